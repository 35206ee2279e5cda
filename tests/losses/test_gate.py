"""A gate over several teachers: its choice, its balance, and the loss, against plain formulas and the authors' code."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.autograd import gradcheck
from torch.nn import functional as F

import kdcache
from kdcache.errors import UsageError
from kdcache.losses import Loss, distillation_loss
from kdcache.losses.batch import BatchTotals
from kdcache.losses.gate import Gate, GateOptions, chosen_logits, imbalance

B, K, C, T = 7, 3, 5, 4.0


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def loss_of(**gate: Any) -> Loss:
    return Loss.model_validate({"name": "kd", "ce_weight": 0.5, "kd_weight": 1.0, "gate": gate})


def published(v: Tensor, u: Tensor, chances: Tensor, labels: Tensor, top: int, balance: float) -> Tensor:
    """MST-Distill's stage 3, written as its code is (main-MST-Distill.py, KD_methods/MST.py at 093b2fe)."""
    indices = torch.topk(chances, k=top, dim=1)[1]
    selected = torch.gather(u, dim=1, index=indices.unsqueeze(-1).expand(-1, -1, u.size(2)))
    distilled = torch.zeros((), dtype=v.dtype)
    for i in range(top):
        student, teacher = F.log_softmax(v / T, dim=1), F.softmax(selected[:, i] / T, dim=1)
        distilled = distilled + F.kl_div(student, teacher, reduction="batchmean") * (T * T)
    mean = chances.mean(dim=0)
    uniform = torch.ones_like(mean) / mean.size(0)
    of_balance = nn.KLDivLoss(reduction="batchmean")(torch.log(mean), uniform)
    total: Tensor = 0.5 * F.cross_entropy(v, labels) + distilled / top + balance * of_balance
    return total


@pytest.mark.parametrize("top", [1, 2, 3])
def test_the_loss_is_the_published_one(top: int) -> None:
    """But for its balance, which the published code divides by the number of teachers."""
    v, u, labels = drawn(B, C), drawn(B, K, C, seed=1), torch.arange(B) % C
    gate = Gate(C, K).double()
    ours = v.clone().requires_grad_()
    found = distillation_loss(ours, u, labels, loss_of(top=top, balance=0.7 / K), chances=gate(ours)).total
    theirs = v.clone().requires_grad_()
    expected = published(theirs, u, gate(theirs), labels, top, 0.7)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)
    gradients = (
        torch.autograd.grad(total, [of, *gate.parameters()]) for total, of in ((found, ours), (expected, theirs))
    )
    for here, there in zip(*gradients, strict=True):
        torch.testing.assert_close(here, there, rtol=0, atol=1e-12)


def test_the_mean_of_the_logits_gives_the_gate_a_gradient() -> None:
    v, u, labels = drawn(B, C), drawn(B, K, C, seed=1), torch.arange(B) % C
    logits = drawn(B, K, seed=2).requires_grad_()

    def total(logits: Tensor, choose: str) -> Tensor:
        options = loss_of(choose=choose, balance=0.0)
        return distillation_loss(v, u, labels, options, chances=logits.softmax(dim=1)).total

    mixed = (logits.softmax(dim=1)[:, :, None] * u).sum(dim=1)
    expected = T**2 * F.kl_div((v / T).log_softmax(1), (mixed / T).softmax(1), reduction="batchmean")
    found = total(logits, "mean")
    torch.testing.assert_close(found, expected + 0.5 * F.cross_entropy(v, labels), rtol=0, atol=1e-12)
    assert torch.autograd.grad(found, logits)[0].abs().max() > 1e-3
    assert not torch.autograd.grad(total(logits, "top"), logits)[0].any(), "a choice has no gradient"
    assert gradcheck(lambda logits: total(logits, "mean"), logits)


@given(st.integers(1, 6), st.integers(2, 5), st.integers(0, 1000))
def test_the_balance_is_the_divergence_from_equal_use(rows: int, teachers: int, seed: int) -> None:
    chances = drawn(rows, teachers, seed=seed).softmax(dim=1)
    mean = chances.mean(dim=0)
    expected = sum(1 / teachers * math.log(1 / teachers / float(g)) for g in mean)
    assert float(imbalance(chances)) == pytest.approx(expected, abs=1e-12)
    assert float(imbalance(torch.full((rows, teachers), 1 / teachers))) == pytest.approx(0, abs=1e-6)


def test_the_parts_of_a_batch_add_up() -> None:
    v, u, labels, chances = drawn(8, C), drawn(8, K, C, seed=1), torch.arange(8) % C, drawn(8, K, seed=2).softmax(dim=1)
    loss = loss_of(top=2, balance=0.3)
    whole = distillation_loss(v, u, labels, loss, chances=chances).total
    # As two processes see it: each knows the sums over both.
    totals = BatchTotals(8, 8, 8, lambda rows: rows.sum(dim=0) + 0 * rows.sum())
    parts = []
    for part in (slice(0, 4), slice(4, 8)):

        def of_both(rows: Tensor, here: slice = part) -> Tensor:
            other = slice(4, 8) if here.start == 0 else slice(0, 4)
            beside = chances[other] if rows.ndim == 2 else torch.ones(4, dtype=torch.float64)
            return rows.sum(dim=0) + beside.sum(dim=0)

        given_totals = totals._replace(sum=of_both)
        parts.append(
            distillation_loss(v[part], u[part], labels[part], loss, whole=given_totals, chances=chances[part]).total
        )
    torch.testing.assert_close(torch.stack(parts).sum(), whole, rtol=0, atol=1e-12)


def test_the_most_probable_teachers_are_chosen() -> None:
    u = torch.arange(2 * 3 * 2.0).reshape(2, 3, 2)
    chances = torch.tensor([[0.2, 0.5, 0.3], [0.6, 0.1, 0.3]])
    first, second = chosen_logits(u, chances, GateOptions(top=2))
    assert first.tolist() == [u[0, 1].tolist(), u[1, 0].tolist()]
    assert second.tolist() == [u[0, 2].tolist(), u[1, 2].tolist()]


@pytest.mark.parametrize(
    ("loss", "words"),
    [
        ({"name": "ce", "gate": {}}, "kd weights are 0, so a gate or a controller would have no effect"),
        ({"name": "kd", "gate": {"top": 0}}, "greater than or equal to 1"),
        ({"name": "kd", "gate": {"choose": "best"}}, "'top' or 'mean'"),
        ({"name": "kd", "gate": {"choose": "mean", "top": 2}}, "top 2 has no effect with choose: mean"),
        ({"name": "kd", "gate": {}, "controller": {"kind": "tgeo"}}, "controller tgeo is for one teacher"),
    ],
)
def test_what_makes_no_sense_is_refused(loss: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        Loss.model_validate(loss)


def test_a_loss_of_your_own_loop_has_no_gate() -> None:
    with pytest.raises(UsageError, match="gate is trained by train-student"):
        kdcache.loss("kd", gate={"top": 1})
    with pytest.raises(ValueError, match=r"\[B, K, C\]"):
        distillation_loss(drawn(B, C), drawn(B, C), torch.zeros(B, dtype=torch.long), loss_of())

"""The chunked head: the loss and the gradients of whole logits, in any chunks, micro-batches and precision."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from helpers.loss_cases import few, loss_of
from helpers.token_targets import drawn, language_logits, targets_of
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import kdcache
from kdcache.errors import UsageError
from kdcache.losses import Loss, LossParts, learned_temperature
from kdcache.losses.batch import BatchTotals
from kdcache.losses.chunked_head import batch_statistics, chunk_size, chunked_loss
from kdcache.losses.lm_head import LMHead
from kdcache.losses.token_loss import token_loss
from kdcache.losses.token_targets import TokenTargets

N, V, D, K = 23, 130, 9, 6
GENERATOR = torch.Generator().manual_seed(0)
HIDDEN = torch.randn(N, D, generator=GENERATOR, dtype=torch.float64)
WEIGHT = torch.randn(V + 7, D, generator=GENERATOR, dtype=torch.float64)
BIAS = torch.randn(V + 7, generator=GENERATOR, dtype=torch.float64)
TEACHER = language_logits(N, V)
LABELS = torch.randint(-1, V, (N,), generator=GENERATOR)
SHAPED, GHOST, DRAWN = targets_of(TEACHER, K, rank=5), targets_of(TEACHER, K), drawn(TEACHER, 20, 4.0)

HEADS: dict[str, dict[str, Any]] = {
    "plain": {},
    "scaled": {"scale": 0.25},
    "capped": {"softcap": 3.0},
    "both": {"scale": 0.5, "softcap": 2.0},
}


def leaves() -> list[Tensor]:
    return [each.clone().requires_grad_() for each in (HIDDEN, WEIGHT, BIAS)]


def gradients(total: Tensor, inputs: list[Tensor]) -> tuple[Tensor, ...]:
    return torch.autograd.grad(3 * total, inputs)


def of_whole_logits(inputs: list[Tensor], targets: TokenTargets, loss: Loss, theta: Any, **head: Any) -> LossParts:
    hidden, weight, bias = inputs[:3]
    z = (hidden @ weight[:V].T + bias[:V]) * head.get("scale", 1.0)
    cap = head.get("softcap")
    logits = z if cap is None else cap * torch.tanh(z / cap)
    return token_loss(logits, LABELS, targets, loss, theta=theta)


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize(
    ("name", "targets"),
    [
        ("kd", GHOST),
        ("kd", SHAPED),
        ("kd", DRAWN),
        ("ce", GHOST),
        ("dtkd+ka", SHAPED),
        ("ctkd", GHOST),
        ("dtd", SHAPED),
        ("cwsm", GHOST),
        ("zscore", SHAPED),
        ("rkl", GHOST),
        ("dkd", SHAPED),
    ],
)
def test_chunks_give_the_loss_and_the_gradients_of_whole_logits(name: str, targets: TokenTargets, head: str) -> None:
    loss = loss_of(name, ce_weight=0.3)
    theta = learned_temperature(loss)
    inputs, others = leaves(), leaves()
    if theta is not None:
        theta.data = theta.data.double()
        inputs.append(theta)
        others.append(theta)
    of_head = LMHead(inputs[1], inputs[2], **HEADS[head])
    found = chunked_loss(inputs[0], of_head, LABELS, targets, loss, theta=theta, chunk=5)
    expected = of_whole_logits(others, targets, loss, theta, **HEADS[head])
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other)
    torch.testing.assert_close(gradients(found.total, inputs), gradients(expected.total, others))


def test_the_gradients_are_those_of_finite_differences() -> None:
    def value(hidden: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return chunked_loss(hidden, LMHead(weight, bias, 0.5, 4.0), LABELS, GHOST, loss_of("kd"), chunk=4).total

    inputs = leaves()
    for index, gradient in enumerate(torch.autograd.grad(value(*inputs), inputs)):
        direction, step = torch.randn_like(gradient), 1e-6
        moved = [[*inputs[:index], inputs[index] + sign * step * direction, *inputs[index + 1 :]] for sign in (1, -1)]
        with torch.no_grad():
            slope = (value(*moved[0]) - value(*moved[1])) / (2 * step)
        torch.testing.assert_close(slope, (gradient * direction).sum(), rtol=1e-6, atol=1e-9)


@few
@given(st.lists(st.integers(1, 8), min_size=1, max_size=6), st.integers(1, 30), st.sampled_from(["kd", "dtd", "cwsm"]))
def test_the_loss_of_a_step_does_not_depend_on_its_micro_batches(sizes: list[int], chunk: int, name: str) -> None:
    loss = loss_of(name)
    inputs, others = leaves(), leaves()
    expected = chunked_loss(others[0], LMHead(others[1], others[2]), LABELS, SHAPED, loss)
    order = torch.randperm(N, generator=torch.Generator().manual_seed(chunk))
    ends = [min(end, N) for end in itertools.accumulate(sizes)]
    parts = [order[start:end] for start, end in itertools.pairwise([0, *ends, N]) if end > start]
    totals = BatchTotals(N, int((LABELS >= 0).sum()), int((LABELS >= 0).sum()))
    head = LMHead(inputs[1], inputs[2])
    each = [batch_statistics(inputs[0][part], head, SHAPED[part], loss, chunk) for part in parts]
    statistics = [torch.stack(values).sum(dim=0) for values in zip(*each, strict=True)]
    found = sum(
        chunked_loss(
            inputs[0][part], head, LABELS[part], SHAPED[part], loss, whole=totals, statistics=statistics, chunk=chunk
        ).total
        for part in parts
    )
    torch.testing.assert_close(found, expected.total)
    assert isinstance(found, Tensor)
    torch.testing.assert_close(gradients(found, inputs), gradients(expected.total, others))


def test_no_gradient_is_computed_where_none_is_asked() -> None:
    loss = loss_of("kd")
    expected = chunked_loss(HIDDEN, LMHead(WEIGHT, BIAS), LABELS, GHOST, loss, chunk=4)
    assert not expected.total.requires_grad
    hidden, weight, bias = leaves()
    with torch.no_grad():
        assert not chunked_loss(hidden, LMHead(weight, bias), LABELS, GHOST, loss, chunk=4).total.requires_grad
    # A frozen head, as of LoRA.
    found = chunked_loss(hidden, LMHead(WEIGHT, BIAS), LABELS, GHOST, loss, chunk=4)
    assert found.total.requires_grad
    assert not found.cross_entropy.requires_grad
    torch.testing.assert_close(found.total, expected.total)
    torch.autograd.backward(found.total)
    assert hidden.grad is not None
    with pytest.raises(RuntimeError, match="differentiated once"):
        torch.autograd.backward(found.total)


def test_no_position_has_a_loss_of_0() -> None:
    hidden = HIDDEN[:0].clone().requires_grad_()
    parts = chunked_loss(hidden, LMHead(WEIGHT), LABELS[:0], GHOST[:0], loss_of("kd"))
    torch.autograd.backward(parts.total)
    assert parts.total == 0
    assert hidden.grad is not None


def test_a_head_in_bfloat16_has_logits_and_sums_in_float32() -> None:
    hidden, weight = HIDDEN.bfloat16().requires_grad_(), WEIGHT.bfloat16().requires_grad_()
    others = [hidden.detach().double().requires_grad_(), weight.detach().double().requires_grad_()]
    loss = loss_of("kd", temperature={"kind": "constant", "tau": 1.0})
    found = chunked_loss(hidden, LMHead(weight), LABELS, SHAPED.to(dtype=torch.float32), loss, chunk=3)
    expected = chunked_loss(others[0], LMHead(others[1]), LABELS, SHAPED, loss)
    assert found.total.dtype == torch.float32
    assert abs(found.total / expected.total - 1) < 0.02
    for one, other in zip(gradients(found.total, [hidden, weight]), gradients(expected.total, others), strict=True):
        assert one.dtype == torch.bfloat16
        assert (one.double() - other).norm() / other.norm() < 0.02


def test_under_autocast_the_gradients_are_near_and_of_the_types_of_the_weights() -> None:
    hidden, weight = HIDDEN.float().requires_grad_(), WEIGHT.float().requires_grad_()
    targets = GHOST.to(dtype=torch.float32)
    expected = gradients(chunked_loss(hidden, LMHead(weight), LABELS, targets, loss_of("kd")).total, [hidden, weight])
    for states in (hidden, hidden.detach().bfloat16().requires_grad_()):
        with torch.autocast("cpu", torch.bfloat16):
            total = chunked_loss(states, LMHead(weight), LABELS, targets, loss_of("kd"), chunk=7).total
        assert total.dtype == torch.float32
        inputs = [states, weight]
        for value, one, other in zip(inputs, gradients(total, inputs), expected, strict=True):
            assert one.dtype == value.dtype
            assert (one.float() - other).norm() / other.norm() < 0.02


def test_a_chunk_has_at_most_as_many_logits_as_are_allowed() -> None:
    assert chunk_size(151_936) == 441
    assert chunk_size(2**27) == 1


def test_the_module_checks_its_arguments_and_has_the_loss_of_the_chunks() -> None:
    module = kdcache.loss("cwsm")
    head = LMHead(WEIGHT, BIAS)
    sums = module.statistics_of_tokens(HIDDEN, head, SHAPED)
    parts = module.of_tokens(HIDDEN, head, LABELS, SHAPED, epoch=1, count=N, statistics=sums)
    expected = chunked_loss(HIDDEN, head, LABELS, SHAPED, module.options)
    torch.testing.assert_close(parts.distillation, expected.distillation)
    assert kdcache.loss("kd").statistics_of_tokens(HIDDEN, head, SHAPED) == []
    for arguments, reason in (
        ((HIDDEN[None], head, LABELS, SHAPED), r"hidden states are \[1, 23, 9\]"),
        ((HIDDEN, head, LABELS[:3], SHAPED), r"labels torch.int64 \[3\]"),
        (
            (HIDDEN, LMHead(WEIGHT[:, :4]), LABELS, SHAPED),
            r"the head is \[137, 4\], and the hidden .* width of 9",
        ),
        ((HIDDEN, head, LABELS, SHAPED[:4]), "there are 4 targets and 23 hidden states"),
        ((HIDDEN, LMHead(WEIGHT[:90]), LABELS, SHAPED), "the student has 90 tokens, the teacher 130"),
    ):
        with pytest.raises(UsageError, match=reason):
            module.of_tokens(*arguments)
    with pytest.raises(UsageError, match="count epochs from 1"):
        module.of_tokens(HIDDEN, head, LABELS, SHAPED, epoch=0)
    with pytest.raises(UsageError, match="plackett_luce is refused for tokens"):
        kdcache.loss("pld").of_tokens(HIDDEN, head, LABELS, SHAPED)
    with pytest.raises(UsageError, match="tail is 'student', and logits have their tail"):
        kdcache.loss("kd", tail="student")(TEACHER, TEACHER, LABELS)

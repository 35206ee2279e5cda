"""Each divergence, truncation and standardization against another way to compute it, and what holds for all."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from helpers.loss_cases import (
    REFERENCES,
    TAU,
    Batch,
    Reference,
    assert_agree,
    assert_all_agree,
    batches,
    few,
    loss_of,
    published,
    unlabeled,
    with_gradient,
)
from helpers.processes import PATIENCE
from hypothesis import assume, given
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from kdcache.losses import Loss, distillation_term
from kdcache.losses.adjustments import truncation
from kdcache.losses.batch import BatchSum, BatchTotals, of_these
from kdcache.losses.correlation import cosine, dist
from kdcache.losses.divergences import dkd, jensen_shannon, kl, mse, ofa, plackett_luce, reverse_kl
from kdcache.losses.normalizations import z_score
from kdcache.losses.registry import DIVERGENCES

ORDERED = ["plackett_luce", "ofa"]
"""Above 0 even between equals."""
ZERO_BETWEEN_EQUALS = [name for name in DIVERGENCES if name not in ORDERED]


@pytest.fixture(params=REFERENCES)
def reference(request: pytest.FixtureRequest) -> Reference:
    return published(request.param)


def of_teacher(divergence: dict[str, Any], tau: float, **given: Any) -> Loss:
    """The divergence alone, weighed by tau^2."""
    constant = {"kind": "constant", "tau": tau}
    return loss_of(ce_weight=0, kd_weight=1, divergence=divergence, temperature=constant, **given)


def assert_published(reference: Reference, name: str, loss: Loss, scale: float = 1.0) -> None:
    teacher, labels = reference["teacher"], reference["labels"]
    result = with_gradient(lambda v: scale * distillation_term(v, teacher, labels, loss), reference["student"])
    assert_all_agree(result, (reference[f"{name}_loss"], reference[f"{name}_grad"]))


# Published values, and other ways to compute


def test_dkd_is_the_published_one(reference: Reference) -> None:
    tau, alpha, beta, _, _ = reference["params"].tolist()
    assert_published(reference, "dkd", of_teacher({"kind": "dkd", "alpha": alpha, "beta": beta}, tau))


def test_dist_is_the_published_one(reference: Reference) -> None:
    assert_published(reference, "dist", of_teacher({"kind": "dist"}, reference["params"][0].item()))


def test_ofa_is_the_published_one(reference: Reference) -> None:
    assert_published(reference, "ofa", of_teacher({"kind": "ofa"}, 1.0))


def test_logit_standardization_is_the_published_one(reference: Reference) -> None:
    # The published figure is without the T^2 of the sum.
    loss = of_teacher({"kind": "kl"}, 2.0, normalization="z_score")
    assert_published(reference, "logit_standardization_T2", loss, scale=1 / 4)


@few
@given(batch=batches())
def test_kl_is_dkd_with_the_teachers_own_weight_for_the_others(batch: Batch) -> None:
    student, teacher, labels = batch
    known = labels >= 0
    rest = 1 - teacher.softmax(dim=1).gather(1, labels.clamp_min(0).unsqueeze(1)).squeeze(1)
    target, others = (dkd(student, teacher, labels, alpha, 1 - alpha) for alpha in (1.0, 0.0))
    assert_agree((target + rest * others)[known], kl(student, teacher, labels)[known])
    assert (target[~known] == 0).all()
    assert (others[~known] == 0).all()


@few
@given(batch=batches())
def test_reverse_kl_and_jensen_shannon_are_those_of_the_probabilities(batch: Batch) -> None:
    student, teacher, labels = batch
    q, p = student.softmax(dim=1), teacher.softmax(dim=1)
    m = (p + q) / 2

    def divergence(a: Tensor, b: Tensor) -> Tensor:
        return torch.where(a > 0, a * (a.log() - b.log()), 0.0).sum(dim=1)

    assert_agree(reverse_kl(student, teacher, labels), divergence(q, p))
    assert_agree(jensen_shannon(student, teacher, labels), (divergence(p, m) + divergence(q, m)) / 2)


def test_dist_is_numpys_correlation(reference: Reference) -> None:
    student, teacher, labels = reference["student"], reference["teacher"], reference["labels"]
    q, p = student.softmax(dim=1).numpy(), teacher.softmax(dim=1).numpy()
    rows = [1 - np.corrcoef(a, b)[0, 1] for a, b in zip(q, p, strict=True)]
    columns = np.mean([1 - np.corrcoef(a, b)[0, 1] for a, b in zip(q.T, p.T, strict=True)])
    expected = torch.tensor([2 * row + 3 * columns for row in rows])
    assert_agree(dist(student, teacher, labels, beta=2, gamma=3), expected)


@few
@given(batch=batches())
def test_cosine_is_that_of_the_probabilities(batch: Batch) -> None:
    student, teacher, labels = batch
    expected = 1 - F.cosine_similarity(student.softmax(dim=1), teacher.softmax(dim=1), eps=0)
    assert_agree(cosine(student, teacher, labels), expected)


@few
@given(batch=batches())
def test_plackett_luce_draws_the_label_first_and_then_in_the_teachers_order(batch: Batch) -> None:
    student, teacher, labels = batch
    expected = []
    for v, u, label in zip(student, teacher, labels.tolist(), strict=True):
        left = sorted(range(len(u)), key=lambda c: (c != label, -u[c].item()))
        value = torch.zeros((), dtype=torch.float64)
        while left:
            value += u.softmax(dim=0)[left[0]] * (v[left].logsumexp(dim=0) - v[left[0]])
            left.pop(0)
        expected.append(value)
    assert_agree(plackett_luce(student, teacher, labels), torch.stack(expected))


def test_plackett_luce_of_a_certain_teacher_is_cross_entropy() -> None:
    student = torch.tensor([[1.0, -2.0, 0.5], [0.0, 3.0, 1.0]], dtype=torch.float64)
    labels = torch.tensor([2, 0])
    teacher = 1e3 * F.one_hot(labels, 3).double()
    assert_agree(plackett_luce(student, teacher, labels), F.cross_entropy(student, labels, reduction="none"))


@few
@given(batch=batches(), eps=st.floats(1, 3))
def test_ofa_without_a_label_or_a_power_is_cross_entropy_with_the_teacher(batch: Batch, eps: float) -> None:
    student, teacher, labels = batch
    log_q, p = student.log_softmax(dim=1), teacher.softmax(dim=1)
    assert_agree(ofa(student, teacher, labels, eps=1), -(p * log_q).sum(dim=1), 1e-8)
    assert_agree(ofa(student, teacher, unlabeled(student), eps), -(p**eps * log_q).sum(dim=1))


def test_mse_is_twice_what_kl_tends_to_in_the_heat(reference: Reference) -> None:
    student, teacher, labels = (reference[name] for name in ("student", "teacher", "labels"))
    student, teacher = (z - z.mean(dim=1, keepdim=True) for z in (student, teacher))
    assert_agree(mse(student, teacher, labels).mean(), F.mse_loss(student, teacher))
    hot = 1e5
    assert_agree(2 * hot**2 * kl(student / hot, teacher / hot, labels), mse(student, teacher, labels), 1e-3)


def test_mse_does_not_see_a_temperature_that_both_share(reference: Reference) -> None:
    student, teacher, labels = (reference[name] for name in ("student", "teacher", "labels"))
    for tau in (0.5, 8.0):
        assert_agree(tau**2 * mse(student / tau, teacher / tau, labels), mse(student, teacher, labels))


# What holds for all


@pytest.mark.parametrize("name", ZERO_BETWEEN_EQUALS)
@few
@given(batch=batches(), tau=TAU)
def test_equals_have_nothing_to_learn_at_any_temperature(name: str, batch: Batch, tau: float) -> None:
    _, logits, labels = batch
    result = with_gradient(lambda v: DIVERGENCES[name].compute(v / tau, logits / tau, labels).sum(), logits)
    assert result[0] == 0 if name != "jensen_shannon" else abs(result[0]) < 1e-14
    assert_agree(result[1], torch.zeros_like(logits), 1e-12 / min(tau, 1))


@pytest.mark.parametrize("name", DIVERGENCES)
@few
@given(batch=batches(), seed=st.integers(0, 2**63 - 1))
def test_neither_the_order_of_classes_nor_of_samples_matters(name: str, batch: Batch, seed: int) -> None:
    student, teacher, labels = batch
    generator = torch.Generator().manual_seed(seed)
    rows, classes = (torch.randperm(size, generator=generator) for size in student.shape)
    relabeled = torch.where(labels >= 0, classes.argsort()[labels.clamp_min(0)], -1)
    value = DIVERGENCES[name].compute(student, teacher, labels)
    permuted = DIVERGENCES[name].compute(student[rows][:, classes], teacher[rows][:, classes], relabeled[rows])
    assert_agree(permuted, value[rows])
    assert (value >= -1e-14).all()


@pytest.mark.parametrize("name", DIVERGENCES)
@few
@given(batch=batches(), shifts=st.tuples(st.floats(-50, 50), st.floats(-50, 50)))
def test_only_mse_sees_a_shift_of_the_logits(name: str, batch: Batch, shifts: tuple[float, float]) -> None:
    student, teacher, labels = batch
    value = DIVERGENCES[name].compute(student, teacher, labels)
    shifted = DIVERGENCES[name].compute(student + shifts[0], teacher + shifts[1], labels)
    if name == "mse":
        apart = shifts[0] - shifts[1]
        assert_agree(shifted, value + 2 * apart * (student - teacher).mean(dim=1) + apart**2, 1e-8)
    else:
        assert_agree(shifted, value, 1e-7)


@pytest.mark.parametrize("name", DIVERGENCES)
def test_gradients_are_those_of_the_values(name: str) -> None:
    generator = torch.Generator().manual_seed(3)
    student, teacher = (2 * torch.randn(4, 5, generator=generator, dtype=torch.float64) for _ in range(2))
    labels = torch.tensor([2, -1, 0, 4])
    student.requires_grad_()
    teacher.requires_grad_()  # DTKD's temperatures carry a gradient to the teacher's side too
    assert torch.autograd.gradcheck(lambda v, u: DIVERGENCES[name].compute(v, u, labels), (student, teacher))


EXTREMES = {
    "opposite": ([1e4, -1e4, 0.0], [-1e4, 1e4, 0.0]),
    "sure of another": ([0.0, 1e4, -1e4], [1e4, 0.0, 0.0]),
    "flat student": ([0.0, 0.0, 0.0], [1e4, -1e4, 0.0]),
    "flat teacher": ([-1e4, 1e4, 0.0], [5.0, 5.0, 5.0]),
    "flat": ([7.0, 7.0, 7.0], [0.0, 0.0, 0.0]),
    "far": ([-1e4, -1e4, -1.0001e4], [1e4, 1e4, 1e4]),
}


@pytest.mark.parametrize("normalization", ["none", "z_score"])
@pytest.mark.parametrize("name", DIVERGENCES)
def test_extreme_logits_give_finite_losses(name: str, normalization: str) -> None:
    loss = of_teacher({"kind": name}, 1.0, normalization=normalization)
    pairs = [(v, u, label) for (v, u), label in itertools.product(EXTREMES.values(), (-1, 0, 1, 2))]
    for batch in [pairs, *([pair] for pair in pairs[::3])]:  # a batch of one has columns that do not vary
        students, teachers, labels = (torch.tensor(part) for part in zip(*batch, strict=True))
        value, gradient = with_gradient(
            partial(distillation_term, teacher_logits=teachers, labels=labels, loss=loss), students
        )
        assert value.isfinite(), batch
        assert gradient.isfinite().all(), batch


# Labels that are not known


def test_dkd_is_the_mean_over_labeled_samples(reference: Reference) -> None:
    student, teacher, labels = reference["student"], reference["teacher"], reference["labels"].clone()
    labels[::3] = -1
    loss = of_teacher({"kind": "dkd"}, 4.0)
    result = with_gradient(lambda v: distillation_term(v, teacher, labels, loss), student)
    known = labels >= 0
    value, gradient = with_gradient(lambda v: distillation_term(v, teacher[known], labels[known], loss), student[known])
    assert_agree(result[0], value)
    assert_agree(result[1][known], gradient)
    assert (result[1][~known] == 0).all()
    nothing = with_gradient(lambda v: distillation_term(v, teacher, unlabeled(v), loss), student)
    assert_all_agree(nothing, (torch.zeros_like(value), torch.zeros_like(student)))


# Truncation


@few
@given(batch=batches(), top=st.integers(1, 40), tau=TAU)
def test_truncation_shares_all_mass_among_the_top(batch: Batch, top: int, tau: float) -> None:
    student, teacher, labels = batch
    if top >= teacher.shape[1]:
        with pytest.raises(ValueError, match=f"top {top} leaves all {teacher.shape[1]} classes"):
            truncation(teacher, labels, top)
        return
    before = teacher.clone()
    truncated = truncation(teacher / tau, labels, top).softmax(dim=1)
    assert torch.equal(teacher, before)
    kept = torch.zeros_like(teacher, dtype=torch.bool).scatter(1, teacher.topk(top, dim=1).indices, True)
    p = torch.where(kept, (teacher / tau).softmax(dim=1), 0.0)
    p = p / p.sum(dim=1, keepdim=True)
    assert_agree(truncated, p, 1e-12)
    assert (truncated[~kept] == 0).all()
    loss = of_teacher({"kind": "kl"}, tau, adjustment={"kind": "truncation", "top": top})
    target = torch.where(kept & (p > 0), p * (p.log() - (student / tau).log_softmax(dim=1)), 0.0)
    expected = tau**2 * target.sum(dim=1).mean()
    torch.testing.assert_close(distillation_term(student, teacher, labels, loss), expected, rtol=1e-8, atol=1e-8)


# Standardization


@few
@given(batch=batches(), scale=st.floats(0.1, 10), shift=st.floats(-10, 10))
def test_standardized_logits_have_forgotten_scale_and_shift(batch: Batch, scale: float, shift: float) -> None:
    # The 1e-7 that the published code adds to the deviation is a visible part of smaller ones.
    logits = batch[0][batch[0].std(dim=1) * min(scale, 1) > 1e-3]
    assume(len(logits) > 0)
    standard = z_score(logits)
    assert_agree(z_score(scale * logits + shift), standard, 1e-3)
    assert_agree(standard.mean(dim=1), torch.zeros(len(logits), dtype=torch.float64), 1e-7)
    assert_agree(standard.std(dim=1), torch.ones(len(logits), dtype=torch.float64), 1e-3)


def test_standardization_stands_in_front_of_all_else(reference: Reference) -> None:
    student, teacher, labels = (reference[name] for name in ("student", "teacher", "labels"))
    for name in ("dtkd", "dtd+ka", "cwsm+dist"):
        standardized = distillation_term(student, teacher, labels, loss_of(name, normalization="z_score"))
        assert_agree(standardized, distillation_term(z_score(student), z_score(teacher), labels, loss_of(name)))


# Statistics of a batch that is in several places


def in_parts(function: Callable[[slice, BatchSum], Tensor], cuts: list[slice]) -> list[Tensor]:
    """`function` of each part in a thread of its own, with a sum over all parts that carries the gradient to them."""
    everyone = threading.Barrier(len(cuts), timeout=PATIENCE)
    sums: list[Tensor] = [torch.empty(0)] * len(cuts)
    values: list[Tensor] = [torch.empty(0)] * len(cuts)

    def part(rank: int) -> None:
        def batch_sum(rows: Tensor) -> Tensor:
            sums[rank] = rows.sum(dim=0)
            everyone.wait()
            total = torch.stack(sums).sum(dim=0)
            everyone.wait()
            return total

        values[rank] = function(cuts[rank], batch_sum)

    threads = [threading.Thread(target=part, args=(rank,)) for rank in range(len(cuts))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return values


@pytest.mark.parametrize("name", ["dist", "dtd", "cwsm", "dtd+dist"])
def test_a_batch_in_parts_gives_the_loss_of_the_whole(reference: Reference, name: str) -> None:
    student, teacher, labels = (reference[name] for name in ("student", "teacher", "labels"))
    loss = loss_of(name, temperature={"tau": 2.0})

    def in_four(v: Tensor, elsewhere: bool = True) -> Tensor:
        def one(part: slice, batch_sum: BatchSum) -> Tensor:
            total = batch_sum if elsewhere else of_these
            whole = BatchTotals(16, int((labels >= 0).sum()), 16, total)
            return distillation_term(v[part], teacher[part], labels[part], loss, whole=whole)

        return torch.stack(in_parts(one, [slice(0, 3), slice(3, 4), slice(4, 11), slice(11, 16)])).sum()

    whole = with_gradient(lambda v: distillation_term(v, teacher, labels, loss), student)
    assert_all_agree(with_gradient(in_four, student), whole)
    assert not torch.allclose(in_four(student, elsewhere=False), whole[0], rtol=1e-4), "the parts alone would do"

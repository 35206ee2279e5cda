"""Brier, R2KD, CSKD with its temperature, comparative distillation and noisy teachers, against NumPy."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from helpers.loss_cases import (
    REFERENCES,
    Batch,
    Reference,
    assert_agree,
    assert_all_agree,
    batches,
    few,
    loss_of,
    published,
    with_gradient,
)
from helpers.processes import PATIENCE
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from kdcache.losses import best_alpha, distillation_loss, distillation_term
from kdcache.losses.adjustments import noise
from kdcache.losses.batch import BatchTotals
from kdcache.losses.brier import brier
from kdcache.losses.comparative import comparative
from kdcache.losses.correlation import dist
from kdcache.losses.cswt import cswt

Array = npt.NDArray[np.float64]


@pytest.fixture(params=REFERENCES)
def reference(request: pytest.FixtureRequest) -> Reference:
    return published(request.param)


def softmax(logits: Array, temperature: float | Array = 1.0) -> Array:
    scaled = logits / temperature
    scaled = np.exp(scaled - scaled.max(axis=1, keepdims=True))
    shares: Array = scaled / scaled.sum(axis=1, keepdims=True)
    return shares


def arrays(reference: Reference) -> tuple[Array, Array, npt.NDArray[np.int64]]:
    return tuple(reference[name].numpy() for name in ("student", "teacher", "labels"))  # type: ignore[return-value]


def cosines(a: Array, b: Array) -> Array:
    """Of the rows."""
    found: Array = (a * b).sum(axis=1) / np.linalg.norm(a, axis=1) / np.linalg.norm(b, axis=1)
    return found


def numerical_gradient(function: Callable[[Array], float], at: Array, entries: list[tuple[int, int]]) -> list[float]:
    found = []
    for i, j in entries:
        step = np.zeros_like(at)
        step[i, j] = 1e-5
        found.append((function(at + step) - function(at - step)) / 2e-5)
    return found


def check(loss_name: str, reference: Reference, expected: Callable[[Array], float], **given: Any) -> None:
    """Value and gradient of a term against a NumPy formula of the student's logits."""
    teacher, labels = reference["teacher"], reference["labels"]
    loss = loss_of(loss_name, **given)
    value, gradient = with_gradient(lambda v: distillation_term(v, teacher, labels, loss), reference["student"])
    student = reference["student"].numpy()
    assert value.item() == pytest.approx(expected(student), rel=1e-9, abs=1e-9)
    entries = [(0, 0), (3, 7), (15, 9)]
    slopes = numerical_gradient(expected, student, entries)
    assert [gradient[entry].item() for entry in entries] == pytest.approx(slopes, rel=1e-5, abs=1e-8)


# Brier


@pytest.mark.parametrize("alpha", [0.0, 0.3])
def test_brier_is_the_mean_squared_difference_of_the_source(reference: Reference, alpha: float) -> None:
    _, u, y = arrays(reference)
    onehot = np.eye(u.shape[1])[y]

    def expected(v: Array) -> float:
        q, p = softmax(v), softmax(u)
        return float(alpha * np.mean((q - onehot) ** 2) + (1 - alpha) * np.mean((q - p) ** 2))

    check("brier", reference, expected, divergence={"alpha": alpha})


def test_brier_without_a_label_has_the_teachers_term_alone() -> None:
    student, teacher = torch.randn(3, 5, dtype=torch.float64), torch.randn(3, 5, dtype=torch.float64)
    known = brier(student, teacher, torch.tensor([0, 1, 2]), alpha=0.25)
    some = brier(student, teacher, torch.tensor([0, -1, 2]), alpha=0.25)
    assert_agree(some[[0, 2]], known[[0, 2]])
    assert_agree(some[1], 0.75 * brier(student, teacher, torch.zeros(3))[1])


def test_brier_acts_on_labels_only_if_they_have_a_weight() -> None:
    assert loss_of("brier").acts_on_label is None
    assert loss_of("brier", divergence={"alpha": 0.1}).acts_on_label == "the divergence brier"


@few
@given(batch=batches(), seed=st.integers(0, 2**63 - 1))
def test_no_weight_of_a_grid_fits_the_labels_better_than_the_best_alpha(batch: Batch, seed: int) -> None:
    at_0, at_1, _ = batch
    labels = torch.randint(-1, at_0.shape[1], at_0.shape[:1], generator=torch.Generator().manual_seed(seed))
    labels[0] = 0
    alpha = best_alpha(at_0, at_1, labels)
    known = labels >= 0
    g, f = (logits[known].softmax(dim=1) for logits in (at_0, at_1))
    y = torch.nn.functional.one_hot(labels[known], g.shape[1])

    def error(weight: float) -> float:
        return float((y - weight * f - (1 - weight) * g).square().sum())

    assert 0 <= alpha <= 1
    assert all(error(alpha) <= error(weight) + 1e-12 for weight in np.linspace(0, 1, 21))


def test_the_best_alpha_of_a_mixture_is_its_weight_and_of_twins_there_is_none() -> None:
    at_0, at_1 = torch.tensor([[2.0, 0.0, 1.0]]), torch.tensor([[0.0, 3.0, 0.0]])
    assert best_alpha(at_0, 40 * torch.eye(3)[:1], torch.tensor([0])) == pytest.approx(1)
    assert best_alpha(40 * torch.eye(3)[:1], at_1, torch.tensor([0])) == pytest.approx(0, abs=1e-6)
    for logits, labels in ((at_0, torch.tensor([0])), (at_1, torch.tensor([-1]))):
        with pytest.raises(ValueError, match="alpha is not determined"):
            best_alpha(at_0, logits, labels)


# R2KD and CSKD


def test_r2kd_is_the_published_value_term(reference: Reference) -> None:
    _, u, _ = arrays(reference)

    def expected(v: Array) -> float:
        q, p = softmax(v, 4.0), softmax(u, 4.0)
        return float(2 * 16 * (1 - cosines(q, p).mean()) + 2 * 16 * (1 - cosines(q.T, p.T).mean()))

    check("r2kd", reference, expected)


def test_dist_is_centered_by_default(reference: Reference) -> None:
    student, teacher, labels = (reference[name] for name in ("student", "teacher", "labels"))
    assert torch.equal(dist(student, teacher, labels), dist(student, teacher, labels, center=True))
    assert not torch.allclose(dist(student, teacher, labels), dist(student, teacher, labels, center=False))


def published_temperatures(v: Array, u: Array, low: float = 2.0, high: float = 6.0) -> Array:
    similarity = cosines(softmax(v), softmax(u))
    found: Array = (high - low) / (similarity.min() - similarity.max()) * (similarity - similarity.max()) + low
    return found


@pytest.mark.parametrize(("low", "high"), [(2.0, 6.0), (0.5, 9.0)])
def test_the_temperatures_are_the_published_ones(reference: Reference, low: float, high: float) -> None:
    v, u, _ = arrays(reference)
    expected = torch.from_numpy(published_temperatures(v, u, low, high))
    found = cswt(reference["student"], reference["teacher"], low=low, high=high)
    assert_agree(found.student.squeeze(1), expected)
    assert_agree(found.teacher, found.student)
    assert_agree(found.weight, expected.mean().square().expand(len(v)))


@pytest.mark.parametrize("rows", [0.0, 2.0])
def test_cskd_is_the_published_term_at_both_temperatures(reference: Reference, rows: float) -> None:
    v, u, _ = arrays(reference)
    of_batch = published_temperatures(v, u)[:, None]  # detached: not of the argument below

    def expected(v: Array) -> float:
        total = 0.0
        for temperature, weight in ((of_batch, of_batch.mean() ** 2), (np.full_like(of_batch, 4.0), 16)):
            q, p = softmax(v, temperature), softmax(u, temperature)
            total += weight * (2 * (1 - cosines(q.T, p.T).mean()) + rows * (1 - cosines(q, p).mean()))
        return float(total)

    check("cskd", reference, expected, divergence={"beta": rows})


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_equally_similar_samples_get_the_low_temperature(dtype: torch.dtype) -> None:
    u = 3 * torch.randn(6, 10, generator=torch.Generator().manual_seed(1), dtype=dtype)
    v = 3 * torch.randn(1, 10, generator=torch.Generator().manual_seed(2), dtype=dtype)
    shifts = torch.arange(6, dtype=dtype).unsqueeze(1) / 3  # changes the similarity by rounding alone
    for student, teacher in ((u, u), (v + shifts, (2 * v + u[:1]).expand(6, 10)), (v, u[:1])):
        found = cswt(student, teacher)
        assert (found.student == 2).all()
        assert (found.weight == 4).all()
    loss = loss_of("cskd")
    value, gradient = with_gradient(lambda v: distillation_term(v, u, torch.zeros(6), loss), u)
    assert value == 0
    assert (gradient.abs() < 1e-6).all()


# Comparative distillation


@pytest.mark.parametrize("size", [1, 2, 4, 8, 16])
def test_comparative_is_the_mean_over_the_pairs_of_groups(reference: Reference, size: int) -> None:
    _, u, _ = arrays(reference)

    def expected(v: Array) -> float:
        groups = [slice(start, start + size) for start in range(0, len(u), size)]
        pairs = [
            np.mean(((v[g].mean(axis=0) - v[h].mean(axis=0)) - (u[g].mean(axis=0) - u[h].mean(axis=0))) ** 2)
            for g, h in itertools.permutations(groups, 2)
        ]
        return float(np.mean(pairs)) if pairs else 0.0

    check("comparative", reference, expected, divergence={"group_size": size})


def test_samples_without_whole_groups_are_refused(reference: Reference) -> None:
    student, teacher, labels = (reference[name] for name in ("student", "teacher", "labels"))
    with pytest.raises(ValueError, match="16 samples cannot be divided into groups of 3"):
        comparative(student, teacher, labels, group_size=3)


@pytest.mark.parametrize("size", [1, 2])
def test_comparative_has_the_gradients_of_its_values(size: int) -> None:
    student, teacher = (torch.randn(4, 3, dtype=torch.float64).requires_grad_() for _ in range(2))
    labels = torch.zeros(4)
    assert torch.autograd.gradcheck(lambda v, u: comparative(v, u, labels, group_size=size), (student, teacher))


@pytest.mark.parametrize("options", [{"alpha": 0.4}, {"center": False}])
def test_the_options_have_the_gradients_of_their_values(options: dict[str, Any]) -> None:
    student, teacher = (torch.randn(4, 3, dtype=torch.float64).requires_grad_() for _ in range(2))
    function: Callable[..., Tensor] = brier if "alpha" in options else dist
    labels = torch.tensor([0, -1, 2, 1])
    assert torch.autograd.gradcheck(lambda v, u: function(v, u, labels, **options), (student, teacher))


# A batch in parts


def in_parts(function: Callable[[slice, BatchTotals], Tensor], cuts: list[slice], rows: int) -> Tensor:
    """Sum of `function` of each part, in threads that share the sums and maxima of the batch."""
    everyone = threading.Barrier(len(cuts), timeout=PATIENCE)
    said: list[Tensor] = [torch.empty(0)] * len(cuts)
    values: list[Tensor] = [torch.empty(0)] * len(cuts)

    def part(rank: int) -> None:
        def shared(own: Tensor) -> Tensor:
            said[rank] = own
            everyone.wait()
            total = torch.stack(said)
            everyone.wait()
            return total

        whole = BatchTotals(
            rows, rows, rows, lambda z: shared(z.sum(dim=0)).sum(dim=0), lambda z: shared(z.amax(dim=0)).amax(dim=0)
        )
        values[rank] = function(cuts[rank], whole)

    threads = [threading.Thread(target=part, args=(rank,)) for rank in range(len(cuts))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return torch.stack(values).sum()


@pytest.mark.parametrize(
    ("name", "given"),
    [
        ("cskd", {}),
        ("cswt", {}),
        ("r2kd", {}),
        ("cswt+dist", {}),
        ("comparative", {}),
        ("comparative", {"divergence": {"group_size": 2}}),
    ],
)
def test_a_batch_in_parts_gives_the_loss_of_the_whole(reference: Reference, name: str, given: dict[str, Any]) -> None:
    student, teacher, labels = (reference[name] for name in ("student", "teacher", "labels"))
    loss = loss_of(name, **given)
    assert loss.is_of_the_batch
    cuts = [slice(0, 4), slice(4, 6), slice(6, 10), slice(10, 16)]

    def in_four(v: Tensor) -> Tensor:
        return in_parts(lambda s, whole: distillation_term(v[s], teacher[s], labels[s], loss, whole=whole), cuts, 16)

    whole = with_gradient(lambda v: distillation_term(v, teacher, labels, loss), student)
    assert_all_agree(with_gradient(in_four, student), whole)
    alone = [distillation_term(student[s], teacher[s], labels[s], loss) * (s.stop - s.start) / 16 for s in cuts]
    assert not torch.allclose(torch.stack(alone).sum(), whole[0], rtol=1e-4), "the parts alone would do"


# Noisy teachers


def test_noise_scales_each_logit_of_a_share_of_the_samples() -> None:
    u = torch.randn(20000, 5, generator=torch.Generator().manual_seed(1), dtype=torch.float64) + 3
    before, labels = u.clone(), torch.zeros(20000)
    torch.manual_seed(3)
    noisy = noise(u, labels, sigma=0.2, share=0.3)
    assert torch.equal(u, before)
    changed = (noisy != u).any(dim=1)
    assert abs(changed.double().mean().item() - 0.3) < 0.02
    factors = (noisy / u)[changed] - 1
    assert abs(factors.mean().item()) < 0.01
    assert factors.std().item() == pytest.approx(0.2, rel=0.02)
    assert abs(torch.corrcoef(factors.T)[0, 1].item()) < 0.05, "one factor per sample would be a temperature"
    torch.manual_seed(3)
    assert torch.equal(noise(u, labels, sigma=0.2, share=0.3), noisy)
    assert not torch.equal(noise(u, labels, sigma=0.2, share=0.3), noisy)


def test_a_noisy_teacher_enters_the_loss_as_its_noisy_logits(reference: Reference) -> None:
    student, teacher, labels = (reference[name] for name in ("student", "teacher", "labels"))
    torch.manual_seed(5)
    found = with_gradient(lambda v: distillation_loss(v, teacher, labels, loss_of("noisy")).total, student)
    torch.manual_seed(5)
    noisy = noise(teacher, labels)
    expected = with_gradient(lambda v: distillation_loss(v, noisy, labels, loss_of("kd")).total, student)
    assert_all_agree(found, expected)
    assert loss_of("noisy").needs_level == "the adjustment noise"
    assert loss_of("zscore+noisy").needs_level is None

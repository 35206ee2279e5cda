"""Losses on vectors and scores: against independent implementations in float64, and properties of the formulas."""

from __future__ import annotations

import itertools
import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError
from torch import Tensor
from torch.autograd import gradcheck

from kdcache.losses import Loss
from kdcache.losses.outputs import OUTPUT_LOSSES, OutputLossOptions
from kdcache.losses.scores import concordance, list_kl, margin_mse
from kdcache.losses.vectors import (
    cosine,
    l1,
    leaf,
    mse,
    probabilistic_transfer,
    rkd,
    similarity_preserving,
    smooth_l1,
)


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def huber(x: float) -> float:
    return 0.5 * x * x if abs(x) < 1 else abs(x) - 0.5


def rkd_by_definition(student: Any, teacher: Any, distance_weight: float, angle_weight: float) -> float:
    """Equations 5 to 8 of Park et al., pair by pair and triple by triple, with the weights of RepDistiller."""
    count = len(student)

    def relative(vectors: Any) -> Any:
        distances = np.array([[math.dist(a, b) for b in vectors] for a in vectors])
        return distances / (distances.sum() / (count * (count - 1)))

    def angle(vectors: Any, i: int, j: int, k: int) -> float:
        one, other = vectors[j] - vectors[i], vectors[k] - vectors[i]
        lengths = np.linalg.norm(one) * np.linalg.norm(other)
        return float(one @ other / lengths) if lengths else 0.0

    pairs = [huber(a - b) for a, b in zip(relative(student).flat, relative(teacher).flat, strict=True)]
    everywhere = itertools.product(range(count), repeat=3)
    triples = [huber(angle(student, i, j, k) - angle(teacher, i, j, k)) for i, j, k in everywhere]
    return float(distance_weight * np.mean(pairs) + angle_weight * np.mean(triples))


@pytest.mark.parametrize("weights", [(25.0, 50.0), (1.0, 0.0), (0.0, 2.0)])
def test_rkd_is_its_definition(weights: tuple[float, float]) -> None:
    student, teacher = drawn(6, 4), drawn(6, 3, seed=1)
    expected = rkd_by_definition(student.numpy(), teacher.numpy(), *weights)
    assert rkd(student, teacher, *weights).tolist() == pytest.approx([expected] * 6, rel=1e-9)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("side", ["student", "teacher"])
def test_rkd_counts_equal_vectors_in_the_mean_distance(side: str, dtype: torch.dtype) -> None:
    """As in the authors' code, where they are 1e-6 apart; several samples of which a ReLU cuts off all are equal."""
    student, teacher = drawn(12, 5), drawn(12, 7, seed=1)
    {"student": student, "teacher": teacher}[side][:4] = 0
    expected = rkd_by_definition(student.numpy(), teacher.numpy(), 1.0, 0.0)
    found = rkd(student.to(dtype), teacher.to(dtype), 1.0, 0.0)
    assert found.tolist() == pytest.approx([expected] * 12, rel=1e-9 if dtype == torch.float64 else 1e-3)


def test_sp_is_its_definition() -> None:
    student, teacher = drawn(7, 4).numpy(), drawn(7, 3, seed=1).numpy()
    grams = [vectors @ vectors.T for vectors in (student, teacher)]
    rows = [np.array([row / np.linalg.norm(row) for row in gram]) for gram in grams]
    expected = np.linalg.norm(rows[0] - rows[1]) ** 2 / 7**2
    found = similarity_preserving(torch.from_numpy(student), torch.from_numpy(teacher))
    assert found.tolist() == pytest.approx([expected] * 7, rel=1e-9)


def test_pkt_is_its_definition() -> None:
    """As in passalis/probabilistic_kt, nn/pkt.py, element by element."""
    student, teacher = drawn(5, 4).numpy(), drawn(5, 3, seed=1).numpy()

    def choices(vectors: Any) -> Any:
        cosines = [[a @ b / (np.linalg.norm(a) + 1e-7) / (np.linalg.norm(b) + 1e-7) for b in vectors] for a in vectors]
        similar = (np.array(cosines) + 1) / 2
        return similar / similar.sum(axis=1, keepdims=True)

    q, p = choices(student), choices(teacher)
    expected = np.mean(p * np.log((p + 1e-7) / (q + 1e-7)))
    found = probabilistic_transfer(torch.from_numpy(student), torch.from_numpy(teacher))
    assert found.tolist() == pytest.approx([expected] * 5, rel=1e-9)


def test_losses_of_single_vectors_are_their_definitions() -> None:
    student, teacher = drawn(6, 4) * 2, drawn(6, 4, seed=1)
    apart = (student - teacher).numpy()
    lengths = student.norm(dim=1) * teacher.norm(dim=1)
    expected: dict[Any, Any] = {
        mse: (apart**2).mean(axis=1),
        l1: np.abs(apart).mean(axis=1),
        smooth_l1: [np.mean([huber(x) for x in row]) for row in apart],
        leaf: (apart**2).sum(axis=1),
        cosine: 1 - (student * teacher).sum(dim=1) / lengths,
    }
    for function, values in expected.items():
        assert function(student, teacher).tolist() == pytest.approx([float(value) for value in values], rel=1e-9)
    unit = student / student.norm(dim=1, keepdim=True)
    torch.testing.assert_close(leaf(student, teacher, normalize=True), (unit - teacher).square().sum(dim=1))


def test_scores_are_compared_by_margin_list_and_concordance() -> None:
    student, teacher = drawn(6, 2) * 3, drawn(6, 2, seed=1) * 3
    margins = [values[:, 0] - values[:, 1] for values in (student, teacher)]
    assert margin_mse(student, teacher).tolist() == pytest.approx(((margins[0] - margins[1]) ** 2).tolist(), rel=1e-12)
    s, t = drawn(5, 7), drawn(5, 7, seed=1)
    for tau in (1.0, 3.0):
        p, q = (t / tau).softmax(dim=1), (s / tau).softmax(dim=1)
        expected = tau**2 * (p * (p / q).log()).sum(dim=1)
        assert list_kl(s, t, tau).tolist() == pytest.approx(expected.tolist(), rel=1e-9)
    assert list_kl(t, t).abs().max() < 1e-15, "a public implementation gives -1.8"
    for column in range(7):
        a, b = s[:, column].numpy(), t[:, column].numpy()
        lin = 2 * np.cov(a, b, bias=True)[0, 1] / (a.var() + b.var() + (a.mean() - b.mean()) ** 2)
        assert concordance(s[:, [column]], t[:, [column]]).tolist() == pytest.approx([1 - lin] * 5, rel=1e-9)


def test_concordance_of_constants_is_defined() -> None:
    two, three = torch.full((4, 1), 2.0, requires_grad=True), torch.full((4, 1), 3.0)
    assert concordance(two, two.detach()).tolist() == [0.0] * 4
    assert concordance(two, three).tolist() == [1.0] * 4
    (gradient,) = torch.autograd.grad(concordance(two, two.detach()).sum(), two)
    assert gradient.isfinite().all()


OPTIONS: dict[str, dict[str, Any]] = {
    "rkd": {"distance_weight": 1.0, "angle_weight": 2.0},
    "smooth_l1": {"beta": 0.5},
    "leaf": {"normalize": True},
    "list_kl": {"tau": 2.0},
}


def loss_of(name: str, **options: Any) -> OutputLossOptions:
    made = Loss.model_validate({"logits": False, "x": {"name": name, **OPTIONS.get(name, {}), **options}})
    return made.outputs["x"]


@pytest.mark.parametrize("name", OUTPUT_LOSSES)
def test_gradients_are_those_of_finite_differences(name: str) -> None:
    width = OUTPUT_LOSSES[name].width or 3
    student, teacher = drawn(5, width).requires_grad_(), drawn(5, width, seed=1)
    assert gradcheck(lambda values: loss_of(name).values(values, teacher), (student,))


@pytest.mark.parametrize("name", OUTPUT_LOSSES)
def test_a_student_that_is_the_teacher_has_no_loss_and_a_finite_gradient(name: str) -> None:
    teacher = drawn(5, OUTPUT_LOSSES[name].width or 3)
    student = teacher.clone().requires_grad_()
    loss = loss_of(name, **{key: False for key in ("normalize",) if name == "leaf"})
    values = loss.values(student, teacher)
    assert values.abs().max() < 1e-12
    (gradient,) = torch.autograd.grad(values.sum(), student)
    assert gradient.abs().max() < 1e-6


@pytest.mark.parametrize("name", OUTPUT_LOSSES)
@pytest.mark.parametrize("kind", ["equal", "zero", "one sample"])
def test_degenerate_batches_have_finite_losses_and_gradients(name: str, kind: str) -> None:
    width = OUTPUT_LOSSES[name].width or 3
    student, teacher = drawn(1 if kind == "one sample" else 4, width), drawn(1 if kind == "one sample" else 4, width)
    student = {"equal": student[:1].expand(4, -1), "zero": torch.zeros(4, width)}.get(kind, student)
    student = student.double().clone().requires_grad_()
    values = loss_of(name).values(student, teacher + 1)
    (gradient,) = torch.autograd.grad(values.sum(), student)
    assert values.isfinite().all()
    assert gradient.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", OUTPUT_LOSSES)
def test_samples_without_features_do_not_explode(name: str, dtype: torch.dtype) -> None:
    """Features of which a ReLU cuts off all numbers of a sample are 0, and several samples may have the same."""
    width = OUTPUT_LOSSES[name].width or 16
    student, teacher = drawn(8, width).relu().to(dtype), drawn(8, width, seed=1).to(dtype)
    student[2] = student[5] = 0
    student[6] = student[7]
    student.requires_grad_()
    values = loss_of(name).values(student, teacher)
    (gradient,) = torch.autograd.grad(values.mean(), student)
    assert values.isfinite().all()
    assert gradient.abs().max() < 10


def test_vectors_of_length_0_have_the_values_of_the_published_implementations() -> None:
    student, teacher = drawn(6, 4), drawn(6, 4, seed=1)
    student[3] = 0
    assert cosine(student, teacher)[3] == 1
    normalized = torch.nn.functional.normalize(student, dim=1)
    torch.testing.assert_close(leaf(student, teacher, normalize=True), (normalized - teacher).square().sum(dim=1))
    grams = [torch.nn.functional.normalize(vectors @ vectors.T, dim=1) for vectors in (student, teacher)]
    expected = (grams[0] - grams[1]).square().mean()
    torch.testing.assert_close(similarity_preserving(student, teacher)[0], expected, rtol=1e-12, atol=0)


def test_distances_of_vectors_far_from_0_are_right_in_float32() -> None:
    student, teacher = drawn(9, 32).float() + 100, drawn(9, 16, seed=1).float()
    expected = rkd(student.double(), teacher.double())
    torch.testing.assert_close(rkd(student, teacher).double(), expected, rtol=1e-4, atol=0)


@settings(deadline=None, max_examples=25)
@given(seed=st.integers(0, 2**16), count=st.integers(3, 8))
def test_relations_do_not_depend_on_rotation_order_or_scale(seed: int, count: int) -> None:
    student, teacher = drawn(count, 4, seed=seed), drawn(count, 5, seed=seed + 1)
    rotation, _ = torch.linalg.qr(drawn(4, 4, seed=seed + 2))
    order = torch.randperm(count, generator=torch.Generator().manual_seed(seed))
    for function in (rkd, similarity_preserving, probabilistic_transfer):
        value = function(student, teacher)
        for changed in (student @ rotation, student * 3):
            torch.testing.assert_close(function(changed, teacher), value, rtol=1e-5, atol=1e-7)
        torch.testing.assert_close(function(student[order], teacher[order]), value, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(rkd(student + 5, teacher), rkd(student, teacher), rtol=1e-6, atol=1e-9)


# The section of a pipeline


def test_losses_by_output_are_one_loss() -> None:
    made = Loss.model_validate({"logits": {"name": "dtkd"}, "features": {"name": "rkd", "weight": 25.0}})
    assert made == Loss.model_validate({"name": "dtkd", "outputs": {"features": {"name": "rkd", "weight": 25.0}}})
    assert (made.uses_teacher, made.uses_cache, made.uses_logits, made.is_of_the_batch) == (True, True, True, True)
    alone = Loss.model_validate({"features": {"name": "mse"}})
    assert (alone.name, alone.uses_teacher, alone.uses_cache, alone.uses_logits) == ("ce", False, True, True)
    none = Loss.model_validate({"logits": False, "features": {"name": "mse"}})
    assert (none.uses_cache, none.uses_logits, none.is_of_the_batch) == (True, False, False)
    assert Loss.model_validate(made.model_dump()) == made
    assert "outputs" not in Loss.model_validate({"name": "kd"}).model_dump()


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"features": {"name": "rdk"}}, "rdk"),
        ({"features": {"weight": 2.0}}, "name"),
        ({"features": {"name": "mse", "beta": 1.0}}, "beta"),
        ({"features": {"name": "mse", "weight": -1.0}}, "weight"),
        ({"logits": True, "features": {"name": "mse"}}, "logits is True"),
        ({"logits": False}, "nothing to learn"),
        ({"logits": False, "features": {"name": "mse", "weight": 0.0}}, "nothing to learn"),
        ({"features": {"name": "rkd", "distance_weight": 0.0, "angle_weight": 0.0}}, "are both 0"),
        ({"logits": {"name": "kkd"}, "features": {"name": "mse"}}, "kkd"),
    ],
)
def test_losses_by_output_that_make_no_sense_are_refused(given: dict[str, Any], words: str) -> None:
    with pytest.raises(ValidationError, match=words):
        Loss.model_validate(given)

"""The losses against the published implementations' numbers, and what must hold where those have none."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError
from torch import Tensor

from kdcache.losses import Loss, cross_entropy, distillation_loss, distillation_term
from kdcache.losses.adjustments import label_smoothing, probability_shift
from kdcache.losses.distillation import warmup
from kdcache.losses.divergences import kl
from kdcache.losses.temperatures import Temperatures, dtd_cwsm, dtd_flsw, dtkd

RULES = ["constant", "dtkd", "dtd_flsw", "dtd_cwsm"]
NAMES = ["ce", "kd", "dtkd", "ka", "dtd", "ka+dtd", "dtkd+ka"]
TAU = st.floats(0.05, 100)
some = settings(max_examples=60, deadline=None)

Reference = dict[str, Tensor]


@pytest.fixture(params=["losses_c10.npz", "losses_c100.npz"])
def reference(request: pytest.FixtureRequest) -> Reference:
    with np.load(Path(__file__).parent / "reference" / request.param) as arrays:
        return {name: torch.from_numpy(arrays[name]) for name in arrays.files}


@st.composite
def batches(draw: st.DrawFn, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor]:
    """Student's and teacher's logits and labels; the teacher is right on about half of the labelled samples."""
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**63 - 1)))
    shape = draw(st.integers(1, 8)), draw(st.integers(2, 40))
    student, teacher = (
        torch.randn(shape, generator=generator, dtype=dtype) * draw(st.sampled_from([0.01, 1.0, 10.0]))
        + draw(st.sampled_from([0.0, 20.0, -20.0]))
        for _ in range(2)
    )
    anything = torch.randint(-1, shape[1], shape[:1], generator=generator)
    right = torch.rand(shape[0], generator=generator) < 0.5
    return student, teacher, torch.where(right & (anything >= 0), teacher.argmax(dim=1), anything)


def loss_of(name: str = "kd", **given: Any) -> Loss:
    return Loss.model_validate({"name": name, **given})


def teacher_alone(rule: str = "constant", **options: Any) -> Loss:
    return loss_of(ce_weight=0, kd_weight=1, temperature={"kind": rule, **options})


def with_gradient(function: Callable[[Tensor], Tensor], student: Tensor) -> tuple[Tensor, Tensor]:
    leaf = student.clone().requires_grad_()
    value = function(leaf)
    (gradient,) = torch.autograd.grad(value, leaf)
    return value.detach(), gradient


def assert_agree(actual: Tensor, expected: Tensor, tolerance: float = 1e-9) -> None:
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance)


def assert_all_agree(actual: tuple[Tensor, ...], expected: tuple[Tensor, ...], tolerance: float = 1e-9) -> None:
    for one, other in zip(actual, expected, strict=True):
        assert_agree(one, other, tolerance)


def unlabelled(logits: Tensor) -> Tensor:
    return torch.full((len(logits),), -1)


def max_temperatures(student: Tensor, teacher: Tensor, tau: float) -> tuple[Tensor, Tensor]:
    """DTKD as the authors' code has it: T_stu, T_tea."""
    x, y = teacher.amax(dim=1), student.amax(dim=1)
    return 2 * y * tau / (x + y), 2 * x * tau / (x + y)


# Published values


def test_kd_is_the_published_one(reference: Reference) -> None:
    loss = teacher_alone(tau=reference["params"][0].item())
    labels, teacher = reference["labels"], reference["teacher"]
    result = with_gradient(lambda v: distillation_term(v, teacher, labels, loss), reference["student"])
    assert_all_agree(result, (reference["kd_loss"], reference["kd_grad"]))


def test_dtkd_is_the_published_one(reference: Reference) -> None:
    tau, alpha, beta, epoch, warmup_epochs = reference["params"].tolist()
    loss = loss_of("dtkd", kd_weight=alpha, plain_kd_weight=beta, warmup_epochs=warmup_epochs, temperature={"tau": tau})
    assert loss.ce_weight == 1
    labels, teacher = reference["labels"], reference["teacher"]
    result = with_gradient(
        lambda v: distillation_loss(v, teacher, labels, loss, int(epoch)).total, reference["student"]
    )
    assert_all_agree(result, (reference["dtkd_total_loss"], reference["dtkd_total_grad"]))


@pytest.mark.parametrize("tau", [1, 4])
def test_probability_shift_is_the_published_one(reference: Reference, tau: int) -> None:
    labels, teacher = reference["labels"], reference["teacher"]
    shifted = probability_shift(teacher / tau, labels).softmax(dim=1)
    assert_agree(shifted, reference[f"ka_ps_probs_T{tau}"])
    loss = loss_of("ka", ce_weight=0, kd_weight=1, temperature={"tau": tau})
    result = with_gradient(lambda v: distillation_term(v, teacher, labels, loss), reference["student"])
    assert_all_agree(result, (reference[f"ka_ps_kl_T{tau}_loss"], reference[f"ka_ps_kl_T{tau}_grad"]))


@pytest.mark.parametrize("lowest", [1e-6, 1.0, 8.0])
@pytest.mark.parametrize("published", ["flsw_tau_beta1_gamma1", "flsw_tau_beta40_gamma2", "cwsm_tau_beta05"])
def test_dtd_temperatures_are_the_published_ones_above_the_clamp(
    reference: Reference, published: str, lowest: float
) -> None:
    student, teacher = reference["student"], reference["teacher"]
    ours = {
        "flsw_tau_beta1_gamma1": lambda: dtd_flsw(student, teacher, tau=8, beta=1, gamma=1, lowest=lowest),
        "flsw_tau_beta40_gamma2": lambda: dtd_flsw(student, teacher, tau=8, beta=40, gamma=2, lowest=lowest),
        "cwsm_tau_beta05": lambda: dtd_cwsm(student, teacher, tau=8, beta=0.5, lowest=lowest),
    }[published]()
    expected = reference[f"dtd_{published}"].clamp_min(lowest)
    assert_all_agree(ours, (expected.unsqueeze(1), expected.unsqueeze(1), expected.square()))


# Divergence and temperatures


@pytest.mark.parametrize("rule", RULES)
@some
@given(batch=batches(), tau=TAU)
def test_a_student_that_is_the_teacher_has_nothing_to_learn(
    rule: str, batch: tuple[Tensor, Tensor, Tensor], tau: float
) -> None:
    _, logits, labels = batch
    loss = teacher_alone(rule, tau=tau)
    value, gradient = with_gradient(lambda v: distillation_term(v, logits, labels, loss), logits)
    assert value == 0
    assert_agree(gradient, torch.zeros_like(gradient))


@some
@given(batch=batches(), tau=TAU)
def test_kl_is_that_of_the_probabilities_and_never_negative(batch: tuple[Tensor, Tensor, Tensor], tau: float) -> None:
    student, teacher, labels = batch
    v, u = student / tau, teacher / tau
    value = kl(v, u, labels)
    assert_agree(value, (u.softmax(dim=1) * (u - v)).sum(dim=1) - u.logsumexp(dim=1) + v.logsumexp(dim=1))
    assert (value >= -1e-14).all()


def test_kl_survives_probabilities_that_underflow() -> None:
    teacher, student = torch.tensor([[0.0, -1e4]]), torch.tensor([[-1e4, 0.0]])
    value, gradient = with_gradient(lambda v: kl(v, teacher, unlabelled(v)).sum(), student)
    assert value == 1e4
    assert torch.equal(gradient, torch.tensor([[-1.0, 1.0]]))


HAZARDS = {
    "student never positive": ([-1.0, -2.0, -3.0], [3.0, 1.0, 0.0]),
    "teacher never positive": ([3.0, 1.0, 0.0], [-1.0, -2.0, -3.0]),
    "sum is zero": ([-2.0, -5.0, -3.0], [2.0, 1.0, 0.0]),
    "both negative": ([-5.0, -6.0, -7.0], [-1.0, -2.0, -3.0]),
    "tiny": ([1e-30, 0.0, -1.0], [1e-38, -1.0, -2.0]),
    "zero": ([0.0, 0.0, 0.0], [0.0, 0.0, 0.0]),
    "huge": ([-1e4, -1e4, -1e4], [1e4, -1e4, 0.0]),
}


@pytest.mark.parametrize("options", [{}, {"sharpness": "logsumexp"}, {"centre": True}, {"detach": True}], ids=str)
@pytest.mark.parametrize("hazard", HAZARDS)
def test_dtkd_stays_finite_where_its_form_has_no_meaning(hazard: str, options: dict[str, Any]) -> None:
    student, teacher = (torch.tensor([row]) for row in HAZARDS[hazard])
    temperatures = dtkd(student, teacher, tau=4, **options)
    for value in temperatures:
        assert value.isfinite().all()
        assert (value > 0).all()
    assert_agree(temperatures.student + temperatures.teacher, torch.tensor([[8.0]]), 1e-6)
    loss = teacher_alone("dtkd", **options)
    total, gradient = with_gradient(lambda v: distillation_term(v, teacher, unlabelled(v), loss), student)
    assert total.isfinite()
    assert total >= 0
    assert gradient.isfinite().all()


@pytest.mark.parametrize("hazard", ["both negative", "tiny", "zero"])
def test_dtkd_is_kd_where_neither_is_sharp(hazard: str) -> None:
    student, teacher = (torch.tensor([row]) for row in HAZARDS[hazard])
    assert_all_agree(dtkd(student, teacher, tau=3), (torch.tensor([[3.0]]), torch.tensor([[3.0]]), torch.tensor([9.0])))


@some
@given(batch=batches(), tau=TAU, floor=st.floats(1e-6, 1e-1))
def test_the_guard_of_dtkd_changes_nothing_above_its_floor(
    batch: tuple[Tensor, Tensor, Tensor], tau: float, floor: float
) -> None:
    student, teacher = (z - z.amin(dim=1, keepdim=True) + floor for z in batch[:2])
    t_student, t_teacher = max_temperatures(student, teacher, tau)
    guarded = dtkd(student, teacher, tau=tau, sharpness_floor=floor)
    assert_all_agree(guarded, (t_student.unsqueeze(1), t_teacher.unsqueeze(1), t_student * t_teacher))


@pytest.mark.parametrize("sharpness", ["max", "logsumexp"])
@some
@given(batch=batches(), shifts=st.tuples(st.floats(-50, 50), st.floats(-50, 50)))
def test_centred_dtkd_does_not_see_a_shift_of_the_logits(
    sharpness: str, batch: tuple[Tensor, Tensor, Tensor], shifts: tuple[float, float]
) -> None:
    student, teacher, labels = batch
    loss = teacher_alone("dtkd", sharpness=sharpness, centre=True)
    result = with_gradient(lambda v: distillation_term(v, teacher, labels, loss), student)
    shifted = with_gradient(lambda v: distillation_term(v, teacher + shifts[1], labels, loss), student + shifts[0])
    assert_all_agree(shifted, result)


def test_uncentred_dtkd_sees_a_shift_of_the_logits() -> None:
    student, teacher = torch.tensor([[3.0, 1.0, 0.0]]), torch.tensor([[5.0, 1.0, 0.0]])
    moved = dtkd(student + 10, teacher, tau=4).student
    assert_agree(moved, torch.tensor([[2 * 13 * 4 / 18]]), 1e-6)


def test_detached_dtkd_has_no_gradient_through_its_temperatures(reference: Reference) -> None:
    student, teacher, labels = reference["student"], reference["teacher"], reference["labels"]
    t_student, t_teacher = (t.unsqueeze(1) for t in max_temperatures(student, teacher, 4))

    def with_fixed_temperatures(v: Tensor) -> Tensor:
        log_q, p = (v / t_student).log_softmax(dim=1), (teacher / t_teacher).softmax(dim=1)
        return (t_student * t_teacher * p * (p.log() - log_q)).sum(dim=1).mean()

    def gradient(detach: bool) -> Tensor:
        loss = teacher_alone("dtkd", detach=detach)
        return with_gradient(lambda v: distillation_term(v, teacher, labels, loss), student)[1]

    fixed = with_gradient(with_fixed_temperatures, student)[1]
    assert_agree(gradient(detach=True), fixed)
    assert (gradient(detach=False) - fixed).abs().max() > 1e-3


def test_dtkd_with_the_sharpness_of_the_paper(reference: Reference) -> None:
    student, teacher = reference["student"], reference["teacher"]
    x, y = teacher.exp().sum(dim=1).log(), student.exp().sum(dim=1).log()
    expected = Temperatures((8 * y / (x + y)).unsqueeze(1), (8 * x / (x + y)).unsqueeze(1), 64 * x * y / (x + y) ** 2)
    assert_all_agree(dtkd(student, teacher, tau=4, sharpness="logsumexp"), expected)


def test_confidence_weights_are_clamped() -> None:
    student = torch.zeros(4, 100, dtype=torch.float64)
    student[:2, 0] = 30
    w = 1 / (student.softmax(dim=1).amax(dim=1) + 1e-3)
    unclamped = 8 + 1.0 * (w.mean() - w)
    assert unclamped.min() < -35
    for lowest in (1.0, 2.5):
        t = dtd_cwsm(student, student, tau=8, beta=1, lowest=lowest)
        expected = torch.stack([unclamped[0], unclamped[0], torch.tensor(lowest), torch.tensor(lowest)])
        assert_all_agree(t, (expected.unsqueeze(1), expected.unsqueeze(1), expected.square()))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@some
@given(seed=st.integers(0, 2**63 - 1), scale=st.sampled_from([0.0, 1.0, 1e4, 1e6]), gamma=st.floats(0.1, 0.9))
def test_focal_weights_of_equal_rows_are_no_nan(dtype: torch.dtype, seed: int, scale: float, gamma: float) -> None:
    logits = scale * torch.randn(8, 33, generator=torch.Generator().manual_seed(seed), dtype=dtype)
    for value in dtd_flsw(logits, logits.clone(), beta=40, gamma=gamma):
        assert value.isfinite().all()
        assert (value >= 1).all()


@pytest.mark.parametrize("rule", ["dtd_flsw", "dtd_cwsm"])
def test_dtd_temperatures_carry_no_gradient(reference: Reference, rule: str) -> None:
    student, teacher = reference["student"], reference["teacher"]
    tau = (dtd_flsw if rule == "dtd_flsw" else dtd_cwsm)(student, teacher).student

    def with_fixed_temperatures(v: Tensor) -> Tensor:
        p = (teacher / tau).softmax(dim=1)
        return (tau.square() * p * (p.log() - (v / tau).log_softmax(dim=1))).sum(dim=1).mean()

    loss = teacher_alone(rule)
    result = with_gradient(lambda v: distillation_term(v, teacher, unlabelled(v), loss), student)
    assert_all_agree(result, with_gradient(with_fixed_temperatures, student))


# Knowledge adjustment


@some
@given(batch=batches())
def test_probability_shift_makes_the_label_the_largest_and_keeps_the_values(
    batch: tuple[Tensor, Tensor, Tensor],
) -> None:
    student, teacher, labels = batch
    shifted = probability_shift(teacher, labels)
    known = labels >= 0
    assert torch.equal(shifted.argmax(dim=1)[known], labels[known])
    assert torch.equal(shifted.sort(dim=1).values, teacher.sort(dim=1).values)
    assert ((shifted != teacher).sum(dim=1) == 2 * (known & (teacher.argmax(dim=1) != labels))).all()
    assert_agree(shifted.logsumexp(dim=1), teacher.logsumexp(dim=1))
    entropies = [torch.special.entr(z.softmax(dim=1)).sum(dim=1) for z in (shifted, teacher)]
    assert_agree(entropies[0], entropies[1])
    for sharpness in ("max", "logsumexp"):
        assert_all_agree(dtkd(student, shifted, sharpness=sharpness), dtkd(student, teacher, sharpness=sharpness))


@some
@given(batch=batches(), smoothing=st.floats(0.01, 0.4))
def test_label_smoothing_replaces_the_wrong_rows_alone(batch: tuple[Tensor, Tensor, Tensor], smoothing: float) -> None:
    _, teacher, labels = batch
    smoothed = label_smoothing(teacher, labels, smoothing)
    for row, before, label in zip(smoothed, teacher, labels.tolist(), strict=True):
        if label in (-1, int(before.argmax())):
            assert torch.equal(row, before)
        else:
            target = torch.full_like(row, smoothing / (len(row) - 1))
            target[label] = 1 - smoothing
            assert_agree(row.softmax(dim=0), target)


@pytest.mark.parametrize("adjust", [probability_shift, label_smoothing])
def test_adjustments_leave_rows_that_are_right_or_unlabelled(adjust: Callable[[Tensor, Tensor], Tensor]) -> None:
    teacher = torch.tensor([[1.0, 5.0, 2.0], [4.0, 3.0, 0.0], [0.0, 1.0, 7.0]])
    assert torch.equal(adjust(teacher, torch.tensor([1, -1, 2])), teacher)
    assert torch.equal(probability_shift(teacher, torch.tensor([2, 1, 0]))[:, 0], torch.tensor([1.0, 3.0, 7.0]))


@pytest.mark.parametrize("adjustment", ["probability_shift", "label_smoothing"])
@pytest.mark.parametrize("rule", RULES)
def test_the_row_of_the_cache_survives(reference: Reference, rule: str, adjustment: str) -> None:
    teacher, labels = reference["teacher"].clone(), reference["labels"].clone()
    loss = loss_of(adjustment={"kind": adjustment}, temperature={"kind": rule, "tau": 1})
    with_gradient(lambda v: distillation_loss(v, teacher, labels, loss).total, reference["student"])
    assert torch.equal(teacher, reference["teacher"])
    assert torch.equal(labels, reference["labels"])


def test_a_smoothed_label_is_not_softened_again() -> None:
    student = torch.tensor([[1.0, -2.0, 0.5, 3.0]], dtype=torch.float64)
    teacher = torch.tensor([[9.0, 1.0, 0.0, 2.0]], dtype=torch.float64)
    target = torch.tensor([[0.1, 0.1, 0.7, 0.1]], dtype=torch.float64)
    loss = loss_of(
        ce_weight=0, kd_weight=1, adjustment={"kind": "label_smoothing", "smoothing": 0.3}, temperature={"tau": 4}
    )
    expected = 16 * (target * (target.log() - (student / 4).log_softmax(dim=1))).sum()
    assert_agree(distillation_term(student, teacher, torch.tensor([2]), loss), expected)


# The sum


def test_cross_entropy_skips_samples_without_a_label() -> None:
    student = torch.tensor([[2.0, 0.0], [5.0, 1.0], [0.0, 1.0]], dtype=torch.float64)
    value, gradient = with_gradient(lambda v: cross_entropy(v, torch.tensor([1, -1, 1])), student)
    p = student.softmax(dim=1)
    assert_agree(value, -(p[0, 1].log() + p[2, 1].log()) / 2)
    expected = (p - torch.tensor([0, 1])) / 2
    expected[1] = 0
    assert_agree(gradient, expected)


def test_cross_entropy_without_any_label_is_zero() -> None:
    student = torch.tensor([[2.0, 0.0], [5.0, 1.0]])
    value, gradient = with_gradient(lambda v: cross_entropy(v, unlabelled(v)), student)
    assert value == 0
    assert torch.equal(gradient, torch.zeros_like(student))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", NAMES)
def test_half_precision_is_raised_to_single(reference: Reference, name: str, dtype: torch.dtype) -> None:
    student, labels = reference["student"].to(dtype), reference["labels"]
    teacher = reference["teacher"].float()
    raised = distillation_loss(student, teacher, labels, loss_of(name), epoch=20)
    exact = distillation_loss(student.double(), teacher.double(), labels, loss_of(name), epoch=20)
    assert raised.total.dtype == torch.float32
    assert_all_agree(tuple(part.double() for part in raised), exact, 1e-5)


def test_warmup_grows_to_one() -> None:
    assert [warmup(epoch, 20) for epoch in (1, 10, 20, 240)] == [0.05, 0.5, 1, 1]
    assert warmup(1, 0) == 1


def test_warmup_weighs_the_teacher_and_not_the_labels(reference: Reference) -> None:
    student, teacher, labels = reference["student"], reference["teacher"], reference["labels"]
    loss = loss_of(ce_weight=2, kd_weight=3, warmup_epochs=10)
    parts = distillation_loss(student, teacher, labels, loss, epoch=4)
    expected = 2 * torch.nn.functional.cross_entropy(student, labels) + 0.4 * 3 * reference["kd_loss"]
    assert_agree(parts.total, expected)
    assert_agree(parts.distillation, 3 * reference["kd_loss"])


def test_labels_alone_need_no_teacher(reference: Reference) -> None:
    student, labels = reference["student"], reference["labels"]
    parts = distillation_loss(student, None, labels, loss_of("ce"))
    assert_agree(parts.total, torch.nn.functional.cross_entropy(student, labels))
    assert parts.distillation == 0
    with pytest.raises(ValueError, match="'dtkd' needs the teacher's logits"):
        distillation_loss(student, None, labels, loss_of("dtkd"))


@pytest.mark.parametrize("name", NAMES)
@some
@given(batch=batches(), seed=st.integers(0, 2**63 - 1))
def test_the_order_of_a_batch_does_not_matter(name: str, batch: tuple[Tensor, Tensor, Tensor], seed: int) -> None:
    student, teacher, labels = batch
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
    loss = loss_of(name)
    value, gradient = with_gradient(lambda v: distillation_loss(v, teacher, labels, loss).total, student)
    permuted = with_gradient(lambda v: distillation_loss(v, teacher[order], labels[order], loss).total, student[order])
    assert_all_agree(permuted, (value, gradient[order]))


# Names and options


@pytest.mark.parametrize(
    ("name", "adjustment", "temperature"),
    [
        ("ce", "none", "constant"),
        ("kd", "none", "constant"),
        ("dtkd", "none", "dtkd"),
        ("dtd", "none", "dtd_flsw"),
        ("ka", "probability_shift", "constant"),
        ("ka+kd", "probability_shift", "constant"),
        ("ka+dtd", "probability_shift", "dtd_flsw"),
        ("dtd+ka", "probability_shift", "dtd_flsw"),
        ("dtkd+ka", "probability_shift", "dtkd"),
        ("ka+dtkd", "probability_shift", "dtkd"),
    ],
)
def test_names_choose_their_axes(name: str, adjustment: str, temperature: str) -> None:
    loss = loss_of(name)
    assert (loss.name, loss.adjustment.kind, loss.temperature.kind) == (name, adjustment, temperature)
    weights = (loss.ce_weight, loss.kd_weight, loss.plain_kd_weight, loss.warmup_epochs)
    if name == "ce":
        assert weights == (1, 0, 0, 0)
    elif temperature == "dtkd":
        assert weights == (1, 3, 1, 20)
    else:
        assert weights == (0.1, 0.9, 0, 0)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("hinton", "unknown loss 'hinton': its parts are kd, ka, dtkd, dtd"),
        ("", "unknown loss ''"),
        ("dtkd+", "unknown loss"),
        ("KD", "unknown loss 'KD'"),
        ("ce+ka", "or 'ce' alone"),
        ("dtkd+dtd", "'dtkd\\+dtd' chooses the same thing twice"),
        ("kd+dtkd", "chooses the same thing twice"),
        ("ka+ka", "'ka\\+ka' chooses the same thing twice"),
    ],
)
def test_names_that_mean_nothing_are_refused(name: str, message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        loss_of(name)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"alpha": 1}, "alpha\n  Extra inputs are not permitted"),
        ({"temperature": {"gamma": 2}}, "gamma\n  Extra inputs are not permitted"),
        ({"temperature": {"kind": "dtd_cwsm", "gamma": 2}}, "gamma\n  Extra inputs are not permitted"),
        ({"temperature": {"kind": "warm"}}, "'constant', 'dtkd', 'dtd_flsw', 'dtd_cwsm'"),
        ({"temperature": {"tau": 0}}, "greater than 0"),
        ({"adjustment": {"smoothing": 0.1}}, "smoothing\n  Extra inputs are not permitted"),
        ({"kd_weight": -1}, "greater than or equal to 0"),
        ({"kd_weight": "1"}, "valid number"),
        ({"plain_kd_weight": 1}, "raise kd_weight instead"),
        ({"ce_weight": 0, "kd_weight": 0}, "nothing to learn"),
        ({"name": "ce", "temperature": {"kind": "dtkd"}}, "would have no effect"),
        ({"name": "ce", "temperature": {"tau": 8}}, "would have no effect"),
        ({"name": "ce", "adjustment": {"kind": "label_smoothing"}}, "would have no effect"),
        ({"name": "ce", "warmup_epochs": 5}, "would have no effect"),
    ],
    ids=str,
)
def test_options_that_are_unknown_or_without_effect_are_refused(given: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        Loss.model_validate(given)


def test_an_option_without_a_kind_keeps_the_named_one() -> None:
    loss = loss_of("ka+dtd", temperature={"tau": 8})
    assert loss.temperature.model_dump() == {"kind": "dtd_flsw", "tau": 8, "beta": 40, "gamma": 2, "lowest": 1}
    assert loss.adjustment.kind == "probability_shift"


def test_another_kind_drops_the_options_of_the_named_one() -> None:
    loss = loss_of("dtd", temperature={"kind": "constant"}, adjustment={"kind": "label_smoothing"})
    assert loss.temperature.model_dump() == {"kind": "constant", "tau": 4}
    assert loss.adjustment.model_dump() == {"kind": "label_smoothing", "smoothing": 0.1}


@pytest.mark.parametrize("name", NAMES)
def test_a_loss_reads_back_from_what_it_writes(name: str) -> None:
    loss = loss_of(name, ce_weight=0.25)
    assert Loss.model_validate(loss.model_dump()) == loss
    assert Loss.model_validate(json.loads(loss.model_dump_json())) == loss

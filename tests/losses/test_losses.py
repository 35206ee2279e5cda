"""The losses against the published implementations' numbers, and what must hold where those have none."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

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
    some,
    teacher_alone,
    unlabeled,
    with_gradient,
)
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from kdcache.losses import cross_entropy, distillation_loss, distillation_term, learned_temperature
from kdcache.losses.adjustments import label_smoothing, probability_shift
from kdcache.losses.batch import MixedLabels
from kdcache.losses.distillation import warmup
from kdcache.losses.divergences import kl
from kdcache.losses.presets import PARTS
from kdcache.losses.temperatures import Temperatures, dtd_cwsm, dtd_flsw, dtkd

RULES = ["constant", "dtkd", "dtd_flsw", "dtd_cwsm"]
NAMES = ["ce", "kd", "dtkd", "ka", "dtd", "ka+dtd", "dtkd+ka"]


@pytest.fixture(params=REFERENCES)
def reference(request: pytest.FixtureRequest) -> Reference:
    return published(request.param)


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


@pytest.mark.parametrize("min_temperature", [1e-6, 1.0, 8.0])
@pytest.mark.parametrize("temperatures", ["flsw_tau_beta1_gamma1", "flsw_tau_beta40_gamma2", "cwsm_tau_beta05"])
def test_dtd_temperatures_are_the_published_ones_above_the_clamp(
    reference: Reference, temperatures: str, min_temperature: float
) -> None:
    student, teacher = reference["student"], reference["teacher"]
    flsw = partial(dtd_flsw, student, teacher, tau=8, min_temperature=min_temperature)
    ours = {
        "flsw_tau_beta1_gamma1": lambda: flsw(beta=1, gamma=1),
        "flsw_tau_beta40_gamma2": lambda: flsw(beta=40, gamma=2),
        "cwsm_tau_beta05": lambda: dtd_cwsm(student, teacher, tau=8, beta=0.5, min_temperature=min_temperature),
    }[temperatures]()
    expected = reference[f"dtd_{temperatures}"].clamp_min(min_temperature)
    assert_all_agree(ours, (expected.unsqueeze(1), expected.unsqueeze(1), expected.square()))


# Divergence and temperatures


@pytest.mark.parametrize("rule", RULES)
@some
@given(batch=batches(), tau=TAU)
def test_a_student_that_is_the_teacher_has_nothing_to_learn(rule: str, batch: Batch, tau: float) -> None:
    _, logits, labels = batch
    loss = teacher_alone(rule, tau=tau)
    value, gradient = with_gradient(lambda v: distillation_term(v, logits, labels, loss), logits)
    assert value == 0
    assert_agree(gradient, torch.zeros_like(gradient))


@some
@given(batch=batches(), tau=TAU)
def test_kl_is_that_of_the_probabilities_and_never_negative(batch: Batch, tau: float) -> None:
    student, teacher, labels = batch
    v, u = student / tau, teacher / tau
    value = kl(v, u, labels)
    assert_agree(value, (u.softmax(dim=1) * (u - v)).sum(dim=1) - u.logsumexp(dim=1) + v.logsumexp(dim=1))
    assert (value >= -1e-14).all()


def test_kl_survives_probabilities_that_underflow() -> None:
    teacher, student = torch.tensor([[0.0, -1e4]]), torch.tensor([[-1e4, 0.0]])
    value, gradient = with_gradient(lambda v: kl(v, teacher, unlabeled(v)).sum(), student)
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


@pytest.mark.parametrize("options", [{}, {"sharpness": "logsumexp"}, {"center": True}, {"detach": True}], ids=str)
@pytest.mark.parametrize("hazard", HAZARDS)
def test_dtkd_stays_finite_where_its_form_has_no_meaning(hazard: str, options: dict[str, Any]) -> None:
    student, teacher = (torch.tensor([row]) for row in HAZARDS[hazard])
    temperatures = dtkd(student, teacher, tau=4, **options)
    for value in temperatures:
        assert value.isfinite().all()
        assert (value > 0).all()
    assert_agree(temperatures.student + temperatures.teacher, torch.tensor([[8.0]]), 1e-6)
    loss = teacher_alone("dtkd", **options)
    total, gradient = with_gradient(lambda v: distillation_term(v, teacher, unlabeled(v), loss), student)
    assert total.isfinite()
    assert total >= 0
    assert gradient.isfinite().all()


@pytest.mark.parametrize("hazard", ["both negative", "tiny", "zero"])
def test_dtkd_is_kd_where_neither_is_sharp(hazard: str) -> None:
    student, teacher = (torch.tensor([row]) for row in HAZARDS[hazard])
    assert_all_agree(dtkd(student, teacher, tau=3), (torch.tensor([[3.0]]), torch.tensor([[3.0]]), torch.tensor([9.0])))


@some
@given(batch=batches(), tau=TAU, floor=st.floats(1e-6, 1e-1))
def test_the_guard_of_dtkd_changes_nothing_above_its_floor(batch: Batch, tau: float, floor: float) -> None:
    student, teacher = (z - z.amin(dim=1, keepdim=True) + floor for z in batch[:2])
    t_student, t_teacher = max_temperatures(student, teacher, tau)
    guarded = dtkd(student, teacher, tau=tau, sharpness_floor=floor)
    assert_all_agree(guarded, (t_student.unsqueeze(1), t_teacher.unsqueeze(1), t_student * t_teacher))


@pytest.mark.parametrize("sharpness", ["max", "logsumexp"])
@some
@given(batch=batches(), shifts=st.tuples(st.floats(-50, 50), st.floats(-50, 50)))
def test_centered_dtkd_does_not_see_a_shift_of_the_logits(
    sharpness: str, batch: Batch, shifts: tuple[float, float]
) -> None:
    student, teacher, labels = batch
    loss = teacher_alone("dtkd", sharpness=sharpness, center=True)
    result = with_gradient(lambda v: distillation_term(v, teacher, labels, loss), student)
    shifted = with_gradient(lambda v: distillation_term(v, teacher + shifts[1], labels, loss), student + shifts[0])
    assert_all_agree(shifted, result)


def test_uncentered_dtkd_sees_a_shift_of_the_logits() -> None:
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
    for min_temperature in (1.0, 2.5):
        t = dtd_cwsm(student, student, tau=8, beta=1, min_temperature=min_temperature)
        expected = torch.stack(
            [unclamped[0], unclamped[0], torch.tensor(min_temperature), torch.tensor(min_temperature)]
        )
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
    result = with_gradient(lambda v: distillation_term(v, teacher, unlabeled(v), loss), student)
    assert_all_agree(result, with_gradient(with_fixed_temperatures, student))


# DTKD's temperatures that really equalize


@few
@given(batch=batches(), tau=TAU)
def test_exact_temperatures_make_the_logsumexps_equal(batch: Batch, tau: float) -> None:
    student, teacher = (z - z.mean(dim=1, keepdim=True) for z in batch[:2])
    t_student, t_teacher, weight = dtkd(*batch[:2], tau=tau, sharpness="logsumexp", center=True, equalize="exact")
    assert_agree(t_student + t_teacher, torch.full_like(t_student, 2 * tau))
    assert_agree(weight, (t_student * t_teacher).squeeze(1))
    assert (t_student > 0).all()
    assert (t_teacher > 0).all()
    x, y = (teacher / t_teacher).logsumexp(dim=1), (student / t_student).logsumexp(dim=1)
    even = torch.tensor(float(student.shape[1])).log()
    sharp = torch.maximum((teacher / tau).logsumexp(dim=1), (student / tau).logsumexp(dim=1)) > even + 1e-3
    inside = torch.minimum(t_student, t_teacher).squeeze(1) > 1.001e-3 * tau
    assert_agree(x[sharp & inside], y[sharp & inside], 1e-8)
    cold = sharp & ~inside  # even at a thousandth of tau the one is less sharp than the other
    assert torch.equal((x > y)[cold], (t_student < t_teacher).squeeze(1)[cold])
    assert torch.equal(t_student[~sharp], torch.full_like(t_student[~sharp], tau))


def test_published_temperatures_do_not_make_the_logsumexps_equal(reference: Reference) -> None:
    student, teacher = (reference[name] - reference[name].mean(dim=1, keepdim=True) for name in ("student", "teacher"))
    for equalize, equal in (("published", False), ("exact", True)):
        t = dtkd(student, teacher, sharpness="logsumexp", center=True, equalize=equalize)
        x, y = (teacher / t.teacher).logsumexp(dim=1), (student / t.student).logsumexp(dim=1)
        assert torch.allclose(x, y, rtol=1e-3) is equal
    largest = dtkd(student, teacher, sharpness="max")
    assert_agree((teacher / largest.teacher).amax(dim=1), (student / largest.student).amax(dim=1))


@pytest.mark.parametrize("hazard", HAZARDS)
def test_exact_dtkd_stays_finite(hazard: str) -> None:
    student, teacher = (torch.tensor([row]) for row in HAZARDS[hazard])
    loss = teacher_alone("dtkd", sharpness="logsumexp", center=True, equalize="exact")
    total, gradient = with_gradient(lambda v: distillation_term(v, teacher, unlabeled(v), loss), student)
    assert total.isfinite()
    assert total >= 0
    assert gradient.isfinite().all()


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("dtkd", {}),
        ("dtkd", {"sharpness": "logsumexp"}),
        ("dtkd", {"sharpness": "logsumexp", "center": True, "equalize": "exact"}),
        ("dtkd+dkd", {}),
        ("dtkd+dist", {"center": True}),
        ("zscore+dtkd+ka", {}),
        ("dtkd+lsr+js", {}),
        ("dtkd+mse", {}),
    ],
    ids=str,
)
def test_the_gradient_goes_through_the_temperatures_too(name: str, options: dict[str, Any]) -> None:
    generator = torch.Generator().manual_seed(4)
    student, teacher = (2 * torch.randn(4, 5, generator=generator, dtype=torch.float64) for _ in range(2))
    loss = loss_of(name, temperature=options)
    labels = torch.tensor([1, -1, 0, 4])
    total = lambda v: distillation_loss(v, teacher, labels, loss, epoch=7).total  # noqa: E731
    assert torch.autograd.gradcheck(total, student.requires_grad_())


# A temperature that is learned


def test_ctkd_is_kd_at_the_temperature_that_it_has_learned(reference: Reference) -> None:
    student, teacher, labels = reference["student"], reference["teacher"], reference["labels"]
    loss = loss_of("ctkd", temperature={"min_temperature": 2.0, "span": 3.0})
    theta = learned_temperature(loss)
    assert theta is not None
    assert theta.tolist() == [1.0]
    with torch.no_grad():
        theta.fill_(-0.5)
    tau = 2 + 3 / (1 + torch.tensor(0.5, dtype=torch.float64).exp().item())
    result = with_gradient(lambda v: distillation_term(v, teacher, labels, loss, 3, theta), student)
    fixed = loss_of("kd", temperature={"tau": tau})
    assert_all_agree(result, with_gradient(lambda v: distillation_term(v, teacher, labels, fixed), student))
    assert learned_temperature(fixed) is None
    with pytest.raises(ValueError, match="'ctkd' learns its temperature"):
        distillation_term(student, teacher, labels, loss)


@pytest.mark.parametrize(("epoch", "reversal"), [(1, 0.0954915), (2, 0.5), (4, 1.0), (240, 1.0)])
def test_ctkd_climbs_where_the_student_descends(reference: Reference, epoch: int, reversal: float) -> None:
    # CosineDecay(0, -1, loops) of the authors' code: (1 + cos(pi * epoch / loops)) / 2 - 1.
    ramp = 5.0 if epoch == 1 else 4.0
    student, teacher, labels = reference["student"], reference["teacher"], reference["labels"]
    loss = loss_of("ctkd", temperature={"ramp_epochs": ramp})

    def kd(theta: float) -> float:
        tau = 1 + 20 * torch.tensor(theta, dtype=torch.float64).sigmoid().item()
        return distillation_term(student, teacher, labels, loss_of("kd", temperature={"tau": tau})).item()

    theta = torch.ones(1, dtype=torch.float64)
    _, gradient = with_gradient(lambda at: distillation_term(student, teacher, labels, loss, epoch, at), theta)
    slope = (kd(1 + 1e-5) - kd(1 - 1e-5)) / 2e-5
    assert gradient.item() == pytest.approx(-reversal * slope, rel=1e-5)


# Knowledge adjustment


@some
@given(batch=batches())
def test_probability_shift_makes_the_label_the_largest_and_keeps_the_values(
    batch: Batch,
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
def test_label_smoothing_replaces_the_wrong_rows_alone(batch: Batch, smoothing: float) -> None:
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
def test_adjustments_leave_rows_that_are_right_or_unlabeled(adjust: Callable[[Tensor, Tensor], Tensor]) -> None:
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
    value, gradient = with_gradient(lambda v: cross_entropy(v, unlabeled(v)), student)
    assert value == 0
    assert torch.equal(gradient, torch.zeros_like(student))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", [*NAMES, *PARTS])
def test_half_precision_is_raised_to_single(reference: Reference, name: str, dtype: torch.dtype) -> None:
    student, labels = reference["student"].to(dtype), reference["labels"]
    teacher, loss = reference["teacher"].float(), loss_of(name)
    if name == "truncated":
        loss = loss_of(name, adjustment={"top": 4})
    theta = learned_temperature(loss)
    if name == "noisy":
        loss = loss_of(name, adjustment={"sigma": 1e-9})  # each call draws anew
    raised = distillation_loss(student, teacher, labels, loss, 20, theta=theta)
    exact = distillation_loss(student.double(), teacher.double(), labels, loss, 20, theta=theta)
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
def test_the_order_of_a_batch_does_not_matter(name: str, batch: Batch, seed: int) -> None:
    student, teacher, labels = batch
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
    loss = loss_of(name)
    value, gradient = with_gradient(lambda v: distillation_loss(v, teacher, labels, loss).total, student)
    permuted = with_gradient(lambda v: distillation_loss(v, teacher[order], labels[order], loss).total, student[order])
    assert_all_agree(permuted, (value, gradient[order]))


# MixedLabels images


@st.composite
def mixtures(draw: st.DrawFn, rows: int, classes: int) -> MixedLabels:
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**63 - 1)))
    partners = torch.randint(-1, classes, (rows,), generator=generator)
    return MixedLabels(partners, torch.rand(rows, generator=generator))


@some
@given(batch=batches(), data=st.data())
def test_cross_entropy_of_mixtures_is_that_of_the_mixed_labels(batch: Batch, data: st.DataObject) -> None:
    student, _, labels = batch
    mixed = data.draw(mixtures(*student.shape))
    # As torchvision mixes labels: one-hot, weighed, added; a label that is not known weighs nothing.
    target = torch.zeros_like(student)
    for row, (own, partner, share) in enumerate(zip(labels, mixed.partner_labels, mixed.share.double(), strict=True)):
        for label, weight in ((own, share), (partner, 1 - share)):
            if label >= 0:
                target[row, label] += weight
    expected = with_gradient(lambda v: -(target * v.log_softmax(dim=1)).sum() / max(target.sum().item(), 1.0), student)
    assert_all_agree(with_gradient(lambda v: cross_entropy(v, labels, mixed), student), expected)
    for label in (labels, mixed.partner_labels):  # all of an image one's own, or all its partner's
        whole = MixedLabels(mixed.partner_labels, (torch.full_like(mixed.share, float(label is labels))))
        assert_agree(cross_entropy(student, labels, whole), cross_entropy(student, label))


@pytest.mark.parametrize("name", ["ce", "kd", "dtkd", "dtd"])
@some
@given(batch=batches(), data=st.data())
def test_only_the_cross_entropy_knows_that_images_are_mixed(name: str, batch: Batch, data: st.DataObject) -> None:
    student, teacher, labels = batch
    mixed = data.draw(mixtures(*student.shape))
    loss = loss_of(name, ce_weight=0.3)
    plain, parts = (distillation_loss(student, teacher, labels, loss, mixed=one) for one in (None, mixed))
    assert_agree(parts.cross_entropy, cross_entropy(student, labels, mixed))
    assert_agree(parts.distillation, plain.distillation)
    assert_agree(parts.total - plain.total, 0.3 * (parts.cross_entropy - plain.cross_entropy), 1e-7)


@pytest.mark.parametrize("kind", ["probability_shift", "label_smoothing"])
def test_a_teacher_is_not_adjusted_on_images_of_two_labels(kind: str) -> None:
    student, teacher, labels = torch.zeros(2, 3), torch.eye(3)[:2], torch.tensor([1, 1])
    mixed = MixedLabels(torch.tensor([0, 2]), torch.tensor([0.5, 0.25]))
    with pytest.raises(ValueError, match=f"{kind} needs one label per image"):
        distillation_loss(student, teacher, labels, loss_of("kd", adjustment={"kind": kind}), mixed=mixed)

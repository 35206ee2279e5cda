"""Losses on targets of tokens: those of dense logits where the targets have them, K + 1 classes where they do not."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers.loss_cases import few, loss_of, with_gradient
from helpers.token_targets import drawn, language_logits, targets_of
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from kdcache.errors import UsageError
from kdcache.losses import distillation_loss, learned_temperature
from kdcache.losses.token_kl import ghost_kl
from kdcache.losses.token_loss import check_token_loss, token_loss
from kdcache.losses.token_targets import TokenTargets, head_and_tail, scaled_logits

N, V, K = 24, 150, 6
TEACHER = language_logits(N, V, width=10)
STUDENT = language_logits(N, V, width=10, seed=1)
LABELS = torch.where(torch.arange(N) % 3 == 0, TEACHER.argmax(dim=1), torch.arange(N) % V)
LABELS[5] = -1
WHOLE = targets_of(TEACHER, K, rank=12)
MASS_ALONE = targets_of(TEACHER, K)

CONSTANT = ["kd", "rkl", "js", "cosine", "ka", "lsr", "dkd", "ofa", "truncated", "brier", "zscore", "noisy"]
DYNAMIC = ["dtkd", "ctkd", "cwsm", "dtd", "ka+dtkd", "dtkd+dkd", "dtkd+rkl"]


def small(name: str, **given: Any) -> Any:
    """A loss whose temperatures are near 2, and whose top is in the head."""
    if "truncated" in name:
        given["adjustment"] = {"top": 4}
    loss = loss_of(name, **given)
    if not loss.uses_teacher or name == "mse":
        return loss
    tau = {"tau": 2.0} if loss.temperature.reference_tau else {}
    if name == "ctkd":
        tau = {"span": 2.0}
    return loss_of(name, **given, temperature={"kind": loss.temperature.kind, **tau})


@pytest.mark.parametrize("name", ["ce", *CONSTANT, "mse"])
def test_targets_that_have_the_whole_row_give_the_loss_of_dense_logits(name: str) -> None:
    loss = small(name)
    check_token_loss(loss, WHOLE)
    torch.manual_seed(3)
    found = with_gradient(lambda v: token_loss(v, LABELS, WHOLE, loss).total, STUDENT)
    torch.manual_seed(3)
    expected = with_gradient(lambda v: distillation_loss(v, TEACHER, LABELS, loss).total, STUDENT)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("name", DYNAMIC)
def test_temperatures_of_each_position_give_nearly_the_loss_of_dense_logits(name: str) -> None:
    loss = small(name)
    check_token_loss(loss, WHOLE)
    theta = learned_temperature(loss)
    found = with_gradient(lambda v: token_loss(v, LABELS, WHOLE, loss, theta=theta).total, STUDENT)
    expected = with_gradient(lambda v: distillation_loss(v, TEACHER, LABELS, loss, theta=theta).total, STUDENT)
    assert abs(found[0] / expected[0] - 1) < 0.02
    assert (found[1] - expected[1]).norm() / expected[1].norm() < 0.02


def coarse(student_scaled: Tensor, targets: TokenTargets, temperature: float) -> tuple[Tensor, Tensor]:
    """log q and log p over K + 1 classes, p from the dense teacher."""
    p = (TEACHER / temperature).softmax(dim=1)
    q = student_scaled.softmax(dim=1)
    both = []
    for values in (q, p):
        head = values.gather(1, targets.indices)
        rest = values.scatter(1, targets.indices, 0.0).sum(dim=1, keepdim=True)
        both.append(torch.cat([head, rest], dim=1).log())
    return both[0], both[1]


def kl_of(log_q: Tensor, log_p: Tensor) -> Tensor:
    return (log_p.exp() * (log_p - log_q)).sum(dim=1)


def js_of(log_q: Tensor, log_p: Tensor) -> Tensor:
    log_m = (log_q.exp() / 2 + log_p.exp() / 2).log()
    return (kl_of(log_m, log_p) + kl_of(log_m, log_q)) / 2


DIVERGENCES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "kd": kl_of,
    "rkl": lambda log_q, log_p: kl_of(log_p, log_q),
    "js": js_of,
}


@pytest.mark.parametrize("temperature", [1.0, 2.0, 4.0])
@pytest.mark.parametrize("name", DIVERGENCES)
def test_a_tail_of_the_students_shape_is_one_class(name: str, temperature: float) -> None:
    loss = loss_of(name, ce_weight=0.0, kd_weight=1.0, temperature={"kind": "constant", "tau": temperature})
    found = with_gradient(lambda v: token_loss(v, LABELS, MASS_ALONE, loss).total, STUDENT)
    expected = with_gradient(
        lambda v: temperature**2 * DIVERGENCES[name](*coarse(v / temperature, MASS_ALONE, temperature)).mean(), STUDENT
    )
    torch.testing.assert_close(found, expected, rtol=1e-7, atol=1e-10)
    asked = loss.model_copy(update={"tail": "student"})
    again = with_gradient(lambda v: token_loss(v, LABELS, WHOLE, asked).total, STUDENT)
    torch.testing.assert_close(again, expected, rtol=1e-7, atol=1e-10)


def test_a_ghost_without_and_with_the_teachers_matrix_is_the_same() -> None:
    loss = loss_of("dtkd", ce_weight=0.0, temperature={"kind": "dtkd", "tau": 2.0, "detach": True})
    found = with_gradient(lambda v: token_loss(v, LABELS, MASS_ALONE, loss).total, STUDENT)
    by_rows = loss_of("dtkd+js", ce_weight=0.0, temperature={"kind": "dtkd", "tau": 2.0, "detach": True})
    assert by_rows.divergence.kind == "jensen_shannon"

    def dense(v: Tensor) -> Tensor:
        sharp, teacher = v.detach().amax(dim=1), TEACHER.amax(dim=1)
        t_student, t_teacher = (4 * each / (sharp + teacher) for each in (sharp, teacher))
        shape = scaled_logits(MASS_ALONE, t_teacher.unsqueeze(1), v / t_student.unsqueeze(1))
        dynamic = t_student * t_teacher * kl_of((v / t_student.unsqueeze(1)).log_softmax(1), shape.log_softmax(1))
        plain = 4 * kl_of((v / 2).log_softmax(1), scaled_logits(MASS_ALONE, 2.0, v / 2).log_softmax(1))
        return (loss.kd_weight * dynamic + loss.plain_kd_weight * plain).mean()

    torch.testing.assert_close(found, with_gradient(dense, STUDENT), rtol=1e-7, atol=1e-10)


def test_dist_has_its_rows_alone() -> None:
    rows = loss_of("dist", ce_weight=0.0, divergence={"kind": "dist", "gamma": 0.0})
    found = with_gradient(lambda v: token_loss(v, LABELS, WHOLE, rows).total, STUDENT)

    def pearson(v: Tensor) -> Tensor:
        q, p = (z.softmax(dim=1) for z in (v, TEACHER))
        both = torch.stack([torch.corrcoef(torch.stack(pair))[0, 1] for pair in zip(q, p, strict=True)])
        return (1 - both).mean()

    torch.testing.assert_close(found, with_gradient(pearson, STUDENT), rtol=1e-5, atol=1e-8)


@few
@given(st.integers(0, 2**31), st.integers(1, 5), st.sampled_from([0.1, 1.0, 30.0, 300.0]))
def test_ghost_kl_is_finite_and_has_the_gradient_of_its_formula(seed: int, top_k: int, spread: float) -> None:
    teacher, student = language_logits(3, 8, seed=seed) * spread / 3, language_logits(3, 8, seed=seed + 1) * spread
    targets = targets_of(teacher, top_k)
    head, tail = head_and_tail(targets, 2.0)
    t, weight = torch.full((3, 1), 1.5, dtype=torch.float64), torch.tensor([1.0, 0.5, 2.0], dtype=torch.float64)

    def closed(v: Tensor) -> Tensor:
        return ghost_kl(v, t, targets.indices, head, tail, weight)

    # With a weight that carries a gradient the plain formula is taken.
    def plain(v: Tensor) -> Tensor:
        return ghost_kl(v, t, targets.indices, head, tail, weight.clone().requires_grad_())

    found, expected = with_gradient(closed, student), with_gradient(plain, student)
    assert found[0].isfinite()
    assert found[1].isfinite().all()
    assert found[0] > -1e-9
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-9)


def test_the_gradients_of_ghost_kl_with_respect_to_all_inputs() -> None:
    targets, few_rows = targets_of(TEACHER[:3, :9], 3), STUDENT[:3, :9].clone().requires_grad_()
    t = torch.tensor([[0.9], [1.5], [3.0]], dtype=torch.float64, requires_grad=True)
    weight = torch.rand(3, dtype=torch.float64, requires_grad=True)

    def value(v: Tensor, t_student: Tensor, t_teacher: Tensor, w: Tensor) -> Tensor:
        return ghost_kl(v, t_student, targets.indices, *head_and_tail(targets, t_teacher), w)

    torch.autograd.gradcheck(value, (few_rows, t, t.detach().clone().requires_grad_(), weight))
    fixed = tuple(each.detach() for each in (t, t, weight))
    torch.autograd.gradcheck(lambda v: value(v, *fixed), few_rows)
    torch.autograd.gradgradcheck(lambda v: value(v, *fixed), few_rows)


def test_equal_networks_have_no_loss_and_no_gradient() -> None:
    for name in ("kd", "rkl", "js", "cosine", "dkd"):
        for targets in (WHOLE, MASS_ALONE):
            loss = small(name, ce_weight=0.0)
            value, gradient = with_gradient(lambda v, t=targets, o=loss: token_loss(v, LABELS, t, o).total, TEACHER)  # type: ignore[misc]
            assert abs(value) < 1e-6
            assert gradient.abs().max() < 1e-6


def test_draws_have_the_gradient_of_the_teacher_in_the_mean() -> None:
    loss = loss_of(ce_weight=0.0, kd_weight=1.0, temperature={"kind": "constant", "tau": 1.0})
    expected = with_gradient(lambda v: distillation_loss(v, TEACHER, LABELS, loss).total, STUDENT)[1]
    errors = []
    for rounds in (50, 5_000):
        targets = drawn(TEACHER, rounds)
        check_token_loss(loss, targets)
        gradient = with_gradient(lambda v, t=targets: token_loss(v, LABELS, t, loss).total, STUDENT)[1]  # type: ignore[misc]
        errors.append(float((gradient - expected).norm() / expected.norm()))
    assert errors[1] < errors[0] / 5, "the error falls with the root of the number of draws"
    assert errors[1] < 0.05


def test_draws_at_another_temperature_have_its_loss() -> None:
    loss = loss_of(ce_weight=0.0, kd_weight=1.0, temperature={"kind": "constant", "tau": 2.0})
    gradient = with_gradient(lambda v: token_loss(v, LABELS, drawn(TEACHER, 50_000, 2.0), loss).total, STUDENT)[1]
    expected = with_gradient(lambda v: distillation_loss(v, TEACHER, LABELS, loss).total, STUDENT)[1]
    assert (gradient - expected).norm() / expected.norm() < 0.05


@pytest.mark.parametrize(
    ("name", "targets", "reason"),
    [
        ("pld", WHOLE, "plackett_luce is refused for tokens: it sorts"),
        ("dist", WHOLE, "dist is refused for tokens: its columns"),
        ("cswt", WHOLE, "cswt is refused for tokens"),
        ("comparative", WHOLE, "comparative is refused for tokens"),
        ("ff_g2m", WHOLE, "ff_g2m is refused for tokens"),
        ("kd", None, "needs a teacher's targets"),
        ("mse", MASS_ALONE, "mse needs the shape of the teacher's tail, and these rows have its mass alone"),
        ("dtd", MASS_ALONE, "dtd_flsw needs the shape"),
        ("zscore", MASS_ALONE, "z_score needs the shape"),
        ("noisy", MASS_ALONE, "noise needs the shape"),
        ("truncated", MASS_ALONE, "truncation to the top 16 needs the shape"),
        ("kd", targets_of(TEACHER, K, (1.0,)), "T = 4 is asked of rows that state the mass"),
        ("cwsm", targets_of(TEACHER, K, (1.0,)), "a T of each position, that of dtd_cwsm, is asked of rows"),
        ("rkl", drawn(TEACHER, 9, 4.0), "needs probabilities, and these rows have classes that were drawn"),
        ("kd", drawn(TEACHER, 9), "T = 4 is asked of rows that were drawn at T = 1 only"),
        ("ctkd", drawn(TEACHER, 9), "is asked of rows that were drawn at T = 1 only"),
    ],
)
def test_losses_that_are_not_defined_are_refused_with_the_reason(
    name: str, targets: TokenTargets | None, reason: str
) -> None:
    with pytest.raises(UsageError, match=reason):
        check_token_loss(loss_of(name), targets)


def test_the_level_and_the_chosen_tail_are_looked_at() -> None:
    without = targets_of(TEACHER, K, rank=3)
    without = without.__class__(**{**vars(without), "logsumexp": None})
    with pytest.raises(UsageError, match="the temperature dtkd depends on the level"):
        check_token_loss(loss_of("dtkd"), without)
    with pytest.raises(UsageError, match=r"mse needs the shape of the teacher's tail, and loss.tail is `student`"):
        check_token_loss(loss_of("mse", tail="student"), WHOLE)
    with pytest.raises(UsageError, match="controller is refused for tokens"):
        check_token_loss(loss_of("kd", controller={"kind": "tgeo"}), WHOLE)
    check_token_loss(loss_of("dist", divergence={"kind": "dist", "gamma": 0.0}), WHOLE)
    check_token_loss(loss_of("ce"), None)


def test_a_small_difference_of_the_loss_is_seen_in_float32() -> None:
    loss = loss_of(ce_weight=0.0, kd_weight=1.0, temperature={"kind": "constant", "tau": 1.0})
    near = (TEACHER + 1e-3 * STUDENT).float()
    found = token_loss(near, LABELS, targets_of(TEACHER, K).to("cpu"), loss).total
    expected = token_loss(near.double(), LABELS, MASS_ALONE, loss).total
    assert math.isclose(float(found), float(expected), rel_tol=0.05)

"""Gradients by hand against the plain formulas, `gradcheck`, and what still takes the plain formulas."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from helpers.loss_cases import TAU, Batch, assert_all_agree, batches, few, loss_of, some
from hypothesis import given
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck

from kdcache.losses import Loss, distillation_loss, distillation_term, learned_temperature
from kdcache.losses.adjustments import probability_shift
from kdcache.losses.batch import BatchTotals
from kdcache.losses.closed_form import equalizing_temperatures, weighted_kl
from kdcache.losses.divergences import kl
from kdcache.losses.fused_loss import is_fused
from kdcache.losses.rows import log_softmax
from kdcache.losses.temperatures import constant, dtkd

LOSSES: dict[str, dict[str, Any]] = {
    "kd": {},
    "ka": {},
    "dtd": {},
    "cwsm": {},
    "ka+dtd": {},
    "dtkd": {},
    "dtkd+ka": {},
    "dtkd, logsumexp": {"name": "dtkd", "temperature": {"sharpness": "logsumexp"}},
    "dtkd, centered": {"name": "dtkd", "temperature": {"center": True}},
    "dtkd, exact": {
        "name": "dtkd",
        "temperature": {"sharpness": "logsumexp", "center": True, "equalize": "exact"},
    },
    "dtkd, detached": {"name": "dtkd", "temperature": {"detach": True}},
    "ctkd": {},
    "zscore": {},
    "lsr": {},
    "dtkd+lsr": {},
    "truncated": {"temperature": {"tau": 2.0}, "adjustment": {"top": 1}},
}
TEMPERATURES = torch.tensor([[0.5], [4.0], [9.0]], dtype=torch.float64)


def options(name: str) -> Loss:
    return Loss.model_validate({"name": name} | LOSSES[name])


def as_written(v: Tensor, u: Tensor, labels: Tensor, loss: Loss, theta: Tensor | None = None) -> Tensor:
    """The term as the docstring of `distillation_term` has it, by autograd alone."""
    inputs: dict[str, Any] = {"epoch": 3, "theta": theta} if loss.learns_temperature else {}
    if loss.normalization != "none":
        v, u = ((z - z.mean(1, keepdim=True)) / (z.std(1, keepdim=True) + 1e-7) for z in (v, u))
    if loss.temperature.kind == "dtkd" and loss.temperature.equalize == "published":  # type: ignore[attr-defined]
        t = authors_temperatures(v, u, loss.temperature)
    else:
        t = loss.temperature.bind(**inputs)(v, u)
    adjust = loss.adjustment.bind()

    def term(student: Tensor, teacher: Tensor, weight: Tensor) -> Tensor:
        return (weight * kl(v / student, adjust(u / teacher, labels), labels)).sum() / len(v)

    value = loss.kd_weight * term(*t)
    return value + loss.plain_kd_weight * term(*constant(v, u, loss.tau)) if loss.plain_kd_weight else value


def authors_temperatures(v: Tensor, u: Tensor, rule: Any) -> tuple[Tensor, Tensor, Tensor]:
    v = v.detach() if rule.detach else v
    if rule.center:
        v, u = v - v.mean(1, keepdim=True), u - u.mean(1, keepdim=True)
    y, x = (z.amax(1) if rule.sharpness == "max" else z.logsumexp(1) for z in (v, u))
    y, x = y.clamp_min(rule.sharpness_floor), x.clamp_min(rule.sharpness_floor)
    student, teacher = 2 * y * rule.tau / (x + y), 2 * x * rule.tau / (x + y)
    return student.unsqueeze(1), teacher.unsqueeze(1), teacher * student


def agree_with_the_plain_formulas(name: str, batch: Batch, tolerance: float) -> None:
    student, teacher, labels = batch
    loss = options(name)
    learned = learned_temperature(loss)
    theta = None if learned is None else learned.detach().double().requires_grad_()
    v = student.clone().requires_grad_()
    ours = distillation_term(v, teacher, labels, loss, 3, theta)
    plain = as_written(v, teacher, labels, loss, theta)
    found, expected = (
        (value.detach(), *torch.autograd.grad(value, [v] if theta is None else [v, theta])) for value in (ours, plain)
    )
    assert_all_agree(found, expected, tolerance)


@pytest.mark.parametrize("name", LOSSES)
def test_values_and_gradients_are_those_of_the_plain_formulas(name: str) -> None:
    generator = torch.Generator().manual_seed(4)
    student, teacher = (2 * torch.randn(64, 100, generator=generator, dtype=torch.float64) for _ in range(2))
    labels = torch.randint(-1, 100, (64,), generator=generator)
    labels[::2] = teacher[::2].argmax(dim=1)
    agree_with_the_plain_formulas(name, (student, teacher, labels), 1e-12)


@pytest.mark.parametrize("name", LOSSES)
@few
@given(batch=batches())
def test_they_are_for_logits_far_from_0_or_nearly_equal(name: str, batch: Batch) -> None:
    # Rows whose spread is a thousandth of their level lose three digits in either formula.
    agree_with_the_plain_formulas(name, batch, 1e-9)


@pytest.mark.parametrize("name", ["kd", "ka+dtd", "dtkd", "dtkd+ka", "dtkd, logsumexp", "dtkd+lsr"])
def test_gradients_of_the_teacher_and_second_derivatives_are_those_of_the_plain_formulas(name: str) -> None:
    generator = torch.Generator().manual_seed(1)
    v, u = (torch.randn(3, 5, generator=generator, dtype=torch.float64).requires_grad_() for _ in range(2))
    labels, loss = torch.tensor([1, -1, 4]), options(name)
    if not loss.temperature.uses_batch:  # its temperatures count as constants
        assert gradcheck(lambda v, u: distillation_term(v, u, labels, loss), (v, u))
        assert gradgradcheck(lambda v: distillation_term(v, u.detach(), labels, loss), (v,))
    first = [torch.autograd.grad(formula(v, u, labels, loss), [v, u]) for formula in (distillation_term, as_written)]
    assert_all_agree(first[0], first[1], tolerance=1e-12)


def test_the_weighted_kl_has_the_gradients_of_its_docstring() -> None:
    generator = torch.Generator().manual_seed(2)
    v, u = (torch.randn(3, 6, generator=generator, dtype=torch.float64) for _ in range(2))
    weight = torch.tensor([1.0, 16.0, 0.0], dtype=torch.float64)
    given = tuple(value.clone().requires_grad_() for value in (v, TEMPERATURES, TEMPERATURES.flip(0), weight))

    def both(v: Tensor, student: Tensor, teacher: Tensor, weight: Tensor) -> Tensor:
        return weighted_kl(v, (u / teacher).detach(), student, teacher, weight)

    assert gradcheck(both, given[:2] + tuple(value.detach() for value in given[2:]))
    assert gradcheck(both, given)
    assert gradgradcheck(both, given)


def test_the_equalizing_temperatures_have_the_gradients_of_their_docstring() -> None:
    y, x = (torch.tensor(values, dtype=torch.float64).requires_grad_() for values in ([2.0, 1e-3, 7], [1.0, 5, 1e-3]))
    for part in range(3):
        assert gradcheck(lambda y, x, part=part: equalizing_temperatures(y, x, 4.0)[part], (y, x))
    assert gradcheck(lambda y, x: equalizing_temperatures(y, x, 4.0), (y, x))
    assert gradgradcheck(lambda y, x: equalizing_temperatures(y, x, 4.0), (y, x))


def test_gradients_of_tied_maxima_are_shared_out() -> None:
    v = torch.tensor([[3.0, 3.0, 1.0], [0.0, 0.0, 0.0]], dtype=torch.float64).requires_grad_()
    u = torch.tensor([[2.0, 0.0, 2.0], [1.0, 1.0, -1.0]], dtype=torch.float64)
    labels, loss = torch.tensor([0, 2]), options("dtkd")
    (ours,), (plain,) = (
        torch.autograd.grad(formula(v, u, labels, loss), v) for formula in (distillation_term, as_written)
    )
    assert_all_agree((ours,), (plain,), tolerance=1e-12)


WHOLE = {name: LOSSES[name] for name in ("kd", "ka", "lsr", "truncated", "dtkd", "dtkd+ka", "dtkd, detached")} | {
    "dtkd, cold": {"name": "dtkd", "temperature": {"tau": 0.5, "sharpness_floor": 2.0}, "kd_weight": 0.3},
    "dtkd alone": {"name": "dtkd", "plain_kd_weight": 0.0, "ce_weight": 0.0},
    "kd alone": {"ce_weight": 0.0, "name": "kd"},
}


def whole_loss(v: Tensor, u: Tensor, labels: Tensor, loss: Loss) -> Tensor:
    """The total as the docstring of `distillation.py` has it, by autograd alone, in epoch 5."""
    known = labels >= 0
    ce = -v.log_softmax(1)[known, labels[known]].sum() / max(int(known.sum()), 1)
    return loss.ce_weight * ce + min(5 / (loss.warmup_epochs or 5), 1.0) * as_written(v, u, labels, loss)


def whole_options(name: str) -> Loss:
    return Loss.model_validate({"name": name} | WHOLE[name])


def agrees_as_a_whole(name: str, batch: Batch, tolerance: float) -> None:
    student, teacher, labels = batch
    loss, v = whole_options(name), student.clone().requires_grad_()
    assert is_fused(loss, v, teacher)
    parts = distillation_loss(v, teacher, labels, loss, 5)
    plain = whole_loss(v, teacher, labels, loss)
    assert parts.total.grad_fn is not None and "Fused" in parts.total.grad_fn.name()
    assert not any(part.requires_grad for part in parts[1:])
    found, expected = ((value.detach(), *torch.autograd.grad(value, v)) for value in (parts.total, plain))
    assert_all_agree(found, expected, tolerance)
    with torch.no_grad():  # which takes the path of the parts
        assert_all_agree(parts, distillation_loss(student, teacher, labels, loss, 5), tolerance)


@pytest.mark.parametrize("name", WHOLE)
@few
@given(batch=batches())
def test_a_loss_in_one_function_is_that_of_the_formula(name: str, batch: Batch) -> None:
    agrees_as_a_whole(name, batch, 1e-9)


@pytest.mark.parametrize("name", sorted(WHOLE.keys() - {"dtkd, detached"}))
def test_a_loss_in_one_function_has_second_derivatives(name: str) -> None:
    generator = torch.Generator().manual_seed(6)
    v, u = (torch.randn(3, 5, generator=generator, dtype=torch.float64) + 2 for _ in range(2))
    labels, loss = torch.tensor([1, -1, 4]), whole_options(name)

    def total(v: Tensor) -> Tensor:
        return distillation_loss(v * 1.5, u, labels, loss, 5).total

    assert gradcheck(total, v.requires_grad_())
    assert gradgradcheck(total, v)


def test_equal_maxima_and_batches_without_labels_in_one_function() -> None:
    v = torch.tensor([[3.0, 3.0, 1.0], [0.0, 0.0, 0.0]], dtype=torch.float64)
    u = torch.tensor([[2.0, 0.0, 2.0], [1.0, 1.0, -1.0]], dtype=torch.float64)
    for labels in (torch.tensor([0, 2]), torch.tensor([-1, -1])):
        agrees_as_a_whole("dtkd", (v, u, labels), 1e-12)
        agrees_as_a_whole("kd", (v, u, labels), 1e-12)


def test_parts_of_a_batch_add_up_in_one_function() -> None:
    generator = torch.Generator().manual_seed(7)
    v, u = (3 * torch.randn(7, 9, generator=generator, dtype=torch.float64) for _ in range(2))
    labels = torch.tensor([0, 3, -1, 6, 8, 8, -1])
    for name in WHOLE:
        loss, leaf = whole_options(name), v.clone().requires_grad_()
        for whole in (BatchTotals(7, 5, 5), BatchTotals(7, torch.tensor(5), torch.tensor(5))):
            cuts = [
                distillation_loss(leaf[cut], u[cut], labels[cut], loss, 5, whole=whole)
                for cut in (slice(0, 2), slice(2, 3), slice(3, 7))
            ]
            sums = [torch.stack(parts).sum() for parts in zip(*cuts, strict=True)]
            (found,) = torch.autograd.grad(sums[0], leaf)
            plain = whole_loss(leaf, u, labels, loss)
            assert_all_agree((sums[0], found), (plain, *torch.autograd.grad(plain, leaf)), 1e-12)


@pytest.mark.parametrize("name", ["kd", "dtkd", "ka+dtd"])
def test_transforms_of_torch_func_see_plain_formulas(name: str) -> None:
    generator = torch.Generator().manual_seed(3)
    v = torch.randn(2, 4, 7, generator=generator)
    u, labels, loss = torch.randn(4, 7, generator=generator), torch.tensor([0, 3, -1, 6]), options(name)
    stacked = torch.func.vmap(torch.func.grad(lambda v: distillation_loss(v, u, labels, loss, 5).total))(v)
    for network, found in zip(v, stacked, strict=True):
        leaf = network.clone().requires_grad_()
        (alone,) = torch.autograd.grad(distillation_loss(leaf, u, labels, loss, 5).total, leaf)
        assert_all_agree((found,), (alone,), tolerance=1e-5)


@pytest.mark.parametrize("name", ["kd", "ka", "ka+dtd", "dtkd"])
def test_a_compiled_loss_is_one_graph_of_the_plain_formulas(name: str) -> None:
    generator = torch.Generator().manual_seed(5)
    v, u = (3 * torch.randn(6, 9, generator=generator) for _ in range(2))
    labels, loss = torch.tensor([0, 3, -1, 6, 8, 8]), options(name)
    compiled = torch.compile(distillation_loss, backend="aot_eager", fullgraph=True)  # needs no compiler
    results = []
    for function in (compiled, distillation_loss):
        leaf = v.clone().requires_grad_()
        parts = function(leaf, u, labels, loss, 5)
        results.append((*(part.detach() for part in parts), *torch.autograd.grad(parts.total, leaf)))
    assert_all_agree(results[0], results[1], tolerance=1e-5)


@some
@given(batch=batches(), tau=TAU)
def test_the_shift_of_scaled_logits_is_the_scaled_shift(batch: Batch, tau: float) -> None:
    _, teacher, labels = batch
    if all(len(set(z.flatten().tolist())) == z.numel() for z in (teacher, teacher / tau)):
        assert torch.equal(probability_shift(teacher / tau, labels), probability_shift(teacher, labels) / tau)


def test_the_gradient_of_a_shift_goes_back_to_where_the_logit_came_from() -> None:
    teacher = torch.tensor([[3.0, 1.0, 2.0], [3.0, 1.0, 2.0], [3.0, 1.0, 2.0]]).requires_grad_()
    slopes = torch.tensor([[1.0, 10.0, 100.0]]).expand(3, 3)
    shifted = probability_shift(teacher, torch.tensor([2, 0, -1]))
    (gradient,) = torch.autograd.grad(shifted, teacher, slopes)
    assert torch.equal(shifted[0], torch.tensor([2.0, 1.0, 3.0]))
    assert torch.equal(gradient, torch.tensor([[100.0, 10, 1], [1, 10, 100], [1, 10, 100]]))


def test_detached_temperatures_of_dtkd_get_no_gradient() -> None:
    v, u = torch.randn(4, 5).requires_grad_(), torch.randn(4, 5)
    assert not any(value.requires_grad for value in dtkd(v, u, detach=True))
    assert all(value.requires_grad for value in dtkd(v, u))
    assert loss_of("dtkd").temperature.has_gradient


@pytest.mark.parametrize("classes", [1, 2, 8, 15, 16, 100])
def test_the_softmax_of_rows_does_not_depend_on_how_they_lie_in_memory(classes: int) -> None:
    torch.manual_seed(0)
    columns = 5 * torch.randn(classes, 30)
    for rows in (columns.t(), columns.t().contiguous(), columns.t()[::2], columns.t()[:0]):
        given, same = rows.clone().requires_grad_(), rows.double().requires_grad_()
        found, expected = log_softmax(given), same.log_softmax(dim=1)
        torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-6)
        weight = torch.randn(found.shape)
        torch.autograd.backward((found * weight).sum())
        torch.autograd.backward((expected * weight.double()).sum())
        assert given.grad is not None
        assert same.grad is not None
        torch.testing.assert_close(given.grad.double(), same.grad, rtol=1e-4, atol=1e-5)

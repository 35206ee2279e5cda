"""Sums of the losses with gradients by hand: the values of the plain formulas, in fewer operations.

In a training step of a small student, starting an operation takes as long as its arithmetic, and autograd needs 36 of
them for KD and 127 for DTKD. The definitions remain `divergences.kl` and `temperatures.dtkd`,
which are also what `torch.compile` fuses and what second derivatives are computed from.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from kdcache.losses.divergences import kl
from kdcache.losses.rows import log_softmax


def is_traced() -> bool:
    """Return whether `torch.compile` or a transform of `torch.func` is at work, which need plain formulas."""
    return torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active()


def weighted_kl(
    student_logits: Tensor, target: Tensor, student_temperature: Tensor, teacher_temperature: Tensor, weight: Tensor
) -> Tensor:
    """Return sum_i w_i KL(p_i || q_i), a scalar, with q = softmax(v / T_stu) and p = softmax(z), z = A(u / T_tea).

    With D the divergence of a row and r = log p - log q, and z proportional to 1 / T_tea, the gradients of the row are

        d / d v     = w / T_stu * (q - p)
        d / d T_stu = -w / T_stu * sum_j (q_j - p_j) v_j / T_stu
        d / d T_tea = -w / T_tea * sum_j p_j (r_j - D) z_j
        d / d w     = D

    Args:
        student_logits: [B, C], v.
        target: [B, C], z, which gets no gradient.
        student_temperature: [B, 1].
        teacher_temperature: [B, 1]; must not require a gradient unless z is proportional to 1 / T_tea.
        weight: [B].
    """
    value: Tensor = _WeightedKL.apply(student_logits, target, student_temperature, teacher_temperature, weight)
    return value


class _WeightedKL(torch.autograd.Function):
    """The sum of `weighted_kl`."""

    @staticmethod
    def forward(ctx: Any, v: Tensor, z: Tensor, t_student: Tensor, t_teacher: Tensor, weight: Tensor) -> Tensor:
        """Return the sum, and keep what its gradients need."""
        scaled = v / t_student
        log_q, log_p = log_softmax(scaled), log_softmax(z)
        p = log_p.exp()
        terms = log_p.sub_(log_q).mul_(p)
        slope = log_q.exp_().sub_(p)
        values = terms.sum(dim=1)
        of_student = of_teacher = None
        if ctx.needs_input_grad[2]:
            of_student = (slope * scaled).sum(dim=1, keepdim=True)
        if ctx.needs_input_grad[3]:
            of_teacher = terms.addcmul_(p, values.unsqueeze(1), value=-1).mul_(z).sum(dim=1, keepdim=True)
        ctx.save_for_backward(v, z, t_student, t_teacher, weight)
        ctx.found = slope, values, of_student, of_teacher
        return weight.dot(values)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        """Return the gradients with respect to all but z."""
        _, _, t_student, t_teacher, weight = ctx.saved_tensors
        if torch.is_grad_enabled():
            return _differentiable(_plain_sum, ctx.saved_tensors, gradients, ctx.needs_input_grad)
        slope, values, of_student, of_teacher = ctx.found
        scale = (weight * gradients[0]).unsqueeze(1)
        of_v = scale / t_student
        return (
            slope * of_v,
            None,
            None if of_student is None else of_student * -of_v,
            None if of_teacher is None else of_teacher * -scale / t_teacher,
            values * gradients[0] if ctx.needs_input_grad[4] else None,
        )


def _plain_sum(v: Tensor, z: Tensor, t_student: Tensor, t_teacher: Tensor, weight: Tensor) -> Tensor:
    # The target has the value z, and the derivatives of one that is proportional to 1 / T_tea.
    return (weight * kl(v / t_student, z * t_teacher.detach() / t_teacher, weight)).sum()


def equalizing_temperatures(
    student_sharpness: Tensor, teacher_sharpness: Tensor, tau: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Return T_stu = 2 y tau / (x + y) and T_tea = 2 x tau / (x + y), [B, 1], and their product w, [B].

    The temperatures add up to 2 tau, so that all three depend on x and y through T_stu alone, with

        d T_tea / d T_stu = -1    d w / d T_stu = T_tea - T_stu
        d T_stu / d y = T_tea / (x + y)    d T_stu / d x = -T_stu / (x + y)

    Args:
        student_sharpness: [B], y, above 0.
        teacher_sharpness: [B], x, above 0.
        tau: reference temperature.
    """
    if is_traced():
        return _plain_temperatures(student_sharpness, teacher_sharpness, tau)
    found: tuple[Tensor, Tensor, Tensor] = _EqualizingTemperatures.apply(student_sharpness, teacher_sharpness, tau)
    return found


class _EqualizingTemperatures(torch.autograd.Function):
    """The temperatures of `equalizing_temperatures`."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, x: Tensor, tau: float) -> tuple[Tensor, Tensor, Tensor]:
        """Return the temperatures and the weight."""
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(y, x)
        ctx.tau = tau
        t_student, t_teacher, weight = _plain_temperatures(y, x, tau)
        ctx.found = t_student.detach(), t_teacher.detach()
        return t_student, t_teacher, weight

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        """Return the gradients with respect to both sharpnesses."""
        y, x = ctx.saved_tensors
        if torch.is_grad_enabled():
            return _differentiable(_plain_temperatures, (y, x, ctx.tau), gradients, ctx.needs_input_grad)
        t_student, t_teacher = (t.squeeze(1) for t in ctx.found)
        of_student, of_teacher, of_weight = gradients
        slope = torch.zeros_like(y) if of_weight is None else of_weight * (t_teacher - t_student)
        if of_student is not None:
            slope = slope + of_student.squeeze(1)
        if of_teacher is not None:
            slope = slope - of_teacher.squeeze(1)
        slope = slope / (x + y)
        return slope * t_teacher, slope * -t_student if ctx.needs_input_grad[1] else None, None


def _plain_temperatures(y: Tensor, x: Tensor, tau: float) -> tuple[Tensor, Tensor, Tensor]:
    t_student, t_teacher = 2 * y * tau / (x + y), 2 * x * tau / (x + y)
    return t_student.unsqueeze(1), t_teacher.unsqueeze(1), t_teacher * t_student


def _differentiable(
    formula: Callable[..., Tensor | tuple[Tensor, ...]],
    inputs: Sequence[Any],
    gradients: Sequence[Tensor | None],
    needed: Sequence[bool],
) -> tuple[Tensor | None, ...]:
    """Return the gradients of a plain formula with a graph, for second derivatives; None where none is needed."""
    results = formula(*inputs)
    results = results if isinstance(results, tuple) else (results,)
    given = [(result, gradient) for result, gradient in zip(results, gradients, strict=True) if gradient is not None]
    wanted = [value for value, is_needed in zip(inputs, needed, strict=True) if is_needed]
    outputs, slopes = zip(*given, strict=True)
    found = iter(torch.autograd.grad(outputs, wanted, slopes, create_graph=True))
    return tuple(next(found) if is_needed else None for is_needed in needed)

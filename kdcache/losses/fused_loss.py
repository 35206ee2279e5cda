"""The whole loss of KD, KA and DTKD, and its gradient, as one function of the student's logits.

In a training step of a small student, starting an operation takes as long as its arithmetic. The gradient is therefore
found together with the value, in about half the operations that autograd needs for the parts. The definition is
`distillation.distillation_loss`, from which second derivatives are computed.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from kdcache.losses.batch import at_least_one
from kdcache.losses.closed_form import is_traced
from kdcache.losses.config import Loss
from kdcache.losses.rows import log_softmax
from kdcache.losses.temperatures import DTKD, ConstantTemperature

Adjust = Callable[[Tensor, Tensor], Tensor]


class Weights(NamedTuple):
    """Factors of the sums over the samples.

    Attributes:
        cross_entropy: a number or a tensor [].
        dynamic: of the divergences at DTKD's temperatures; 0 for a constant temperature.
        plain: of the divergences at tau.
        warmup: factor of both in the total.
    """

    cross_entropy: Tensor | float
    dynamic: float
    plain: float
    warmup: float


def is_fused(loss: Loss, student_logits: Tensor, teacher_logits: Tensor) -> bool:
    """Return whether `fused_loss` computes a loss: that of KL divergences at a constant T or that of published DTKD."""
    temperature = loss.temperature
    by_sharpness = (
        isinstance(temperature, DTKD)
        and temperature.sharpness == "max"
        and temperature.equalize == "published"
        and not temperature.center
        and loss.adjustment.commutes_with_scale
    )
    return (
        loss.divergence.has_closed_form
        and loss.normalization == "none"
        and (by_sharpness or isinstance(temperature, ConstantTemperature))
        and not loss.adjustment.uses_batch
        and not loss.skips_unlabeled
        and student_logits.requires_grad
        and not teacher_logits.requires_grad
        and torch.is_grad_enabled()
        and not is_traced()
    )


def weights_of(loss: Loss, rows: int, labeled: Tensor | int, warmup: float, dtype: torch.dtype) -> Weights:
    """Return the factors of the sums over the samples of a batch.

    Args:
        loss: one that `is_fused`.
        rows: number of samples of the batch.
        labeled: number of labeled samples of the batch.
        warmup: factor of the distillation weights.
        dtype: of the logits.
    """
    labeled = labeled.to(dtype) if isinstance(labeled, Tensor) else labeled
    count = max(rows, 1)
    dynamic, plain = loss.kd_weight / count, loss.plain_kd_weight / count
    if isinstance(loss.temperature, ConstantTemperature):
        dynamic, plain = 0.0, dynamic + plain
    return Weights(loss.ce_weight / at_least_one(labeled), dynamic, plain, warmup)


def fused_loss(
    student_logits: Tensor,
    teacher_logits: Tensor,
    labels: Tensor,
    loss: Loss,
    weights: Weights,
    all_labeled: bool,
    plain_total: Callable[[], Tensor],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return the total, and the sums of cross-entropy, distillation, T_stu and T_tea over the samples; all scalar.

    With v and u the logits of a row, q = softmax(v / T_stu), p = softmax(A(u / T_tea)), r = log p - log q and
    D = KL(p || q), the gradients of a row are

        CE                d / d v = softmax(v) - onehot(y)
        T^2 D             d / d v = T (q - p)
        T_stu T_tea D     d / d v = T_tea (q - p) + d T_stu / d v * s
                          s = (T_tea - T_stu) D - T_tea sum_j (q - p)_j v_j / T_stu
                            + T_stu sum_j p_j (r_j - D) u_j / T_tea
                          d T_stu / d max v = T_tea / (x + y), 0 where max v is below the floor

    where s is the derivative by T_stu, with T_tea = 2 tau - T_stu.

    Args:
        student_logits: [B, C], v.
        teacher_logits: [B, C], u.
        labels: [B] int64, -1 where not known.
        loss: one that `is_fused`.
        weights: from `weights_of`.
        all_labeled: whether every sample is known to have a label.
        plain_total: returns the total by autograd alone, for second derivatives.
    """
    found: tuple[Tensor, Tensor, Tensor, Tensor, Tensor] = _FusedLoss.apply(
        student_logits, teacher_logits, labels, loss, weights, all_labeled, plain_total
    )
    return found


class _FusedLoss(torch.autograd.Function):
    """The value and the gradient of `fused_loss`."""

    @staticmethod
    def forward(
        ctx: Any,
        v: Tensor,
        u: Tensor,
        labels: Tensor,
        loss: Loss,
        weights: Weights,
        all_labeled: bool,
        plain_total: Callable[[], Tensor],
    ) -> tuple[Tensor, ...]:
        """Return the total and its parts, and keep the gradient of the total."""
        adjust: Adjust = loss.adjustment.bind()
        cross_entropy, slope = _cross_entropy(v, labels, weights.cross_entropy, all_labeled)
        distilled = v.new_zeros(())
        student = teacher = None
        if weights.dynamic:
            rule: Any = loss.temperature
            distilled, student, teacher = _add_dtkd(slope, v, u, labels, adjust, rule, weights)
        if weights.plain:
            of_plain = _add_plain(slope, v, u, labels, adjust, loss.tau, weights)
            distilled = torch.add(distilled, of_plain, alpha=weights.plain * loss.tau**2)
        if student is None or teacher is None:
            student = teacher = v.new_full((), loss.tau * len(v))
        total = cross_entropy.mul(weights.cross_entropy).add_(distilled, alpha=weights.warmup)
        ctx.slope, ctx.plain_total = slope, plain_total
        ctx.save_for_backward(v)
        ctx.mark_non_differentiable(cross_entropy, distilled, student, teacher)
        return total, cross_entropy, distilled, student, teacher

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        """Return the gradient with respect to the student's logits."""
        (v,) = ctx.saved_tensors
        if torch.is_grad_enabled():
            (slope,) = torch.autograd.grad(ctx.plain_total(), v, gradients[0], create_graph=True)
        else:
            slope = ctx.slope * gradients[0]
        return slope, None, None, None, None, None, None


def _cross_entropy(v: Tensor, labels: Tensor, weight: Tensor | float, all_labeled: bool) -> tuple[Tensor, Tensor]:
    """Return the sum of the cross-entropy over the labeled samples, and its weighted gradient [B, C]."""
    log_q = log_softmax(v)
    total = F.nll_loss(log_q, labels, ignore_index=-1, reduction="sum")
    if isinstance(weight, float) and not weight:
        return total, torch.zeros_like(v)
    slope, index = log_q.exp_(), labels.unsqueeze(1)
    if all_labeled:
        slope.scatter_(1, index, -1.0, reduce="add")
    else:
        known = (index >= 0).to(v.dtype)
        slope.mul_(known).scatter_add_(1, index.clamp_min(0), -known)
    return total, slope.mul_(weight)


def _log_ratio(scaled: Tensor, target: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return q - p, p and log p - log q of the rows, each [B, C]."""
    log_q, log_p = log_softmax(scaled), log_softmax(target)
    p = log_p.exp()
    ratio = log_p.sub_(log_q)
    return log_q.exp_().sub_(p), p, ratio


def _row_sums(a: Tensor, b: Tensor) -> Tensor:
    """Return sum_j a_ij b_ij of the rows of two matrices [B, C], as [B, 1]."""
    sums: Tensor = torch.linalg.vecdot(a, b)
    return sums.unsqueeze(1)


def _add_plain(
    slope: Tensor, v: Tensor, u: Tensor, labels: Tensor, adjust: Adjust, tau: float, weights: Weights
) -> Tensor:
    """Add the gradient of the divergences at tau, and return the sum of these."""
    difference, p, ratio = _log_ratio(v / tau, adjust(u / tau, labels))
    slope.add_(difference, alpha=weights.plain * weights.warmup * tau)
    if not p.is_contiguous():  # rows of few classes are columns in memory
        p, ratio = p.t(), ratio.t()
    return p.reshape(-1).dot(ratio.reshape(-1))


def _add_dtkd(
    slope: Tensor, v: Tensor, u: Tensor, labels: Tensor, adjust: Adjust, rule: DTKD, weights: Weights
) -> tuple[Tensor, Tensor, Tensor]:
    """Add the gradient of the divergences at DTKD's temperatures, and return the sums of them and of both T."""
    largest = v.amax(dim=1, keepdim=True)
    x, y = u.amax(dim=1, keepdim=True).clamp_min_(rule.sharpness_floor), largest.clamp_min(rule.sharpness_floor)
    share = (x + y).reciprocal_().mul_(2 * rule.tau)
    t_student, t_teacher = y.mul_(share), x.mul_(share)
    target = adjust(u / t_teacher, labels)
    scaled = v / t_student
    difference, p, ratio = _log_ratio(scaled, target)
    values = _row_sums(p, ratio)
    factor = weights.dynamic * weights.warmup
    slope.addcmul_(difference, t_teacher, value=factor)
    if not rule.detach:
        of_student = _row_sums(difference, scaled)
        p_target = p.mul_(target)
        of_teacher = _row_sums(p_target, ratio)
        # sum_j p_j (r_j - D) u_j / T_tea
        of_teacher.addcmul_(values, p_target.sum(dim=1, keepdim=True), value=-1)
        by_student = (t_teacher - t_student).mul_(values).addcmul_(t_teacher, of_student, value=-1)
        by_student.addcmul_(t_student, of_teacher).mul_(t_teacher).mul_(share)
        at = (v == largest).to(v.dtype)
        # Maxima that are equal share their gradient, as those of `amax` do.
        of_largest = by_student.mul_(largest >= rule.sharpness_floor).div_(at.sum(dim=1, keepdim=True))
        slope.addcmul_(at, of_largest, value=factor / (2 * rule.tau))
    distilled = (t_student * t_teacher).view(-1).dot(values.view(-1)) * weights.dynamic
    return distilled, t_student.sum(), t_teacher.sum()

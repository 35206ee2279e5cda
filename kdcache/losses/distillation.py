"""The sum of the three axes.

    loss = ce_weight * CE(v, y)
         + warmup(epoch) * ( kd_weight       * mean_i w_i   * D( A(u_i / T_tea_i), v_i / T_stu_i )
                           + plain_kd_weight * mean_i tau^2 * D( A(u_i / tau),     v_i / tau ) )

with v the student's and u the teacher's raw logits, y the labels, A the adjustment, (T_stu, T_tea, w) the temperatures
and D the divergence. Nothing here knows of caches: give it the live teacher's logits or the cached ones.

The adjustment comes after the temperature, as in the KA paper (1911.07471), where A acts on the softened P_tau. For the
probability shift the order makes no difference; a smoothed label softened once more would no longer be that label.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from kdcache.losses import adjustments, divergences, temperatures
from kdcache.losses.spec import Loss
from kdcache.losses.temperatures import Temperatures

ADJUSTMENTS: dict[str, Callable[..., Tensor]] = {
    "none": adjustments.none,
    "probability_shift": adjustments.probability_shift,
    "label_smoothing": adjustments.label_smoothing,
}
TEMPERATURES: dict[str, Callable[..., Temperatures]] = {
    "constant": temperatures.constant,
    "dtkd": temperatures.dtkd,
    "dtd_flsw": temperatures.dtd_flsw,
    "dtd_cwsm": temperatures.dtd_cwsm,
}
DIVERGENCES: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {"kl": divergences.kl}


class LossParts(NamedTuple):
    """A step's loss, all scalars.

    Attributes:
        total: the one to differentiate.
        cross_entropy: before `ce_weight`.
        distillation: what `distillation_term` gives: with its weights, before the warm-up.
    """

    total: Tensor
    cross_entropy: Tensor
    distillation: Tensor


def cross_entropy(student_logits: Tensor, labels: Tensor) -> Tensor:
    """Mean cross-entropy over the labelled samples of a batch; 0 where none is labelled.

    Args:
        student_logits: [B, C].
        labels: [B] int64, -1 for a sample whose label is not known.
    """
    summed = F.cross_entropy(student_logits, labels, ignore_index=-1, reduction="sum")
    return summed / (labels >= 0).sum().clamp_min(1)


def warmup(epoch: int, warmup_epochs: float) -> float:
    """min(epoch / warmup_epochs, 1), the epoch counted from 1: how far the teacher's weight has grown."""
    return min(epoch / warmup_epochs, 1.0) if warmup_epochs else 1.0


def distillation_term(student_logits: Tensor, teacher_logits: Tensor, labels: Tensor, loss: Loss) -> Tensor:
    """kd_weight * mean_i w_i * D(...) + plain_kd_weight * mean_i tau^2 * D(...), before the warm-up; a scalar.

    Args:
        student_logits: [B, C] raw logits.
        teacher_logits: [B, C] raw logits.
        labels: [B] int64, -1 where not known.
        loss: which adjustment, temperature and divergence, and their weights.
    """

    def term(t: Temperatures) -> Tensor:
        taught = ADJUSTMENTS[loss.adjustment.kind](teacher_logits / t.teacher, labels, **loss.adjustment.arguments())
        compare = DIVERGENCES[loss.divergence.kind]
        return (t.weight * compare(student_logits / t.student, taught, labels)).mean()

    rule = TEMPERATURES[loss.temperature.kind]
    total = loss.kd_weight * term(rule(student_logits, teacher_logits, **loss.temperature.arguments()))
    if loss.plain_kd_weight:
        plain = temperatures.constant(student_logits, teacher_logits, loss.temperature.tau)
        total = total + loss.plain_kd_weight * term(plain)
    return total


def distillation_loss(
    student_logits: Tensor, teacher_logits: Tensor | None, labels: Tensor, loss: Loss, epoch: int = 1
) -> LossParts:
    """The whole loss of a batch.

    Args:
        student_logits: [B, C] raw logits; half precision is raised to float32 first.
        teacher_logits: [B, C] raw logits, live or cached; None where the loss does not use the teacher.
        labels: [B] int64, -1 where not known.
        loss: what `--loss` and the pipeline file say.
        epoch: counted from 1, for the warm-up.

    Raises:
        ValueError: if the loss uses the teacher and its logits are None.
    """
    if student_logits.dtype in (torch.float16, torch.bfloat16):
        student_logits = student_logits.float()
    ce = cross_entropy(student_logits, labels)
    if not loss.uses_teacher:
        return LossParts(loss.ce_weight * ce, ce.detach(), torch.zeros_like(ce))
    if teacher_logits is None:
        raise ValueError(f"the loss {loss.name!r} needs the teacher's logits")
    distilled = distillation_term(student_logits, teacher_logits.to(student_logits.dtype), labels, loss)
    total = loss.ce_weight * ce + warmup(epoch, loss.warmup_epochs) * distilled
    return LossParts(total, ce.detach(), distilled.detach())

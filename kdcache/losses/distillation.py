"""The sum of the three axes.

    loss = ce_weight * CE(v, y)
         + warmup(epoch) * ( kd_weight       * mean_i w_i   * D( A(u_i / T_tea_i), v_i / T_stu_i )
                           + plain_kd_weight * mean_i tau^2 * D( A(u_i / tau),     v_i / tau ) )

with v the student's and u the teacher's raw logits, both standardized first where asked, y the labels, A the
adjustment, (T_stu, T_tea, w) the temperatures and D the divergence. Of DKD, which needs labels, mean_i is over the
labeled samples, as it is of CE. Nothing here knows of caches: give it the live teacher's logits or the cached ones.

Of a mixed image both see the mixture, and only CE(v, y) becomes share * CE(v, y) + (1 - share) * CE(v, y'), y' the
partner's label. What acts on the one true class has none to act on: KA, DKD, OFA and Plackett-Luce are refused.

The adjustment comes after the temperature, as in the KA paper (1911.07471), where A acts on the softened P_tau. For the
probability shift the order makes no difference; a smoothed label softened once more would no longer be that label.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from kdcache.losses import adjustments, divergences, normalizations, temperatures
from kdcache.losses.batch import BatchTotals, MixedLabels, at_least_one, batch_totals
from kdcache.losses.config import Loss
from kdcache.losses.temperatures import Temperatures

NORMALISATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "none": normalizations.none,
    "z_score": normalizations.z_score,
}
ADJUSTMENTS: dict[str, Callable[..., Tensor]] = {
    "none": adjustments.none,
    "probability_shift": adjustments.probability_shift,
    "label_smoothing": adjustments.label_smoothing,
    "truncation": adjustments.truncation,
}
TEMPERATURES: dict[str, Callable[..., Temperatures]] = {
    "constant": temperatures.constant,
    "dtkd": temperatures.dtkd,
    "dtd_flsw": temperatures.dtd_flsw,
    "dtd_cwsm": temperatures.dtd_cwsm,
    "ctkd": temperatures.ctkd,
}
DIVERGENCES: dict[str, Callable[..., Tensor]] = {
    "kl": divergences.kl,
    "reverse_kl": divergences.reverse_kl,
    "jensen_shannon": divergences.jensen_shannon,
    "dkd": divergences.dkd,
    "dist": divergences.dist,
    "plackett_luce": divergences.plackett_luce,
    "ofa": divergences.ofa,
    "mse": divergences.mse,
    "cosine": divergences.cosine,
}


class LossParts(NamedTuple):
    """A step's loss, all scalars.

    Attributes:
        total: the one to differentiate.
        cross_entropy: before `ce_weight`.
        distillation: what `distillation_term` gives: with its weights, before the warm-up.
        student_temperature: mean over the samples; 0 where there is no teacher.
        teacher_temperature: the same.
    """

    total: Tensor
    cross_entropy: Tensor
    distillation: Tensor
    student_temperature: Tensor
    teacher_temperature: Tensor


def cross_entropy(
    student_logits: Tensor,
    labels: Tensor,
    mixed: MixedLabels | None = None,
    smoothing: float = 0.0,
    whole: BatchTotals | None = None,
) -> Tensor:
    """Mean cross-entropy over the labeled samples of a batch; 0 where none is labeled.

    Of mixed images it is the mean over their labeled shares, which are not scaled up where they come to less than one.

    Args:
        student_logits: [B, C].
        labels: [B] int64, -1 for a sample whose label is not known.
        mixed: partners' labels and own shares; None where images are as they are.
        smoothing: of the labels, spread evenly over all classes (Szegedy et al. 2016, 1512.00567).
        whole: the batch that these samples are part of; None where they are all of it.
    """
    told = partial(F.cross_entropy, student_logits, ignore_index=-1, label_smoothing=smoothing)
    known = at_least_one((whole or batch_totals(labels, mixed, student_logits.dtype)).shares)
    if mixed is None:
        return told(labels, reduction="sum") / known
    share = mixed.share.to(student_logits.dtype)
    own, partner = told(labels, reduction="none"), told(mixed.partner_labels, reduction="none")
    return (share * own + (1 - share) * partner).sum() / known


def warmup(epoch: int, warmup_epochs: float) -> float:
    """min(epoch / warmup_epochs, 1), the epoch counted from 1: how far the teacher's weight has grown."""
    return min(epoch / warmup_epochs, 1.0) if warmup_epochs else 1.0


def learned_temperature(loss: Loss, device: torch.device | str = "cpu") -> nn.Parameter | None:
    """CTKD's theta [1], for the optimizer of the student and for `distillation_loss`; None for any other loss."""
    return nn.Parameter(torch.ones(1, device=device)) if loss.temperature.kind == "ctkd" else None


def distillation_term(
    student_logits: Tensor,
    teacher_logits: Tensor,
    labels: Tensor,
    loss: Loss,
    epoch: int = 1,
    theta: Tensor | None = None,
    whole: BatchTotals | None = None,
) -> Tensor:
    """kd_weight * mean_i w_i * D(...) + plain_kd_weight * mean_i tau^2 * D(...), before the warm-up; a scalar.

    Args:
        student_logits: [B, C] raw logits.
        teacher_logits: [B, C] raw logits.
        labels: [B] int64, -1 where not known.
        loss: which adjustment, temperature and divergence, and their weights.
        epoch: counted from 1; for CTKD.
        theta: what `learned_temperature` gave; for CTKD.
        whole: the batch that these samples are part of; None where they are all of it.

    Raises:
        ValueError: if CTKD has no theta.
    """
    whole = whole or batch_totals(labels)
    return _term_and_temperatures(student_logits, teacher_logits, labels, loss, epoch, theta, whole)[0]


def _term_and_temperatures(
    student_logits: Tensor,
    teacher_logits: Tensor,
    labels: Tensor,
    loss: Loss,
    epoch: int,
    theta: Tensor | None,
    whole: BatchTotals,
) -> tuple[Tensor, Temperatures]:
    if loss.temperature.kind == "ctkd" and theta is None:
        raise ValueError(f"the loss {loss.name!r} learns its temperature: make theta with learned_temperature(loss)")
    of_the_step: dict[str, dict[str, Any]] = {
        "ctkd": {"epoch": epoch, "theta": theta},
        "dtd_flsw": {"batch_sum": whole.sum},
        "dtd_cwsm": {"batch_sum": whole.sum},
        "dist": {"batch_sum": whole.sum},
    }
    student_logits, teacher_logits = (NORMALISATIONS[loss.normalization](z) for z in (student_logits, teacher_logits))
    rows = at_least_one(whole.labeled if loss.skips_unlabeled else whole.rows)

    def chosen(functions: dict[str, Callable[..., Any]], axis: Any) -> Callable[..., Any]:
        return partial(functions[axis.kind], **axis.arguments(), **of_the_step.get(axis.kind, {}))

    def term(t: Temperatures) -> Tensor:
        taught = chosen(ADJUSTMENTS, loss.adjustment)(teacher_logits / t.teacher, labels)
        values: Tensor = chosen(DIVERGENCES, loss.divergence)(student_logits / t.student, taught, labels)
        return (t.weight * values).sum() / rows

    found = chosen(TEMPERATURES, loss.temperature)(student_logits, teacher_logits)
    total = loss.kd_weight * term(found)
    if loss.plain_kd_weight:
        plain = temperatures.constant(student_logits, teacher_logits, loss.tau)
        total = total + loss.plain_kd_weight * term(plain)
    return total, found


def distillation_loss(
    student_logits: Tensor,
    teacher_logits: Tensor | None,
    labels: Tensor,
    loss: Loss,
    epoch: int = 1,
    mixed: MixedLabels | None = None,
    theta: Tensor | None = None,
    whole: BatchTotals | None = None,
    label_smoothing: float = 0.0,
) -> LossParts:
    """The whole loss of a batch.

    Args:
        student_logits: [B, C] raw logits; half precision is raised to float32 first.
        teacher_logits: [B, C] raw logits, live or cached; None where the loss does not use the teacher.
        labels: [B] int64, -1 where not known.
        loss: what `--loss` and the pipeline file say.
        epoch: counted from 1, for the warm-up and for CTKD.
        mixed: partners' labels and own shares, where each image is mixed with another.
        theta: what `learned_temperature` gave; for CTKD.
        whole: the batch that these samples are part of; None where they are all of it.
        label_smoothing: of the cross-entropy.

    Raises:
        ValueError: if the loss uses the teacher and its logits are None, acts on the one true class of mixed images, or
            is CTKD without theta.
    """
    if student_logits.dtype in (torch.float16, torch.bfloat16):
        student_logits = student_logits.float()
    whole = whole or batch_totals(labels, mixed, student_logits.dtype)
    ce = cross_entropy(student_logits, labels, mixed, label_smoothing, whole)
    if not loss.uses_teacher:
        none = torch.zeros_like(ce)
        return LossParts(loss.ce_weight * ce, ce.detach(), none, none, none)
    if teacher_logits is None:
        raise ValueError(f"the loss {loss.name!r} needs the teacher's logits")
    if mixed is not None and loss.acts_on_label:
        raise ValueError(f"{loss.acts_on_label} needs one label an image, and mixed images have two")
    teacher_logits = teacher_logits.to(student_logits.dtype)
    distilled, found = _term_and_temperatures(student_logits, teacher_logits, labels, loss, epoch, theta, whole)
    total = loss.ce_weight * ce + warmup(epoch, loss.warmup_epochs) * distilled
    means = (t.detach().sum() / whole.rows for t in (found.student, found.teacher))
    return LossParts(total, ce.detach(), distilled.detach(), *means)

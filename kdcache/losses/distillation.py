"""The loss as a sum over the axes.

    loss = ce_weight * CE(v, y)
         + warmup(epoch) * ( kd_weight       * mean_i w_i   * D( A(u_i / T_tea_i), v_i / T_stu_i )
                           + plain_kd_weight * mean_i tau^2 * D( A(u_i / tau),     v_i / tau ) )

with v the student's and u the teacher's raw logits, both normalized first if the loss says so, y the labels, A the
adjustment, (T_stu, T_tea, w) the temperatures and D the divergence. For DKD, which needs labels, mean_i is over the
labeled samples, as for CE. Caches play no role here: the teacher's logits may be computed or read.

A controller, if there is one, replaces CE(v_i, y_i) by (1 - a_i) CE(v_i, y_i) and D by a_i D, or sets the temperature
of each sample (`controllers.py`). With a gate over several teachers, the distillation term is the mean over those that
it chooses (`gate.py`).

For mixed images student and teacher see the mixture, and only CE(v, y) becomes share * CE(v, y) + (1 - share) *
CE(v, y'), y' the partner's label. KA, DKD, OFA and Plackett-Luce, which act on the one true class, are refused.

The adjustment comes after the temperature, as in the KA paper (1911.07471), where A acts on the softened P_tau. For the
probability shift the order makes no difference; a smoothed label that is softened again would no longer be that label.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from kdcache.losses import temperatures
from kdcache.losses.batch import BatchTotals, MixedLabels, at_least_one, batch_totals
from kdcache.losses.closed_form import is_traced, weighted_kl
from kdcache.losses.config import Loss
from kdcache.losses.controllers import Control
from kdcache.losses.fused_loss import fused_loss, is_fused, weights_of
from kdcache.losses.gate import chosen_logits, imbalance
from kdcache.losses.options import Options
from kdcache.losses.registry import NORMALIZATIONS
from kdcache.losses.temperatures import Temperatures

WeightedSum = Callable[[Tensor, Temperatures], Tensor]
"""(student's logits [B, C], temperatures) -> [], the sum of the weighted divergences of the samples."""

NO_CONTROL = Control()
"""What is set for each sample without a controller: nothing."""


class LossParts(NamedTuple):
    """The loss of a batch and its parts, all scalar tensors.

    Attributes:
        total: the loss to differentiate; the other values carry no gradient.
        cross_entropy: mean over the labeled samples in nats, before `ce_weight`.
        distillation: the distillation terms with their weights, before the warm-up; 0 without a teacher.
        student_temperature: mean over the samples; 0 without a teacher.
        teacher_temperature: mean over the samples; 0 without a teacher.
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
    """Return the mean cross-entropy over the labeled samples of a batch, in nats; 0 if none is labeled.

    For mixed images it is the mean over their labeled shares, which are not scaled up where they add up to less than 1.

    Args:
        student_logits: [B, C].
        labels: [B] int64, -1 where not known.
        mixed: labels of the partners and shares; None if images are not mixed.
        smoothing: label smoothing, spread evenly over all classes (Szegedy et al. 2016, 1512.00567).
        whole: totals of the batch that these samples are part of; None if they are all of it.
    """
    of_labels = partial(F.cross_entropy, student_logits, ignore_index=-1, label_smoothing=smoothing)
    labeled = at_least_one((whole or batch_totals(labels, mixed, student_logits.dtype)).shares)
    if mixed is None:
        return of_labels(labels, reduction="sum") / labeled
    share = mixed.share.to(student_logits.dtype)
    own, partner = of_labels(labels, reduction="none"), of_labels(mixed.partner_labels, reduction="none")
    return (share * own + (1 - share) * partner).sum() / labeled


def warmup(epoch: float | None, warmup_epochs: float) -> float:
    """Return min(epoch / warmup_epochs, 1), the factor of the distillation weights; 1 without an epoch.

    Args:
        epoch: counted from 1.
        warmup_epochs: length of the warm-up; 0 for none.
    """
    return min(epoch / warmup_epochs, 1.0) if epoch is not None and warmup_epochs else 1.0


def learned_temperature(loss: Loss, device: torch.device | str = "cpu") -> nn.Parameter | None:
    """Return the parameter theta [1] of a learned temperature (CTKD); None for a loss that learns none.

    Give it to the optimizer of the student and to `distillation_loss`.
    """
    return nn.Parameter(torch.ones(1, device=device)) if loss.learns_temperature else None


def distillation_term(
    student_logits: Tensor,
    teacher_logits: Tensor,
    labels: Tensor,
    loss: Loss,
    epoch: float | None = None,
    theta: Tensor | None = None,
    whole: BatchTotals | None = None,
) -> Tensor:
    """Return kd_weight * mean_i w_i * D(...) + plain_kd_weight * mean_i tau^2 * D(...), a scalar before the warm-up.

    Args:
        student_logits: [B, C] raw logits.
        teacher_logits: [B, C] raw logits.
        labels: [B] int64, -1 where not known.
        loss: adjustment, temperature and divergence, and their weights.
        epoch: counted from 1, for CTKD; None for the end of its ramp.
        theta: the result of `learned_temperature`, for CTKD.
        whole: totals of the batch that these samples are part of; None if they are all of it.

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
    epoch: float | None,
    theta: Tensor | None,
    whole: BatchTotals,
    control: Control = NO_CONTROL,
    of_targets: WeightedSum | None = None,
) -> tuple[Tensor, Temperatures]:
    """Return the distillation term and the temperatures of `kd_weight`'s part of it; see `distillation_loss`."""
    if loss.learns_temperature and theta is None:
        raise ValueError(f"the loss {loss.name!r} learns its temperature: make theta with learned_temperature(loss)")
    normalize = NORMALIZATIONS[loss.normalization].compute
    student_logits, teacher_logits = normalize(student_logits), normalize(teacher_logits)
    n_rows = at_least_one(whole.labeled if loss.skips_unlabeled else whole.rows)
    of_step: dict[str, Any] = {"epoch": epoch, "theta": theta} if loss.learns_temperature else {}
    temperature = loss.temperature.bind(**of_step, **_over_batch(loss.temperature, whole))
    adjust = loss.adjustment.bind(**_over_batch(loss.adjustment, whole))
    divergence = loss.divergence.bind(**_over_batch(loss.divergence, whole))

    def weighted_sum(t: Temperatures) -> Tensor:
        if of_targets is not None:
            return of_targets(student_logits, t)
        if _has_closed_form(loss, teacher_logits, t):
            with torch.no_grad():
                target = adjust(teacher_logits / t.teacher, labels)
            return weighted_kl(student_logits, target, *t)
        target = adjust(teacher_logits / t.teacher, labels)
        values: Tensor = divergence(student_logits / t.student, target, labels)
        return (t.weight * values).sum()

    if control.temperature is None:
        dynamic = temperature(student_logits, teacher_logits)
    else:
        dynamic = temperatures.same_for_both(control.temperature)
    total = weighted_sum(dynamic.shared(control.share)) * (loss.kd_weight / n_rows)
    if loss.plain_kd_weight:
        plain = temperatures.constant(student_logits, teacher_logits, loss.tau)
        total = total + weighted_sum(plain.shared(control.share)) * (loss.plain_kd_weight / n_rows)
    return total, dynamic


def _gated(
    student_logits: Tensor,
    teacher_logits: Tensor,
    chances: Tensor | None,
    labels: Tensor,
    loss: Loss,
    *of_step: Any,
) -> tuple[Tensor, Temperatures]:
    """Return the mean of the terms of the teachers [B, K, C] that a gate chooses, and the mean temperatures."""
    if loss.gate is None or chances is None or teacher_logits.ndim != 3:
        raise ValueError("a gate needs the logits [B, K, C] of K teachers and its probabilities [B, K]")
    chosen = chosen_logits(teacher_logits, chances, loss.gate)
    terms, of_teachers = zip(
        *(_term_and_temperatures(student_logits, logits, labels, loss, *of_step) for logits in chosen), strict=True
    )
    means = (torch.stack(values).mean(dim=0) for values in zip(*of_teachers, strict=True))
    return torch.stack(terms).mean(), Temperatures(*means)


def _has_closed_form(loss: Loss, teacher_logits: Tensor, t: Temperatures) -> bool:
    """Return whether `weighted_kl` has all gradients of a distillation term."""
    if not loss.divergence.has_closed_form or teacher_logits.requires_grad or is_traced():
        return False
    return loss.adjustment.commutes_with_scale or not t.teacher.requires_grad


def _over_batch(options: Options, whole: BatchTotals) -> dict[str, Any]:
    found: dict[str, Any] = {"batch_sum": whole.sum} if options.uses_batch else {}
    if options.uses_batch_max:
        found["batch_max"] = whole.max
    return {**found, "edges": whole.edges} if options.uses_edges else found


def distillation_loss(
    student_logits: Tensor,
    teacher_logits: Tensor | None,
    labels: Tensor,
    loss: Loss,
    epoch: float | None = None,
    mixed: MixedLabels | None = None,
    theta: Tensor | None = None,
    whole: BatchTotals | None = None,
    label_smoothing: float = 0.0,
    control: Control = NO_CONTROL,
    chances: Tensor | None = None,
    of_targets: WeightedSum | None = None,
) -> LossParts:
    """Return the whole loss of a batch.

    Args:
        student_logits: [B, C] raw logits; half precision is raised to float32 first.
        teacher_logits: [B, C] raw logits, computed or cached, with a gate [B, K, C]; None if the loss does not use the
            teacher.
        labels: [B] int64, -1 where not known.
        loss: the `loss` section of a pipeline.
        epoch: counted from 1, for the warm-up and for CTKD; None for the end of both.
        mixed: labels of the partners and shares, if images are mixed.
        theta: the result of `learned_temperature`, for CTKD.
        whole: totals of the batch that these samples are part of; None if they are all of it.
        label_smoothing: of the cross-entropy.
        control: what a controller sets for each sample.
        chances: [B, K], the probabilities of a gate over K teachers.
        of_targets: sums the divergences from targets that are not logits / T, such as those of tokens; the teacher's
            logits then serve the temperatures alone.

    Raises:
        ValueError: if the loss uses the teacher and its logits are None, or it acts on the one true class of images
            that are mixed, or is CTKD without theta.
    """
    if student_logits.dtype in (torch.float16, torch.bfloat16):
        student_logits = student_logits.float()
    whole = whole or batch_totals(labels, mixed, student_logits.dtype)
    if not loss.uses_teacher:
        ce = cross_entropy(student_logits, labels, mixed, label_smoothing, whole)
        none = torch.zeros_like(ce)
        return LossParts(ce if loss.ce_weight == 1 else loss.ce_weight * ce, ce.detach(), none, none, none)
    if teacher_logits is None:
        raise ValueError(f"the loss {loss.name!r} needs the teacher's logits")
    if mixed is not None and loss.acts_on_label:
        raise ValueError(f"{loss.acts_on_label} needs one label per image, and mixed images have two")
    teacher_logits = teacher_logits.to(student_logits.dtype)
    is_plain = mixed is None and control is NO_CONTROL and loss.gate is None and of_targets is None
    is_plain = is_plain and not label_smoothing and is_fused(loss, student_logits, teacher_logits)
    if is_plain and isinstance(whole.rows, int):
        return _fused(student_logits, teacher_logits, labels, loss, epoch, whole, whole.rows)
    # With weight 0 it is reported, and takes no part in the gradient.
    of_labels = student_logits if loss.ce_weight else student_logits.detach()
    ce = cross_entropy(of_labels, labels, mixed, label_smoothing, whole)
    of_step = (loss, epoch, theta, whole, control, of_targets)
    if loss.gate is None:
        distilled, dynamic = _term_and_temperatures(student_logits, teacher_logits, labels, *of_step)
    else:
        distilled, dynamic = _gated(student_logits, teacher_logits, chances, labels, *of_step)
    weighted_ce = ce
    if control.share is not None:
        of_rows = F.cross_entropy(
            student_logits, labels, ignore_index=-1, label_smoothing=label_smoothing, reduction="none"
        )
        weighted_ce = ((1 - control.share) * of_rows).sum() / at_least_one(whole.labeled)
    total = loss.ce_weight * weighted_ce + warmup(epoch, loss.warmup_epochs) * distilled
    if loss.gate is not None and chances is not None:
        total = total + loss.gate.balance * imbalance(chances, whole.sum) * (len(labels) / whole.rows)
    student = dynamic.student.detach().sum() / whole.rows
    shared = dynamic.teacher is dynamic.student
    teacher = student if shared else dynamic.teacher.detach().sum() / whole.rows
    return LossParts(total, ce.detach(), distilled.detach(), student, teacher)


def _fused(
    student_logits: Tensor,
    teacher_logits: Tensor,
    labels: Tensor,
    loss: Loss,
    epoch: float | None,
    whole: BatchTotals,
    rows: int,
) -> LossParts:
    """Return the loss with its gradient by hand; see `distillation_loss`."""

    def plain_total() -> Tensor:
        ce = cross_entropy(student_logits, labels, whole=whole)
        term = distillation_term(student_logits, teacher_logits, labels, loss, epoch, None, whole)
        return loss.ce_weight * ce + factor * term

    factor = warmup(epoch, loss.warmup_epochs)
    all_labeled = isinstance(whole.labeled, int) and whole.labeled == rows
    weights = weights_of(loss, rows, whole.labeled, factor, student_logits.dtype)
    total, ce, distilled, student, teacher = fused_loss(
        student_logits, teacher_logits, labels, loss, weights, all_labeled, plain_total
    )
    student = student / rows
    teacher = student if loss.temperature.is_shared else teacher / rows
    return LossParts(total, ce / at_least_one(whole.labeled), distilled, student, teacher)

"""The losses of `distillation.py` for the positions of a language model, from targets instead of the teacher's logits.

    forward KL with a tail of the student's shape    K + 1 classes, without the teacher's [n, V] (`token_kl.py`)
    forward KL from draws                            the classes that were drawn
    forward KL of the top classes, renormalized      these classes, if the head has all of them
    all else                                         the decoded teacher, [n, V] of one chunk (`chunked_head.py`)

The decoded teacher has, at the temperature of each position, the mass that its tail has there. Standardized logits are
the exception: they are those of T = 1, divided by the temperature.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kdcache.errors import UsageError
from kdcache.losses.batch import BatchTotals, at_least_one, batch_totals
from kdcache.losses.closed_form import is_traced, weighted_kl
from kdcache.losses.config import Loss
from kdcache.losses.distillation import LossParts, WeightedSum, distillation_loss, warmup
from kdcache.losses.fused_tokens import HardTarget, SoftTarget, token_sums
from kdcache.losses.registry import NORMALIZATIONS
from kdcache.losses.temperatures import DTKD, ConstantTemperature, Temperatures
from kdcache.losses.token_kl import draws_kl, ghost_kl, shaped_kl
from kdcache.losses.token_targets import (
    NEVER,
    TokenTargets,
    check_temperature,
    head_and_tail,
    head_log_probs,
    other_temperature,
    scaled_logits,
)


def token_loss(
    student_logits: Tensor,
    labels: Tensor,
    targets: TokenTargets | None,
    loss: Loss,
    epoch: float | None = None,
    theta: Tensor | None = None,
    whole: BatchTotals | None = None,
    label_smoothing: float = 0.0,
) -> LossParts:
    """Return the whole loss of n positions.

    Args:
        student_logits: [n, V] raw logits; half precision is raised to float32 first.
        labels: [n] int64, the next tokens, -1 where not known.
        targets: of the same positions; None if the loss does not use the teacher. See `check_token_loss`.
        loss: the `loss` section of a pipeline.
        epoch: counted from 1, for the warm-up and for CTKD; None for the end of both.
        theta: the result of `learned_temperature`, for CTKD.
        whole: totals of the step that these positions are part of; None if they are all of it.
        label_smoothing: of the cross-entropy.
    """
    whole = whole or batch_totals(labels)
    of_step = (labels, loss, epoch, None, theta, whole, label_smoothing)
    if targets is None or not loss.uses_teacher:
        return distillation_loss(student_logits, None, *of_step)
    if student_logits.dtype in (torch.float16, torch.bfloat16):
        student_logits = student_logits.float()
    targets = targets.to(dtype=student_logits.dtype)
    if isinstance(loss.temperature, ConstantTemperature) and not label_smoothing and _is_plain_kl(loss, targets):
        return _with_cross_entropy(student_logits, labels, targets, loss, warmup(epoch, loss.warmup_epochs), whole)
    return distillation_loss(
        student_logits,
        teacher_for_temperatures(targets, loss),
        *of_step,
        of_targets=_weighted_sum(targets, labels, loss),
    )


def _is_plain_kl(loss: Loss, targets: TokenTargets) -> bool:
    """Return whether a loss is the KL divergence from a head and a tail, with nothing that changes them."""
    return (
        targets.draws is None
        and loss.divergence.has_closed_form
        and loss.adjustment.kind == "none"
        and loss.normalization == "none"
        and not is_traced()
    )


def _with_cross_entropy(
    student_logits: Tensor, labels: Tensor, targets: TokenTargets, loss: Loss, factor: float, whole: BatchTotals
) -> LossParts:
    """Return the loss at a constant temperature, whose parts share the softmax of the student."""
    tau, count, labeled = loss.tau, at_least_one(whole.rows), at_least_one(whole.labeled)
    of_row = (loss.kd_weight + loss.plain_kd_weight) * tau**2 / count
    ones = student_logits.new_ones(len(labels))
    t = None if tau == 1 else tau * ones.unsqueeze(1)
    stored = None if takes_student_shape(loss, targets) else targets
    soft = SoftTarget(targets.indices, *head_and_tail(targets, tau), stored, t)
    hard = HardTarget(labels, loss.ce_weight / labeled)
    found = token_sums(student_logits, t, soft, factor * of_row * ones, hard)
    mean = tau * ones.sum() / whole.rows
    return LossParts(found.total, found.cross_entropies.sum() / labeled, of_row * found.divergences.sum(), mean, mean)


def teacher_for_temperatures(targets: TokenTargets, loss: Loss) -> Tensor:
    """Return the teacher's logits as the temperature rule and the normalization of a loss need them.

    [n, V] decoded at T = 1, or [n, 1]: DTKD needs the largest logit or the logsumexp alone, and both are those of a row
    of one class; the other rules that do without the tail's shape do not read the teacher.
    """
    temperature = loss.temperature
    if temperature.needs_tail_shape or loss.normalization != "none":
        return scaled_logits(targets, 1.0)
    if isinstance(temperature, DTKD) and targets.logsumexp is not None:
        largest = targets.log_probs[:, 0] + targets.logsumexp
        return (largest if temperature.sharpness == "max" else targets.logsumexp).unsqueeze(1)
    return targets.log_probs.new_zeros(len(targets), 1)


def _weighted_sum(targets: TokenTargets, labels: Tensor, loss: Loss) -> WeightedSum | None:
    """Return the sum of the weighted divergences from targets; None for logits that are normalized first."""
    if loss.normalization != "none":
        return None
    as_student = takes_student_shape(loss, targets)
    is_plain_kl = _is_plain_kl(loss, targets)
    if targets.draws is not None:
        draws = targets.draws
        return lambda student_logits, t: draws_kl(student_logits, t.student, draws, t.weight)
    if is_plain_kl and as_student:

        def of_ghost(student_logits: Tensor, t: Temperatures) -> Tensor:
            head, tail = head_and_tail(targets, t.teacher)
            return ghost_kl(student_logits, t.student, targets.indices, head, tail, t.weight)

        return of_ghost
    kept = loss.adjustment.classes_kept
    if loss.divergence.has_closed_form and kept is not None and kept <= (targets.top_k or targets.indices.shape[1]):

        def of_renormalized(student_logits: Tensor, t: Temperatures) -> Tensor:
            head = (head_log_probs(targets)[:, :kept] / t.teacher).log_softmax(dim=1)
            return ghost_kl(
                student_logits,
                t.student,
                targets.indices[:, :kept],
                head,
                torch.full_like(head[:, :1], NEVER),
                t.weight,
            )

        return of_renormalized
    adjust, divergence = loss.adjustment.bind(), loss.divergence.bind()

    def of_decoded(student_logits: Tensor, t: Temperatures) -> Tensor:
        constant = not any(value.requires_grad for value in t)
        if is_plain_kl and constant:
            return shaped_kl(student_logits, t.student, targets, t.teacher, t.weight)
        shape = (student_logits / t.student).detach() if as_student else None
        target = adjust(scaled_logits(targets, t.teacher, shape), labels)
        if loss.divergence.has_closed_form and not t.teacher.requires_grad:
            return weighted_kl(student_logits, target, *t)
        values: Tensor = divergence(student_logits / t.student, target, labels)
        return (t.weight * values).sum()

    return of_decoded


def takes_student_shape(loss: Loss, targets: TokenTargets) -> bool:
    """Return whether the tail gets the shape of the student's: where the loss says so, or none is stored."""
    return loss.tail == "student" or not targets.has_shape


def check_token_loss(loss: Loss, targets: TokenTargets | None) -> None:
    """Check that a loss is defined for targets, once and before training.

    Args:
        loss: the `loss` section of a pipeline.
        targets: any positions of the cache; None without one.

    Raises:
        UsageError: for a loss that is not defined for tokens, or that needs what the targets do not have.
    """
    if not loss.uses_teacher:
        return
    axes = (loss.adjustment, loss.temperature, loss.divergence)
    for options in axes:
        if options.refused_for_tokens is not None:
            raise UsageError(
                f"{options.kind} is refused for tokens: {options.refused_for_tokens}",
                "use a loss of single positions, such as kd, rkl, dtkd or dkd",
            )
    if loss.gate is not None or loss.controller is not None:
        raise UsageError(
            f"{'gate' if loss.gate is not None else 'controller'} is refused for tokens: it is trained for whole "
            "samples",
            "remove it from the loss",
        )
    if targets is None:
        raise UsageError(f"the loss {loss.name!r} needs a teacher's targets", "give a cache, or use the loss ce")
    _check_targets(loss, targets)


def _check_targets(loss: Loss, targets: TokenTargets) -> None:
    """Check that targets have what a loss needs of a teacher of tokens."""
    if loss.needs_level is not None and targets.logsumexp is None:
        raise UsageError(
            f"{loss.needs_level} depends on the level of the teacher's logits, and these rows do not have it",
            "use a loss that does not, such as kd, or dump the teacher itself",
        )
    shape_users = [
        options.kind for options in (loss.adjustment, loss.temperature, loss.divergence) if options.needs_tail_shape
    ]
    if NORMALIZATIONS[loss.normalization].needs_tail_shape:
        shape_users.append(loss.normalization)
    kept = loss.adjustment.classes_kept
    if kept is not None and kept > (targets.top_k or targets.indices.shape[1]):
        shape_users.append(f"{loss.adjustment.kind} to the top {kept}")
    if targets.draws is not None and (
        shape_users or not loss.divergence.has_closed_form or loss.adjustment.kind != "none" or loss.needs_level
    ):
        raise UsageError(
            f"the loss {loss.name!r} needs probabilities, and these rows have classes that were drawn from them",
            "use kd, whose gradient is linear in the probabilities, or a cache with a head",
        )
    if shape_users and takes_student_shape(loss, targets):
        stored = "these rows have its mass alone" if not targets.has_shape else "loss.tail is `student`"
        raise UsageError(
            f"{shape_users[0]} needs the shape of the teacher's tail, and {stored}",
            "set loss.tail to stored and use a cache with a lowrank tail, or use a loss such as kd",
        )
    if len(targets.temperatures) > 1:
        return
    if not loss.temperature.is_constant:
        raise other_temperature(targets, f"a T of each position, that of {loss.temperature.kind},")
    check_temperature(targets, loss.tau)

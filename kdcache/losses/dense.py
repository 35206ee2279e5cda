"""The losses of `distillation.py` for networks that say a class of every pixel.

    cross-entropy    at the pixels of the label maps, to which the student's logits are enlarged
    distillation     at the teacher's places, to which the student's logits are brought: every place is a row

Logits are interpolated bilinearly between the centers of pixels (`align_corners=False`), as the segmentation networks
of torchvision, mmsegmentation and transformers do. The label of a place, for KA and its like, is that of the nearest
pixel.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from kdcache.losses.batch import BatchTotals, at_least_one
from kdcache.losses.config import Loss
from kdcache.losses.distillation import LossParts, distillation_loss
from kdcache.losses.maps import labels_of_places, resized, rows_of_places

UNKNOWN = -1
"""Label of a pixel that is ignored."""


class DenseTotals(NamedTuple):
    """Totals of a step, over all of its micro-batches and processes.

    Attributes:
        labeled: labeled pixels of the label maps.
        places: the teacher's places as the rows of a batch; None for a loss without a teacher.
    """

    labeled: Tensor | int
    places: BatchTotals | None


def dense_totals(maps: Tensor, teacher_logits: Tensor | None) -> DenseTotals:
    """Return the totals of a step of which all images are given.

    Args:
        maps: [B, H, W] int64, -1 where ignored.
        teacher_logits: [B, C, h, w]; None for a loss without a teacher.
    """
    labeled = (maps >= 0).sum()
    if teacher_logits is None:
        return DenseTotals(labeled, None)
    size = (teacher_logits.shape[2], teacher_logits.shape[3])
    known = (labels_of_places(maps, size) >= 0).sum()
    return DenseTotals(labeled, BatchTotals(len(maps) * size[0] * size[1], known, known))


def dense_loss(
    student_logits: Tensor,
    teacher_logits: Tensor | None,
    maps: Tensor,
    loss: Loss,
    epoch: float | None = None,
    theta: Tensor | None = None,
    totals: DenseTotals | None = None,
    label_smoothing: float = 0.0,
) -> LossParts:
    """Return the whole loss of a batch of label maps.

    Args:
        student_logits: [B, C, h', w'] raw logits; half precision is raised to float32 first.
        teacher_logits: [B, C, h, w] raw logits; None if the loss does not use the teacher.
        maps: [B, H, W] int64, -1 where ignored.
        loss: the `loss` section of a pipeline.
        epoch: counted from 1, for the warm-up and for CTKD; None for the end of both.
        theta: the result of `learned_temperature`, for CTKD.
        totals: of the step that these images are part of; None if they are all of it.
        label_smoothing: of the cross-entropy.
    """
    if student_logits.dtype in (torch.float16, torch.bfloat16):
        student_logits = student_logits.float()
    totals = totals or dense_totals(maps, teacher_logits if loss.uses_teacher else None)
    ce = student_logits.new_zeros(())
    if loss.ce_weight or not loss.uses_teacher:
        enlarged = resized(student_logits, (maps.shape[1], maps.shape[2]))
        ce = F.cross_entropy(enlarged, maps, ignore_index=-1, reduction="sum", label_smoothing=label_smoothing)
        ce = ce / at_least_one(totals.labeled)
    if not loss.uses_teacher:
        none = torch.zeros_like(ce)
        return LossParts(loss.ce_weight * ce, ce.detach(), none, none, none)
    if teacher_logits is None or totals.places is None:
        raise ValueError(f"the loss {loss.name!r} needs the teacher's logits")
    size = (teacher_logits.shape[2], teacher_logits.shape[3])
    parts = distillation_loss(
        *rows_of_places(resized(student_logits, size), teacher_logits, labels_of_places(maps, size), UNKNOWN),
        loss.model_copy(update={"ce_weight": 0.0}),
        epoch,
        None,
        theta,
        totals.places,
    )
    return parts._replace(total=loss.ce_weight * ce + parts.total, cross_entropy=ce.detach())

"""Losses on maps [B, C, h, w] of the student and the teacher: class logits, or vectors, at every place.

Each returns one value per sample, [B]. The maps of both have the same places: `resized` brings the teacher's to those
of the student. Where the places of a map are to be left out, such as those without a label, a mask says which count.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from kdcache.losses.batch import BatchSum, batch_mean, of_these
from kdcache.losses.normalizations import z_score
from kdcache.losses.rows import are_narrow
from kdcache.losses.vectors import unit_vectors

Align = Literal["bilinear", "nearest"]

Standardize = Literal["none", "channels", "places"]

_FLAT = 1e-6
"""Deviation of a channel in the batch up to which it counts as constant, and becomes 0 when it is standardized."""


def resized(maps: Tensor, size: tuple[int, int], align: Align = "bilinear", align_corners: bool = False) -> Tensor:
    """Return maps [B, C, h, w] interpolated to another grid, as a teacher does that enlarges its logits in the end.

    Args:
        maps: [B, C, h, w].
        size: (height, width).
        align: "bilinear" or "nearest".
        align_corners: of the bilinear interpolation, as in `torch.nn.functional.interpolate`; must be that of the
            teacher: torchvision's networks have False, those of many repositories True.
    """
    if maps.shape[2:] == size:
        return maps
    if align == "nearest":
        return functional.interpolate(maps, size, mode="nearest")
    return functional.interpolate(maps, size, mode="bilinear", align_corners=align_corners)


def on_largest_grid(maps: Sequence[Tensor]) -> list[Tensor]:
    """Return maps [B, C_i, h_i, w_i] enlarged to the grid of the one with the most places."""
    height, width = max((one.shape[2:] for one in maps), key=lambda size: size[0] * size[1])
    return [resized(one, (height, width)) for one in maps]


def standardized(maps: Tensor, over: Standardize) -> Tensor:
    """Return maps [B, C, h, w] with mean 0 and deviation 1 over the channels of each place, or the places of a channel.

    Over channels this is logit standardization at each place (Sun et al. 2024, 2403.01427), after which the student
    need not have the range of the teacher's logits; over places it is what PKD (Cao et al. 2022, 2207.02039) does to
    features, for each map by itself, not the batch. The level of a place does not change the first.

    Args:
        maps: [B, C, h, w].
        over: "channels", "places", or "none" for the maps as they are.
    """
    if over == "channels":
        return z_score(maps.movedim(1, -1).flatten(0, 2)).view(*_last(maps)).movedim(-1, 1)
    if over == "places":
        return z_score(maps.flatten(2).flatten(0, 1)).view(maps.shape)
    return maps


def _last(maps: Tensor) -> tuple[int, ...]:
    """Return the shape of maps with the channels last, [B, h, w, C]."""
    return (len(maps), *maps.shape[2:], maps.shape[1])


def labels_of_places(maps: Tensor, size: tuple[int, int]) -> Tensor:
    """Return the label of the pixel that is nearest to the center of each place, [B, H, W] -> [B, h, w] int64."""
    if tuple(maps.shape[1:]) == size:
        return maps
    # float32 holds every class exactly.
    return functional.interpolate(maps.unsqueeze(1).float(), size=size, mode="nearest-exact").squeeze(1).long()


def mean_over_places(values: Tensor, mask: Tensor | None = None) -> Tensor:
    """Return the mean over the places that count, [B, h, w] -> [B]; 0 if none does.

    Args:
        values: [B, h, w].
        mask: [B, h, w] bool, which places count; None for all.
    """
    if mask is None:
        return values.mean(dim=(1, 2))
    return (values * mask).sum(dim=(1, 2)) / mask.sum(dim=(1, 2)).clamp_min(1)


def _counted(student: Tensor, teacher: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
    """Return maps that are 0 where places do not count: what is left out may be infinite, and so may its gradient."""
    if mask is None:
        return student, teacher
    return torch.where(mask[:, None], student, 0.0), torch.where(mask[:, None], teacher, 0.0)


def kl_of_places(student: Tensor, teacher: Tensor, tau: float = 1.0) -> Tensor:
    """Return KL(softmax(u / T) || softmax(v / T)) over the channels of each place, [B, C, h, w] -> [B, h, w]."""
    log_p, log_q = (teacher / tau).log_softmax(dim=1), (student / tau).log_softmax(dim=1)
    return (log_p.exp() * (log_p - log_q)).sum(dim=1)


def pixel_kd(
    student: Tensor,
    teacher: Tensor,
    tau: float = 1.0,
    mask: Tensor | None = None,
) -> Tensor:
    """Return T^2 times the mean over the places of the KL divergence of their classes, [B, C, h, w] -> [B].

    Source: pixel-wise distillation (Liu et al. 2019, 1903.04197); winycg/CIRKD@60f4425, losses/kd.py, T = 1, where the
    mean is over all places of the batch, which is the same if no place is left out. Ignored labels are not left out
    there: pass a mask to do so.

    Args:
        student: [B, C, h, w] logits.
        teacher: [B, C, h, w] logits.
        tau: T.
        mask: [B, h, w] bool, which places count; None for all.
    """
    return tau**2 * mean_over_places(kl_of_places(*_counted(student, teacher, mask), tau), mask)


def pixel_mse(student: Tensor, teacher: Tensor, mask: Tensor | None = None) -> Tensor:
    """Return the mean of (h - t)^2 over channels and places, [B, C, h, w] -> [B].

    On standardized features it is PKD (Cao et al. 2022), on a hidden layer FitNets (Romero et al. 2015).

    Args:
        student: [B, C, h, w].
        teacher: [B, C, h, w].
        mask: [B, h, w] bool, which places count; None for all.
    """
    student, teacher = _counted(student, teacher, mask)
    return mean_over_places((student - teacher).square().mean(dim=1), mask)


def channel_wise(student: Tensor, teacher: Tensor, tau: float = 4.0) -> Tensor:
    """Return the KL divergence of the distributions over the places of each channel (CWD: Shu et al. 2021, 2011.13256).

        T^2 / C sum_c KL(softmax_x(u_c / T) || softmax_x(v_c / T))

    HAZARD: places are compared, so that a constant that is added to the logits of one place changes the loss, where a
    softmax over classes would not see it. Rows without their level are of no use: dump with `over_places: true`.

    Source: open-mmlab/mmrazor, models/losses/cwd.py, whose tau is 1 by default and 4 in its configurations.

    Args:
        student: [B, C, h, w], logits or features.
        teacher: [B, C, h, w].
        tau: T.
    """
    log_p, log_q = (teacher.flatten(2) / tau).log_softmax(dim=2), (student.flatten(2) / tau).log_softmax(dim=2)
    return tau**2 * (log_p.exp() * (log_p - log_q)).sum(dim=2).mean(dim=1)


def attention_transfer(student: Tensor, teacher: Tensor, power: float = 2.0) -> Tensor:
    """Return the mean squared difference of attention maps (AT: Zagoruyko & Komodakis 2017, 1612.03928), -> [B].

        mean_x (a(h) - a(t))_x^2,   a(f) = mean_c |f_c|^p, over all places divided by its Euclidean length

    Numbers of channels may differ. A map of zeros has the attention 0 everywhere, and no gradient. HAZARD: the value
    falls with the number of places, since a(f) has length 1; published weights of 1000 and more make up for it.

    Source: szagoruyko/attention-transfer, utils.py; winycg/CIRKD@60f4425, losses/at.py.

    Args:
        student: [B, C, h, w] features.
        teacher: [B, C', h, w] features.
        power: p.
    """
    attention = [unit_vectors(maps.abs().pow(power).mean(dim=1).flatten(1)) for maps in (student, teacher)]
    return (attention[0] - attention[1]).square().mean(dim=1)


def theia(
    student: Tensor,
    teacher: Tensor,
    cosine_weight: float = 0.9,
    mean: Tensor | None = None,
    deviation: Tensor | None = None,
    batch_sum: BatchSum = of_these,
) -> Tensor:
    """Return a mix of cosine and smooth L1 to standardized features (Theia: Shang et al. 2024, 2407.20179), -> [B].

        w (1 - cos(h, t')) + (1 - w) smooth_l1(h, t'),   t' = (t - mean_c) / deviation_c

    Cosine and mean are over all numbers of a map. The paper has one mean and deviation per channel over the whole data
    set; without them they are those of the teacher's maps in the batch. A constant channel becomes 0.

    Source: bdaiinstitute/theia@26bdf5d, models/rvfm.py.

    Args:
        student: [B, C, h, w] features.
        teacher: [B, C, h, w] features.
        cosine_weight: w.
        mean: [C], of the teacher's channels; None for that of the batch.
        deviation: [C], of the teacher's channels; None for that of the batch.
        batch_sum: sums over the samples of the whole batch.
    """
    if mean is None:
        mean = batch_mean(teacher.mean(dim=(2, 3)), batch_sum)
    centered = teacher - mean[:, None, None]
    if deviation is None:
        deviation = batch_mean(centered.square().mean(dim=(2, 3)), batch_sum).sqrt()
    is_flat = deviation <= _FLAT
    target = torch.where(is_flat[:, None, None], 0.0, centered / torch.where(is_flat, 1.0, deviation)[:, None, None])
    apart = 1 - (unit_vectors(student.flatten(1)) * unit_vectors(target.flatten(1))).sum(dim=1)
    smooth = functional.smooth_l1_loss(student, target, reduction="none").flatten(1).mean(dim=1)
    return cosine_weight * apart + (1 - cosine_weight) * smooth


def masked_latents(student: Tensor, teacher: Tensor, mask: Tensor | None = None, normalize: bool = False) -> Tensor:
    """Return the mean of |h - t| over the channels of the masked places (SALT: Li et al. 2025, 2509.24317), -> [B].

    The student predicts the frozen teacher's latents where it was shown nothing. Source of loss and targets:
    facebookresearch/jepa@51c59d5, app/vjepa/train.py, with an exponent of 1 and layer-normalized targets.

    Args:
        student: [B, C, h, w], predictions.
        teacher: [B, C, h, w], latents.
        mask: [B, h, w] bool, which places the student did not see; None for all.
        normalize: whether the target of a place is normalized to mean 0 and variance 1 over its channels (layer norm).
    """
    if normalize:
        teacher = functional.layer_norm(teacher.movedim(1, -1), (teacher.shape[1],)).movedim(-1, 1)
    student, teacher = _counted(student, teacher, mask)
    return mean_over_places((student - teacher).abs().mean(dim=1), mask)


class PlaceRows(NamedTuple):
    """Places of maps as the samples of a batch, for losses of class logits.

    Attributes:
        student: [M, C].
        teacher: [M, C].
        labels: [M] int64, -1 where a place has none.
    """

    student: Tensor
    teacher: Tensor
    labels: Tensor


def _places(maps: Tensor) -> Tensor:
    """Return the places of maps [B, C, h, w] as rows [M, C]; of few classes each of these is a column in memory."""
    if are_narrow(maps):
        return maps.transpose(0, 1).flatten(1).t()
    return maps.movedim(1, -1).flatten(0, 2)


def rows_of_places(
    student: Tensor, teacher: Tensor, labels: Tensor, ignore_index: int = 255, *, with_ignored: bool = True
) -> PlaceRows:
    """Return the places of maps as a batch, for any loss of class logits: DTKD, KA, DKD and others at every pixel.

        rows = rows_of_places(student_maps, teacher_maps, label_maps)
        parts = kdcache.loss("dtkd+ka")(*rows, epoch=1)

    HAZARD: statistics of the batch, as DTD and DIST have them, are then those of all its places. Losses that need the
    level of the logits, such as DTKD, need it here: dump with `over_places: true`.

    Args:
        student: [B, C, h, w] logits.
        teacher: [B, C, h, w] logits.
        labels: [B, h, w] integers, at the same places.
        ignore_index: label of places without one.
        with_ignored: whether these are kept, as samples without a label, which still have a teacher.
    """
    rows = [_places(maps) for maps in (student, teacher)]
    flat = labels.flatten().long()
    ignored = (flat == ignore_index) | (flat < 0)
    flat = torch.where(ignored, -1, flat)
    if with_ignored:
        return PlaceRows(rows[0], rows[1], flat)
    return PlaceRows(rows[0][~ignored], rows[1][~ignored], flat[~ignored])

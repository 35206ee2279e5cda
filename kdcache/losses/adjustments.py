"""First axis: adjustments of the teacher's logits.

Every adjustment is a pure function `(teacher_logits [B, C], labels [B]) -> [B, C]` of logits that are already divided
by the temperature; `noise` also draws random numbers. None works in place: the row of the cache must survive, since the
next epoch reads it again.
"""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from kdcache.losses.options import AdjustmentOptions, Positive, Presets


def none(teacher_logits: Tensor, labels: Tensor) -> Tensor:
    """Return the teacher's logits unchanged."""
    return teacher_logits


class NoAdjustment(AdjustmentOptions):
    """Options of `none`."""

    compute = staticmethod(none)
    commutes_with_scale = True

    kind: Literal["none"] = "none"


def probability_shift(teacher_logits: Tensor, labels: Tensor) -> Tensor:
    """Swap the teacher's largest probability with that of the true class where the teacher is wrong (KA).

    Swapping the two probabilities is the same as swapping the two logits, at every temperature. The maximum, the
    logsumexp, the entropy, and therefore DTKD's temperatures do not change.

    Args:
        teacher_logits: [B, C].
        labels: [B] int64; rows labeled -1 are unchanged.

    Source: Wen, Lai & Qian 2019 (1911.07471), "probability shift".
    """
    largest, predicted = teacher_logits.max(dim=1, keepdim=True)
    truth = labels.unsqueeze(1)
    truth = torch.where(truth < 0, predicted, truth)
    return teacher_logits.scatter(1, predicted, teacher_logits.gather(1, truth)).scatter(1, truth, largest)


class ProbabilityShift(AdjustmentOptions):
    """Options of `probability_shift`."""

    compute = staticmethod(probability_shift)
    presets: ClassVar[Presets] = {"ka": {}}
    acts_on_label = True
    commutes_with_scale = True

    kind: Literal["probability_shift"] = "probability_shift"


def label_smoothing(teacher_logits: Tensor, labels: Tensor, smoothing: float = 0.1) -> Tensor:
    """Replace the teacher's row by the smoothed one-hot label where the teacher is wrong (KA).

    The new row holds log-probabilities, which softmax turns back into `1 - smoothing` for the label and `smoothing`
    spread evenly over the other classes.

    Args:
        teacher_logits: [B, C].
        labels: [B] int64; rows labeled -1 are unchanged.
        smoothing: probability that the label gives up, between 0 and 1.

    Source: Wen, Lai & Qian 2019 (1911.07471), "label smooth regularization".
    """
    classes = teacher_logits.shape[1]
    wrong = (labels >= 0) & (teacher_logits.argmax(dim=1) != labels)
    smoothed = torch.full_like(teacher_logits, smoothing / (classes - 1)).scatter(
        1, labels.clamp_min(0).unsqueeze(1), 1.0 - smoothing
    )
    return torch.where(wrong.unsqueeze(1), smoothed.log(), teacher_logits)


class LabelSmoothing(AdjustmentOptions):
    """Options of `label_smoothing`."""

    compute = staticmethod(label_smoothing)
    presets: ClassVar[Presets] = {"lsr": {}}
    acts_on_label = True
    gives_probabilities = True
    loses_order = True

    kind: Literal["label_smoothing"] = "label_smoothing"
    smoothing: Annotated[float, Field(gt=0, lt=1)] = 0.1


def truncation(teacher_logits: Tensor, labels: Tensor, top: int = 16) -> Tensor:
    """Keep the `top` largest logits: softmax shares all probability among them, the other classes get exactly 0.

    An ablation: it gives what a cache of the renormalized top-k would, at any temperature. The other logits are set
    10,000 below the smallest that is kept: 0 in any floating-point softmax and, unlike -inf, never a source of NaN.

    Args:
        teacher_logits: [B, C].
        labels: [B]; not used, so that the true class may be cut off.
        top: number of classes that are kept.

    Raises:
        ValueError: if there are not more classes than that.

    Source: Shen & Xing 2022, FKD (2112.01528), "marginal re-norm" of the top 5.
    """
    if top >= teacher_logits.shape[1]:
        raise ValueError(f"truncation to the top {top} leaves all {teacher_logits.shape[1]} classes as they are")
    largest, indices = teacher_logits.topk(top, dim=1)
    rest = (largest[:, -1:] - 1e4).expand_as(teacher_logits)
    return rest.scatter(1, indices, largest)


class Truncation(AdjustmentOptions):
    """Options of `truncation`."""

    compute = staticmethod(truncation)
    presets: ClassVar[Presets] = {"truncated": {}}
    gives_probabilities = True
    gives_zeros = True

    kind: Literal["truncation"] = "truncation"
    top: Annotated[int, Field(ge=1)] = 16

    @property
    def classes_kept(self) -> int:
        """Return `top`."""
        return self.top


def noise(teacher_logits: Tensor, labels: Tensor, sigma: float = 0.3, share: float = 0.5) -> Tensor:
    """Multiply the teacher's logits by random factors in a share of the samples (noisy teachers).

        u'_j = (1 + xi_j) * u_j    xi_j ~ N(0, sigma^2), drawn for each class of a sample that was drawn

    Every call draws anew from torch's default generator, which training seeds with `train.seed` in each process and
    stores in its checkpoints, so that a resumed run draws what the whole one would. In a loss with `plain_kd_weight`
    each of the two terms draws its own.

    The logits are scaled about 0: a constant that is added to a row changes how much noise it gets.

    Args:
        teacher_logits: [B, C].
        labels: [B]; not used.
        sigma: standard deviation of the factors.
        share: probability that a sample is changed, above 0 and at most 1.

    Source: Sau & Balasubramanian 2016 (1610.09650), section 3.1. The defaults are close to those of KD_Lib, whose
    variance is 0.1; its code draws once for a whole batch whether it is changed, the paper for each sample.
    """
    drawn = torch.rand(len(teacher_logits), 1, dtype=teacher_logits.dtype, device=teacher_logits.device) < share
    factors = torch.where(drawn, 1 + sigma * torch.randn_like(teacher_logits), 1.0)
    return teacher_logits * factors


class Noise(AdjustmentOptions):
    """Options of `noise`."""

    compute = staticmethod(noise)
    presets: ClassVar[Presets] = {"noisy": {}}
    needs_level = True
    needs_tail_shape = True
    commutes_with_scale = True

    kind: Literal["noise"] = "noise"
    sigma: Positive = 0.3
    share: Annotated[float, Field(gt=0, le=1)] = 0.5

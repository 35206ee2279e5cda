"""First axis: what is done to the teacher's logits before they teach.

Every adjustment is a pure function `(teacher_logits [B, C], labels [B]) -> [B, C]` of logits that the temperature has
already divided. None works in place: the row of the cache must survive, since the next epoch reads it again.
"""

from __future__ import annotations

import torch
from torch import Tensor


def none(teacher_logits: Tensor, labels: Tensor) -> Tensor:
    """The teacher as it is."""
    return teacher_logits


def probability_shift(teacher_logits: Tensor, labels: Tensor) -> Tensor:
    """KA by probability shift: where the teacher is wrong, swap its largest probability with the true class's.

    Swapping the two probabilities is the same as swapping the two logits, at every temperature; so the maximum, the
    logsumexp, the entropy, and with them DTKD's temperatures, stay what they were.

    Args:
        teacher_logits: [B, C].
        labels: [B] int64; rows labeled -1 are left alone.

    Source: Wen, Lai & Qian 2019 (1911.07471), "probability shift".
    """
    predicted = teacher_logits.argmax(dim=1)
    truth = torch.where(labels < 0, predicted, labels)
    rows = torch.arange(len(teacher_logits), device=teacher_logits.device)
    shifted = teacher_logits.clone()
    shifted[rows, predicted] = teacher_logits[rows, truth]
    shifted[rows, truth] = teacher_logits[rows, predicted]
    return shifted


def label_smoothing(teacher_logits: Tensor, labels: Tensor, smoothing: float = 0.1) -> Tensor:
    """KA by label smoothing: where the teacher is wrong, the smoothed one-hot label takes the row's place.

    The row is replaced by log-probabilities, which softmax turns back into `1 - smoothing` on the label and `smoothing`
    spread evenly over the other classes.

    Args:
        teacher_logits: [B, C].
        labels: [B] int64; rows labeled -1 are left alone.
        smoothing: probability that the label gives away, between 0 and 1.

    Source: Wen, Lai & Qian 2019 (1911.07471), "label smooth regularization".
    """
    classes = teacher_logits.shape[1]
    wrong = (labels >= 0) & (teacher_logits.argmax(dim=1) != labels)
    smoothed = torch.full_like(teacher_logits, smoothing / (classes - 1)).scatter(
        1, labels.clamp_min(0).unsqueeze(1), 1.0 - smoothing
    )
    return torch.where(wrong.unsqueeze(1), smoothed.log(), teacher_logits)


def truncation(teacher_logits: Tensor, labels: Tensor, top: int = 16) -> Tensor:
    """The `top` largest logits alone: softmax then shares all mass among them, and the other classes get exactly 0.

    An ablation: what a cache of the top j, renormalized, teaches, at whatever temperature. The others are set 10,000
    below the least that is kept, which no float tells from 0 in a softmax, and which unlike -inf never makes a NaN.

    Args:
        teacher_logits: [B, C].
        labels: [B]; not looked at, so that the true class may be cut off.
        top: how many classes are kept.

    Raises:
        ValueError: if there are no more classes than that.

    Source: Shen & Xing 2022, FKD (2112.01528), "marginal re-norm" of the top 5.
    """
    if top >= teacher_logits.shape[1]:
        raise ValueError(f"truncation to the top {top} leaves all {teacher_logits.shape[1]} classes as they are")
    kept, where = teacher_logits.topk(top, dim=1)
    rest = (kept[:, -1:] - 1e4).expand_as(teacher_logits)
    return rest.scatter(1, where, kept)

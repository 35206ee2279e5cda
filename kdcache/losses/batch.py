"""What the samples at hand are part of: a step's batch may be cut in pieces, and lie in several processes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, distributed

BatchSum = Callable[[Tensor], Tensor]
"""[B, ...] -> [...]: the sum over the samples of the whole batch, differentiable.

Of a batch that lies in several processes it is the all-reduced sum, whose gradient is all-reduced too: each process
then has the statistics of the whole.
"""


def of_these(rows: Tensor) -> Tensor:
    """Where the samples that are here are the whole batch."""
    return rows.sum(dim=0)


def of_all_ranks(rows: Tensor) -> Tensor:
    """Where each process of the default group has some samples of the batch."""
    return _AllReduced.apply(rows.sum(dim=0))  # type: ignore[no-any-return]  # torch's is not typed


class _AllReduced(torch.autograd.Function):
    """The sum over all processes, forward and, of the gradients, backward."""

    @staticmethod
    def forward(_: Any, here: Tensor) -> Tensor:
        summed = here.clone()
        distributed.all_reduce(summed)
        return summed

    @staticmethod
    def backward(_: Any, *gradients: Tensor) -> Tensor:
        summed = gradients[0].clone()
        distributed.all_reduce(summed)
        return summed


def batch_mean(rows: Tensor, batch_sum: BatchSum) -> Tensor:
    """[B, ...] -> [...]: the mean over the samples of the whole batch."""
    return batch_sum(rows) / batch_sum(rows.new_ones(len(rows)))


class BatchTotals(NamedTuple):
    """The batch that some samples are part of. The losses of its parts, and their gradients, add up to its own.

    Attributes:
        rows: how many samples it has.
        labeled: how many of them have a label.
        shares: of how much the true class is known: `labeled`; of mixed images the sum of their labeled shares.
        sum: over all of its samples; for DTD and DIST.
    """

    rows: Tensor | int
    labeled: Tensor | int
    shares: Tensor | int
    sum: BatchSum = of_these


def at_least_one(count: Tensor | int) -> Tensor | int:
    """What a sum is divided by for a mean; where there is nothing to add up, the mean is 0."""
    return count.clamp_min(1) if isinstance(count, Tensor) else max(count, 1)


def labeled_shares(labels: Tensor, mixed: MixedLabels | None, dtype: torch.dtype = torch.float32) -> Tensor:
    """Of how much of each sample the true class is known, [B]: 0 or 1, or where it is mixed anything between."""
    known = (labels >= 0).to(dtype)
    if mixed is None:
        return known
    share = mixed.share.to(dtype)
    return share * known + (1 - share) * (mixed.partner_labels >= 0)


def batch_totals(labels: Tensor, mixed: MixedLabels | None = None, dtype: torch.dtype = torch.float32) -> BatchTotals:
    """A batch that is all here.

    Args:
        labels: [B] int64, -1 where not known.
        mixed: partners' labels and own shares, where each image is mixed with another.
        dtype: that the shares are added up in.
    """
    return BatchTotals(len(labels), (labels >= 0).sum(), labeled_shares(labels, mixed, dtype).sum())


class MixedLabels(NamedTuple):
    """What is known of a batch of mixed images beside their own labels.

    Attributes:
        partner_labels: [B] int64, -1 where not known.
        share: [B] float32, how much of an image is of its own label; the rest is of its partner's.
    """

    partner_labels: Tensor
    share: Tensor

    def to(self, device: torch.device | str) -> MixedLabels:
        """The same on another device."""
        return MixedLabels(*(part.to(device, non_blocking=True) for part in self))

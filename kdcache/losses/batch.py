"""Batches of which a call sees a part only: micro-batches, and the batches of several processes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, distributed

BatchSum = Callable[[Tensor], Tensor]
"""[B, ...] -> [...]: the differentiable sum over the samples of the whole batch.

For a batch that is spread over several processes it is the all-reduced sum, whose gradient is all-reduced too, so that
each process has the statistics of the whole batch.
"""

BatchMax = Callable[[Tensor], Tensor]
"""[B, ...] -> [...]: the maximum over the samples of the whole batch, without a gradient."""


BatchRows = Callable[[Tensor], Tensor]
"""[B, ...] -> [N, ...]: the rows of all samples of the whole batch, in the same order in each process.

For a batch that is spread over several processes the gradient is all-reduced, as that of `BatchSum`.
"""


def of_these(rows: Tensor) -> Tensor:
    """Return the sum over the given samples, which are the whole batch."""
    return rows.sum(dim=0)


def of_all_ranks(rows: Tensor) -> Tensor:
    """Return the sum over the samples of all processes of the default group."""
    return _AllReduced.apply(rows.sum(dim=0))  # type: ignore[no-any-return]  # torch's is not typed


def max_of_these(rows: Tensor) -> Tensor:
    """Return the maximum over the given samples, which are the whole batch."""
    return rows.detach().amax(dim=0)


def max_of_all_ranks(rows: Tensor) -> Tensor:
    """Return the maximum over the samples of all processes of the default group."""
    largest = max_of_these(rows)
    distributed.all_reduce(largest, distributed.ReduceOp.MAX)
    return largest


def rows_of_these(rows: Tensor) -> Tensor:
    """Return the given rows, which are those of the whole batch."""
    return rows


def rows_of_all_ranks(rows: Tensor) -> Tensor:
    """Return the rows of the samples of all processes of the default group, which may hold different numbers."""
    return _AllGathered.apply(rows)  # type: ignore[no-any-return]  # torch's is not typed


OVER_ALL_RANKS = of_all_ranks, max_of_all_ranks, rows_of_all_ranks
"""The fields `sum`, `max` and `all_rows` of `BatchTotals`, for a batch that is spread over processes."""


class _AllGathered(torch.autograd.Function):
    """The rows of all processes, whose gradient is all-reduced."""

    @staticmethod
    def forward(ctx: Any, here: Tensor) -> Tensor:
        count = torch.tensor([len(here)], device=here.device)
        counts = [torch.empty_like(count) for _ in range(distributed.get_world_size())]
        distributed.all_gather(counts, count)
        sizes = [int(each) for each in counts]
        # All processes have to send tensors of one shape.
        padded = here.new_zeros(max(sizes), *here.shape[1:])
        padded[: len(here)] = here
        parts = [torch.empty_like(padded) for _ in sizes]
        distributed.all_gather(parts, padded)
        start = sum(sizes[: distributed.get_rank()])
        ctx.own = slice(start, start + len(here))
        return torch.cat([part[:size] for part, size in zip(parts, sizes, strict=True)])

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        summed = gradients[0].clone()
        distributed.all_reduce(summed)
        own: Tensor = summed[ctx.own]
        return own


class _AllReduced(torch.autograd.Function):
    """An all-reduced sum whose gradient is all-reduced too."""

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
    """Return the mean over the samples of the whole batch, [B, ...] -> [...]."""
    return batch_sum(rows) / batch_sum(rows.new_ones(len(rows)))


class BatchTotals(NamedTuple):
    """Totals of the batch that some samples are part of. The losses and gradients of its parts add up to its own.

    Attributes:
        rows: number of samples.
        labeled: number of labeled samples.
        shares: `labeled`; for mixed images the sum of their labeled shares.
        sum: sum over all of its samples, for losses of the batch such as DTD and DIST.
        max: maximum over all of its samples.
        all_rows: rows of all of its samples, for losses of pairs of samples such as RKD.
        edges: [2, E] int64, pairs of its samples that an edge of a graph joins, for FF-G2M; None without.
    """

    rows: Tensor | int
    labeled: Tensor | int
    shares: Tensor | int
    sum: BatchSum = of_these
    max: BatchMax = max_of_these
    all_rows: BatchRows = rows_of_these
    edges: Tensor | None = None


def at_least_one(count: Tensor | int) -> Tensor | int:
    """Return the divisor of a mean, at least 1: the mean of nothing is 0."""
    return count.clamp_min(1) if isinstance(count, Tensor) else max(count, 1)


def labeled_shares(labels: Tensor, mixed: MixedLabels | None, dtype: torch.dtype = torch.float32) -> Tensor:
    """Return the labeled share of each sample, [B]: 0 or 1, or for mixed images any value between."""
    known = (labels >= 0).to(dtype)
    if mixed is None:
        return known
    share = mixed.share.to(dtype)
    return share * known + (1 - share) * (mixed.partner_labels >= 0)


def batch_totals(labels: Tensor, mixed: MixedLabels | None = None, dtype: torch.dtype = torch.float32) -> BatchTotals:
    """Return the totals of a batch of which all samples are given.

    Args:
        labels: [B] int64, -1 where not known.
        mixed: labels of the partners and shares, if images are mixed.
        dtype: of the sum of the shares.
    """
    return BatchTotals(len(labels), (labels >= 0).sum(), labeled_shares(labels, mixed, dtype).sum())


def of_step(count: Tensor | int, over_all_ranks: bool = False) -> BatchTotals:
    """Return the totals of an optimizer step of taught positions, all of which have a label.

    Args:
        count: of the positions in all micro-batches and processes, such as `num_items_in_batch` of transformers.
        over_all_ranks: whether statistics of the step are summed over the processes of the default group.
    """
    return BatchTotals(count, count, count, *(OVER_ALL_RANKS if over_all_ranks else ()))


class MixedLabels(NamedTuple):
    """The labels of a batch of mixed images, in addition to their own.

    Attributes:
        partner_labels: [B] int64, -1 where not known.
        share: [B] float32, the share of an image's own label; the rest is that of its partner's.
    """

    partner_labels: Tensor
    share: Tensor

    def to(self, device: torch.device | str) -> MixedLabels:
        """Return a copy on another device."""
        return MixedLabels(*(part.to(device, non_blocking=True) for part in self))

"""Sums over a batch, which may be spread over several processes."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

BatchSum = Callable[[Tensor], Tensor]
"""[B, ...] -> [...]: the sum over the samples of the whole batch, differentiable.

Of a batch that lies in equal parts in several processes it is the all-reduced sum, whose gradient is all-reduced too:
each process then has the statistics of the whole, and the gradients of all, averaged as DDP does, are those of one
process with all samples.
"""


def of_these(rows: Tensor) -> Tensor:
    """Where the samples that are here are the whole batch."""
    return rows.sum(dim=0)


def batch_mean(rows: Tensor, batch_sum: BatchSum) -> Tensor:
    """[B, ...] -> [...]: the mean over the samples of the whole batch."""
    return batch_sum(rows) / batch_sum(rows.new_ones(len(rows)))

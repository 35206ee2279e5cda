"""Batches for losses of groups of samples."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from kdcache.errors import UsageError
from kdcache.losses import Loss


def check_groups(cuts: Sequence[Sequence[Tensor]], ranks: int, loss: Loss) -> None:
    """Check that no group of samples of a loss is in two processes.

    Args:
        cuts: the batches of an epoch, each as the micro-batches of all processes.
        ranks: number of processes.
        loss: minimized.

    Raises:
        UsageError: if a batch has no whole number of groups, or with several processes one of its micro-batches.
    """
    group = loss.divergence.samples_per_group if loss.uses_teacher else 1
    for cut in cuts:
        for size in map(len, cut) if ranks > 1 else [sum(map(len, cut))]:
            if size % group:
                raise UsageError(
                    f"a {'micro-batch' if ranks > 1 else 'batch'} of {size} images cannot be divided into groups of "
                    f"{group} (loss.divergence)",
                    "choose a train.batch_size that gives whole groups, in the last batch of an epoch too, or smaller "
                    "groups: loss.divergence.group_size 1 is always possible",
                )

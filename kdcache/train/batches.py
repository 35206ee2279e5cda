"""The order of the samples of an epoch, its batches, the micro-batches of all processes, and batches of validation."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from kdcache.cache.teacher import Teacher
from kdcache.config.schema import TrainSpec
from kdcache.data.samples import Samples
from kdcache.data.views import Batch, View
from kdcache.errors import UsageError
from kdcache.losses import Loss


def epoch_order(samples: Samples, teacher: Teacher | None, generator: torch.Generator) -> Tensor:
    """Return the ordinals of an epoch's samples in a random order, [M, K] int64: the samples of a row stay together.

    Args:
        samples: training images; without groups K is 1.
        teacher: knows in which order its rows can be read fast; None without one.
        generator: source of the order.
    """
    if samples.groups is not None:
        groups = torch.from_numpy(samples.groups)
        return groups[torch.randperm(len(groups), generator=generator)]
    order = teacher.order(generator) if teacher is not None else torch.randperm(len(samples), generator=generator)
    return order[:, None]


def cut_batches(order: Tensor, spec: TrainSpec, ranks: int) -> list[tuple[Tensor, ...]]:
    """Return the batches of an epoch, each as the ids [b] int64 of the micro-batches of all processes.

    Args:
        order: [M, K] int64; the samples of a row are in one micro-batch, one after the other.
        spec: batch size, and micro-batches of each process.
        ranks: number of processes.

    Raises:
        UsageError: if a batch has fewer rows than micro-batches, or no whole number of rows.
    """
    group, count = order.shape[1], ranks * spec.gradient_accumulation_steps
    if spec.batch_size % group:
        raise UsageError(
            f"a batch of {spec.batch_size} samples (train.batch_size) does not divide into the data set's groups of "
            f"{group}",
            f"set train.batch_size to a multiple of {group}",
        )
    cuts = list(torch.split(order, spec.batch_size // group))
    # Batch norm cannot be trained on a batch of one; the next epoch's order leaves out other samples.
    fewest = count * (2 if group == 1 else 1)
    if len(cuts) > 1 and len(cuts[-1]) < min(fewest, len(cuts[0])):
        cuts = cuts[:-1]
    if len(cuts[0]) < count:
        content = f"{len(cuts[0])} images" if group == 1 else f"{len(cuts[0])} groups of {group} samples"
        raise UsageError(
            f"a batch of {content} cannot be divided into {count} micro-batches ({ranks} processes, "
            f"gradient_accumulation_steps {spec.gradient_accumulation_steps})",
            "raise train.batch_size (images per step over all processes), or lower train.gradient_accumulation_steps",
        )
    return [tuple(part.flatten() for part in torch.tensor_split(cut, count)) for cut in cuts]


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


class LabeledBatches:
    """Batches of the labeled images of a view: random orders of all, one after the other.

    Args:
        view: the images; one at least has a label.
        batch_size: images per batch; all, if there are fewer.
        seed: of the orders.
    """

    def __init__(self, view: View, batch_size: int, seed: int) -> None:
        self._view, self._seed = view, seed
        self._ids = (view.labels >= 0).nonzero().flatten()
        self._size = min(batch_size, len(self._ids))

    def batch(self, index: int, device: torch.device | str) -> Batch:
        """Return a batch [B], on a device; the images that do not fill a batch are left out of an order."""
        number, index = divmod(index, len(self._ids) // self._size)
        generator = torch.Generator().manual_seed(self._seed * 1_000_003 + number)
        order = self._ids[torch.randperm(len(self._ids), generator=generator)]
        batch = self._view.__getitems__(order[index * self._size :][: self._size].tolist())
        return batch._replace(images=batch.images.to(device), labels=batch.labels.to(device))

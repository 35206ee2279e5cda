"""Training on label maps: totals of a step, and the teacher's map of classes."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from kdcache.cache.format.grid_encoding import GridEncoding
from kdcache.cache.reader import Cache
from kdcache.data.samples import Samples
from kdcache.data.views import View
from kdcache.errors import MismatchError, UsageError
from kdcache.losses import Loss
from kdcache.losses.batch import OVER_ALL_RANKS, BatchTotals
from kdcache.losses.dense import DenseTotals, dense_totals
from kdcache.train.passes import MicroBatch

_HOW = "cache: {logits: false, outputs: {pixels: {kind: classes, places: grid, source: classifier}}}"
"""How a teacher of segmentation is dumped."""


def totals_of_step(
    micro_batches: Sequence[MicroBatch], rows: int, over_ranks: Callable[[Tensor], Tensor] | None
) -> DenseTotals | None:
    """Return the totals of the label maps of a step, over all processes; None without label maps.

    Args:
        micro_batches: of this process.
        rows: images of the step, over all processes.
        over_ranks: returns the sum of a tensor over all processes; None for a single one.
    """
    if micro_batches[0].maps is None:
        return None
    own = [dense_totals(part.maps, part.teacher_logits) for part in micro_batches if part.maps is not None]
    labeled = torch.stack([torch.as_tensor(each.labeled) for each in own]).sum()
    labeled = labeled if over_ranks is None else over_ranks(labeled)
    teacher = micro_batches[0].teacher_logits
    if teacher is None:
        return DenseTotals(labeled, None)
    known = torch.stack([torch.as_tensor(each.places.labeled) for each in own if each.places is not None]).sum()
    known = known if over_ranks is None else over_ranks(known)
    count = rows * teacher.shape[2] * teacher.shape[3]
    places = BatchTotals(count, known, known, *(() if over_ranks is None else OVER_ALL_RANKS))
    return DenseTotals(labeled, places)


def map_of_classes(cache: Cache, samples: Samples) -> str:
    """Return the name of the output of a cache that has the logits of every place of a map.

    Raises:
        UsageError: if the cache has none, or several.
        MismatchError: if they are of other classes than the data set's.
    """
    maps = [name for name, record in cache.outputs.items() if record.kind == "classes" and record.places == "grid"]
    if len(maps) != 1:
        found = f"{len(maps)} outputs with them: {', '.join(maps)}" if maps else "none"
        raise UsageError(
            f"{samples.name} has a class per pixel, which needs the teacher's logits of every place, and {cache.path} "
            f"has {found}",
            f"dump the teacher with one of them: {_HOW}",
        )
    (name,) = maps
    encoding = cache.outputs[name].encoding
    channels = encoding.channels if isinstance(encoding, GridEncoding) else 0
    if channels != samples.num_classes:
        raise MismatchError(
            f"the output {name} of {cache.path} has {channels} classes per place, and {samples.name} has "
            f"{samples.num_classes}",
            "use the data set that the teacher was trained on, in its classes; if this is it, dump the module that has "
            f"the logits (cache.outputs.{name}.source)",
        )
    return name


def check_dense_loss(loss: Loss, train: View) -> None:
    """Check that a loss is defined for label maps, and that they can be moved with the images.

    Raises:
        UsageError: for a gate or a controller, which are of whole images.
    """
    for part in ("gate", "controller"):
        if getattr(loss, part) is not None:
            raise UsageError(
                f"loss.{part} is of whole images, and the data set has a class per pixel", f"remove loss.{part}"
            )

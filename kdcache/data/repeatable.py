"""Check that a data set gives the same item each time: one that augments by itself cannot be matched with a cache."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from kdcache.cache.planner import pilot_ids
from kdcache.data.images import ItemImages
from kdcache.data.samples import Samples
from kdcache.data.seeding import seeded
from kdcache.errors import UsageError

_ITEMS = 16
_READINGS = 4
"""A step that changes an image with probability 0.5 escapes once in 8^16 data sets, one of 0.1 once in 800."""

_SECONDS = 5.0
"""Time after which slow items are not read for a third time."""

_MOVE = (
    "move the random steps out of the data set into `transform`, of the pipeline or of kdcache.dump_teacher, where "
    "each view is drawn from a seed and is the same for teacher and student; or let an item depend on its index alone"
)
_SEED = "seed what it draws, for instance random_split(..., generator=torch.Generator().manual_seed(0))"


def check_repeatable(samples: Samples, keys: npt.NDArray[np.uint64] | None = None) -> None:
    """Check that some items are the same each time they are read; see `find_random_item`.

    Raises:
        UsageError: if one is not.
    """
    found = find_random_item(samples, keys)
    if found is not None:
        raise UsageError(*found)


def find_random_item(samples: Samples, keys: npt.NDArray[np.uint64] | None = None) -> tuple[str, str] | None:
    """Read some items of a `torch.utils.data.Dataset` several times, in other orders and with other random seeds.

    Args:
        samples: data set; images in files and in memory are not read, as nothing is drawn for them.
        keys: [N] uint64, content keys that were computed earlier, to compare with.

    Returns:
        What differs and the fix; None if nothing does.
    """
    images = samples.images
    if not isinstance(images, ItemImages):
        return None
    ids = pilot_ids(len(samples), _ITEMS)
    first = _read(images, ids, 0)
    where = f"of {samples.name}/{samples.split}"
    by = _own_steps(images.dataset)
    for index, (key, label) in first.items():
        if label != samples.labels[index]:
            return f"item {index} {where} has another label each time it is read{by}", _MOVE
        if keys is not None and key != keys[index]:
            return f"item {index} {where} is another image than when it was first read{by}", _MOVE
    start = time.monotonic()
    for reading in range(1, _READINGS):
        order = ids[::-1] if reading % 2 else [*ids[1::2], *ids[::2]]
        for index, (key, label) in _read(images, order, reading).items():
            if (key, label) != first[index]:
                what = "is another image" if key != first[index][0] else "has another label"
                return f"item {index} {where} {what} each time it is read{by}", _MOVE
        if time.monotonic() - start > _SECONDS:
            break
    if images.reload is not None:
        with seeded(_READINGS, 1):
            again = ItemImages(images.reload(), len(samples))
        for index, read in _read(again, ids, 0).items():
            if read != first[index]:
                return f"item {index} {where} is another one when the data set is loaded again", _SEED
    return None


def _read(images: ItemImages, ids: Sequence[int], reading: int) -> dict[int, tuple[int, int]]:
    """Return content key and label of some items, read under random generators that are seeded by `reading`."""
    with seeded(reading, 0):
        return {index: (_key(content), label) for index in ids for content, label in [images.read(index)]}


def _key(content: bytes) -> int:
    return int.from_bytes(hashlib.blake2b(content, digest_size=8).digest(), "little")


def _own_steps(dataset: Any) -> str:
    """Return a note on the transform of a data set of torchvision; empty if it has none."""
    names = [*_step_names(dataset)]
    return f" (its transform: {', '.join(names)})" if names else ""


def _step_names(dataset: Any) -> Iterator[str]:
    while hasattr(dataset, "dataset"):  # Subset, and wrappers like it
        dataset = dataset.dataset
    transform = getattr(dataset, "transform", None)
    if transform is not None:
        yield from (type(step).__name__ for step in getattr(transform, "transforms", [transform]))

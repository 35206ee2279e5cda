"""Match a data set with a cache by content: other order, missing samples, or additional samples.

Samples are matched by their content keys. The result is in the order of the cache, so that the ordinal of a sample is
its id there, and its views and logits are unchanged. Only if samples of the cache are missing do ordinals differ from
ids: `Samples.ids` then maps them, for the seeds of the views and for an `AlignedTeacher`.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.utils.data import Subset

from kdcache.cache.reader import Cache
from kdcache.cache.teacher import Teacher, TeacherWrapper
from kdcache.data.images import ArrayImages, FileImages, Images, ItemImages
from kdcache.data.replay import A_FEW, check_data, replay, view_of
from kdcache.data.samples import Samples
from kdcache.data.views import View
from kdcache.errors import MismatchError
from kdcache.runtime.progress import Progress

_NAMED = 3

Ids = npt.NDArray[np.int64]


class Alignment(NamedTuple):
    """The mapping between the samples of a data set and those of a cache.

    Attributes:
        ids: [n] int64, ascending, ids in the cache of the samples that are in both.
        positions: [n] int64, their positions in the data set.
        missing: int64, ids of the cache that are not in the data set.
        extra: int64, positions in the data set that are not in the cache.
    """

    ids: Ids
    positions: Ids
    missing: Ids
    extra: Ids


def align(
    keys: npt.NDArray[np.uint64],
    labels: npt.NDArray[np.int32],
    cached_keys: npt.NDArray[np.uint64],
    cached_labels: npt.NDArray[np.int32],
) -> Alignment:
    """Match samples [M] of a data set with those [N] of a cache, by content key and label.

    Samples with the same key and label are interchangeable: they are used in turn, and if there are fewer than in the
    cache, the last one is used again.

    Raises:
        MismatchError: if a sample has other labels in the data set than in the cache.
    """
    same = np.unique(np.concatenate([keys, cached_keys]), return_inverse=True)[1].astype(np.int64)
    width = int(max(labels.max(), cached_labels.max())) + 2
    pairs, cached = np.split(same * width + np.concatenate([labels, cached_labels]) + 1, [len(keys)])
    order = np.argsort(pairs, kind="stable")
    ordered = pairs[order]
    start = np.searchsorted(ordered, cached, "left")
    count = np.searchsorted(ordered, cached, "right") - start
    there = count > 0
    relabeled = np.flatnonzero(~there & np.isin(cached_keys, keys))
    if len(relabeled):
        first = relabeled[0]
        here = int(np.flatnonzero(keys == cached_keys[first])[0])
        raise MismatchError(
            f"sample {here} of the data set has label {labels[here]}, and is sample {first} of the cache with label "
            f"{cached_labels[first]} ({len(relabeled)} samples are labeled otherwise)",
            "use the labels that the cache was made with, or dump the teacher again",
        )
    positions = order[(start + np.minimum(_turns(cached), count - 1))[there]]
    unused = np.ones(len(keys), bool)
    unused[positions] = False
    return Alignment(np.flatnonzero(there), positions, np.flatnonzero(~there), np.flatnonzero(unused))


def _turns(values: Ids) -> Ids:
    """Return, for each value, how many equal values come before it."""
    order = np.argsort(values, kind="stable")
    ordered = values[order]
    turns = np.empty_like(order)
    turns[order] = np.arange(len(values)) - np.searchsorted(ordered, ordered, "left")
    return turns


def aligned(samples: Samples, found: Alignment) -> Samples:
    """Return the samples of a data set that are in a cache, in the order of the cache."""
    ids = found.ids if len(found.missing) else None
    images = taken(samples.images, found.positions)
    return replace(samples, images=images, labels=samples.labels[found.positions], ids=ids)


def taken(images: Images, positions: Ids) -> Images:
    """Return the images at some positions, in that order."""
    if isinstance(images, ArrayImages):
        return ArrayImages(images.pixels[torch.from_numpy(positions)])
    if isinstance(images, FileImages):
        return FileImages([images.paths[position] for position in positions])
    if isinstance(images, ItemImages):
        return ItemImages(Subset(images.dataset, positions.tolist()), len(positions))
    raise TypeError(f"images of the kind {type(images).__name__} cannot be put in another order")


def described(samples: Samples, found: Alignment) -> str:
    """Return a line with the numbers of matched, missing and extra samples, and the first names."""
    parts = [f"{len(found.ids):,} samples of the cache are in {samples.name}/{samples.split}"]
    if len(found.missing):
        parts.append(f"{len(found.missing):,} are missing ({_some(f'sample {i} of the cache' for i in found.missing)})")
    if len(found.extra):
        parts.append(f"{len(found.extra):,} of its own are left out ({_some(_name(samples, i) for i in found.extra)})")
    return ", ".join(parts)


def _name(samples: Samples, position: int) -> str:
    return str(samples.images.paths[position]) if isinstance(samples.images, FileImages) else f"sample {position}"


def _some(names: Iterable[str]) -> str:
    given = list(names)
    return ", ".join(given[:_NAMED]) + (", ..." if len(given) > _NAMED else "")


class Shared(NamedTuple):
    """The samples that are both in a data set and in a cache.

    Attributes:
        view: view 0 of the samples, as the teacher saw them, in the order of the cache.
        ids: [n] int64, their ids in the cache.
        note: the numbers of matched, missing and extra samples; empty if all match.
    """

    view: View
    ids: Ids
    note: str


def shared(cache: Cache, samples: Samples, progress: Progress) -> Shared:
    """Return the images of a cache that are in a data set, which may have another order.

    Raises:
        MismatchError: if there are none, or labels or pixels differ from those of the cache.
    """
    found = align(samples.keys(progress), samples.labels, cache.sample_keys, cache.labels)
    if not len(found.ids):
        raise MismatchError(
            f"no sample of {samples.name}/{samples.split} is in {cache.path}",
            "give the cache of a teacher of this data set (`kdcache info CACHE` names its own)",
        )
    in_order = np.array_equal(found.positions, np.arange(len(samples)))
    here = samples if in_order and not len(found.missing) else aligned(samples, found)
    check_data(cache, here, None, progress)
    replay(cache, here, A_FEW)
    note = described(samples, found) if len(found.missing) or len(found.extra) else ""
    return Shared(view_of(cache, here), found.ids, note)


class AlignedTeacher(TeacherWrapper):
    """A teacher that takes ordinals of samples in a data set, and maps them to their ids in the cache.

    Args:
        teacher: of the cache.
        ids: [n] int64, ascending, the id of each sample in the cache.
        count: N, the number of samples of the cache.
    """

    def __init__(self, teacher: Teacher, ids: Ids, count: int) -> None:
        super().__init__(teacher)
        self._ids = torch.from_numpy(ids)
        self._place = torch.full((count,), -1)
        self._place[self._ids] = torch.arange(len(ids))

    def __call__(self, ids: Tensor, view: int = 0) -> Tensor:
        """Return the logits [B, C] of the samples at ordinals `ids` [B] int64 in a view."""
        return super().__call__(self._ids[ids.cpu()], view)

    def order(self, generator: torch.Generator) -> Tensor:
        """Return a random order of all ordinals, [n] int64: the wrapped teacher's, without the missing samples."""
        places = self._place[super().order(generator)]
        return places[places >= 0]

    def prefetch(self, batches: Iterable[Tensor], view: int = 0) -> None:
        """Announce the batches of ordinals [B] int64 that will be asked for, in this order."""
        super().prefetch((self._ids[batch.cpu()] for batch in batches), view)

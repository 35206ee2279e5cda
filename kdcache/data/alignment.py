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
from kdcache.data.label_maps import ChosenMaps
from kdcache.data.repeatable import check_repeatable
from kdcache.data.replay import SPOT_CHECK_IMAGES, check_matches_cache, replay, teacher_view
from kdcache.data.sample_groups import groups_among
from kdcache.data.samples import Samples
from kdcache.data.views import View
from kdcache.errors import MismatchError
from kdcache.runtime.progress import Progress

_NAMES_SHOWN = 3
"""Samples that a message names."""

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

    @property
    def ids_of_kept(self) -> Ids | None:
        """`ids`, or None if none is missing, so that the ids are the new ordinals."""
        return self.ids if len(self.missing) else None


def align(
    keys: npt.NDArray[np.uint64],
    labels: npt.NDArray[np.int32],
    cached_keys: npt.NDArray[np.uint64],
    cached_labels: npt.NDArray[np.int32],
) -> Alignment:
    """Match samples [M] of a data set with those [N] of a cache, by content key and label.

    Samples with the same key and label are interchangeable: each is used once, and if there are fewer than in the
    cache, the last one is repeated.

    Raises:
        MismatchError: if a sample has another label in the data set than in the cache.
    """
    key_ids = np.unique(np.concatenate([keys, cached_keys]), return_inverse=True)[1].astype(np.int64)
    width = int(max(labels.max(), cached_labels.max())) + 2
    pairs, cached = np.split(key_ids * width + np.concatenate([labels, cached_labels]) + 1, [len(keys)])
    order = np.argsort(pairs, kind="stable")
    ordered = pairs[order]
    start = np.searchsorted(ordered, cached, "left")
    count = np.searchsorted(ordered, cached, "right") - start
    matched = count > 0
    positions = order[(start + np.minimum(_count_earlier(cached), count - 1))[matched]]
    unused = np.ones(len(keys), bool)
    unused[positions] = False
    # The cache may hold an image under two labels, and the data set only one of them: the other one is missing. It has
    # another label only if the data set has a copy of the image that matches no sample of the cache.
    relabeled = np.flatnonzero(~matched & np.isin(cached_keys, keys[unused]))
    if len(relabeled):
        first = relabeled[0]
        position = int(np.flatnonzero(unused & (keys == cached_keys[first]))[0])
        raise MismatchError(
            f"sample {position} of the data set has label {labels[position]}, and is sample {first} of the cache "
            f"with label {cached_labels[first]} ({len(relabeled)} samples have other labels)",
            "use the labels that the cache was made with, or dump the teacher again",
        )
    return Alignment(np.flatnonzero(matched), positions, np.flatnonzero(~matched), np.flatnonzero(unused))


def _count_earlier(values: Ids) -> Ids:
    """Return, for each value, how many equal values come before it."""
    order = np.argsort(values, kind="stable")
    ordered = values[order]
    earlier = np.empty_like(order)
    earlier[order] = np.arange(len(values)) - np.searchsorted(ordered, ordered, "left")
    return earlier


def apply_alignment(samples: Samples, alignment: Alignment) -> Samples:
    """Return the samples of a data set that are in a cache, in the order of the cache."""
    kept = groups_among(samples.groups, alignment.positions, len(samples), f"{samples.name}/{samples.split}")
    chosen = select_samples(samples, alignment.positions, alignment.ids_of_kept)
    return replace(chosen, notes=samples.notes + kept.notes, groups=kept.groups)


def select_samples(samples: Samples, positions: Ids, ids: Ids | None) -> Samples:
    """Return the samples at some positions, in that order, without groups.

    Args:
        samples: a data set.
        positions: [n] int64.
        ids: [n] int64, ids of these samples in a cache; None if they are their new ordinals.
    """
    names, privacy = samples.sample_names, samples.privacy
    return replace(
        samples,
        images=select_images(samples.images, positions),
        labels=samples.labels[positions],
        ids=ids,
        groups=None,
        sample_names=None if names is None else names[positions],
        privacy=None if privacy is None else privacy[positions],
        maps=None if samples.maps is None else ChosenMaps(samples.maps, positions),
    )


def select_images(images: Images, positions: Ids) -> Images:
    """Return the images at some positions, in that order."""
    if isinstance(images, ArrayImages):
        return ArrayImages(images.pixels[torch.from_numpy(positions)])
    if isinstance(images, FileImages):
        return FileImages([images.paths[position] for position in positions])
    if isinstance(images, ItemImages):
        return ItemImages(Subset(images.dataset, positions.tolist()), len(positions))
    raise TypeError(f"images of type {type(images).__name__} cannot be reordered")


def describe_alignment(samples: Samples, alignment: Alignment) -> str:
    """Return the numbers of matched, missing and extra samples, and the first names, as one line of text."""
    parts = [f"{len(alignment.ids):,} samples of the cache are in {samples.name}/{samples.split}"]
    if len(alignment.missing):
        names = _first_few(f"sample {i} of the cache" for i in alignment.missing)
        parts.append(f"{len(alignment.missing):,} are missing ({names})")
    if len(alignment.extra):
        names = _first_few(_name(samples, i) for i in alignment.extra)
        parts.append(f"{len(alignment.extra):,} of its own are left out ({names})")
    return ", ".join(parts)


def _name(samples: Samples, position: int) -> str:
    return str(samples.images.paths[position]) if isinstance(samples.images, FileImages) else f"sample {position}"


def _first_few(names: Iterable[str]) -> str:
    names = list(names)
    return ", ".join(names[:_NAMES_SHOWN]) + (", ..." if len(names) > _NAMES_SHOWN else "")


class MatchedSamples(NamedTuple):
    """The samples that are both in a data set and in a cache.

    Attributes:
        view: view 0 of the samples, as the teacher saw them, in the order of the cache.
        ids: [n] int64, ids of the samples in the cache.
        note: numbers of matched, missing and extra samples; empty if all match.
    """

    view: View
    ids: Ids
    note: str


def match_samples(cache: Cache, samples: Samples, progress: Progress) -> MatchedSamples:
    """Return the samples of a data set that are in a cache; the data set may have another order.

    Raises:
        MismatchError: if no sample is in the cache, or labels or pixels differ from those of the cache.
    """
    alignment = align(samples.keys(progress), samples.labels, cache.sample_keys, cache.labels)
    if not len(alignment.ids):
        check_repeatable(samples)
        raise MismatchError(
            f"no sample of {samples.name}/{samples.split} is in {cache.path}",
            "use a cache that was made from this data set (`kdcache info CACHE` names the cache's data set)",
        )
    in_order = np.array_equal(alignment.positions, np.arange(len(samples)))
    is_whole = in_order and not len(alignment.missing)
    matched = samples if is_whole else select_samples(samples, alignment.positions, alignment.ids_of_kept)
    check_matches_cache(cache, matched, None, progress)
    replay(cache, matched, SPOT_CHECK_IMAGES)
    note = describe_alignment(samples, alignment) if len(alignment.missing) or len(alignment.extra) else ""
    return MatchedSamples(teacher_view(cache, matched), alignment.ids, note)


class AlignedTeacher(TeacherWrapper):
    """A teacher that takes ordinals of samples in a data set, and maps them to their ids in the cache.

    Args:
        teacher: teacher of the cache.
        ids: [n] int64, ascending, the id of each sample in the cache.
        count: N, the number of samples of the cache.
    """

    def __init__(self, teacher: Teacher, ids: Ids, count: int) -> None:
        super().__init__(teacher)
        self._ids = torch.from_numpy(ids)
        self._ordinals = torch.full((count,), -1)
        self._ordinals[self._ids] = torch.arange(len(ids))

    def __call__(self, ids: Tensor, view: int = 0) -> Tensor:
        """Return the logits [B, C] of the samples at ordinals `ids` [B] int64 in a view."""
        return super().__call__(self._ids[ids.cpu()], view)

    def order(self, generator: torch.Generator) -> Tensor:
        """Return a random order of all ordinals, [n] int64: the wrapped teacher's, without the missing samples."""
        ordinals = self._ordinals[super().order(generator)]
        return ordinals[ordinals >= 0]

    def prefetch(self, batches: Iterable[Tensor], view: int = 0) -> None:
        """Announce the batches of ordinals [B] int64 that will be asked for, in this order."""
        super().prefetch((self._ids[batch.cpu()] for batch in batches), view)

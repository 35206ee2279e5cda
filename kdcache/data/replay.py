"""Compare a cache with the data set that it was made from: samples, labels, and replayed pixels."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, NamedTuple

import numpy as np
from torch import Tensor

from kdcache.cache.format import zarr_store
from kdcache.cache.format.fingerprints import Inputs, inputs_of
from kdcache.cache.planner import pilot_ids
from kdcache.cache.preconditions import refuse_sequences
from kdcache.cache.reader import Cache
from kdcache.config.transform import Transform
from kdcache.data.loader import batches, cut_range
from kdcache.data.repeatable import check_repeatable
from kdcache.data.same_samples import check_same_samples
from kdcache.data.samples import Samples
from kdcache.data.transform_limits import MAX_BATCH_VALUES, MAX_IMAGE_VALUES
from kdcache.data.views import View
from kdcache.errors import MismatchError, counted
from kdcache.runtime.progress import Progress, Silent

_ROUNDING_TOLERANCE = 1e-5
"""Largest relative difference of an image's sketch that is attributed to rounding in another library version."""

_BATCH = MAX_BATCH_VALUES // MAX_IMAGE_VALUES
"""Images per batch: as many as fit the limit of a batch when each has the largest size that a transform may make."""

SPOT_CHECK_IMAGES = 32
"""Images that are compared before a cache is used; `kdcache verify --replay` compares all."""


def check_matches_cache(cache: Cache, samples: Samples, transform: Transform | None, progress: Progress | None) -> None:
    """Check that a data set has the samples, order and labels of a cache, and that a pipeline has its transform.

    Raises:
        MismatchError: if they differ; the message says in what, and names the first such sample.
    """
    plan = cache.manifest.plan
    refuse_sequences(
        plan,
        f"{samples.name}/{samples.split}",
        "train a language model on them, with a pipeline of text (dataset: {name: text})",
    )
    if cache.num_classes != samples.num_classes:
        raise MismatchError(
            f"the cache {cache.path} has {cache.num_classes} classes, {samples.name} has {samples.num_classes}",
            "use the data set that the cache was made from (`kdcache info CACHE` names it)",
        )
    _check_class_names(cache, samples, progress)
    ids = slice(None) if samples.ids is None else samples.ids
    if samples.ids is not None and (largest := int(samples.ids.max(initial=-1))) >= len(cache):
        raise MismatchError(
            f"{cache.path} holds {len(cache)} samples, and the data set was matched with another cache up to sample "
            f"{largest}",
            "join caches of the same samples; `kdcache merge` makes one cache of several parts",
        )
    try:
        check_same_samples(samples, samples.keys(progress), cache.sample_keys[ids], cache.labels[ids])
    except MismatchError:
        check_repeatable(samples)  # the more probable cause, if it is one
        raise
    if transform is not None and transform != plan.views.transform:
        raise MismatchError(
            f"the pipeline's transform is not that of the cache\n  cache: {plan.views.transform}\n"
            f"  pipeline: {transform}",
            "remove `transform` from the pipeline: the student then sees what the teacher saw",
        )


def _check_class_names(cache: Cache, samples: Samples, progress: Progress | None) -> None:
    """Check that the classes of a data set are not those of a cache in another order; other names are a note.

    Raises:
        MismatchError: with the first class that differs.
    """
    ours, theirs = cache.manifest.plan.dataset.class_names, samples.class_names
    differ = [number for number, (one, other) in enumerate(zip(ours, theirs, strict=True)) if one != other]
    if not differ:
        return
    first = f"class {differ[0]} is {ours[differ[0]]!r} in {cache.path} and {theirs[differ[0]]!r} in {samples.name}"
    if sorted(ours) == sorted(theirs):
        raise MismatchError(
            f"the data set has the classes of the cache in another order: {first}",
            "give it the order of the cache (`kdcache info CACHE --json` has it)",
        )
    if progress is not None:
        progress.say(f"note: {counted(len(differ), 'class', 'classes')} have other names: {first}")


def teacher_view(cache: Cache, samples: Samples, view: int = 0) -> View:
    """Return a view of a data set, with the transform and seed that a cache's teacher had.

    Raises:
        UsageError: if code outside of kdcache drew the views.
    """
    views = cache.manifest.plan.views
    return View(samples, views.transform, views.seed, view, crops=cache.crops)


def fingerprints_of(view: View, ids: Sequence[int]) -> Inputs:
    """Return the fingerprints and sketches of the samples `ids` of a view, in that order."""
    cuts = [ids[cut.start : cut.stop] for cut in cut_range(range(len(ids)), _BATCH)]
    return Inputs.concatenate([inputs_of(batch.images) for batch in batches(view, cuts)])


class Replay(NamedTuple):
    """The result of a replay: how many images match those that the teacher saw.

    Attributes:
        checked: number of images whose fingerprints were compared.
        rounded: number of images among these that differ by rounding alone.
    """

    checked: int
    rounded: int


def replay(
    cache: Cache,
    samples: Samples,
    limit: int | None = None,
    num_workers: int | Literal["auto"] = 0,
    progress: Progress | None = None,
) -> Replay:
    """Replay views and compare their fingerprints with those in the cache, without the teacher.

    Args:
        cache: cache to compare with.
        samples: data set that the cache was made from.
        limit: number of images to compare, spread over samples and views; None for all that have a fingerprint.
        num_workers: number of processes that load images.
        progress: progress reporter; silent if None.

    Raises:
        MismatchError: if an image differs by more than rounding; the message names sample and view.
    """
    plan = cache.manifest.plan
    stride = plan.shape.fingerprint_stride
    # Some views may not have been pulled, and some samples of the cache may be missing from the data set.
    cache_ids = np.arange(len(samples)) if samples.ids is None else samples.ids
    with_fingerprint = np.flatnonzero(cache_ids % stride == 0)
    pairs = np.arange(len(cache.views) * len(with_fingerprint))
    chosen = pairs if limit is None else pairs[pilot_ids(len(pairs), limit)]
    view_positions, sample_positions = np.divmod(chosen, max(len(with_fingerprint), 1))
    rounded = 0
    with (progress or Silent()).task("replay", len(chosen), "images") as task:
        for position in np.unique(view_positions).tolist():
            view_index = cache.views[position]
            stored = zarr_store.read_inputs(cache.path, plan, view_index)
            view = teacher_view(cache, samples, view_index)
            ids = with_fingerprint[sample_positions[view_positions == position]].tolist()
            cuts = [ids[cut.start : cut.stop] for cut in cut_range(range(len(ids)), _BATCH)]
            for batch in batches(view, cuts, num_workers):
                expected = Inputs(*(values[cache_ids[batch.ids.numpy()] // stride] for values in stored))
                rounded += compare_inputs(cache, view_index, batch.ids, expected, inputs_of(batch.images))
                task.advance(len(batch.ids))
    return Replay(len(chosen), rounded)


def compare_inputs(cache: Cache, view: int, ids: Tensor, expected: Inputs, actual: Inputs) -> int:
    """Return how many of M images of a view differ by rounding alone from those that the teacher saw.

    Raises:
        MismatchError: if an image differs by more than rounding; the message names the first.
    """
    differ = expected.fingerprints != actual.fingerprints
    scale = np.maximum(np.abs(expected.sketches).max(axis=1), 1.0)
    gap = np.abs(expected.sketches - actual.sketches).max(axis=1)
    for row in np.flatnonzero(differ & ~(gap <= _ROUNDING_TOLERANCE * scale)):
        raise MismatchError(
            f"view {view} of sample {int(ids[row])} is not what the teacher of {cache.path} saw: the means of "
            f"image regions differ by up to {gap[row]:.3g} (fingerprint {actual.fingerprints[row]:08x}, "
            f"in the cache {expected.fingerprints[row]:08x})",
            "use the images and the library versions that the cache was made with (`kdcache info` names them)",
        )
    return int(differ.sum())

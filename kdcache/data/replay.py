"""Compare a cache with the data set that it was made from: samples, labels, and replayed pixels."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from torch import Tensor

from kdcache.cache.format import zarr_store
from kdcache.cache.format.fingerprints import Inputs, inputs_of
from kdcache.cache.planner import pilot_ids
from kdcache.cache.reader import Cache
from kdcache.config.schema import Transform
from kdcache.data.loader import batches, cut_range
from kdcache.data.samples import Samples, check_same_samples
from kdcache.data.transform_limits import MOST_IN_A_BATCH, MOST_VALUES
from kdcache.data.views import View
from kdcache.errors import MismatchError
from kdcache.runtime.progress import Progress, Silent

_LAST_BITS = 1e-5
"""Parts of a picture whose means are within this of one another differ by the rounding of another library at most."""

_BATCH = MOST_IN_A_BATCH // MOST_VALUES
"""So few that images of any size that a transform may make can be looked at."""

A_FEW = 32
"""Images that are compared before anything is made of a cache; `kdcache verify --replay` takes all."""


def check_data(cache: Cache, samples: Samples, transform: Transform | None, progress: Progress | None) -> None:
    """Check that a cache was made from a data set, with its labels, order, and the transform of a pipeline.

    Raises:
        MismatchError: which says what differs, and where it begins.
    """
    plan = cache.manifest.plan
    if cache.num_classes != samples.num_classes:
        raise MismatchError(
            f"the cache {cache.path} has {cache.num_classes} classes, {samples.name} has {samples.num_classes}",
            "use the data set that the cache was made from (`kdcache info CACHE` names it)",
        )
    ids = slice(None) if samples.ids is None else samples.ids
    check_same_samples(samples, samples.keys(progress), cache.sample_keys[ids], cache.labels[ids])
    if transform is not None and transform != plan.views.transform:
        raise MismatchError(
            f"the teacher saw images through another transform\n  cache: {plan.views.transform}\n"
            f"  pipeline: {transform}",
            "remove `transform` from the pipeline: the student then sees what the teacher saw",
        )


def view_of(cache: Cache, samples: Samples, view: int = 0) -> View:
    """Return a data set as the teacher of a cache saw it in a view.

    Raises:
        UsageError: if it was drawn by code outside of kdcache.
    """
    views = cache.manifest.plan.views
    return View(samples, views.transform, views.seed, view, crops=cache.crops)


def fingerprints_of(view: View, ids: Sequence[int]) -> Inputs:
    """Return the fingerprints and sketches of some images of a view, in that order."""
    cuts = [ids[cut.start : cut.stop] for cut in cut_range(range(len(ids)), _BATCH)]
    return Inputs.concatenate([inputs_of(batch.images) for batch in batches(view, cuts)])


class Replay(NamedTuple):
    """How the pixels of a data set, as a student would load it, compare with those that the teacher saw.

    Attributes:
        checked: images whose fingerprints were compared.
        rounded: those of them that differ, but by rounding alone.
    """

    checked: int
    rounded: int


def replay(
    cache: Cache, samples: Samples, limit: int | None = None, workers: int = 0, progress: Progress | None = None
) -> Replay:
    """Replay views and compare their fingerprints with those in the cache, without the teacher.

    Args:
        cache: that was made from them.
        samples: the data set as it is now.
        limit: number of images to compare, spread over samples and views; None for all with a fingerprint.
        workers: number of processes that load images.
        progress: progress reporter; silent if None.

    Raises:
        MismatchError: which names the first sample and view that differ.
    """
    plan = cache.manifest.plan
    stride = plan.shape.fingerprint_stride
    # Of what is here: some views may not have been pulled, and some samples of the cache be missing.
    in_cache = np.arange(len(samples)) if samples.ids is None else samples.ids
    marked = np.flatnonzero(in_cache % stride == 0)
    every = np.arange(len(cache.views) * len(marked))
    chosen = every if limit is None else every[pilot_ids(len(every), limit)]
    which, numbers = np.divmod(chosen, max(len(marked), 1))
    rounded = 0
    with (progress or Silent()).task("replay", len(chosen), "images") as task:
        for place in np.unique(which).tolist():
            number = cache.views[place]
            kept = zarr_store.read_inputs(cache.path, plan, number)
            view = view_of(cache, samples, number)
            ids = marked[numbers[which == place]].tolist()
            cuts = [ids[cut.start : cut.stop] for cut in cut_range(range(len(ids)), _BATCH)]
            for batch in batches(view, cuts, workers):
                then = Inputs(*(values[in_cache[batch.ids.numpy()] // stride] for values in kept))
                rounded += compare_inputs(cache, number, batch.ids, then, inputs_of(batch.images))
                task.advance(len(batch.ids))
    return Replay(len(chosen), rounded)


def compare_inputs(cache: Cache, view: int, ids: Tensor, then: Inputs, now: Inputs) -> int:
    """Return how many of M images of a view differ by rounding alone from what the teacher saw.

    Raises:
        MismatchError: which names the first that differs by more.
    """
    differ = then.fingerprints != now.fingerprints
    scale = np.maximum(np.abs(then.sketches).max(axis=1), 1.0)
    gap = np.abs(then.sketches - now.sketches).max(axis=1)
    for place in np.flatnonzero(differ & ~(gap <= _LAST_BITS * scale)):
        raise MismatchError(
            f"view {view} of sample {int(ids[place])} is not what the teacher of {cache.path} saw: parts of the "
            f"picture differ by up to {gap[place]:.3g} in their mean (fingerprint {now.fingerprints[place]:08x}, "
            f"in the cache {then.fingerprints[place]:08x})",
            "use the images and the library versions that the cache was made with (`kdcache info` names them)",
        )
    return int(differ.sum())

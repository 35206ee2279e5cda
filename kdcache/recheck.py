"""A cache held against what it was made from: the pixels that the teacher saw, and the teacher itself."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from kdcache.cache import layout
from kdcache.cache.codec import decode, encode
from kdcache.cache.fidelity import TEMPERATURES, divergence, gradient_error, total_variation
from kdcache.cache.planner import pilot_ids
from kdcache.cache.reader import Cache
from kdcache.errors import MismatchError
from kdcache.fingerprints import Inputs, inputs_of
from kdcache.limits import MOST_IN_A_BATCH, MOST_VALUES
from kdcache.models import weights_digest
from kdcache.pipeline import CacheSpec, Transform
from kdcache.progress import Progress, Silent
from kdcache.running import RunningTeacher, described_precision, refuse_not_finite
from kdcache.samples import Samples, check_same_samples
from kdcache.views import View, batches, cut_range

_LAST_BITS = 1e-5
"""Parts of a picture whose means are within this of one another differ by the rounding of another library at most."""

_BATCH = MOST_IN_A_BATCH // MOST_VALUES
"""So few that images of any size that a transform may make can be looked at."""

A_FEW = 32
"""Images that are compared before anything is made of a cache; `kdcache verify --replay` takes all."""

_SUSPECT = 0.05
"""Mean total variation at T = 1 from which it is another teacher, or another way to run it."""


def check_data(cache: Cache, samples: Samples, transform: Transform | None, progress: Progress | None) -> None:
    """That a cache was made from a data set, with its labels, in its order, through the transform that a pipeline says.

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
    """What the teacher of a cache saw of a data set, in one of its views.

    Raises:
        UsageError: if it was drawn by code that kdcache has not got.
    """
    views = cache.manifest.plan.views
    return View(samples, views.transform, views.seed, view, crops=cache.crops)


def fingerprints_of(view: View, ids: Sequence[int]) -> Inputs:
    """What some images leave behind of themselves in a cache, in that order."""
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
    """Make views anew and compare their fingerprints with those in the cache, without the teacher.

    Args:
        cache: that was made from them.
        samples: the data set as it is now.
        limit: how many images to look at, spread over samples and views; None for every one with a fingerprint.
        workers: processes that load them.
        progress: who is told how it goes.

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
            kept = layout.read_inputs(cache.path, plan, number)
            view = view_of(cache, samples, number)
            ids = marked[numbers[which == place]].tolist()
            cuts = [ids[cut.start : cut.stop] for cut in cut_range(range(len(ids)), _BATCH)]
            for batch in batches(view, cuts, workers):
                then = Inputs(*(values[in_cache[batch.ids.numpy()] // stride] for values in kept))
                rounded += compare_inputs(cache, number, batch.ids, then, inputs_of(batch.images))
                task.advance(len(batch.ids))
    return Replay(len(chosen), rounded)


def compare_inputs(cache: Cache, view: int, ids: Tensor, then: Inputs, now: Inputs) -> int:
    """How many images [M] of a view differ by rounding alone from what the teacher saw.

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


class Agreement(NamedTuple):
    """How near cached logits are to those of the live teacher, on a sample of rows of one view.

    Attributes:
        view: which one.
        temperature: T.
        rows: how many.
        total_variation: mean over the rows.
        divergence: mean KL(live || cached), in nats.
        top1: share of rows with the same largest class.
        gradient_error: of KD, relative, for a student that has learned nothing.
    """

    view: int
    temperature: int
    rows: int
    total_variation: float
    divergence: float
    top1: float
    gradient_error: float


def compare_with_teacher(
    cache: Cache,
    model: nn.Module,
    samples: Samples,
    spec: CacheSpec | None = None,
    rows: int = 512,
    device: torch.device | str = "cpu",
    progress: Progress | None = None,
) -> list[Agreement]:
    """Run the teacher again on some rows of every view.

    Args:
        cache: what is to be verified.
        model: the teacher; put into evaluation mode.
        samples: the data set that the cache was made from.
        spec: in what precision it runs, and how many processes load images; None for the usual.
        rows: how many of each view, spread over the data set.
        device: where the teacher runs.
        progress: who is told how it goes.

    Raises:
        MismatchError: if it has other weights, or says something else than the cache.
    """
    plan, spec = cache.manifest.plan, spec or CacheSpec()
    if (digest := weights_digest(model)) != plan.teacher.weights_digest:
        raise MismatchError(
            f"this teacher has the weights {digest}, the cache is of {plan.teacher.weights_digest}",
            "give the teacher that the cache was made with (`kdcache info CACHE` names it)",
        )
    if (precision := described_precision(spec)) != plan.teacher.precision:
        raise MismatchError(
            f"the teacher would run in {precision}, the cache's ran in {plan.teacher.precision}",
            "set cache.precision, cache.channels_last and cache.compile as they were",
        )
    running = RunningTeacher(model, plan.encoding.num_classes, spec, device)
    ids = pilot_ids(len(samples), rows)
    cuts = [ids[cut.start : cut.stop] for cut in cut_range(range(len(ids)), plan.batch_size)]
    teacher = cache.teacher(device)
    found = []
    with (progress or Silent()).task("teacher", len(ids) * len(cache.views), "rows") as task:
        for view in cache.views:
            seen = view_of(cache, samples, view)
            parts = []
            for batch in batches(seen, cuts, spec.workers, device):
                live = running(batch.images)
                refuse_not_finite(live.isfinite().all(dim=1).cpu(), batch.ids)
                truth = teacher.labels[batch.ids.to(device)]
                again = decode(encode(live, truth, plan.encoding, teacher.basis), truth, plan.encoding, teacher.basis)
                parts.append((live, again, teacher(batch.ids, view)))
                task.advance(len(batch.ids))
            live, again, cached = (torch.cat(logits) for logits in zip(*parts, strict=True))
            _check_same_teacher(_agreement(view, 1, again, cached))
            found += [_agreement(view, t, live, cached) for t in TEMPERATURES]
    return found


def _check_same_teacher(encoded: Agreement) -> None:
    """Refuse another teacher; `encoded` compares with live logits after the same encoding, which may lose much."""
    if encoded.total_variation > _SUSPECT:
        raise MismatchError(
            f"in view {encoded.view} the teacher says something else than the cache: mean total variation "
            f"{encoded.total_variation:.4f} at T = 1, the same class in {encoded.top1:.1%} of {encoded.rows} rows",
            "run the teacher as the cache's was: its code, precision, library versions (`kdcache info CACHE`)",
        )


def _agreement(view: int, temperature: int, live: Tensor, cached: Tensor) -> Agreement:
    return Agreement(
        view,
        temperature,
        len(live),
        float(total_variation(live, cached, temperature).mean()),
        float(divergence(live, cached, temperature).mean()),
        float((live.argmax(dim=1) == cached.argmax(dim=1)).float().mean()),
        gradient_error(live, cached, torch.zeros_like(live), temperature),
    )

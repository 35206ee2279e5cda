"""The inputs of training: images, labels and the cached teacher, and the check that they belong together."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
from torch import Tensor

from kdcache.cache.format.recorded_views import Crops
from kdcache.cache.placement.choose import Placement
from kdcache.cache.reader import Cache
from kdcache.cache.teacher import Teacher, TeacherWrapper
from kdcache.config.schema import Pipeline, TrainSpec
from kdcache.config.transform import Transform
from kdcache.data.alignment import align, apply_alignment, describe_alignment
from kdcache.data.check_images import check_images
from kdcache.data.datasets import load_held_out, load_split
from kdcache.data.repeatable import check_repeatable, find_random_item
from kdcache.data.replay import SPOT_CHECK_IMAGES, check_matches_cache, replay
from kdcache.data.same_samples import explain_fractions
from kdcache.data.samples import Samples
from kdcache.data.transforms import is_random
from kdcache.errors import MismatchError, UsageError
from kdcache.runtime.progress import Progress, Silent
from kdcache.train.cached_teacher import load_teacher


@dataclass(frozen=True)
class CacheOptions:
    """How the rows of caches are held, and which differences between a cache and the data set are accepted.

    Attributes:
        placement: where the rows are held; see `Cache.teacher`.
        allow_other_pixels: train although the loaded images differ from those that the teacher saw.
        align: match samples by their content keys, in any order, and leave out those that are not in the cache.
        allow_missing: the same, and accept that the data set lacks some samples of the cache.
    """

    placement: Placement | Literal["auto"] = "auto"
    allow_other_pixels: bool = False
    align: bool = False
    allow_missing: bool = False

    @property
    def by_content(self) -> bool:
        """Whether samples are matched by their content keys."""
        return self.align or self.allow_missing


@dataclass(frozen=True)
class TrainingInputs:
    """What students of one data set, one transform and the same caches share.

    Attributes:
        samples: training images.
        validation: split for the selection of an epoch; None without one.
        test: split for the final test; None without one.
        transform: of the teacher's views, or without a cache that of the pipeline.
        seed: of the views.
        views: number of views of the cache; None for a new view in every epoch.
        teacher: joined teacher of the caches; None without one.
        record: facts about caches, placement and replay, for the metrics of the run.
        crops: boxes of the teacher's views, if they are recorded.
        level_known: whether the teacher's logits are known exactly, or up to an additive constant per sample.
    """

    samples: Samples
    validation: Samples | None
    test: Samples | None
    transform: Transform
    seed: int = 0
    views: int | None = 1
    teacher: Teacher | None = None
    record: dict[str, Any] = field(default_factory=dict)
    crops: Crops | None = None
    level_known: bool = True

    def without_teacher(self) -> TrainingInputs:
        """Return what is loaded for a loss that uses no teacher."""
        return replace(self, teacher=None, record={**self.record, "placement": []})


def inputs_without_teacher(pipeline: Pipeline, progress: Progress | None = None) -> TrainingInputs:
    """Load the data of a pipeline alone.

    Args:
        pipeline: `dataset` and `transform`.
        progress: progress reporter; silent if None.

    Raises:
        CorruptError: if some image files cannot be read; names all of a split.
        KdcacheError: if the splits have different classes.
    """
    progress = progress or Silent()
    samples = load_split(pipeline.dataset, "train")
    transform = samples.transform if pipeline.transform is None else pipeline.transform
    _check_split(samples, transform, progress)
    return TrainingInputs(
        samples,
        _held_out(pipeline, "validation", samples, progress),
        _held_out(pipeline, "test", samples, progress),
        transform,
        views=None if is_random(transform) else 1,
    )


def inputs_from_caches(
    pipeline: Pipeline,
    caches: Sequence[Cache],
    options: CacheOptions | None = None,
    *,
    device: torch.device | str = "cpu",
    progress: Progress | None = None,
) -> TrainingInputs:
    """Load the data of a pipeline, and the teacher of its caches.

    Args:
        pipeline: `dataset`, `transform`, `join`, and whether the `loss` uses a teacher.
        caches: one or several.
        options: placement of the rows, and accepted differences; the defaults if None.
        device: where the logits are returned.
        progress: progress reporter; silent if None.

    Raises:
        MismatchError: if a cache belongs to other images, another order, other labels or another transform, the caches
            differ in their views, or replayed images are not those that the teacher saw.
        UsageError: if the number of weights is not that of the caches.
    """
    options, progress = options or CacheOptions(), progress or Silent()
    samples = load_split(pipeline.dataset, "train")
    matched: dict[str, dict[str, int]] = {}
    if options.by_content:
        samples, matched = _matched(samples, caches[0], options.allow_missing, progress)
    for note in samples.notes:
        progress.say(f"note: {note}")
    views = caches[0].manifest.plan.views
    replayed = []
    for cache in caches:
        check_matches_cache(cache, samples, pipeline.transform, progress)
        if cache.manifest.plan.views != views:
            raise MismatchError(
                f"{cache.path} has other views than {caches[0].path}\n  {cache.manifest.plan.views}\n  {views}",
                "join caches that were dumped with the same transform, seed and number of views",
            )
        _check_same_boxes(caches[0], cache)
        replayed.append(_replay(cache, samples, options.allow_other_pixels, progress))
    teacher, placements = load_teacher(pipeline, caches, samples, options.placement, device, progress)
    record = {
        "caches": [cache.manifest.digest for cache in caches],
        "placement": placements,
        "replay": replayed,
        **matched,
    }
    return TrainingInputs(
        samples,
        _held_out(pipeline, "validation", samples, progress),
        _held_out(pipeline, "test", samples, progress),
        views.transform,
        views.seed,
        _n_first_views(caches),
        teacher,
        record,
        caches[0].crops,
        all(_level_known(cache, samples) for cache in caches),
    )


def _level_known(cache: Cache, samples: Samples) -> bool:
    """Return whether a cache has the level of the teacher's class logits."""
    if samples.maps is None:
        return cache.level_known
    return all(record.level != "unknown" for record in cache.outputs.values() if record.places == "grid")


def _check_same_boxes(first: Cache, other: Cache) -> None:
    """Check that two teachers of the same views saw the same crops, if these are recorded.

    Raises:
        MismatchError: if they did not.
    """
    if first is other or first.crops is None or other.crops is None:
        return
    for view in sorted(set(first.views).intersection(other.views)):
        differ = (first.crops(view) != other.crops(view)).any(axis=1)
        if differ.any():
            raise MismatchError(
                f"the teacher of {other.path} saw another crop of sample {int(differ.argmax())} in view {view} than "
                f"that of {first.path}",
                "join caches whose teachers saw the same crops",
            )


def _matched(
    samples: Samples, cache: Cache, allow_missing: bool, progress: Progress
) -> tuple[Samples, dict[str, dict[str, int]]]:
    """Return the samples of a data set that are in a cache, in the cache's order, and their numbers for the record.

    Raises:
        MismatchError: if there are none, or some of the cache are missing and that is not accepted.
    """
    keys = samples.keys(progress)
    alignment = align(keys, samples.labels, cache.sample_keys, cache.labels)
    if not len(alignment.ids):
        check_repeatable(samples)
        raise MismatchError(
            f"no sample of {samples.name}/{samples.split} is in {cache.path}",
            "use a copy of the data set that the cache was made from (`kdcache info CACHE` names it)",
        )
    if len(alignment.missing) and not allow_missing:
        check_repeatable(samples)
        cause, remedy = explain_fractions(samples, keys, cache.sample_keys)
        raise MismatchError(
            describe_alignment(samples, alignment) + cause,
            f"{remedy}{'; or ' if remedy else ''}use --allow-missing to train on the samples that match, or add the "
            "others",
        )
    progress.say(f"note: {describe_alignment(samples, alignment)}")
    counts = {"matched": len(alignment.ids), "missing": len(alignment.missing), "extra": len(alignment.extra)}
    return apply_alignment(samples, alignment), {"alignment": counts}


def _n_first_views(caches: Sequence[Cache]) -> int:
    """Return how many views, from view 0 on, all caches have: students are trained on these.

    Raises:
        UsageError: if view 0 is missing.
    """
    common = set.intersection(*(set(cache.views) for cache in caches))
    count = next(view for view in range(len(common) + 1) if view not in common)
    if count == 0:
        raise UsageError(
            f"view 0 of {caches[0].path} is missing, and students are trained on the views from 0 on",
            "pull the first ones: `kdcache pull URL DIR --views 0-...`",
        )
    return count


def _held_out(
    pipeline: Pipeline, split: Literal["validation", "test"], samples: Samples, progress: Progress
) -> Samples | None:
    held_out = load_held_out(pipeline.dataset, split)
    if held_out is None:
        return None
    if held_out.class_names != samples.class_names:
        raise MismatchError(f"the {split} split has other classes than the training images", "check the data set")
    _check_split(held_out, pipeline.eval_transform or samples.transform, progress)
    return held_out


def _check_split(samples: Samples, transform: Transform, progress: Progress) -> None:
    """Check that the images can be read, and report what is left out and what is drawn by the data set itself.

    Raises:
        CorruptError: if some image files cannot be read; names all.
    """
    for note in check_images(samples, progress, transform=transform):
        progress.say(f"note: {note}")
    if (found := find_random_item(samples)) is not None:
        progress.say(f"note: {found[0]}, so that a teacher of it cannot be dumped; {found[1]}")


def _replay(cache: Cache, samples: Samples, allow_other_pixels: bool, progress: Progress) -> dict[str, Any]:
    """Compare some images with those that the teacher saw, and return the result for the record of the run.

    Raises:
        MismatchError: if they differ, and that is not accepted.
    """
    try:
        replayed = replay(cache, samples, SPOT_CHECK_IMAGES)
    except MismatchError as error:
        if not allow_other_pixels:
            raise MismatchError(error.what, f"{error.fix}; or use --allow-other-pixels") from None
        progress.say(f"note: {error.what}; continuing because of --allow-other-pixels")
        return {"other_pixels": error.what}
    if replayed.rounded:
        progress.say(
            f"note: {replayed.rounded} of {replayed.checked} images differ from the teacher's by rounding alone"
        )
    return replayed._asdict()


def labels_shown(samples: Samples, spec: TrainSpec) -> Tensor:
    """Return the labels that a network is trained with, [N] int64.

    With `labels_per_class`, so many labels per class are drawn with `seed`, and the others are -1.
    """
    labels = torch.from_numpy(samples.labels).long()
    if spec.labels_per_class is None:
        return labels
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(spec.seed))
    by_class, positions = labels[order].sort(stable=True)
    starts = torch.searchsorted(by_class, by_class, side="left")
    rank_in_class = torch.arange(len(labels)) - starts
    shown = torch.full_like(labels, -1)
    drawn = order[positions[rank_in_class < spec.labels_per_class]]
    shown[drawn] = labels[drawn]
    return shown


class FixedImagesTeacher(TeacherWrapper):
    """A teacher of one view, for a student that augments its images itself: every view gets the logits of view 0."""

    def __call__(self, ids: Tensor, view: int = 0) -> Tensor:
        """Return the logits [B, C] of samples `ids` [B] int64, whatever the view."""
        return super().__call__(ids, 0)

    def prefetch(self, batches: Iterable[Tensor], view: int = 0) -> None:
        """Announce the batches of ids [B] int64 that will be asked for, in this order."""
        super().prefetch(batches, 0)

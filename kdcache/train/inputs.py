"""What a network is trained on: the images, the cached teacher, and that the two belong together."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor

from kdcache.cache.decoded_teacher import decode_if_small
from kdcache.cache.format.recorded_views import Crops
from kdcache.cache.joined_teacher import JoinedTeacher
from kdcache.cache.placement.choose import Placement
from kdcache.cache.reader import Cache
from kdcache.cache.teacher import Teacher, TeacherWrapper
from kdcache.config.schema import Pipeline, TrainSpec, Transform
from kdcache.data.alignment import AlignedTeacher, align, aligned, described
from kdcache.data.datasets import load_held_out, load_split
from kdcache.data.mixing import split_mixing
from kdcache.data.replay import A_FEW, check_data, replay
from kdcache.data.samples import Samples
from kdcache.data.transforms import is_random
from kdcache.data.views import View
from kdcache.errors import MismatchError, UsageError
from kdcache.runtime.progress import Progress, Silent


@dataclass(frozen=True)
class TrainingInputs:
    """Everything that students of one data set, one transform and the same caches have in common.

    Attributes:
        samples: the training images.
        validation: for the selection; None without.
        test: for the end; None without.
        transform: what the teacher saw, or, without a cache, what the pipeline says.
        seed: of its views.
        views: how many a cache has; None for a view of its own in every epoch.
        teacher: from the caches; None without.
        record: of caches, placement and replay, for the run folder.
        crops: the boxes of what the teacher saw, where they are recorded.
        level_known: whether the teacher's logits are known as they are, or but for a constant of each row.
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


def inputs_without_teacher(pipeline: Pipeline) -> TrainingInputs:
    """The data of a pipeline alone.

    Raises:
        KdcacheError: if the splits do not fit one another.
    """
    samples = load_split(pipeline.dataset, "train")
    transform = samples.transform if pipeline.transform is None else pipeline.transform
    return TrainingInputs(
        samples,
        _held_out(pipeline, "validation", samples),
        _held_out(pipeline, "test", samples),
        transform,
        views=None if is_random(transform) else 1,
    )


def inputs_from_caches(
    pipeline: Pipeline,
    caches: Sequence[Cache],
    *,
    device: torch.device | str = "cpu",
    placement: Placement | Literal["auto"] = "auto",
    other_pixels: bool = False,
    by_content: bool = False,
    allow_missing: bool = False,
    progress: Progress | None = None,
) -> TrainingInputs:
    """The data of a pipeline, and the teacher that caches of it are.

    Args:
        pipeline: its `dataset`, `transform`, `join` and whether its `loss` uses a teacher are looked at.
        caches: one or several.
        device: where the logits are wanted.
        placement: where the rows are held; see `Cache.teacher`.
        other_pixels: go on although the images that are loaded are not those that the teacher saw.
        by_content: match samples by their content keys, in whatever order the data set has them, and leave out those
            that the caches have not.
        allow_missing: the same, and go on although the data set lacks some samples of the caches.
        progress: who is told how it goes.

    Raises:
        MismatchError: if a cache belongs to other images, another order, other labels or another transform, the caches
            have other views than one another, or some pixels, made anew, are not those that the teacher saw.
        UsageError: for weights that do not fit the caches.
    """
    progress = progress or Silent()
    samples = load_split(pipeline.dataset, "train")
    matched: dict[str, dict[str, int]] = {}
    if by_content or allow_missing:
        samples, matched = _matched(samples, caches[0], allow_missing, progress)
    views = caches[0].manifest.plan.views
    replayed = []
    for cache in caches:
        check_data(cache, samples, pipeline.transform, progress)
        if cache.manifest.plan.views != views:
            raise MismatchError(
                f"{cache.path} has other views than {caches[0].path}\n  {cache.manifest.plan.views}\n  {views}",
                "join caches that were dumped with the same transform, seed and number of views",
            )
        _check_same_boxes(caches[0], cache)
        replayed.append(_replay(cache, samples, other_pixels, progress))
    teachers = [cache.teacher(device, placement) for cache in caches] if pipeline.loss.uses_teacher else []
    for each in teachers:
        progress.say(f"the cache is held: {each.placement} ({each.why})")
    teacher: Teacher | None = None
    if teachers:
        joined = JoinedTeacher(teachers, pipeline.join.weights, pipeline.join.combine)
        teacher = teachers[0] if len(teachers) == 1 else joined
        if samples.ids is not None:
            teacher = AlignedTeacher(teacher, samples.ids, len(caches[0]))
        if all(each.placement != "stream" for each in teachers):
            teacher = decode_if_small(teacher, len(samples), samples.num_classes)
    record = {
        "caches": [cache.manifest.digest for cache in caches],
        "placement": [each.placement for each in teachers],
        "replay": replayed,
        **matched,
    }
    return TrainingInputs(
        samples,
        _held_out(pipeline, "validation", samples),
        _held_out(pipeline, "test", samples),
        views.transform,
        views.seed,
        _first_views(caches),
        teacher,
        record,
        caches[0].crops,
        all(cache.level_known for cache in caches),
    )


def _check_same_boxes(first: Cache, other: Cache) -> None:
    """That two teachers of the same views saw the same crops, where these are recorded."""
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
    """The samples of a data set that a cache has, in its order, and how many there are, for the record."""
    found = align(samples.keys(progress), samples.labels, cache.sample_keys, cache.labels)
    if not len(found.ids):
        raise MismatchError(
            f"no sample of {samples.name}/{samples.split} is in {cache.path}",
            "use a copy of the data set that the cache was made from (`kdcache info CACHE` names it)",
        )
    if len(found.missing) and not allow_missing:
        raise MismatchError(
            described(samples, found), "say --allow-missing to train on those that are there, or get the others"
        )
    progress.say(f"note: {described(samples, found)}")
    counts = {"matched": len(found.ids), "missing": len(found.missing), "extra": len(found.extra)}
    return aligned(samples, found), {"alignment": counts}


def _first_views(caches: Sequence[Cache]) -> int:
    """How many views, from the first on, are there of every cache: those are trained on.

    Raises:
        UsageError: if there is none.
    """
    here = set.intersection(*(set(cache.views) for cache in caches))
    count = next(view for view in range(len(here) + 1) if view not in here)
    if count == 0:
        raise UsageError(
            f"view 0 of {caches[0].path} is not here, and students are shown the views from the first on",
            "pull the first ones: `kdcache pull URL DIR --views 0-...`",
        )
    return count


def _held_out(pipeline: Pipeline, split: Literal["validation", "test"], samples: Samples) -> Samples | None:
    held_out = load_held_out(pipeline.dataset, split)
    if held_out is not None and held_out.class_names != samples.class_names:
        raise MismatchError(f"the {split} split has other classes than the training images", "check the data set")
    return held_out


def _replay(cache: Cache, samples: Samples, other_pixels: bool, progress: Progress) -> dict[str, Any]:
    """A look at some images before the first step, for the record of the run."""
    try:
        found = replay(cache, samples, A_FEW)
    except MismatchError as error:
        if not other_pixels:
            raise MismatchError(error.what, f"{error.fix}; or say --allow-other-pixels") from None
        progress.say(f"note: {error.what}; going on, as asked")
        return {"other_pixels": error.what}
    if found.rounded:
        progress.say(f"note: {found.rounded} of {found.checked} images differ from the teacher's by rounding alone")
    return found._asdict()


def few_labels(samples: Samples, spec: TrainSpec) -> Tensor:
    """The labels that a network is shown, [N] int64: `labels_per_class` of each class, drawn with `seed`, else -1."""
    labels = torch.from_numpy(samples.labels).long()
    if spec.labels_per_class is None:
        return labels
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(spec.seed))
    seen = torch.full_like(labels, -1)
    for label in range(samples.num_classes):
        seen[order[labels[order] == label][: spec.labels_per_class]] = label
    return seen


class FixedImagesTeacher(TeacherWrapper):
    """A teacher of one view, for a student that augments its images itself: every view gets the logits of view 0."""

    def __call__(self, ids: Tensor, view: int = 0) -> Tensor:
        """Return the logits [B, C] of samples `ids` [B] int64, whatever the view."""
        return super().__call__(ids, 0)

    def prefetch(self, batches: Iterable[Tensor], view: int = 0) -> None:
        """Announce the batches of ids [B] int64 that will be asked for, in this order."""
        super().prefetch(batches, 0)


def own_transform(lessons: TrainingInputs, own: Transform, spec: TrainSpec) -> View:
    """The training images as a student sees them that augments on its own.

    Raises:
        UsageError: if the teacher saw random views, or the transform mixes images.
    """
    if lessons.teacher is not None:
        if lessons.views != 1 or is_random(lessons.transform):
            raise UsageError(
                f"student.transform is for a teacher of fixed images, and the cache has {lessons.views} views of "
                f"{json.dumps(lessons.transform)}",
                "remove student.transform: the student then sees what the teacher saw",
            )
        if split_mixing(own)[1]:
            raise UsageError(
                f"student.transform mixes images in its step {own[-1]}, and the teacher saw none that are mixed",
                "dump the teacher on mixed views: put the step at the end of `transform`",
            )
    return View(lessons.samples, own, spec.seed, labels=few_labels(lessons.samples, spec))

"""Stage two: one trainer for students and, with cross-entropy and no cache, for teachers."""

from __future__ import annotations

import json
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from kdcache.cache.placement import Placement
from kdcache.cache.reader import Cache, CachedTeacher
from kdcache.datasets import load_held_out, load_split
from kdcache.errors import MismatchError, UsageError
from kdcache.evaluate import Score, evaluate, try_network
from kdcache.fit import Epoch, Teacher, fit
from kdcache.losses import Loss
from kdcache.losses.spec import Truncation
from kdcache.mixing import split_mixing
from kdcache.models import build_model
from kdcache.pipeline import Pipeline, StudentSpec, TeacherSpec, TrainSpec, Transform
from kdcache.progress import Progress
from kdcache.recheck import check_data, replay
from kdcache.runs import CHECKPOINT, check_free, run_folder
from kdcache.samples import Samples
from kdcache.views import View, is_random

_REPLAYED = 32
"""Images that are compared with what the teacher saw before the first step; `kdcache verify --replay` takes all."""


@dataclass(frozen=True)
class Result:
    """What came of a run.

    Attributes:
        model: with the selected weights.
        best: the selected epoch: the first of the best validation accuracy; the last without a validation split.
        test: on the test split, touched once; None without one.
        seconds: of training, validation included.
        checkpoint: where the weights lie.
    """

    model: nn.Module
    best: Epoch
    test: Score | None
    seconds: float
    checkpoint: Path


def train_teacher(
    pipeline: Pipeline, out: str | Path, *, device: torch.device | str = "cpu", progress: Progress | None = None
) -> Result:
    """Train the pipeline's teacher with cross-entropy, from random weights.

    Args:
        pipeline: its `dataset`, `transform` and `teacher` sections.
        out: the run folder; must not exist.
        device: where to train.
        progress: who is told how it goes.

    Raises:
        KdcacheError: if anything does not fit; nothing is left behind.
    """
    out, spec = Path(out), pipeline.section("teacher")
    check_free(out)
    samples = load_split(pipeline.dataset, "train")
    transform = samples.transform if pipeline.transform is None else pipeline.transform
    loss = Loss.model_validate({"name": "ce"})
    views = None if is_random(transform) else 1
    train = View(samples, transform, labels=few_labels(samples, spec.train))
    return _train(pipeline, spec, loss, train, out, views, device, progress)


def train_student(
    pipeline: Pipeline,
    cache: Cache | None,
    out: str | Path,
    *,
    device: torch.device | str = "cpu",
    placement: Placement | Literal["auto"] = "auto",
    other_pixels: bool = False,
    progress: Progress | None = None,
) -> Result:
    """Train the pipeline's student from a cache; the teacher itself is never loaded.

    Args:
        pipeline: its `dataset`, `student` and `loss` sections.
        cache: a cache of the same data set; None only for a loss that uses no teacher.
        out: the run folder; must not exist.
        device: where to train.
        placement: where the cache's rows are held meanwhile; see `Cache.teacher`.
        other_pixels: train although the images that are loaded are not those that the teacher saw.
        progress: who is told how it goes.

    Raises:
        MismatchError: if the cache belongs to other images, another order, other labels or another transform, or the
            pixels of some views, made anew, are not those that the teacher saw.
        KdcacheError: if anything else does not fit; nothing is left behind.
    """
    out, spec = Path(out), pipeline.section("student")
    check_free(out)
    samples = load_split(pipeline.dataset, "train")
    teacher: CachedTeacher | None = None
    replayed: dict[str, Any] | None = None
    if cache is None:
        if pipeline.loss.uses_teacher:
            raise UsageError(
                f"the loss {pipeline.loss.name} needs a teacher", "give its cache with --cache, or take --loss ce"
            )
        transform = samples.transform if pipeline.transform is None else pipeline.transform
        views, seed = None if is_random(transform) else 1, 0
    else:
        check_data(cache, samples, pipeline.transform, progress)
        replayed = _replay(cache, samples, other_pixels, progress)
        plan = cache.manifest.plan
        transform, views, seed = plan.views.transform, plan.views.count, plan.views.seed
        teacher = cache.teacher(device, placement) if pipeline.loss.uses_teacher else None
        if teacher and progress:
            progress.say(f"the cache is held: {teacher.placement} ({teacher.why})")
    train = View(samples, transform, seed, labels=few_labels(samples, spec.train))
    extra = {
        "cache": cache.manifest.digest if cache else None,
        "placement": teacher.placement if teacher else None,
        "replay": replayed,
    }
    return _train(pipeline, spec, pipeline.loss, train, out, views, device, progress, teacher, extra)


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


def _replay(cache: Cache, samples: Samples, other_pixels: bool, progress: Progress | None) -> dict[str, Any]:
    """A look at some images before the first step, for the record of the run."""
    try:
        found = replay(cache, samples, _REPLAYED)
    except MismatchError as error:
        if not other_pixels:
            raise MismatchError(error.what, f"{error.fix}; or say --allow-other-pixels") from None
        if progress:
            progress.say(f"note: {error.what}; going on, as asked")
        return {"other_pixels": error.what}
    if found.rounded and progress:
        progress.say(f"note: {found.rounded} of {found.checked} images differ from the teacher's by rounding alone")
    return found._asdict()


def _train(
    pipeline: Pipeline,
    spec: TeacherSpec | StudentSpec,
    loss: Loss,
    train: View,
    out: Path,
    views: int | None,
    device: torch.device | str,
    progress: Progress | None,
    teacher: Teacher | None = None,
    extra: dict[str, Any] | None = None,
) -> Result:
    samples = train.samples
    if not loss.uses_teacher and not bool((train.labels >= 0).any()):
        raise UsageError("no training image has a label, and the loss uses no teacher", "set train.labels_per_class")
    _check_loss(loss, train, progress)
    eval_transform = _eval_transform(pipeline, train)
    validation = _held_out(pipeline, "validation", eval_transform, samples)
    test = _held_out(pipeline, "test", eval_transform, samples)
    used = {"transform": train.transform, "eval_transform": eval_transform, "loss": loss}
    with run_folder(out, pipeline.model_copy(update=used)) as run, torch.random.fork_rng():
        torch.manual_seed(spec.train.seed)
        start = isinstance(spec, StudentSpec) and (spec.weights is not None or "@" in spec.model)
        model = build_model(spec, samples.num_classes, train.shape(), trained=start)
        try_network(model, train, "cpu", "network")
        began = time.perf_counter()
        best = fit(
            model,
            train,
            validation,
            spec.train,
            loss,
            teacher=teacher,
            views=views,
            device=device,
            on_epoch=lambda epoch: run.epoch(epoch._asdict()),
            progress=progress,
        )
        seconds = time.perf_counter() - began
        score = evaluate(model, test, device) if test is not None else None
        run.finish(
            model,
            {
                "loss": loss.name,
                "seed": spec.train.seed,
                "best": best._asdict(),
                "test": score._asdict() if score else None,
                "labelled": int((train.labels >= 0).sum()),
                "parameters": sum(p.numel() for p in model.parameters()),
                "seconds": round(seconds, 3),
                **(extra or {}),
            },
        )
    return Result(model, best, score, seconds, out / CHECKPOINT)


def _check_loss(loss: Loss, train: View, progress: Progress | None) -> None:
    """That the loss makes sense for these images and labels."""
    if train.mixes and loss.acts_on_label:
        raise UsageError(
            f"{loss.acts_on_label} acts on the one true class of an image, and {train.transform[-1]} mixes two images",
            "take a loss without ka, lsr, dkd, pld and ofa, such as kd or dtkd, or a cache of views that are not mixed",
        )
    top = loss.adjustment.top if isinstance(loss.adjustment, Truncation) else 0
    if top >= train.samples.num_classes:
        raise UsageError(
            f"truncation to the top {top} would cut nothing off: {train.samples.name} has "
            f"{train.samples.num_classes} classes",
            "set loss.adjustment.top to fewer, or remove the truncation",
        )
    if loss.skips_unlabelled and (unlabelled := int((train.labels < 0).sum())):
        if unlabelled == len(train.labels):
            raise UsageError(
                f"no training image has a label, and the divergence {loss.divergence.kind} is of labelled ones alone",
                "take another divergence, such as kl",
            )
        if progress:
            progress.say(
                f"note: of the {unlabelled} images without a label nothing is learned: the divergence "
                f"{loss.divergence.kind} is of labelled ones alone"
            )


def _held_out(
    pipeline: Pipeline, split: Literal["validation", "test"], transform: Transform, samples: Samples
) -> View | None:
    held_out = load_held_out(pipeline.dataset, split)
    if held_out is None:
        return None
    if held_out.class_names != samples.class_names:
        raise MismatchError(f"the {split} split has other classes than the training images", "check the data set")
    return View(held_out, transform)


def _eval_transform(pipeline: Pipeline, train: View) -> Transform:
    """What validation and test images go through: never something random, never something unsaid."""
    if pipeline.eval_transform is not None:
        if split_mixing(pipeline.eval_transform)[1]:
            raise UsageError(
                "eval_transform mixes images, and accuracy is of images with one label", "remove its last step"
            )
        return pipeline.eval_transform
    if is_random(train.transform):
        fixed = [step for step in train.transform if not is_random([step])]
        raise UsageError(
            "the transform draws at random, and validation and test images need one that does not",
            f"say which: its fixed steps would be eval_transform: {json.dumps(fixed)}",
        )
    return train.transform

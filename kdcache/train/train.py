"""Stage two: one trainer for students and, with cross-entropy and no cache, for teachers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import nn

from kdcache.cache.placement.choose import Placement
from kdcache.cache.reader import Cache
from kdcache.config.schema import Pipeline, StudentSpec, TeacherSpec, TrainSpec
from kdcache.data.transforms import is_random, transform_for_evaluation
from kdcache.data.views import View, seeded
from kdcache.errors import UsageError
from kdcache.losses import Loss
from kdcache.losses.config import Truncation
from kdcache.models import build_model
from kdcache.models.checks import try_network, try_training
from kdcache.models.evaluate import SplitScore, evaluate
from kdcache.runtime.distributed import is_first, n_processes
from kdcache.runtime.progress import Progress, Silent
from kdcache.train.inputs import (
    OfFixedImages,
    TrainingInputs,
    few_labels,
    inputs_from_caches,
    inputs_without_teacher,
    own_transform,
)
from kdcache.train.loop import Epoch, fit
from kdcache.train.run_folder import CHECKPOINT, check_free, check_trackers, run_folder
from kdcache.train.step import Teacher


@dataclass(frozen=True)
class Result:
    """What came of a run.

    Attributes:
        model: with the selected weights.
        best: the selected epoch: the first of the best validation accuracy; the last without a validation split.
        test: on the test split, touched once, by the first process; None without one.
        seconds: of training, validation included.
        checkpoint: where the weights lie.
    """

    model: nn.Module
    best: Epoch
    test: SplitScore | None
    seconds: float
    checkpoint: Path


def train_teacher(
    pipeline: Pipeline, out: str | Path, *, device: torch.device | str = "cpu", progress: Progress | None = None
) -> Result:
    """Train the pipeline's teacher with cross-entropy, from random weights.

    Interrupted after an epoch, it goes on there when it is called again with the same arguments.

    Args:
        pipeline: its `dataset`, `transform` and `teacher` sections.
        out: the run folder; must not exist.
        device: where to train.
        progress: who is told how it goes.

    Raises:
        KdcacheError: if anything does not fit; before the first whole epoch, nothing is left behind.
    """
    spec = pipeline.section("teacher")
    check_free(Path(out))
    loss = Loss.model_validate({"name": "ce"})
    inputs = inputs_without_teacher(pipeline)
    return _train(pipeline, spec, loss, inputs, Path(out), device, progress or Silent())


def train_student(
    pipeline: Pipeline,
    cache: Cache | Sequence[Cache] | None,
    out: str | Path,
    *,
    device: torch.device | str = "cpu",
    placement: Placement | Literal["auto"] = "auto",
    other_pixels: bool = False,
    by_content: bool = False,
    allow_missing: bool = False,
    progress: Progress | None = None,
) -> Result:
    """Train the pipeline's student from a cache; the teacher itself is never loaded.

    Interrupted after an epoch, it goes on there when it is called again with the same arguments.

    Args:
        pipeline: its `dataset`, `student`, `join` and `loss` sections.
        cache: of the same data set, or several; None only for a loss that uses no teacher.
        out: the run folder; must not exist.
        device: where to train.
        placement: where the cache's rows are held meanwhile; see `Cache.teacher`.
        other_pixels: train although the images that are loaded are not those that the teacher saw.
        by_content: match samples with the cache's by content, in whatever order they are; leave others out.
        allow_missing: the same, and train although the data set lacks some of them.
        progress: who is told how it goes.

    Raises:
        MismatchError: if the cache belongs to other images, another order, other labels or another transform, or the
            pixels of some views, made anew, are not those that the teacher saw.
        KdcacheError: if anything else does not fit; before the first whole epoch, nothing is left behind.
    """
    pipeline.section("student")
    check_free(Path(out))
    caches = [] if cache is None else [cache] if isinstance(cache, Cache) else [*cache]
    if caches:
        inputs = inputs_from_caches(
            pipeline,
            caches,
            device=device,
            placement=placement,
            other_pixels=other_pixels,
            by_content=by_content,
            allow_missing=allow_missing,
            progress=progress,
        )
    elif by_content or allow_missing:
        raise UsageError("samples are to be matched with a cache, and none is given", "give one with --cache")
    elif pipeline.loss.uses_teacher:
        raise UsageError(
            f"the loss {pipeline.loss.name} needs a teacher", "give its cache with --cache, or take --loss ce"
        )
    else:
        inputs = inputs_without_teacher(pipeline)
    return train_on(pipeline, inputs, out, device=device, progress=progress)


def train_on(
    pipeline: Pipeline,
    inputs: TrainingInputs,
    out: str | Path,
    *,
    device: torch.device | str = "cpu",
    progress: Progress | None = None,
) -> Result:
    """Train the pipeline's student on inputs that several students may have in common; see `train_student`."""
    spec = pipeline.section("student")
    check_free(Path(out))
    return _train(pipeline, spec, pipeline.loss, inputs, Path(out), device, progress or Silent())


def _train(
    pipeline: Pipeline,
    spec: TeacherSpec | StudentSpec,
    loss: Loss,
    inputs: TrainingInputs,
    out: Path,
    device: torch.device | str,
    progress: Progress,
) -> Result:
    samples = inputs.samples
    train, views, teacher = _seen(spec, loss, inputs, progress)
    if not loss.uses_teacher and not bool((train.labels >= 0).any()):
        raise UsageError("no training image has a label, and the loss uses no teacher", "set train.labels_per_class")
    _check_loss(loss, train, progress)
    if loss.needs_level and not inputs.level_known:
        raise UsageError(
            f"of this teacher only probabilities are known, so its logits but for a constant of each row; and "
            f"{loss.needs_level} depends on that constant",
            "take one that does not: set loss.normalization to z_score, for dtkd loss.temperature.center to true, or "
            "take a loss such as kd",
        )
    check_trackers(spec.train.trackers)
    eval_transform = transform_for_evaluation(pipeline.eval_transform, inputs.transform)
    validation, test = (
        None if held is None else View(held, eval_transform) for held in (inputs.validation, inputs.test)
    )
    used = pipeline.model_copy(update={"transform": inputs.transform, "eval_transform": eval_transform, "loss": loss})
    torch_device = torch.device(device)
    begun_with = {
        "caches": inputs.record.get("caches", []),
        "device": torch_device.type,
        # The order of the images is another one where rows are read as a stream.
        "streamed": "stream" in inputs.record.get("placement", []),
    }
    with (
        run_folder(out, used, begun_with, spec.train.trackers) as run,
        torch.random.fork_rng([torch_device] if torch_device.type == "cuda" else []),
        seeded(spec.train.seed),
    ):
        torch.manual_seed(spec.train.seed)
        start = isinstance(spec, StudentSpec) and (spec.weights is not None or spec.names_weights)
        model = build_model(spec, samples.num_classes, train.shape(), trained=start, progress=progress)
        try_network(model, train, "cpu", "network")
        try_training(model, train, "network", _smallest_micro_batch(spec.train, len(train)))
        trained = fit(
            model,
            train,
            validation,
            spec.train,
            loss,
            teacher=teacher,
            views=views,
            device=device,
            on_epoch=run.epoch,
            checkpointer=run,
            progress=progress,
        )
        score = evaluate(model, test, device) if test is not None and is_first() else None
        run.finish(
            model,
            {
                "network": "student" if isinstance(spec, StudentSpec) else "teacher",
                "loss": loss.name,
                "seed": spec.train.seed,
                "best": trained.best._asdict(),
                "epochs": len(trained.epochs),
                "test": score._asdict() if score else None,
                "labeled": int((train.labels >= 0).sum()),
                "parameters": sum(p.numel() for p in model.parameters()),
                "seconds": round(trained.seconds, 3),
                **inputs.record,
            },
        )
    return Result(model, trained.best, score, trained.seconds, out / CHECKPOINT)


def _smallest_micro_batch(spec: TrainSpec, n_samples: int) -> int:
    """Return the number of images that a process goes through at once, where it is smallest."""
    return min(spec.batch_size, n_samples) // (spec.gradient_accumulation_steps * n_processes())


def _seen(
    spec: TeacherSpec | StudentSpec, loss: Loss, inputs: TrainingInputs, progress: Progress
) -> tuple[View, int | None, Teacher | None]:
    """The training images as the network sees them, how many views of them there are, and who teaches."""
    teacher = inputs.teacher if loss.uses_teacher else None
    own = spec.transform if isinstance(spec, StudentSpec) else None
    if own is None:
        labels = few_labels(inputs.samples, spec.train)
        return _images(inputs, labels), inputs.views, teacher
    train = own_transform(inputs, own, spec.train)
    if teacher is not None:
        progress.say("note: the student sees images through student.transform: the teacher did not see these pixels")
    return train, None if is_random(own) else 1, OfFixedImages(teacher) if teacher is not None else None


def _images(inputs: TrainingInputs, labels: torch.Tensor) -> View:
    return View(inputs.samples, inputs.transform, inputs.seed, labels=labels, crops=inputs.crops)


def _check_loss(loss: Loss, train: View, progress: Progress) -> None:
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
    if loss.skips_unlabeled and (unlabeled := int((train.labels < 0).sum())):
        if unlabeled == len(train.labels):
            raise UsageError(
                f"no training image has a label, and the divergence {loss.divergence.kind} is of labeled ones alone",
                "take another divergence, such as kl",
            )
        progress.say(
            f"note: of the {unlabeled} images without a label nothing is learned: the divergence "
            f"{loss.divergence.kind} is of labeled ones alone"
        )

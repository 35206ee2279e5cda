"""Stage two: one trainer for students and, with cross-entropy and no cache, for teachers."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.optim import SGD, AdamW, Optimizer
from torch.optim.lr_scheduler import CosineAnnealingLR, LambdaLR, LRScheduler, MultiStepLR
from torch.utils.data import DataLoader

from kdcache.cache.reader import Cache
from kdcache.datasets import load_split
from kdcache.errors import CorruptError, MismatchError, UsageError
from kdcache.evaluate import Score, evaluate, try_network
from kdcache.losses import Loss, LossParts, distillation_loss
from kdcache.models import build_model
from kdcache.pipeline import Pipeline, StudentSpec, TeacherSpec, TrainSpec, Transform
from kdcache.progress import Progress, Silent
from kdcache.runs import CHECKPOINT, check_free, run_folder
from kdcache.samples import Samples, check_same_samples
from kdcache.views import Batch, View, as_is, is_random

Teacher = Callable[[Tensor, int], Tensor]
"""(ids [B] int64, view) -> logits [B, C]: a `CachedTeacher`, or anything that answers like one."""


class Epoch(NamedTuple):
    """A line of metrics.csv. Losses are means over the epoch's steps, `cross_entropy` and `distillation` unweighted."""

    epoch: int
    lr: float
    loss: float
    cross_entropy: float
    distillation: float
    validation_accuracy: float | None
    validation_loss: float | None


@dataclass(frozen=True)
class Result:
    """What came of a run.

    Attributes:
        model: with the selected weights.
        best: the epoch that was selected: the first of the best validation accuracy, or the last without a validation split.
        test: on the test split, touched once; None without one.
        seconds: of training, validation included.
        checkpoint: where the weights lie.
    """

    model: nn.Module
    best: Epoch
    test: Score | None
    seconds: float
    checkpoint: Path


def steps(
    model: nn.Module,
    train: View,
    spec: TrainSpec,
    loss: Loss,
    epoch: int,
    optimizer: Optimizer,
    teacher: Teacher | None = None,
    device: torch.device | str = "cpu",
) -> list[LossParts]:
    """One epoch of training, and the loss of each of its steps.

    Args:
        model: in training mode.
        train: images and labels, set to the view of this epoch.
        spec: batch size, seed and workers; the order of the samples follows from (seed, epoch).
        loss: what is minimised.
        epoch: counted from 1.
        optimizer: of the model's parameters.
        teacher: where the teacher's logits come from; None for a loss without one.
        device: where the model is.
    """
    order = torch.Generator().manual_seed(spec.seed * 1_000_003 + epoch)
    loader: DataLoader[Batch] = DataLoader(
        train,
        batch_size=spec.batch_size,
        shuffle=True,
        generator=order,
        num_workers=spec.workers,
        collate_fn=as_is,
        # Batch norm cannot be trained on a batch of one; the next epoch's order will leave out another sample.
        drop_last=len(train) % spec.batch_size == 1 and len(train) > 1,
        pin_memory=torch.device(device).type == "cuda",
    )
    parts = []
    for images, labels, ids in loader:
        student_logits = model(images.to(device, non_blocking=True))
        teacher_logits = teacher(ids, train.view).to(device) if teacher is not None else None
        step = distillation_loss(student_logits, teacher_logits, labels.to(device), loss, epoch)
        optimizer.zero_grad()
        step.total.backward()  # type: ignore[no-untyped-call]  # torch leaves it untyped
        optimizer.step()
        parts.append(LossParts(*(value.detach() for value in step)))
    return parts


def fit(
    model: nn.Module,
    train: View,
    validation: View | None,
    spec: TrainSpec,
    loss: Loss,
    *,
    teacher: Teacher | None = None,
    views: int | None = 1,
    device: torch.device | str = "cpu",
    on_epoch: Callable[[Epoch], None] | None = None,
    progress: Progress | None = None,
) -> Epoch:
    """Train a network, and leave in it the weights of its best epoch on the validation split.

    Args:
        model: the network; moved to `device`.
        train: images and labels.
        validation: for the selection; None keeps the last epoch's weights.
        spec: optimizer, schedule, seed.
        loss: what is minimised.
        teacher: where the teacher's logits come from.
        views: epoch e sees view (e - 1) mod `views`; None gives every epoch a view of its own.
        device: where to train.
        on_epoch: called with each line of metrics.
        progress: who is told how it goes.

    Raises:
        CorruptError: if the loss becomes NaN or infinite.
    """
    model.to(device)
    optimizer = make_optimizer(model, spec)
    schedule = _make_schedule(optimizer, spec)
    best: tuple[Epoch, dict[str, Tensor]] | None = None
    with (progress or Silent()).task("training", spec.epochs, "epochs") as task:
        for number in range(1, spec.epochs + 1):
            train.view = number - 1 if views is None else (number - 1) % views
            rate = optimizer.param_groups[0]["lr"]
            model.train()
            parts = steps(model, train, spec, loss, number, optimizer, teacher, device)
            means = LossParts(*(torch.stack(values).double().mean() for values in zip(*parts, strict=True)))
            if not torch.isfinite(means.total):
                raise CorruptError(
                    f"the loss became {means.total.item()} in epoch {number}", "lower train.lr, or the weights of the loss"
                )
            schedule.step()
            score = evaluate(model, validation, device) if validation is not None else None
            epoch = Epoch(
                number,
                rate,
                means.total.item(),
                means.cross_entropy.item(),
                means.distillation.item(),
                score.accuracy if score else None,
                score.loss if score else None,
            )
            if on_epoch:
                on_epoch(epoch)
            if best is None or score is None or score.accuracy > (best[0].validation_accuracy or 0.0):
                best = epoch, copy.deepcopy(model.state_dict())
            task.advance(1, f"loss {epoch.loss:.3f}" + (f", validation {score.accuracy:.1%}" if score else ""))
    if best is None:
        raise UsageError("there was no epoch to train", "set train.epochs to 1 or more")
    model.load_state_dict(best[1])
    return best[0]


def make_optimizer(model: nn.Module, spec: TrainSpec) -> Optimizer:
    """The optimizer that a pipeline describes."""
    if spec.optimizer == "adamw":
        return AdamW(model.parameters(), lr=spec.lr, weight_decay=spec.weight_decay)
    nesterov = spec.nesterov and spec.momentum > 0
    return SGD(
        model.parameters(), lr=spec.lr, momentum=spec.momentum, nesterov=nesterov, weight_decay=spec.weight_decay
    )


def _make_schedule(optimizer: Optimizer, spec: TrainSpec) -> LRScheduler:
    if spec.schedule == "cosine":
        return CosineAnnealingLR(optimizer, T_max=spec.epochs)
    if spec.schedule == "multistep":
        return MultiStepLR(optimizer, milestones=spec.milestones, gamma=spec.decay)
    return LambdaLR(optimizer, lambda _: 1.0)


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
    samples = _train_split(pipeline)
    transform = samples.transform if pipeline.transform is None else pipeline.transform
    loss = Loss.model_validate({"name": "ce"})
    views = None if is_random(transform) else 1
    return _train(pipeline, spec, loss, View(samples, transform), out, views, device, progress)


def train_student(
    pipeline: Pipeline,
    cache: Cache | None,
    out: str | Path,
    *,
    device: torch.device | str = "cpu",
    progress: Progress | None = None,
) -> Result:
    """Train the pipeline's student from a cache; the teacher itself is never loaded.

    Args:
        pipeline: its `dataset`, `student` and `loss` sections.
        cache: a cache of the same data set; None only for a loss that uses no teacher.
        out: the run folder; must not exist.
        device: where to train.
        progress: who is told how it goes.

    Raises:
        MismatchError: if the cache belongs to other images, another order, other labels or another transform.
        KdcacheError: if anything else does not fit; nothing is left behind.
    """
    out, spec = Path(out), pipeline.section("student")
    check_free(out)
    samples = _train_split(pipeline)
    if cache is None:
        if pipeline.loss.uses_teacher:
            raise UsageError(
                f"the loss {pipeline.loss.name} needs a teacher", "give its cache with --cache, or take --loss ce"
            )
        transform = samples.transform if pipeline.transform is None else pipeline.transform
        teacher, views, seed = None, None if is_random(transform) else 1, 0
    else:
        _check_cache(cache, samples, pipeline, progress)
        plan = cache.manifest.plan
        transform, views, seed = plan.views.transform, plan.views.count, plan.views.seed
        teacher = cache.teacher(device) if pipeline.loss.uses_teacher else None
    labels = few_labels(samples, spec.labels_per_class, spec.train.seed)
    train = View(samples, transform, seed, labels=labels)
    extra = {"cache": cache.manifest.digest if cache else None, "labelled": int((labels >= 0).sum())}
    return _train(pipeline, spec, pipeline.loss, train, out, views, device, progress, teacher, extra)


def few_labels(samples: Samples, per_class: int | None, seed: int) -> Tensor:
    """The labels that a student may see, [N] int64: `per_class` of each class, drawn with `seed`; -1 for the others."""
    labels = torch.from_numpy(samples.labels).long()
    if per_class is None:
        return labels
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
    seen = torch.full_like(labels, -1)
    for label in range(samples.num_classes):
        chosen = order[labels[order] == label][:per_class]
        seen[chosen] = label
    return seen


def _train_split(pipeline: Pipeline) -> Samples:
    samples = load_split(pipeline.dataset, "train")
    if samples is None:
        raise UsageError("the data set has no training images", "check the dataset section")
    return samples


def _check_cache(cache: Cache, samples: Samples, pipeline: Pipeline, progress: Progress | None) -> None:
    plan = cache.manifest.plan
    if cache.num_classes != samples.num_classes:
        raise MismatchError(
            f"the cache {cache.path} has {cache.num_classes} classes, {samples.name} has {samples.num_classes}",
            "use the data set that the cache was made from (`kdcache info CACHE` names it)",
        )
    check_same_samples(samples, samples.keys(progress), cache.sample_keys, cache.labels)
    if pipeline.transform is not None and pipeline.transform != plan.views.transform:
        raise MismatchError(
            f"the teacher saw images through another transform\n  cache: {plan.views.transform}\n"
            f"  pipeline: {pipeline.transform}",
            "remove `transform` from the pipeline: the student then sees what the teacher saw",
        )


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
    validation, test = (_held_out(pipeline, split, train, samples) for split in ("validation", "test"))
    with run_folder(out, pipeline) as run, torch.random.fork_rng():
        torch.manual_seed(spec.train.seed)
        model = build_model(spec, samples.num_classes, samples.images.shape())
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
                "parameters": sum(p.numel() for p in model.parameters()),
                "seconds": round(seconds, 3),
                **(extra or {}),
            },
        )
    return Result(model, best, score, seconds, out / CHECKPOINT)


def _held_out(pipeline: Pipeline, split: Any, train: View, samples: Samples) -> View | None:
    held_out = load_split(pipeline.dataset, split)
    if held_out is None:
        return None
    if held_out.class_names != samples.class_names:
        raise MismatchError(f"the {split} split has other classes than the training images", "check the data set")
    return View(held_out, _eval_transform(pipeline, train, samples))


def _eval_transform(pipeline: Pipeline, train: View, samples: Samples) -> Transform:
    if pipeline.eval_transform is not None:
        return pipeline.eval_transform
    return samples.transform if is_random(train.transform) else train.transform


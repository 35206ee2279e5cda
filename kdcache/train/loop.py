"""The training loop: epochs of optimizer steps, with the weights of the best epoch on held-out samples selected.

With several processes, only what is drawn in the network (dropout) and batch normalization, which is of one
micro-batch, differ from a single process; see `step.py`.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import nn

from kdcache.cache.teacher import Teacher
from kdcache.config.schema import TrainSpec
from kdcache.data.views import View
from kdcache.losses import Loss
from kdcache.models.pixel_scores import PixelScore
from kdcache.runtime.progress import Progress, Silent, Task
from kdcache.train.epochs import Checkpointer, Selected, TrainingResult, epochs_work, mean_losses
from kdcache.train.learned import NO_PARTS, LearnedParts
from kdcache.train.passes import Clock, Work, run_alone
from kdcache.train.scoring import HeldOut, held_out_cuts, held_out_work, validation_work
from kdcache.train.step import Trainer


class Epoch(NamedTuple):
    """A line of metrics.csv: losses are means over the steps of the epoch, as `LossParts` defines them.

    `lr` is that of the first step; temperatures are means over the samples, None without a teacher. Without a
    validation split, `validation_loss` is the loss on samples that are held out, if there are any.
    """

    epoch: int
    view: int
    lr: float
    loss: float
    cross_entropy: float
    distillation: float
    student_temperature: float | None
    teacher_temperature: float | None
    validation_accuracy: float | None
    validation_loss: float | None


class PixelEpoch(NamedTuple):
    """A line of metrics.csv of a network that says a class of every pixel: `Epoch` with a mean over the classes.

    `validation_accuracy` is the share of pixels, `validation_mean_iou` the mean intersection over union, by which the
    epoch is selected.
    """

    epoch: int
    view: int
    lr: float
    loss: float
    cross_entropy: float
    distillation: float
    student_temperature: float | None
    teacher_temperature: float | None
    validation_accuracy: float | None
    validation_loss: float | None
    validation_mean_iou: float | None = None


AnyEpoch = Epoch | PixelEpoch


class _ImageEpochs:
    """The epochs of a network of images; see `EpochKind`.

    Args:
        trainer: of the network.
    """

    def __init__(self, trainer: Trainer) -> None:
        self._trainer = trainer

    def read(self, values: list[Any]) -> AnyEpoch:
        """Return a line of metrics from its values."""
        return (Epoch if len(values) == len(Epoch._fields) else PixelEpoch)(*values)

    def is_better(self, line: AnyEpoch, best: AnyEpoch) -> bool:
        """Return whether an epoch is selected instead of the best before it; without any validation, it always is."""
        now, before = getattr(line, "validation_mean_iou", None), getattr(best, "validation_mean_iou", None)
        if now is not None and before is not None:
            return bool(now > before)
        if line.validation_accuracy is not None and best.validation_accuracy is not None:
            return line.validation_accuracy > best.validation_accuracy
        if line.validation_loss is not None and best.validation_loss is not None:
            return line.validation_loss < best.validation_loss
        return True

    def described(self, line: AnyEpoch) -> str:
        """Return the results of an epoch, for the progress."""
        if isinstance(line, PixelEpoch) and line.validation_mean_iou is not None:
            return f", validation mIoU {line.validation_mean_iou:.1%}"
        if line.validation_accuracy is not None:
            return f", validation {line.validation_accuracy:.1%}"
        return "" if line.validation_loss is None else f", held out {line.validation_loss:.3g}"

    def selected(self) -> Selected:
        """Return the network that is validated and saved."""
        whole = self._trainer.selected
        return Selected(whole.model, whole.learned_state)


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
    on_epoch: Callable[[AnyEpoch], None] | None = None,
    checkpointer: Checkpointer | None = None,
    progress: Progress | None = None,
) -> TrainingResult[AnyEpoch]:
    """Train a network alone, and load the weights of its best epoch into it; see `training_work`."""

    def start(clock: Clock) -> Work[TrainingResult[AnyEpoch]]:
        return training_work(
            model,
            train,
            validation,
            spec,
            loss,
            teacher=teacher,
            views=views,
            device=device,
            on_epoch=on_epoch,
            checkpointer=checkpointer,
            progress=progress,
            clock=clock,
        )

    return run_alone(start, device)


def training_work(
    model: nn.Module,
    train: View,
    validation: View | None,
    spec: TrainSpec,
    loss: Loss,
    *,
    teacher: Teacher | None = None,
    views: int | None = 1,
    device: torch.device | str = "cpu",
    on_epoch: Callable[[AnyEpoch], None] | None = None,
    checkpointer: Checkpointer | None = None,
    progress: Progress | None = None,
    clock: Clock = time.perf_counter,
    learned: LearnedParts = NO_PARTS,
    held: HeldOut | None = None,
) -> Work[TrainingResult[AnyEpoch]]:
    """Train a network, and load the weights of its best epoch into it and into what is learned beside it.

    Args:
        model: network; moved to `device`.
        train: images and labels.
        validation: split for the selection; None selects by `held`.
        spec: optimizer, schedule, seed.
        loss: minimized.
        teacher: source of the teacher's logits.
        views: number of views that epochs go through; None gives every epoch a view of its own.
        device: where to train.
        on_epoch: called with each line of metrics; after a resume, with those before it too.
        checkpointer: stores the state after each epoch, and returns that of an interrupted run.
        progress: progress reporter; silent if None.
        clock: returns seconds, for the duration of training.
        learned: what is trained beside the network.
        held: samples for the selection; None selects the last epoch, if there is no validation split.

    Raises:
        Diverged: if the loss becomes NaN or infinite.
        UsageError: if a batch has too few images to be divided.
    """
    data, progress = train.samples, progress or Silent()
    trainer = Trainer(model, spec, loss, data.per_epoch, device, progress.say, learned, data.group_size)
    held_cuts = [] if held is None else held_out_cuts(trainer, held.view)

    def epoch_work(number: int, task: Task, after_step: Callable[[], None]) -> Work[AnyEpoch]:
        view = view_of_epoch(number, views, spec)
        lr = float(trainer.schedule.get_last_lr()[0])
        parts = yield from trainer.epoch_work(train, number, teacher, after_step, view=view)
        means = mean_losses(number, parts, loss.uses_teacher)
        kind: type[AnyEpoch] = Epoch if data.maps is None else PixelEpoch
        epoch: AnyEpoch = kind(number, view, lr, **means, validation_accuracy=None, validation_loss=None)
        if validation is not None:
            score = yield from validation_work(trainer, validation, number, task)
            epoch = epoch._replace(validation_accuracy=score.accuracy, validation_loss=score.loss)
            if isinstance(epoch, PixelEpoch) and isinstance(score, PixelScore):
                return epoch._replace(validation_mean_iou=score.mean_iou)
            return epoch
        if held is not None:
            return epoch._replace(validation_loss=(yield from held_out_work(trainer, held, held_cuts, number, task)))
        return epoch

    trained = yield from epochs_work(
        trainer,
        spec,
        _ImageEpochs(trainer),
        lambda done: (spec.epochs - done) * trainer.steps,
        epoch_work,
        clock=clock,
        progress=progress,
        on_epoch=on_epoch,
        checkpointer=checkpointer,
    )
    learned.load(trained.learned)
    return trained


def view_of_epoch(epoch: int, views: int | None, spec: TrainSpec) -> int:
    """Return the index of the view of an epoch, which is counted from 1."""
    if views is None:
        return epoch - 1
    if spec.view_order == "random":
        generator = torch.Generator().manual_seed(spec.seed_of_data * 1_000_003 + epoch)
        return int(torch.randint(views, (), generator=generator))
    return (epoch - 1) % views

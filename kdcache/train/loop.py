"""The training loop: epochs of optimizer steps, with the weights of the best epoch on held-out samples selected.

With several processes, only what is drawn in the network (dropout) and batch normalization, which is of one
micro-batch, differ from a single process; see `step.py`.
"""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

import torch
from accelerate.utils import broadcast_object_list, gather_object
from torch import Tensor, nn

from kdcache.cache.teacher import Teacher
from kdcache.config.schema import TrainSpec
from kdcache.data.views import View
from kdcache.errors import CorruptError
from kdcache.losses import Loss, LossParts
from kdcache.runtime.progress import Progress, Silent
from kdcache.train.learned import NO_PARTS, LearnedParts, WholeNetwork
from kdcache.train.passes import Clock, Work, run_alone
from kdcache.train.random_states import as_plain_values, from_plain_values, random_state, set_random_state
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


class Diverged(CorruptError):
    """The loss became NaN or infinite (exit code 5)."""


class Checkpointer(Protocol):
    """A store of the state that an interrupted run resumes from."""

    def load(self) -> dict[str, Any] | None:
        """Return the last state that was saved; None if there is none."""

    def save(self, state: dict[str, Any]) -> None:
        """Save tensors and plain values, atomically."""


@dataclass
class _Best:
    """The best epoch so far, its weights, and those of what is learned beside the network, by name."""

    epoch: Epoch
    weights: dict[str, Tensor]
    learned: dict[str, dict[str, Tensor]] = field(default_factory=dict)


@dataclass
class TrainingState:
    """Progress of a run."""

    rows: list[Epoch] = field(default_factory=list)
    best: _Best | None = None
    seconds: float = 0.0

    def add(self, epoch: Epoch, selected: WholeNetwork) -> None:
        """Add an epoch; it is the best one if all epochs before were worse."""
        self.rows.append(epoch)
        if self.best is None or _is_better(epoch, self.best.epoch):
            self.best = _Best(epoch, *copy.deepcopy((selected.model.state_dict(), selected.learned_state())))

    def is_over(self, spec: TrainSpec) -> bool:
        """Return whether all epochs are done, or early stopping applies."""
        if self.best is None:
            return False
        waited = self.rows[-1].epoch - self.best.epoch.epoch
        return len(self.rows) >= spec.epochs or (
            spec.early_stopping_patience is not None and waited >= spec.early_stopping_patience
        )


def _is_better(epoch: Epoch, best: Epoch) -> bool:
    """Return whether an epoch is selected instead of the best before it; without any validation, it always is."""
    if epoch.validation_accuracy is not None and best.validation_accuracy is not None:
        return epoch.validation_accuracy > best.validation_accuracy
    if epoch.validation_loss is not None and best.validation_loss is not None:
        return epoch.validation_loss < best.validation_loss
    return True


class TrainingResult(NamedTuple):
    """The result of training; the network holds the weights of the best epoch.

    Attributes:
        best: the first epoch of the best validation accuracy, or else of the lowest loss on samples that are held out;
            the last one without either.
        epochs: all epochs.
        seconds: duration of training, with validation, without interruptions.
        warnings: about gradients that were not finite or exploded.
    """

    best: Epoch
    epochs: list[Epoch]
    seconds: float
    warnings: list[str]


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
    checkpointer: Checkpointer | None = None,
    progress: Progress | None = None,
) -> TrainingResult:
    """Train a network alone, and load the weights of its best epoch into it; see `training_work`."""

    def start(clock: Clock) -> Work[TrainingResult]:
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
    on_epoch: Callable[[Epoch], None] | None = None,
    checkpointer: Checkpointer | None = None,
    progress: Progress | None = None,
    clock: Clock = time.perf_counter,
    learned: LearnedParts = NO_PARTS,
    held: HeldOut | None = None,
) -> Work[TrainingResult]:
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
    state = TrainingState()
    if checkpointer and (saved := _load(trainer, checkpointer)) is not None:
        state = _resume(trainer, saved)
        progress.say(f"resuming after epoch {len(state.rows)} of {spec.epochs}")
        if on_epoch:
            for epoch in state.rows:
                on_epoch(epoch)
    with progress.task("training", (spec.epochs - len(state.rows)) * trainer.steps, "steps") as task:
        note = ""

        def after_step() -> None:
            task.advance(1, note)

        while not state.is_over(spec):
            began, number = clock(), len(state.rows) + 1
            view = view_of_epoch(number, views, spec)
            lr = float(trainer.schedule.get_last_lr()[0])
            parts = yield from trainer.epoch_work(train, number, teacher, after_step, view=view)
            epoch = _mean_losses(trainer, Epoch(number, view, lr, 0, 0, 0, None, None, None, None), parts)
            if validation is not None:
                score = yield from validation_work(trainer, validation, number, task)
                epoch = epoch._replace(validation_accuracy=score.accuracy, validation_loss=score.loss)
            elif held is not None:
                epoch = epoch._replace(
                    validation_loss=(yield from held_out_work(trainer, held, held_cuts, number, task))
                )
            state.add(epoch, trainer.selected)
            state.seconds += clock() - began
            if on_epoch:
                on_epoch(epoch)
            if checkpointer:
                _save(trainer, state, checkpointer)
            note = f"epoch {number} of {spec.epochs}, loss {epoch.loss:.3f}"
            if epoch.validation_accuracy is not None:
                note += f", validation {epoch.validation_accuracy:.1%}"
            elif epoch.validation_loss is not None:
                note += f", held out {epoch.validation_loss:.3g}"
            task.advance(1, note)
    assert state.best is not None, "there is at least one epoch"  # noqa: S101  # for the type checker
    model.load_state_dict(state.best.weights)
    learned.load(state.best.learned)
    warning = trainer.gradients.warning
    return TrainingResult(state.best.epoch, state.rows, state.seconds, [] if warning is None else [warning])


def view_of_epoch(epoch: int, views: int | None, spec: TrainSpec) -> int:
    """Return the index of the view of an epoch, which is counted from 1."""
    if views is None:
        return epoch - 1
    if spec.view_order == "random":
        generator = torch.Generator().manual_seed(spec.seed_of_data * 1_000_003 + epoch)
        return int(torch.randint(views, (), generator=generator))
    return (epoch - 1) % views


def _mean_losses(trainer: Trainer, epoch: Epoch, parts: list[LossParts]) -> Epoch:
    """Return an epoch with the means of its losses.

    Raises:
        Diverged: if the loss is NaN or infinite.
    """
    means = LossParts(*(torch.stack(values).double().mean() for values in zip(*parts, strict=True)))
    if not math.isfinite(total := means.total.item()):
        raise Diverged(f"the loss became {total} in epoch {epoch.epoch}", "lower train.lr, or the weights of the loss")
    cross_entropy, distillation, *temperatures = (value.item() for value in means[1:])
    student, teacher = temperatures if trainer.loss.uses_teacher else (None, None)
    return epoch._replace(
        loss=total,
        cross_entropy=cross_entropy,
        distillation=distillation,
        student_temperature=student,
        teacher_temperature=teacher,
    )


def _load(trainer: Trainer, checkpointer: Checkpointer) -> dict[str, Any] | None:
    """Return the state that the first process saved, in all processes."""
    saved = [checkpointer.load() if trainer.accelerator.is_main_process else None]
    if trainer.ranks > 1:
        broadcast_object_list(saved)
    return saved[0]


def _save(trainer: Trainer, state: TrainingState, checkpointer: Checkpointer) -> None:
    generators = gather_object([as_plain_values(random_state(trainer.device))])
    if not trainer.accelerator.is_main_process or state.best is None:
        return
    checkpointer.save(
        {
            "trainer": trainer.state_dict(),
            "rows": [list(row) for row in state.rows],
            "best": state.best.epoch.epoch,
            "weights": state.best.weights,
            "learned": state.best.learned,
            "seconds": state.seconds,
            "generators": generators,
        }
    )


def _resume(trainer: Trainer, state: dict[str, Any]) -> TrainingState:
    trainer.load_state_dict(state["trainer"])
    # If the interrupted run had fewer processes, the additional ones keep the seed that they were given.
    if trainer.accelerator.process_index < len(state["generators"]):
        own = from_plain_values(state["generators"][trainer.accelerator.process_index])
        set_random_state(own, trainer.device)
    rows = [Epoch(*row) for row in state["rows"]]
    return TrainingState(rows, _Best(rows[state["best"] - 1], state["weights"], state["learned"]), state["seconds"])

"""The training loop: epochs of steps, and the best epoch on the validation split kept.

One step is one batch, however many processes share it and in however many pieces each goes through its part: the
losses of the pieces are divided by what the whole batch holds, so that they, and their gradients, add up to its own.
What is different with several processes is what is drawn in the network (dropout), and batch normalization, which sees
a piece at a time.
"""

from __future__ import annotations

import copy
import math
import random
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from accelerate.utils import broadcast_object_list, gather_object
from torch import Tensor, nn

from kdcache.cache.teacher import Teacher
from kdcache.config.schema import TrainSpec
from kdcache.data.views import View
from kdcache.errors import CorruptError
from kdcache.losses import Loss, LossParts
from kdcache.models.evaluate import SplitScore, evaluate
from kdcache.runtime.progress import Progress, Silent
from kdcache.train.step import Trainer


class Epoch(NamedTuple):
    """A line of metrics.csv; losses are means over the epoch's steps, `LossParts` says of what.

    `lr` is that of the first step; temperatures are means over the samples, None without a teacher.
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
    """Who keeps what an interrupted run goes on with."""

    def load(self) -> dict[str, Any] | None:
        """What was kept last; None at the beginning."""

    def save(self, state: dict[str, Any]) -> None:
        """Keep tensors and plain values, whole or not at all."""


@dataclass
class _Best:
    """The best epoch so far, and its weights."""

    epoch: Epoch
    weights: dict[str, Tensor]


@dataclass
class TrainingState:
    """How far a run has come."""

    rows: list[Epoch] = field(default_factory=list)
    best: _Best | None = None
    seconds: float = 0.0

    def take(self, epoch: Epoch, network: nn.Module) -> None:
        """Add an epoch, which is the best if none before it was as good."""
        self.rows.append(epoch)
        before = self.best.epoch.validation_accuracy if self.best else None
        if before is None or epoch.validation_accuracy is None or epoch.validation_accuracy > before:
            self.best = _Best(epoch, copy.deepcopy(network.state_dict()))

    def is_over(self, spec: TrainSpec) -> bool:
        """Whether all epochs are done, or none of the last `early_stopping_patience` was the best."""
        if self.best is None:
            return False
        waited = self.rows[-1].epoch - self.best.epoch.epoch
        return len(self.rows) >= spec.epochs or (
            spec.early_stopping_patience is not None and waited >= spec.early_stopping_patience
        )


class TrainingResult(NamedTuple):
    """What came of training; the network holds the weights of the best epoch.

    Attributes:
        best: the first epoch of the best validation accuracy; the last one without a validation split.
        epochs: all of them.
        seconds: of training, validation included, interruptions not.
    """

    best: Epoch
    epochs: list[Epoch]
    seconds: float


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
    """Train a network, and leave in it the weights of its best epoch on the validation split.

    Args:
        model: the network; moved to `device`.
        train: images and labels.
        validation: for the selection, by the first process; None keeps the last epoch's weights.
        spec: optimizer, schedule, seed.
        loss: what is minimized.
        teacher: where the teacher's logits come from.
        views: how many an epoch's one is of; None gives every epoch a view of its own.
        device: where to train.
        on_epoch: called with each line of metrics, also with those of a run that is gone on with.
        checkpointer: who keeps the state after each epoch, and has that of a run to go on with.
        progress: who is told how it goes.

    Raises:
        Diverged: if the loss becomes NaN or infinite.
        UsageError: if a batch cannot be shared out.
    """
    progress = progress or Silent()
    trainer = Trainer(model, spec, loss, len(train), device)
    state = TrainingState()
    if checkpointer and (saved := _kept(trainer, checkpointer)) is not None:
        state = _resume(trainer, saved)
        progress.say(f"going on after epoch {len(state.rows)} of {spec.epochs}")
        if on_epoch:
            for epoch in state.rows:
                on_epoch(epoch)
    with progress.task("training", (spec.epochs - len(state.rows)) * trainer.steps, "steps") as task:
        note = ""
        while not state.is_over(spec):
            began, number = time.perf_counter(), len(state.rows) + 1
            view = view_of(number, views, spec)
            lr = float(trainer.schedule.get_last_lr()[0])
            parts = trainer.epoch(
                train,
                number,
                teacher,
                lambda: task.advance(1, note),  # noqa: B023  # called at once
                view=view,
            )
            epoch = _line(trainer, number, view, lr, parts, validation)
            state.take(epoch, trainer.shown)
            state.seconds += time.perf_counter() - began
            if on_epoch:
                on_epoch(epoch)
            if checkpointer:
                _keep(trainer, state, checkpointer)
            note = f"epoch {number} of {spec.epochs}, loss {epoch.loss:.3f}"
            if epoch.validation_accuracy is not None:
                note += f", validation {epoch.validation_accuracy:.1%}"
            task.advance(1, note)
    assert state.best is not None, "there is at least one epoch"  # noqa: S101  # and the type checker must be told
    model.load_state_dict(state.best.weights)
    return TrainingResult(state.best.epoch, state.rows, state.seconds)


def view_of(epoch: int, views: int | None, spec: TrainSpec) -> int:
    """The view that an epoch, counted from 1, sees."""
    if views is None:
        return epoch - 1
    if spec.view_order == "random":
        generator = torch.Generator().manual_seed(spec.seed * 1_000_003 + epoch)
        return int(torch.randint(views, (), generator=generator))
    return (epoch - 1) % views


def _line(
    trainer: Trainer, number: int, view: int, lr: float, parts: list[LossParts], validation: View | None
) -> Epoch:
    means = LossParts(*(torch.stack(values).double().mean() for values in zip(*parts, strict=True)))
    if not math.isfinite(total := means.total.item()):
        raise Diverged(f"the loss became {total} in epoch {number}", "lower train.lr, or the weights of the loss")
    score: list[SplitScore | None] = [None]
    if validation is not None and trainer.accelerator.is_main_process:
        score = [evaluate(trainer.shown, validation, trainer.device)]
    if trainer.ranks > 1:
        broadcast_object_list(score)
    accuracy, log_likelihood = score[0] or (None, None)
    ce, distilled, *temperatures = (value.item() for value in means[1:])
    student, teacher = temperatures if trainer.loss.uses_teacher else (None, None)
    return Epoch(number, view, lr, total, ce, distilled, student, teacher, accuracy, log_likelihood)


def _kept(trainer: Trainer, checkpointer: Checkpointer) -> dict[str, Any] | None:
    """What the first process has kept, to all of them."""
    kept = [checkpointer.load() if trainer.accelerator.is_main_process else None]
    if trainer.ranks > 1:
        broadcast_object_list(kept)
    return kept[0]


def _keep(trainer: Trainer, state: TrainingState, checkpointer: Checkpointer) -> None:
    generators = gather_object([_generators(trainer.device)])
    if not trainer.accelerator.is_main_process or state.best is None:
        return
    checkpointer.save(
        {
            "trainer": trainer.state_dict(),
            "rows": [list(row) for row in state.rows],
            "best": state.best.epoch.epoch,
            "weights": state.best.weights,
            "seconds": state.seconds,
            "generators": generators,
        }
    )


def _resume(trainer: Trainer, state: dict[str, Any]) -> TrainingState:
    trainer.load_state_dict(state["trainer"])
    # Of a run with fewer processes the others draw what they have been seeded with.
    if trainer.accelerator.process_index < len(state["generators"]):
        _put_back(state["generators"][trainer.accelerator.process_index], trainer.device)
    rows = [Epoch(*row) for row in state["rows"]]
    return TrainingState(rows, _Best(rows[state["best"] - 1], state["weights"]), state["seconds"])


def _generators(device: torch.device) -> dict[str, Any]:
    """The states of all generators that a network may draw from."""
    kind, keys, *position = np.random.get_state(legacy=True)
    return {
        "python": random.getstate(),
        "numpy": (kind, keys.tolist(), *position),  # type: ignore[union-attr]  # a tuple, when legacy
        "cpu": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state(device) if device.type == "cuda" else None,
    }


def _put_back(states: dict[str, Any], device: torch.device) -> None:
    random.setstate(states["python"])
    np.random.set_state(states["numpy"])
    torch.set_rng_state(states["cpu"])
    if device.type == "cuda" and states["cuda"] is not None:
        torch.cuda.set_rng_state(states["cuda"], device)

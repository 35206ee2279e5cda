"""The training loop: epochs of steps, and the best epoch on the validation split kept.

One step is one batch, however many processes share it and in however many pieces each goes through its part: the
losses of the pieces are divided by what the whole batch holds, so that they, and their gradients, add up to its own.
What is different with several processes is what is drawn in the network (dropout), and batch normalisation, which sees
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

from kdcache.config.schema import TrainSpec
from kdcache.data.views import View
from kdcache.errors import CorruptError
from kdcache.losses import Loss, LossParts
from kdcache.models.evaluate import Score, evaluate
from kdcache.runtime.progress import Progress, Silent
from kdcache.train.step import Learner, Teacher


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


class Keeper(Protocol):
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
class _Course:
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
        """Whether all epochs are done, or none of the last `patience` was the best."""
        if self.best is None:
            return False
        waited = self.rows[-1].epoch - self.best.epoch.epoch
        return len(self.rows) >= spec.epochs or (spec.patience is not None and waited >= spec.patience)


class Trained(NamedTuple):
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
    keeper: Keeper | None = None,
    progress: Progress | None = None,
) -> Trained:
    """Train a network, and leave in it the weights of its best epoch on the validation split.

    Args:
        model: the network; moved to `device`.
        train: images and labels.
        validation: for the selection, by the first process; None keeps the last epoch's weights.
        spec: optimizer, schedule, seed.
        loss: what is minimised.
        teacher: where the teacher's logits come from.
        views: how many an epoch's one is of; None gives every epoch a view of its own.
        device: where to train.
        on_epoch: called with each line of metrics, also with those of a run that is gone on with.
        keeper: who keeps the state after each epoch, and has that of a run to go on with.
        progress: who is told how it goes.

    Raises:
        Diverged: if the loss becomes NaN or infinite.
        UsageError: if a batch cannot be shared out.
    """
    progress = progress or Silent()
    learner = Learner(model, spec, loss, len(train), device)
    course = _Course()
    if keeper and (state := _kept(learner, keeper)) is not None:
        course = _resume(learner, state)
        progress.say(f"going on after epoch {len(course.rows)} of {spec.epochs}")
        if on_epoch:
            for epoch in course.rows:
                on_epoch(epoch)
    with progress.task("training", (spec.epochs - len(course.rows)) * learner.steps, "steps") as task:
        note = ""
        while not course.is_over(spec):
            began, number = time.perf_counter(), len(course.rows) + 1
            train.view = view_of(number, views, spec)
            lr = float(learner.schedule.get_last_lr()[0])
            parts = learner.epoch(train, number, teacher, lambda: task.advance(1, note))  # noqa: B023  # called at once
            epoch = _line(learner, number, train.view, lr, parts, validation)
            course.take(epoch, learner.shown)
            course.seconds += time.perf_counter() - began
            if on_epoch:
                on_epoch(epoch)
            if keeper:
                _keep(learner, course, keeper)
            note = f"epoch {number} of {spec.epochs}, loss {epoch.loss:.3f}"
            if epoch.validation_accuracy is not None:
                note += f", validation {epoch.validation_accuracy:.1%}"
            task.advance(1, note)
    assert course.best is not None, "there is at least one epoch"  # noqa: S101  # and the type checker must be told
    model.load_state_dict(course.best.weights)
    return Trained(course.best.epoch, course.rows, course.seconds)


def view_of(epoch: int, views: int | None, spec: TrainSpec) -> int:
    """The view that an epoch, counted from 1, sees."""
    if views is None:
        return epoch - 1
    if spec.view_order == "random":
        generator = torch.Generator().manual_seed(spec.seed * 1_000_003 + epoch)
        return int(torch.randint(views, (), generator=generator))
    return (epoch - 1) % views


def _line(
    learner: Learner, number: int, view: int, lr: float, parts: list[LossParts], validation: View | None
) -> Epoch:
    means = LossParts(*(torch.stack(values).double().mean() for values in zip(*parts, strict=True)))
    if not math.isfinite(total := means.total.item()):
        raise Diverged(f"the loss became {total} in epoch {number}", "lower train.lr, or the weights of the loss")
    score: list[Score | None] = [None]
    if validation is not None and learner.accelerator.is_main_process:
        score = [evaluate(learner.shown, validation, learner.device)]
    if learner.ranks > 1:
        broadcast_object_list(score)
    accuracy, log_likelihood = score[0] or (None, None)
    ce, distilled, *temperatures = (value.item() for value in means[1:])
    student, teacher = temperatures if learner.loss.uses_teacher else (None, None)
    return Epoch(number, view, lr, total, ce, distilled, student, teacher, accuracy, log_likelihood)


def _kept(learner: Learner, keeper: Keeper) -> dict[str, Any] | None:
    """What the first process has kept, to all of them."""
    kept = [keeper.load() if learner.accelerator.is_main_process else None]
    if learner.ranks > 1:
        broadcast_object_list(kept)
    return kept[0]


def _keep(learner: Learner, course: _Course, keeper: Keeper) -> None:
    generators = gather_object([_generators(learner.device)])
    if not learner.accelerator.is_main_process or course.best is None:
        return
    keeper.save(
        {
            "learner": learner.state_dict(),
            "rows": [list(row) for row in course.rows],
            "best": course.best.epoch.epoch,
            "weights": course.best.weights,
            "seconds": course.seconds,
            "generators": generators,
        }
    )


def _resume(learner: Learner, state: dict[str, Any]) -> _Course:
    learner.load_state_dict(state["learner"])
    # Of a run with fewer processes the others draw what they have been seeded with.
    if learner.accelerator.process_index < len(state["generators"]):
        _put_back(state["generators"][learner.accelerator.process_index], learner.device)
    rows = [Epoch(*row) for row in state["rows"]]
    return _Course(rows, _Best(rows[state["best"] - 1], state["weights"]), state["seconds"])


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

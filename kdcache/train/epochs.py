"""The epochs of any training: metrics, the weights of the best epoch, early stopping, and resuming."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Generator
from dataclasses import dataclass, field
from typing import Any, Generic, NamedTuple, Protocol, TypeVar

import torch
from accelerate.utils import broadcast_object_list, gather_object
from torch import Tensor, nn

from kdcache.config.optimizer import OptimizerSpec
from kdcache.errors import CorruptError
from kdcache.losses import LossParts
from kdcache.runtime.progress import Progress, Task
from kdcache.train.network_trainer import NetworkTrainer
from kdcache.train.random_states import as_plain_values, from_plain_values, random_state, set_random_state


class Line(Protocol):
    """A line of metrics.csv, a NamedTuple; losses are means over the steps of the epoch, as `LossParts` defines them.

    `lr` is that of the first step; temperatures are means over the samples, None without a teacher.
    """

    @property
    def epoch(self) -> int:
        """Number of the epoch, from 1."""

    @property
    def loss(self) -> float:
        """Mean of the losses of the steps."""


L = TypeVar("L", bound=Line)


class Diverged(CorruptError):
    """The loss became NaN or infinite (exit code 5)."""


class Checkpointer(Protocol):
    """A store of the state that an interrupted run resumes from."""

    def load(self) -> dict[str, Any] | None:
        """Return the last state that was saved; None if there is none."""

    def save(self, state: dict[str, Any]) -> None:
        """Save tensors and plain values, atomically."""


class Selected(NamedTuple):
    """The network that is validated and saved.

    Attributes:
        network: its weights are kept.
        learned: returns the weights of what is learned beside it, by name.
    """

    network: nn.Module
    learned: Callable[[], dict[str, dict[str, Tensor]]]


class EpochKind(Protocol[L]):
    """What the epochs of a kind of network are."""

    def read(self, values: list[Any]) -> L:
        """Return a line of metrics from its values."""

    def is_better(self, line: L, best: L) -> bool:
        """Return whether an epoch is selected instead of the best before it."""

    def described(self, line: L) -> str:
        """Return the results of an epoch, for the progress."""

    def selected(self) -> Selected:
        """Return the network that is validated and saved."""


@dataclass
class _Best(Generic[L]):
    """The best epoch so far, its weights, and those of what is learned beside the network, by name."""

    epoch: L
    weights: dict[str, Tensor]
    learned: dict[str, dict[str, Tensor]] = field(default_factory=dict)


@dataclass
class TrainingState(Generic[L]):
    """Progress of a run."""

    rows: list[L] = field(default_factory=list)
    best: _Best[L] | None = None
    seconds: float = 0.0

    def add(self, epoch: L, kind: EpochKind[L]) -> None:
        """Add an epoch; it is the best one if all epochs before were worse."""
        self.rows.append(epoch)
        if self.best is None or kind.is_better(epoch, self.best.epoch):
            selected = kind.selected()
            self.best = _Best(epoch, *copy.deepcopy((selected.network.state_dict(), selected.learned())))

    def is_over(self, spec: OptimizerSpec) -> bool:
        """Return whether all epochs are done, or early stopping applies."""
        if self.best is None:
            return False
        waited = self.rows[-1].epoch - self.best.epoch.epoch
        return len(self.rows) >= spec.epochs or (
            spec.early_stopping_patience is not None and waited >= spec.early_stopping_patience
        )


@dataclass(frozen=True)
class TrainingResult(Generic[L]):
    """The result of training; the network holds the weights of the best epoch.

    Attributes:
        best: the first of the best epochs, by what selects them; the last one without anything that does.
        epochs: all epochs.
        seconds: duration of training, with validation, without interruptions.
        warnings: about gradients that were not finite or exploded.
        learned: weights of what was learned beside the network in the best epoch, by name.
    """

    best: L
    epochs: list[L]
    seconds: float
    warnings: list[str]
    learned: dict[str, dict[str, Tensor]]


def epochs_work(
    trainer: NetworkTrainer,
    spec: OptimizerSpec,
    kind: EpochKind[L],
    steps: Callable[[int], int],
    epoch_work: Callable[[int, Task, Callable[[], None]], Generator[Any, Any, L]],
    *,
    clock: Callable[[], float],
    progress: Progress,
    on_epoch: Callable[[L], None] | None = None,
    checkpointer: Checkpointer | None = None,
) -> Generator[Any, Any, TrainingResult[L]]:
    """Train a network for the epochs that are left, and load the weights of its best epoch into it.

    Args:
        trainer: of the network.
        spec: number of epochs, early stopping.
        kind: what the epochs are.
        steps: returns the number of optimizer steps of all epochs after the first so many.
        epoch_work: (number of the epoch from 1, task, what to call after each step but the last) -> its line.
        clock: returns seconds, for the duration of training.
        progress: progress reporter.
        on_epoch: called with each line of metrics; after a resume, with those before it too.
        checkpointer: stores the state after each epoch, and returns that of an interrupted run.
    """
    state: TrainingState[L] = TrainingState()
    if checkpointer and (saved := _load(trainer, checkpointer)) is not None:
        state = _resume(trainer, saved, kind)
        progress.say(f"resuming after epoch {len(state.rows)} of {spec.epochs}")
        if on_epoch:
            for epoch in state.rows:
                on_epoch(epoch)
    with progress.task("training", steps(len(state.rows)), "steps") as task:
        note = ""

        def after_step() -> None:
            task.advance(1, note)

        while not state.is_over(spec):
            began, number = clock(), len(state.rows) + 1
            epoch = yield from epoch_work(number, task, after_step)
            state.add(epoch, kind)
            state.seconds += clock() - began
            if on_epoch:
                on_epoch(epoch)
            if checkpointer:
                _save(trainer, state, checkpointer)
            note = f"epoch {number} of {spec.epochs}, loss {epoch.loss:.3f}{kind.described(epoch)}"
            task.advance(1, note)
    assert state.best is not None, "there is at least one epoch"  # noqa: S101  # for the type checker
    trainer.model.load_state_dict(state.best.weights)
    warning = trainer.gradients.warning
    warnings = [] if warning is None else [warning]
    return TrainingResult(state.best.epoch, state.rows, state.seconds, warnings, state.best.learned)


def mean_losses(epoch: int, parts: list[LossParts], has_temperatures: bool) -> dict[str, Any]:
    """Return the means of the losses of the steps of an epoch, by column of metrics.csv.

    Raises:
        Diverged: if the loss is NaN or infinite.
    """
    means = LossParts(*(torch.stack(values).double().mean() for values in zip(*parts, strict=True)))
    if not math.isfinite(total := means.total.item()):
        raise Diverged(f"the loss became {total} in epoch {epoch}", "lower train.lr, or the weights of the loss")
    cross_entropy, distillation, *temperatures = (value.item() for value in means[1:])
    student, teacher = temperatures if has_temperatures else (None, None)
    return {
        "loss": total,
        "cross_entropy": cross_entropy,
        "distillation": distillation,
        "student_temperature": student,
        "teacher_temperature": teacher,
    }


def _load(trainer: NetworkTrainer, checkpointer: Checkpointer) -> dict[str, Any] | None:
    """Return the state that the first process saved, in all processes."""
    saved = [checkpointer.load() if trainer.accelerator.is_main_process else None]
    if trainer.ranks > 1:
        broadcast_object_list(saved)
    return saved[0]


def _save(trainer: NetworkTrainer, state: TrainingState[L], checkpointer: Checkpointer) -> None:
    generators = gather_object([as_plain_values(random_state(trainer.device))])
    if not trainer.accelerator.is_main_process or state.best is None:
        return
    checkpointer.save(
        {
            "trainer": trainer.state_dict(),
            "rows": [list(row) for row in state.rows],  # type: ignore[call-overload]  # named tuples
            "best": state.best.epoch.epoch,
            "weights": state.best.weights,
            "learned": state.best.learned,
            "seconds": state.seconds,
            "generators": generators,
        }
    )


def _resume(trainer: NetworkTrainer, state: dict[str, Any], kind: EpochKind[L]) -> TrainingState[L]:
    trainer.load_state_dict(state["trainer"])
    # If the interrupted run had fewer processes, the additional ones keep the seed that they were given.
    if trainer.accelerator.process_index < len(state["generators"]):
        own = from_plain_values(state["generators"][trainer.accelerator.process_index])
        set_random_state(own, trainer.device)
    rows = [kind.read(row) for row in state["rows"]]
    return TrainingState(rows, _Best(rows[state["best"] - 1], state["weights"], state["learned"]), state["seconds"])

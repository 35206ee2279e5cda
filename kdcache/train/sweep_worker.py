"""Worker processes of a sweep: they send their progress to the process that started them, and end with it."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future
from concurrent.futures import wait as futures_wait
from contextlib import contextmanager
from dataclasses import replace
from multiprocessing import get_context, parent_process, set_start_method
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any, NamedTuple

import torch

from kdcache.data.images import ArrayImages, map_images
from kdcache.data.samples import Samples
from kdcache.runtime.progress import Progress, Task
from kdcache.runtime.resources import share_cores
from kdcache.train.inputs import TrainingInputs
from kdcache.train.sweep_groups import Job
from kdcache.train.tokens.inputs import TokenInputs

_SECONDS_BETWEEN_MESSAGES = 0.5


class ProgressQueue:
    """A queue of progress messages from workers to the process that started them."""

    def __init__(self) -> None:
        self._messages = get_context("spawn").SimpleQueue()

    def advance(self, epochs: int, note: str) -> None:
        """Send a number of finished epochs, and a note."""
        self._messages.put((epochs, note))

    def say(self, message: str) -> None:
        """Send a message for the user."""
        self._messages.put((None, message))

    def forward(self, task: Task, progress: Progress) -> None:
        """Report all messages that have arrived."""
        while not self._messages.empty():
            epochs, text = self._messages.get()
            if epochs is None:
                progress.say(text)
            else:
                task.advance(epochs, text)


class _WorkerState(NamedTuple):
    context: Any
    queue: ProgressQueue


_state: _WorkerState | None = None


def enter_worker(context: Any, queue: ProgressQueue, processes: int, start_method: str) -> None:
    """Set up a worker process: its share of threads and cores, the context of the sweep, and the watch on its parent.

    Args:
        context: of the sweep.
        queue: for its progress.
        processes: number of workers.
        start_method: how it starts the processes that load images; otherwise as it was started itself, which takes
            seconds for each.
    """
    global _state  # noqa: PLW0603  # a pool has no other place for what its workers are given
    set_start_method(start_method, force=True)
    share_machine(processes)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    _state = _WorkerState(context, queue)


def share_machine(processes: int) -> None:
    """Let this process use its share of the cores and of torch's threads, as one of so many that train."""
    share_cores(processes)
    torch.set_num_threads(max(1, torch.get_num_threads() // processes))


def _end_with_parent() -> None:
    """Wait for the end of the parent, and end this process at once: no one would read its results."""
    parent = parent_process()
    if parent is not None:
        wait([parent.sentinel])
        os._exit(1)


def worker_state() -> _WorkerState:
    """Return what `enter_worker` was given."""
    assert _state is not None, "set by enter_worker"  # noqa: S101
    return _state


class _LastMessage:
    """When the students that share this reported last: one line shows all of them."""

    def __init__(self) -> None:
        self._at = -_SECONDS_BETWEEN_MESSAGES

    def is_recent(self) -> bool:
        """Return whether it is, and if not, that it is now."""
        now = time.monotonic()
        recent = now - self._at < _SECONDS_BETWEEN_MESSAGES
        self._at = self._at if recent else now
        return recent


class StudentProgress:
    """A progress reporter for one student of a sweep; the epochs of its training are reported to the sweep's task.

    Args:
        name: of the student.
        shown: name in notes on the progress.
        epochs: its number of epochs; after early stopping, the others are reported at the end.
        advance: takes a number of epochs and a note.
        say: takes a message for the user.
        last: shared with the students that are trained together.
    """

    def __init__(
        self,
        name: str,
        shown: str,
        epochs: int,
        advance: Callable[[int, str], None],
        say: Callable[[str], None],
        last: _LastMessage,
    ) -> None:
        self._name, self._shown, self._epochs, self._advance, self._say = name, shown, epochs, advance, say
        self._reported = 0
        self._last = last

    def finish(self) -> None:
        """Report all epochs that were not reported."""
        self._advance(self._epochs - self._reported, f"{self._name}: finished")

    @contextmanager
    def task(self, what: str, total: int, unit: str) -> Iterator[Task]:
        """Begin a task of `total` units; only steps of training count as epochs."""
        yield _StudentTask(self, what, total, unit, self._epochs if what == "training" else 0)

    def say(self, message: str) -> None:
        """Report a message, with the name of the student."""
        self._say(f"{self._name}: {message}")

    def report(self, epochs: int, note: str) -> None:
        """Report that so many epochs are finished, if there are new ones, or the last note is not a recent one."""
        new = max(epochs - self._reported, 0)
        if new or not self._last.is_recent():
            self._reported += new
            self._advance(new, f"{self._shown}: {note}")


class _StudentTask:
    def __init__(self, progress: StudentProgress, what: str, total: int, unit: str, epochs: int) -> None:
        self._progress, self._what, self._total, self._unit, self._epochs = progress, what, max(total, 1), unit, epochs
        self._done = 0

    def advance(self, amount: int = 1, note: str = "") -> None:
        """Count finished units."""
        self._done += amount
        done = note or f"{self._done:,} of {self._total:,} {self._unit}"
        percent = f"{100 * self._done // self._total}%"
        self._progress.report(self._done * self._epochs // self._total, f"{self._what}, {percent}, {done}")


def completed(futures: Iterable[Future[Any]], meanwhile: Callable[[], None]) -> Iterator[Future[Any]]:
    """Yield futures as they complete, and call a function in between."""
    pending = set(futures)
    while pending:
        done, pending = futures_wait(pending, _SECONDS_BETWEEN_MESSAGES, FIRST_COMPLETED)
        meanwhile()
        yield from done


def reporters(
    group: Sequence[Job], advance: Callable[[int, str], None], say: Callable[[str], None]
) -> list[StudentProgress]:
    """Return a progress reporter for each student of a group, which show their progress as one."""
    last = _LastMessage()
    shown = f"{len(group)} students together" if len(group) > 1 else group[0].name
    return [StudentProgress(job.name, shown, job.epochs, advance, say, last) for job in group]


def mapped_inputs(
    inputs_by_key: Mapping[str, TrainingInputs | TokenInputs], folder: Path
) -> dict[str, TrainingInputs | TokenInputs]:
    """Return inputs for other processes: images in memory are written to a file that all of them map, once each."""
    mapped: dict[int, Samples] = {}

    def split(samples: Any) -> Any:
        if samples is None or not isinstance(samples.images, ArrayImages):
            return samples
        if id(samples) not in mapped:
            mapped[id(samples)] = replace(samples, images=map_images(samples.images, folder / str(len(mapped))))
        return mapped[id(samples)]

    names = ("samples", "validation", "test")
    return {
        key: replace(inputs, **{name: split(getattr(inputs, name)) for name in names})
        if isinstance(inputs, TrainingInputs)
        else inputs
        for key, inputs in inputs_by_key.items()
    }

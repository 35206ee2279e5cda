"""Progress reporting for long operations; library calls are silent unless they are given a reporter, or True."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Protocol

_UNREPORTED_SECONDS = 2.0
"""An operation that every command begins with is reported if it takes longer."""


class Task(Protocol):
    """An operation in progress."""

    def advance(self, amount: int = 1, note: str = "") -> None:
        """Report `amount` more units as done, with a short note on the state."""


class Progress(Protocol):
    """A progress reporter."""

    def task(self, what: str, total: int, unit: str) -> AbstractContextManager[Task]:
        """Begin an operation of `total` units; the context ends it."""

    def say(self, message: str) -> None:
        """Show a line to the user that is not part of the result."""


@contextmanager
def delayed_task(
    progress: Progress, what: str, total: int, unit: str, seconds: float = _UNREPORTED_SECONDS
) -> Iterator[Task]:
    """Begin an operation that is reported only if it takes longer than `seconds`."""
    task = _DelayedTask(progress, what, total, unit, seconds)
    try:
        yield task
    finally:
        task.close()


class _DelayedTask:
    """A task that begins in its progress reporter at the first unit after some seconds."""

    def __init__(self, progress: Progress, what: str, total: int, unit: str, seconds: float) -> None:
        self._progress, self._task, self._begun = progress, (what, total, unit), time.monotonic()
        self._seconds, self._done = seconds, 0
        self._stack = ExitStack()
        self._shown: Task | None = None

    def advance(self, amount: int = 1, note: str = "") -> None:
        """Report `amount` more units as done, with a short note on the state."""
        self._done += amount
        if self._shown is not None:
            self._shown.advance(amount, note)
        elif time.monotonic() - self._begun > self._seconds:
            self._shown = self._stack.enter_context(self._progress.task(*self._task))
            self._shown.advance(self._done, note)

    def close(self) -> None:
        """End the task in the progress reporter, if it began there."""
        self._stack.close()


class _NoTask:
    def advance(self, amount: int = 1, note: str = "") -> None:
        """Do nothing."""


class Silent:
    """A progress reporter that prints nothing."""

    @contextmanager
    def task(self, what: str, total: int, unit: str) -> Iterator[Task]:
        """Begin an operation without reporting it."""
        yield _NoTask()

    def say(self, message: str) -> None:
        """Do nothing."""

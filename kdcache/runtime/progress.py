"""Progress reporting for long operations; library calls are silent unless they are given a reporter, or True."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Protocol


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

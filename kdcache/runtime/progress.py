"""How long work tells of itself without knowing who listens: the command line draws bars, a library call is silent."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Protocol


class Task(Protocol):
    """One piece of work in progress."""

    def advance(self, amount: int = 1, note: str = "") -> None:
        """`amount` more units are done; `note` is a few words on how it goes."""


class Progress(Protocol):
    """Whoever listens to long work."""

    def task(self, what: str, total: int, unit: str) -> AbstractContextManager[Task]:
        """Begin a piece of work of `total` units, as a context that ends it."""

    def say(self, message: str) -> None:
        """One line that the user should read and that is not a result."""


class _NoTask:
    def advance(self, amount: int = 1, note: str = "") -> None:
        """Nobody listens."""


class Silent:
    """The listener of a library call: nothing is printed."""

    @contextmanager
    def task(self, what: str, total: int, unit: str) -> Iterator[Task]:
        """Begin a piece of work that nobody watches."""
        yield _NoTask()

    def say(self, message: str) -> None:
        """Nobody listens."""

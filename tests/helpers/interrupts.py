"""A progress reporter that interrupts a dump."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from kdcache.runtime.progress import Silent, Task


class StopsAfter(Silent):
    """Presses Ctrl-C when so many batches of the teacher's pass are done, never by default, and keeps the messages."""

    def __init__(self, batches: int = -1) -> None:
        self.left, self.said = batches, list[str]()

    def say(self, message: str) -> None:
        self.said.append(message)

    @contextmanager
    def task(self, what: str, total: int, unit: str) -> Iterator[Task]:
        with super().task(what, total, unit) as silent:
            yield self if what == "teacher" else silent

    def advance(self, amount: int = 1, note: str = "") -> None:
        self.left -= 1
        if self.left == 0:
            raise KeyboardInterrupt

"""Ctrl-C at a chosen moment: in a dump, or after a checkpoint of a run."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from kdcache.runtime.progress import Silent, Task
from kdcache.train import run_folder


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


def interrupt_after_checkpoints(count: int, patch: pytest.MonkeyPatch) -> None:
    """Press Ctrl-C when a run has saved its checkpoint `count` times."""
    saved, save = 0, run_folder.Run.save

    def stop(run: Any, state: dict[str, Any]) -> None:
        nonlocal saved
        save(run, state)
        saved += 1
        if saved == count:
            raise KeyboardInterrupt

    patch.setattr(run_folder.Run, "save", stop)

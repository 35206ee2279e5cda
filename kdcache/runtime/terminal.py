"""Progress on a terminal or in a log file: bars or lines on stderr, for the command line and for `progress=True`."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.progress import Progress as Bars
from rich.text import Text

from kdcache.errors import counted
from kdcache.runtime.launched import is_first
from kdcache.runtime.progress import Progress, Silent, Task

SECONDS_BETWEEN_LINES = 10

messages = Console(stderr=True, highlight=False, soft_wrap=True)


def reporter(progress: Progress | bool | None) -> Progress:
    """Return the reporter that the argument `progress` of a public function means.

    Args:
        progress: a reporter, or whether to show progress on stderr: bars in a terminal, lines elsewhere. Of several
            processes, only the first one shows it.
    """
    if progress is None or isinstance(progress, bool):
        return Terminal() if progress and is_first() else Silent()
    return progress


def printable(text: str) -> str:
    r"""Replace control characters, which a cache from elsewhere may contain and a terminal would execute.

    Bytes of a path that are not UTF-8 are written as \xff.
    """
    return "".join(sign if sign.isprintable() or sign in "\n\t" else _replacement(sign) for sign in text)


def _replacement(sign: str) -> str:
    is_byte = "\udc80" <= sign <= "\udcff"
    return f"\\x{ord(sign) - 0xDC00:02x}" if is_byte else "\N{REPLACEMENT CHARACTER}"


def say(message: str) -> None:
    """Print a message to stderr."""
    messages.print(Text(printable(message)))


class _BarTask:
    def __init__(self, bars: Bars, task_id: Any, unit: str) -> None:
        self._bars, self._id, self._unit = bars, task_id, unit

    def advance(self, amount: int = 1, note: str = "") -> None:
        self._bars.update(self._id, advance=amount)
        task = next(task for task in self._bars.tasks if task.id == self._id)
        speed = f"{task.finished_speed or task.speed or 0:,.0f} {self._unit}/s" if self._unit == "rows" else ""
        self._bars.update(self._id, note=note or speed)


class _LineTask:
    """Progress in a log file: a line at the start, every ten seconds, and at the end."""

    def __init__(self, what: str, total: int, unit: str) -> None:
        self._what, self._total, self._unit, self._done = what, total, unit, 0
        self._began = self._last_line = time.monotonic()
        say(f"{what}: {counted(total, unit.removesuffix('s'))}")

    def advance(self, amount: int = 1, note: str = "") -> None:
        self._done += amount
        now = time.monotonic()
        if now - self._last_line > SECONDS_BETWEEN_LINES or self._done >= self._total:
            self._last_line = now
            speed = self._done / max(now - self._began, 1e-9)
            left = (self._total - self._done) / max(speed, 1e-9)
            after = f", {note}" if note else ""
            rate = f", {speed:,.1f} {self._unit}/s, {left:,.0f} s left" if self._done else ""
            say(f"{self._what}: {self._done:,} of {counted(self._total, self._unit.removesuffix('s'))}{rate}{after}")


class Terminal:
    """A progress reporter on stderr: bars with speed and remaining time, or lines in a log file."""

    @contextmanager
    def task(self, what: str, total: int, unit: str) -> Iterator[Task]:
        """Report a task of `total` units while the context lasts."""
        if not messages.is_terminal:
            yield _LineTask(what, total, unit)
            return
        columns = (
            TextColumn("{task.description}"),
            MofNCompleteColumn(),
            TextColumn(unit),
            BarColumn(bar_width=20),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            TextColumn("{task.fields[note]}"),
        )
        with Bars(*columns, console=messages) as bars:
            yield _BarTask(bars, bars.add_task(what, total=total, note=""), unit)

    def say(self, message: str) -> None:
        """Print a message."""
        say(message)

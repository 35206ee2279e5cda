"""The only place that prints: results to stdout, progress and messages to stderr."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.progress import Progress as Bars
from rich.table import Table
from rich.text import Text

from kdcache.errors import KdcacheError

if TYPE_CHECKING:
    from kdcache.runtime.progress import Task
    from kdcache.train.train import RunResult

_SECONDS_BETWEEN_LINES = 10
_OWED = "kdcache.json"

# A figure that a narrow terminal cuts off is worse than a line that wraps.
_tables = Console(highlight=False, width=240)
_results = Console(highlight=False, soft_wrap=True)
_messages = Console(stderr=True, highlight=False, soft_wrap=True)


def _shown(text: str) -> str:
    """A text without what a terminal would obey: a cache from elsewhere may say anything of itself."""
    return "".join(sign if sign.isprintable() or sign in "\n\t" else "\N{REPLACEMENT CHARACTER}" for sign in text)


def say(message: str) -> None:
    """A line about what goes on, to stderr."""
    _messages.print(Text(_shown(message)))


def result(text: str) -> None:
    """A line of the result, to stdout."""
    _results.print(Text(_shown(text)))


def facts(pairs: Mapping[str, str]) -> None:
    """Named values, one a line, aligned."""
    width = max(map(len, pairs))
    for name, value in pairs.items():
        result(f"{name:<{width}}  {value}")


def owe_json(context: click.Context, _option: click.Parameter | None, wanted: bool) -> bool:
    """Note whether a command is to print one JSON document to stdout; hands that on."""
    context.meta[_OWED] = wanted
    return wanted


def _meta() -> dict[str, Any]:
    """What is noted of the command that runs, if one does."""
    context = click.get_current_context(silent=True)
    return context.meta if context is not None else {}


def as_json(content: Mapping[str, Any]) -> None:
    """A result for programs."""
    _meta()[_OWED] = False
    result(json.dumps(content, indent=2))


def table(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """A table; its first column is text, the others are figures."""
    drawn = Table(title=Text(_shown(title)), title_justify="left", box=None, pad_edge=False)
    for number, column in enumerate(columns):
        drawn.add_column(column, justify="right" if number else "left", no_wrap=True)
    for row in rows:
        drawn.add_row(*(Text(_shown(cell)) for cell in row))
    _tables.print(drawn)


def error(mistake: KdcacheError) -> None:
    """What happened, and what to do; to stdout too, where JSON is wanted and none was printed.

    A result and a mistake make no two documents: the result of `verify`, for one, says what is wrong itself.
    """
    mistake_as_json(mistake)
    _messages.print(Text.assemble(("error: ", "bold red"), _shown(mistake.what)))
    _messages.print(Text.assemble(("fix: ", "bold green"), _shown(mistake.fix)))


def mistake_as_json(mistake: KdcacheError) -> None:
    """What happened, and what to do, to stdout, if JSON is wanted there and none was printed."""
    # Of several processes that torchrun has started one speaks to programs.
    if _meta().get(_OWED) and os.environ.get("RANK", "0") == "0":
        as_json({"error": {"what": mistake.what, "fix": mistake.fix, "exit_code": mistake.exit_code}})


class _BarTask:
    def __init__(self, bars: Bars, number: Any, unit: str) -> None:
        self._bars, self._number, self._unit = bars, number, unit

    def advance(self, amount: int = 1, note: str = "") -> None:
        self._bars.update(self._number, advance=amount)
        task = next(task for task in self._bars.tasks if task.id == self._number)
        speed = f"{task.finished_speed or task.speed or 0:,.0f} {self._unit}/s" if self._unit == "rows" else ""
        self._bars.update(self._number, note=note or speed)


class _LineTask:
    """Progress in a log file: a line at the start, now and then, and at the end."""

    def __init__(self, what: str, total: int, unit: str) -> None:
        self._what, self._total, self._unit, self._done = what, total, unit, 0
        self._began = self._told = time.monotonic()
        say(f"{what}: {total:,} {unit}")

    def advance(self, amount: int = 1, note: str = "") -> None:
        self._done += amount
        now = time.monotonic()
        if now - self._told > _SECONDS_BETWEEN_LINES or self._done >= self._total:
            self._told = now
            speed = self._done / max(now - self._began, 1e-9)
            left = (self._total - self._done) / max(speed, 1e-9)
            after = f", {note}" if note else ""
            rate = f", {speed:,.1f} a second, {left:,.0f} s left" if self._done else ""
            say(f"{self._what}: {self._done:,} of {self._total:,} {self._unit}{rate}{after}")


class Terminal:
    """Progress on stderr: how much is done, how fast, how long it will take; lines where it is no terminal."""

    @contextmanager
    def task(self, what: str, total: int, unit: str) -> Iterator[Task]:
        """Begin a piece of work of `total` units."""
        if not _messages.is_terminal:
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
        with Bars(*columns, console=_messages) as bars:
            yield _BarTask(bars, bars.add_task(what, total=total, note=""), unit)

    def say(self, message: str) -> None:
        """A line about what goes on."""
        say(message)


def run_result(out: Path, trained: RunResult, in_json: bool) -> None:
    """What a training run came to."""
    best, test = trained.best, trained.test
    if in_json:
        as_json(
            {
                "run": str(out),
                "best": best._asdict(),
                "test": test._asdict() if test else None,
                "seconds": round(trained.seconds, 3),
            }
        )
        return
    validated = "" if best.validation_accuracy is None else f", validation accuracy {best.validation_accuracy:.2%}"
    facts(
        {
            "run": str(out),
            "weights": str(trained.checkpoint),
            "selected": f"epoch {best.epoch}{validated}",
            "test": f"accuracy {test.accuracy:.2%}, loss {test.loss:.4f}" if test else "no test split",
            "time": f"{trained.seconds:.1f} s",
        }
    )

"""Print results to stdout, progress and messages to stderr; no other module prints."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from threading import Event, Thread
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
    from kdcache.train.train import Result

_SECONDS_BETWEEN_LINES = 10
_EXPECTED = "kdcache.json"

# In a narrow terminal, lines that wrap are better than numbers that are cut off.
_tables = Console(highlight=False, width=240)
_results = Console(highlight=False, soft_wrap=True)
_messages = Console(stderr=True, highlight=False, soft_wrap=True)


def _printable(text: str) -> str:
    """Replace control characters, which a cache from elsewhere may contain and a terminal would execute."""
    return "".join(sign if sign.isprintable() or sign in "\n\t" else "\N{REPLACEMENT CHARACTER}" for sign in text)


def say(message: str) -> None:
    """Print a message to stderr."""
    _messages.print(Text(_printable(message)))


def result(text: str) -> None:
    """Print a line of the result to stdout."""
    _results.print(Text(_printable(text)))


def facts(pairs: Mapping[str, str]) -> None:
    """Print named values, one per line, aligned."""
    width = max(map(len, pairs))
    for name, value in pairs.items():
        result(f"{name:<{width}}  {value}")


def expect_json(context: click.Context, _option: click.Parameter | None, as_json: bool) -> bool:
    """Store whether a command is to print one JSON document to stdout, and return it: the callback of `--json`."""
    context.meta[_EXPECTED] = as_json
    return as_json


def _meta() -> dict[str, Any]:
    """Return what is stored for the running command; empty outside of a command."""
    context = click.get_current_context(silent=True)
    return context.meta if context is not None else {}


def as_json(content: Mapping[str, Any]) -> None:
    """Print a result as JSON to stdout."""
    _meta()[_EXPECTED] = False
    result(json.dumps(content, indent=2))


def table(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Print a table; the first column is aligned to the left, the others to the right."""
    _tables.print(Text(_printable(title), "bold"), soft_wrap=True)
    drawn = Table(box=None, pad_edge=False)
    for index, column in enumerate(columns):
        drawn.add_column(column, justify="right" if index else "left", no_wrap=True)
    for row in rows:
        drawn.add_row(*(Text(_printable(cell)) for cell in row))
    _tables.print(drawn)


def error(problem: KdcacheError) -> None:
    """Print what happened and the fix to stderr, and as JSON to stdout if that is expected.

    A command prints one JSON document: after a result, such as that of `verify`, which includes the problems, the error
    is printed to stderr only.
    """
    error_as_json(problem)
    _messages.print(Text.assemble(("error: ", "bold red"), _printable(problem.what)))
    _messages.print(Text.assemble(("fix: ", "bold green"), _printable(problem.fix)))


def error_as_json(problem: KdcacheError) -> None:
    """Print an error as JSON to stdout, if JSON is expected there and none was printed."""
    # Of the processes that torchrun starts, only the first prints JSON.
    if _meta().get(_EXPECTED) and os.environ.get("RANK", "0") == "0":
        as_json({"error": {"what": problem.what, "fix": problem.fix, "exit_code": problem.exit_code}})


@contextmanager
def working(what: str, delay: float = 2) -> Iterator[None]:
    """Report to stderr how long work takes that has no progress of its own; nothing in the first `delay` seconds."""
    done = Event()

    def report() -> None:
        start, wait = time.monotonic(), delay
        while not done.wait(wait):
            say(f"{what}: {time.monotonic() - start:,.0f} s")
            wait = _SECONDS_BETWEEN_LINES

    thread = Thread(target=report, daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()


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
        say(f"{what}: {total:,} {unit}")

    def advance(self, amount: int = 1, note: str = "") -> None:
        self._done += amount
        now = time.monotonic()
        if now - self._last_line > _SECONDS_BETWEEN_LINES or self._done >= self._total:
            self._last_line = now
            speed = self._done / max(now - self._began, 1e-9)
            left = (self._total - self._done) / max(speed, 1e-9)
            suffix = f", {note}" if note else ""
            say(
                f"{self._what}: {self._done:,} of {self._total:,} {self._unit}, "
                f"{speed:,.1f} {self._unit}/s, {left:,.0f} s left{suffix}"
            )


class Terminal:
    """The progress reporter of the command line: bars with speed and remaining time, or lines in a log file."""

    @contextmanager
    def task(self, what: str, total: int, unit: str) -> Iterator[Task]:
        """Report a task of `total` units while the context lasts."""
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
        """Print a message."""
        say(message)


def run_result(out: Path, trained: Result, json_wanted: bool) -> None:
    """Print the result of a training run."""
    best, test = trained.best, trained.test
    if json_wanted:
        as_json(
            {
                "run": str(out),
                "best": best._asdict(),
                "test": test._asdict() if test else None,
                "seconds": round(trained.seconds, 3),
            }
        )
        return
    validation = "" if best.validation_accuracy is None else f", validation accuracy {best.validation_accuracy:.2%}"
    facts(
        {
            "run": str(out),
            "weights": str(trained.checkpoint),
            "selected": f"epoch {best.epoch}{validation}",
            "test": f"accuracy {test.accuracy:.2%}, loss {test.loss:.4f}" if test else "no test split",
            "time": f"{trained.seconds:.1f} s",
        }
    )

"""Print results to stdout, and errors to stderr, where `runtime.terminal` prints progress and messages."""

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
from rich.table import Table
from rich.text import Text

from kdcache.errors import InterruptedRun, KdcacheError
from kdcache.runtime.terminal import SECONDS_BETWEEN_LINES, Terminal, messages, printable, say

if TYPE_CHECKING:
    from kdcache.models.evaluate import SplitScore
    from kdcache.models.pixel_scores import PixelScore
    from kdcache.train.run_result import RunResult
    from kdcache.train.tokens.train import LanguageRunResult

__all__ = [
    "Terminal",
    "as_json",
    "error",
    "error_as_json",
    "expect_json",
    "facts",
    "language_run_result",
    "result",
    "run_result",
    "say",
    "short_count",
    "table",
    "working",
]

_EXPECTED = "kdcache.json"

# In a narrow terminal, lines that wrap are better than numbers that are cut off.
_tables = Console(highlight=False, width=240)
_results = Console(highlight=False, soft_wrap=True)


def result(text: str) -> None:
    """Print a line of the result to stdout."""
    _results.print(Text(printable(text)))


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
    _tables.print(Text(printable(title), "bold"), soft_wrap=True)
    drawn = Table(box=None, pad_edge=False)
    for index, column in enumerate(columns):
        drawn.add_column(column, justify="right" if index else "left", no_wrap=True)
    for row in rows:
        drawn.add_row(*(Text(printable(cell)) for cell in row))
    _tables.print(drawn)


def error(problem: KdcacheError | InterruptedRun) -> None:
    """Print what happened and the fix to stderr, and as JSON to stdout if that is expected.

    A command prints one JSON document: after a result, such as that of `verify`, which includes the problems, the error
    is printed to stderr only.
    """
    error_as_json(problem)
    messages.print(Text.assemble(("error: ", "bold red"), printable(problem.what)))
    messages.print(Text.assemble(("fix: ", "bold green"), printable(problem.fix)))


def error_as_json(problem: KdcacheError | InterruptedRun) -> None:
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
            wait = SECONDS_BETWEEN_LINES

    thread = Thread(target=report, daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()


def run_result(out: Path, trained: RunResult, json_wanted: bool) -> None:
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
    validation = "" if best.validation_loss is None else f", held-out loss {best.validation_loss:.4g}"
    if best.validation_accuracy is not None:
        validation = f", validation accuracy {best.validation_accuracy:.2%}"
    if (mean_iou := getattr(best, "validation_mean_iou", None)) is not None:
        validation = f", validation mIoU {mean_iou:.2%}"
    facts(
        {
            "run": str(out),
            "weights": str(trained.checkpoint),
            "selected": f"epoch {best.epoch}{validation}",
            "test": _described_score(test) if test else "not measured: no test split, or no class logits",
            "time": f"{trained.seconds:.1f} s",
        }
    )


def _described_score(score: SplitScore | PixelScore) -> str:
    """Return the score of a split in words."""
    of_images = f"accuracy {score.accuracy:.2%}, loss {score.loss:.4f}"
    mean_iou = getattr(score, "mean_iou", None)
    return of_images if mean_iou is None else f"mIoU {mean_iou:.2%}, pixel {of_images}"


def language_run_result(out: Path, trained: LanguageRunResult, json_wanted: bool) -> None:
    """Print the result of the training run of a language model."""
    best = trained.best
    if json_wanted:
        as_json({"run": str(out), "best": best._asdict(), "seconds": round(trained.seconds, 3)})
        return
    selected, held_out = f"epoch {best.epoch}", "not measured: set student.train.held_out_fraction"
    if best.held_out_loss is not None and best.perplexity is not None:
        selected += f", held-out loss {best.held_out_loss:.4g}"
        held_out = f"perplexity {best.perplexity:.4g}"
        if best.kl is not None and best.agreement is not None:
            held_out += f", KL to the teacher {best.kl:.4g} nats, top-1 agreement {best.agreement:.2%}"
    facts(
        {
            "run": str(out),
            "model": str(trained.folder),
            "selected": selected,
            "held out": held_out,
            "time": f"{trained.seconds:.1f} s",
        }
    )


def short_count(count: int) -> str:
    """Return a large number in a few characters, such as 1.82G."""
    for unit, size in (("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if count >= size:
            return f"{count / size:.3g} {unit}"
    return str(count)

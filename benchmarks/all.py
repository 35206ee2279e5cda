"""Run every benchmark, and print one table of all measures that have a bound: `python benchmarks/all.py`.

The benchmarks run one after the other, each in a process of its own, with its own sizes; together they take one to two
hours on two cores. `--only` names those to run, and `--quick` runs all of them with small sizes, whose figures do not
compare with the bounds. Ratios are those of loops that take turns in one process: kdcache beside a bare loop, plain
torchvision, a live teacher, files per image as FKD writes them, a tar of logits, and `np.memmap`.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import NamedTuple

import recorded
from recorded import Recorded

from kdcache.cli import output


class Measure(NamedTuple):
    """A figure in the table of a benchmark.

    Attributes:
        benchmark: name of its file, without `.py`.
        shown: name of the measure; rows with several names have their own name appended.
        row: beginnings of the names of the rows; "" for all.
        column: heading of the figure.
        bound: `<= 1.1` or `>= 1`; a lone `<=` or `>=` takes the value from the column of that heading.
        table: beginning of the title; "" for any.
        bound_column: heading of the bound.
    """

    benchmark: str
    shown: str
    row: str
    column: str
    bound: str
    table: str = ""
    bound_column: str = "bound"


_MEASURES = [
    Measure("data", "loading, per plain v2", "memory, crop, flip", "per v2", "<= 1.1"),
    Measure("data", "loading, images/s", "memory, crop, flip", "images/s", ">= 20,000"),
    Measure("data", "loading, per plain v2", "32 JPEG, crop, flip", "per v2", "<= 1.1"),
    Measure("data", "loading, per plain v2", "224 JPEG, resized crop", "per v2", "<= 1.03"),
    Measure("dump", "pass of the teacher, per bare loop", "dump-teacher", "ratio", "<="),
    Measure("train", "training, per bare loop", "cross-entropy", "ratio", "<="),
    Measure("train", "training, per cross-entropy", "KD from the cache", "ratio", "<="),
    Measure("train", "training, per cross-entropy", "DTKD from the cache", "ratio", "<="),
    Measure("train", "training, per cache", "KD, live teacher", "ratio to cache", ">= 1"),
    Measure("codec", "codec, share of the network", "", "ratio", "<="),
    Measure("load", "loading a view, per np.load", "", "ratio", "<="),
    Measure("load", "writing, rows/s", "top 16, uniform", "written, rows/s", ">= 500,000"),
    Measure("sources", "time per row, per cache in memory", "FKD files", "per kdcache", ">= 1"),
    Measure("sources", "time per row, per cache in memory", "tar of logits", "per kdcache", ">= 1"),
    Measure("sources", "time per row, per cache in memory", "live teacher", "per kdcache", ">= 1"),
    Measure("sources", "time per row, per cache in memory", "np.memmap", "per kdcache", ""),
    Measure("cluster", "dump, of the speed of all ranks", "", "of all", ">="),
    Measure("larger_than_memory", "rows/s", "mmap", "rows/s", ">=", "batches of"),
    Measure("larger_than_memory", "rows/s", "stream", "rows/s", ">=", "batches of"),
    Measure("remote", "MB/s", "pull", "MB/s", ">=", bound_column="bound, MB/s"),
    Measure("remote", "MB/s", "verify", "MB/s", ">=", bound_column="bound, MB/s"),
    Measure("peers", "gradient error at T = 4", "kdcache, planned", "T=4", ""),
    Measure("peers", "gradient error at T = 4", "FKD, top 10", "T=4", ""),
    Measure("peers", "gradient error at T = 4", "TinyViT, top 10", "T=4", ""),
    Measure("peers", "gradient error at T = 4", "ml-dr, top 10", "T=4", ""),
    Measure("students", "accuracy, difference to live", "default cache", "to live", ""),
    Measure("map_students", "mean IoU of maps, difference to live", "default cache", "to live", ""),
    Measure("together", "students in one pass, per separate passes", "", "ratio", "<="),
    Measure("token_codec", "encoding of a distribution of tokens, ms", "ghost", "ms per row", "<="),
    Measure("token_codec", "encoding of a distribution of tokens, ms", "lowrank", "ms per row", "<="),
    Measure("token_codec", "bytes of a distribution of tokens", "lowrank", "bytes per row", "<= 105"),
    Measure("token_losses", "step of a language model, per cross-entropy", "KD, top", "per cross-entropy", "<="),
]
_WITH_DEVICE = ("dump", "train", "codec", "together", "token_losses")
"""Benchmarks that take a --device."""


def measured(measure: Measure, tables: list[Recorded]) -> list[tuple[str, str, str]]:
    """Return (name, bound, figure) of the rows that a measure has in some tables, but for those without their bound."""
    found = []
    for table in tables:
        if measure.column not in table.columns or not table.title.startswith(measure.table):
            continue
        for row in table.rows:
            figure = row[table.column(measure.column)]
            bound = measure.bound
            if bound in ("<=", ">="):
                stated = row[table.column(measure.bound_column)]
                bound = f"{bound} {stated}" if stated else "none"
            if row[0].startswith(measure.row) and figure and bound != "none":
                setting = "" if len(tables) == 1 else f" ({table.title.split(':')[0].split(', in')[0]})"
                found.append((f"{measure.shown}: {row[0]}{setting}", bound, figure))
    return found


def within(figure: str, bound: str) -> str:
    """Return whether a figure is within its bound: "yes" or "no", and "" without a bound."""
    if not bound:
        return ""
    sign, stated = bound.split()
    value, limit = (float(text.replace(",", "").rstrip("%")) for text in (figure, stated))
    return "yes" if (value <= limit if sign == "<=" else value >= limit) else "no"


def main() -> None:
    """Print the table."""
    folder = Path(__file__).parent
    names = [name for name in dict.fromkeys(one.benchmark for one in _MEASURES) if (folder / f"{name}.py").exists()]
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--only", nargs="+", choices=names, default=names, metavar="NAME", help=", ".join(names))
    arguments.add_argument(
        "--quick", action="store_true", help="small sizes; the results do not compare with the bounds"
    )
    asked = arguments.parse_args()
    rows, problems = [], []
    on = recorded.machine()
    for name in asked.only:
        options = [*(["--quick"] if asked.quick else []), *(["--device", "cpu"] if name in _WITH_DEVICE else [])]
        outcome = recorded.run(name, options)
        output.say(f"{name}: {outcome.seconds:.0f} s{outcome.problem and ', ' + outcome.problem}")
        if outcome.problem:
            problems.append(name)
        for measure in _MEASURES:
            if measure.benchmark == name:
                rows += [
                    [shown, bound, figure, "" if asked.quick else within(figure, bound), name]
                    for shown, bound, figure in measured(measure, outcome.tables)
                ]
    output.table(on, ["measure", "bound", "figure", "within", "benchmark"], rows)
    if problems:
        sys.exit(f"these ended with an error: {', '.join(problems)}")


if __name__ == "__main__":
    main()

"""Run benchmarks in processes of their own, and read the tables that they print, cell by cell.

A benchmark prints with `kdcache.cli.output.table`; in the process that is started here, its tables are recorded too.
"""

from __future__ import annotations

import json
import os
import runpy
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch

from kdcache.cli import output

_FOLDER = Path(__file__).parent


class Recorded(NamedTuple):
    """A table that a benchmark printed.

    Attributes:
        title: of it.
        columns: headings.
        rows: cells.
    """

    title: str
    columns: list[str]
    rows: list[list[str]]

    def column(self, name: str, nth: int = 0) -> int:
        """Return the index of the n-th column with a heading."""
        return [index for index, column in enumerate(self.columns) if column == name][nth]


class Outcome(NamedTuple):
    """What came of a benchmark.

    Attributes:
        tables: that were printed.
        problem: why there are no more; "" if it ended well.
        seconds: that it took.
    """

    tables: list[Recorded]
    problem: str
    seconds: float


def run(name: str, arguments: Sequence[str], limit: float | None = None, n_tables: int = 0) -> Outcome:
    """Run a benchmark of this folder in a new process.

    Args:
        name: of its file, without `.py`.
        arguments: of the command.
        limit: seconds after which it is ended; None for no limit.
        n_tables: number of tables after which it ends; 0 for all.
    """
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        record = Path(folder) / "tables.jsonl"
        record.touch()
        with subprocess.Popen(
            [sys.executable, __file__, str(record), str(n_tables), name, *arguments],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        ) as process:
            try:
                errors = process.communicate(timeout=limit)[1].strip().splitlines()
                problem = (errors or ["no message"])[-1] if process.returncode else ""
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)  # with the processes that it has started
                problem = f"stopped after {limit:.0f} s"
        tables = [Recorded(**json.loads(line)) for line in record.read_text().splitlines()]
    return Outcome(tables, problem, time.monotonic() - began)


def machine(device: str = "cpu") -> str:
    """Return what the figures depend on: the device, the cores, and the version of torch."""
    name = torch.cuda.get_device_name(device) if torch.device(device).type == "cuda" else f"{_processor()} (CPU)"
    return f"{name}, {len(os.sched_getaffinity(0))} cores, torch {torch.__version__}"


def _processor() -> str:
    path = Path("/proc/cpuinfo")
    lines = path.read_text().splitlines() if path.exists() else []
    return next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), "processor")


def _record(record: Path, n_tables: int, name: str, arguments: list[str]) -> None:
    """Run a benchmark as a command of this process, and append its tables to a file."""
    printed, count = output.table, 0

    def table(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
        nonlocal count
        printed(title, columns, rows)
        with record.open("a") as opened:
            opened.write(json.dumps(Recorded(title, list(columns), [list(row) for row in rows])._asdict()) + "\n")
        count += 1
        if count == n_tables:
            sys.exit()

    output.table = table
    sys.argv = [f"{name}.py", *arguments]
    sys.path.insert(0, str(_FOLDER))
    runpy.run_path(str(_FOLDER / f"{name}.py"), run_name="__main__")


if __name__ == "__main__":
    _record(Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3], sys.argv[4:])

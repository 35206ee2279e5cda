"""Measure a dump by several ranks with a shared folder: `python benchmarks/cluster.py`.

torchrun starts 1, 2, 4 and 8 ranks on this machine, which dump the same rows with gloo. So that they do not compete for
its cores, the teacher is a small layer that sleeps for --wait seconds per batch, as if an accelerator of its own were
busy. Then 8 ranks of which one sleeps four times as long, once as ranks claim their shards and once with shares that
are fixed in advance; and 8 ranks of which one is killed in the middle, after which torchrun starts all of them again.

Columns:
    rows/s       from the first batch to the last commit marker; with a killed rank, starting again is included
    of 1 rank    compared with a single rank
    of all       compared with the speed that the ranks have together if none ever waits
    made again   rows that were run through the teacher twice
    digest       whether the root digest is that of a single rank
The bound is 0.8 of the speed of all ranks, with a slow one too. The command fails if a digest differs.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from kdcache import Samples, dump_teacher, open_cache
from kdcache.cli import output
from kdcache.config.transform import Transform
from kdcache.data.images import ArrayImages
from kdcache.runtime.distributed import join_ranks
from kdcache.runtime.progress import Silent, Task

_BATCH, _SHARD, _SIDE, _CLASSES = 64, 512, 8, 100
_FLOAT: Transform = [{"ToDtype": {"dtype": "float32", "scale": True}}]
_SLOWER = 4
_BOUND = 0.8
_WORKER = "--worker"


class Case(NamedTuple):
    """A row of the table.

    Attributes:
        ranks: number of them.
        slow: whether the last rank is four times slower.
        fixed: whether each rank makes its own share only.
        killed: whether the last rank is killed once, in the middle of its share.
    """

    ranks: int
    slow: bool = False
    fixed: bool = False
    killed: bool = False

    def described(self) -> str:
        """Return its name in the table."""
        parts = [
            f"{self.ranks} {'rank' if self.ranks == 1 else 'ranks'}",
            *([f"one {_SLOWER} x slower"] if self.slow else []),
            *(["fixed shares"] if self.fixed else []),
            *(["one killed"] if self.killed else []),
        ]
        return ", ".join(parts)

    def speed(self) -> float:
        """Return the speed of all ranks together, in units of one rank that is not slow."""
        return self.ranks - (1 - 1 / _SLOWER if self.slow else 0)


class Result(NamedTuple):
    """Result of a dump.

    Attributes:
        seconds: from the first batch to the last commit marker.
        rows: that were run through the teacher.
        digest: root digest of the cache.
    """

    seconds: float
    rows: int
    digest: str


class SleepingTeacher(nn.Module):
    """A linear layer that sleeps per batch, and appends the time at which each batch began to a log.

    Args:
        wait: seconds of sleep per batch.
        log: file to which a line is appended per batch; it outlives the process.
        fatal: number of the batch at which the process kills itself; None for never.
    """

    def __init__(self, wait: float, log: Path, fatal: int | None) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layer = nn.Linear(3 * _SIDE * _SIDE, _CLASSES)
        self._wait, self._log, self._fatal = wait, log, fatal
        self.is_logged, self._count = True, 0

    def forward(self, images: Tensor) -> Tensor:
        """Return logits [B, 100] of images [B, 3, 8, 8]."""
        if self.is_logged and len(images) == _BATCH:  # what runs before the pass has fewer
            with self._log.open("a") as opened:
                opened.write(f"{time.time()} {len(images)}\n")
            self._count += 1
            if self._count == self._fatal:
                os.kill(os.getpid(), signal.SIGKILL)
            time.sleep(self._wait)
        logits: Tensor = self.layer(images.flatten(1))
        return logits


class PassBegins(Silent):
    """A progress reporter that tells the teacher when its pass begins: what runs before it is not measured."""

    def __init__(self, teacher: SleepingTeacher) -> None:
        self._teacher = teacher
        teacher.is_logged = False

    @contextmanager
    def task(self, what: str, total: int, unit: str) -> Iterator[Task]:
        """Begin an operation without reporting it."""
        self._teacher.is_logged = what.startswith("teacher")
        with super().task(what, total, unit) as task:
            yield task


def main() -> None:
    """Print the table."""
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--folder", type=Path, help="shared folder for temporary files")
    arguments.add_argument("--rows", type=int, default=51_200)
    arguments.add_argument("--wait", type=float, default=0.05, help="seconds that a batch of 64 takes (default 0.05)")
    arguments.add_argument(
        "--quick", action="store_true", help="small sizes; the results do not compare with the bounds"
    )
    asked = arguments.parse_args()
    most = 2 if asked.quick else 8
    rows = 6 * _SHARD if asked.quick else asked.rows
    cases = [
        *(Case(2**power) for power in range(most.bit_length())),
        Case(most, slow=True),
        *([] if asked.quick else [Case(most, slow=True, fixed=True)]),
        Case(most, killed=True),
    ]
    with tempfile.TemporaryDirectory(dir=asked.folder) as folder:
        results = {case: _dumped(case, rows, asked.wait, Path(folder) / str(n)) for n, case in enumerate(cases)}
    alone = results[cases[0]]
    table = []
    for case, result in results.items():
        speedup = alone.seconds / result.seconds
        table.append(
            [
                case.described(),
                f"{rows / result.seconds:,.0f}",
                f"{speedup:.2f}",
                f"{speedup / case.speed():.2f}",
                "" if case.fixed or case.killed else f"{_BOUND:.2f}",
                f"{result.rows - rows:,}",
                "equal" if result.digest == alone.digest else "OTHER",
            ]
        )
    output.table(
        f"a dump of {rows:,} rows in shards of {_SHARD}; {1000 * asked.wait:.0f} ms per batch of {_BATCH}; "
        f"{os.cpu_count()} cores",
        ["ranks", "rows/s", "of 1 rank", "of all", "bound", "made again", "digest"],
        table,
    )
    if any(result.digest != alone.digest for result in results.values()):
        sys.exit("root digests differ")


def _dumped(case: Case, rows: int, wait: float, folder: Path) -> Result:
    """Dump with some ranks, and return the result."""
    folder.mkdir()
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={case.ranks}"]
    restarts = ["--max-restarts=1"] if case.killed else []
    options = [name for name in ("slow", "fixed", "killed") if getattr(case, name)]
    done = subprocess.run(
        [*launch, *restarts, __file__, _WORKER, str(folder), str(rows), str(wait), *options],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        sys.exit(f"{case.described()}: {done.stderr}")
    lines = [line.split() for log in folder.glob("*.log") for line in log.read_text().splitlines()]
    began = min(float(line[0]) for line in lines)
    cache = folder / "c.kdcache"
    ended = max(marker.stat().st_mtime for marker in cache.glob("commits/*/*.json"))
    return Result(ended - began, sum(int(line[1]) for line in lines), open_cache(cache).manifest.digest)


def _work(folder: Path, rows: int, wait: float, *options: str) -> None:
    """Do the work of one rank."""
    pixels = torch.randint(256, (rows, 3, _SIDE, _SIDE), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    labels, names = (np.arange(rows) % _CLASSES).astype(np.int32), tuple(map(str, range(_CLASSES)))
    samples = Samples("noise", "train", ArrayImages(pixels), labels, names, [{"RandomHorizontalFlip": {}}, *_FLOAT])
    with join_ranks() as ranks:
        is_last = ranks.rank == ranks.count - 1
        dies = is_last and "killed" in options and os.environ["TORCHELASTIC_RESTART_COUNT"] == "0"
        teacher = SleepingTeacher(
            wait * (_SLOWER if is_last and "slow" in options else 1),
            folder / f"{ranks.rank}.log",
            rows // ranks.count // _BATCH // 2 if dies else None,
        )
        dump_teacher(
            teacher,
            samples,
            folder / "c.kdcache",
            ranks=dataclasses.replace(ranks, store=None) if "fixed" in options else ranks,
            progress=PassBegins(teacher) if ranks.is_first else None,
            top_k=8,
            pilot_rows=256,  # planning is not measured
            shard_rows=_SHARD,
            batch_size=_BATCH,
            num_workers=0,
        )


if __name__ == "__main__":
    if sys.argv[1:2] == [_WORKER]:
        _work(Path(sys.argv[2]), int(sys.argv[3]), float(sys.argv[4]), *sys.argv[5:])
    else:
        main()

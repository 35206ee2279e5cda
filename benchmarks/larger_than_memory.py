"""Measure a cache that is larger than memory: `python benchmarks/larger_than_memory.py`.

Rows per second of each placement, in batches of 256, still encoded (`codec.py` measures the decoding), in the order
that a trainer uses with that placement; and the peak of anonymous memory of a process that opens a cache and reads
batches, for N rows and for 10 N. The bounds: 50,000 rows/s for mmap in random order with look-ahead from a cold disk;
1,000,000 rows/s for stream; and a peak that does not grow with the rows, except for the label, the content key and the
position in the order of each sample.

Cold: the files were dropped from the page cache just before, and the last column shows what was then read from the
disk. A pass of mmap reads few rows compared with the size of the file, and there are several passes, each after the
files were dropped again: in a long pass most pages would be in memory already. Medians of the passes.

The rows are synthetic (`common.py`), encoded, and repeated after 20,000. That is more than a chunk holds, so that
compression does not gain from the repetition. Give a --folder on the disk to measure; it takes 170 bytes per row.
"""

from __future__ import annotations

import argparse
import gc
import multiprocessing
import os
import resource
import statistics
import tempfile
import threading
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import NamedTuple, ParamSpec, TypeVar

import torch
from common import encoded, planned, write_cache

from kdcache import open_cache
from kdcache.cache.placement.choose import Placement
from kdcache.cli import output

_BATCH = 256
_SECTOR = 512
_AT_MOST = {"host": 2**22, "mmap": 2**15, "stream": 2**22}
"""Rows per pass."""

_PROCESSES = multiprocessing.get_context("forkserver")
P = ParamSpec("P")
T = TypeVar("T")


class Case(NamedTuple):
    """A line of the first table.

    Attributes:
        placement: of the rows.
        ahead: whether the batches are prefetched.
        cold: whether the files are dropped from the page cache first.
        bound: rows per second.
    """

    placement: Placement
    ahead: bool
    cold: bool
    bound: int | None = None


_CASES = [
    Case("host", ahead=False, cold=False),
    Case("mmap", ahead=True, cold=True, bound=50_000),
    Case("mmap", ahead=False, cold=True),
    Case("mmap", ahead=True, cold=False),
    Case("mmap", ahead=False, cold=False),
    Case("stream", ahead=True, cold=True, bound=1_000_000),
    Case("stream", ahead=True, cold=False),
]


class Pace(NamedTuple):
    """Result of a pass: rows per second, and bytes per row that were read from the disk."""

    rows: float
    read: float


def main() -> None:
    """Print the tables."""
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--rows", type=int, default=1_600_000, help="N (default 1,600,000)")
    arguments.add_argument("--folder", type=Path, help="folder for temporary files, on the disk to measure")
    arguments.add_argument("--passes", type=int, default=3)
    arguments.add_argument(
        "--quick", action="store_true", help="small sizes; the results do not compare with the bounds"
    )
    asked = arguments.parse_args()
    rows, classes, passes = (2000, 100, 1) if asked.quick else (asked.rows, 1000, asked.passes)
    pool = encoded(planned(classes, top_k=4, rank=48), min(rows, 20_000))
    _PROCESSES.set_forkserver_preload(["kdcache.cache.reader", "kdcache.cache.parallel", "kdcache.cache.planner"])
    with tempfile.TemporaryDirectory(dir=asked.folder) as folder:
        os.environ["KDCACHE_HOME"] = folder  # which all processes are given
        sizes = (rows, 10 * rows)
        caches = {size: write_cache(Path(folder) / f"{size}.kdcache", pool, size).path for size in sizes}
        memory = [_memory_row(placement, caches) for placement in ("host", "mmap", "stream")]
        speed = [_speed_row(case, caches[10 * rows], passes) for case in _CASES]
    output.table(
        f"batches of {_BATCH} from a cache of {10 * rows:,} rows, {classes} classes",
        ["placement", "look-ahead", "disk", "rows/s", "bound", "from disk, bytes/row"],
        speed,
    )
    output.table(
        "peak of anonymous memory above that after importing kdcache, MB",
        ["placement", *(f"{count:,} rows" for count in caches), "bytes per added row"],
        memory,
    )


def _speed_row(case: Case, cache: Path, passes: int) -> list[str]:
    paces = [_pace(cache, case) for _ in range(passes)]
    return [
        case.placement,
        "yes" if case.ahead else "no",
        "cold" if case.cold else "warm",
        f"{statistics.median(pace.rows for pace in paces):,.0f}",
        f"{case.bound:,}" if case.bound else "",
        f"{statistics.median(pace.read for pace in paces):,.0f}",
    ]


def _memory_row(placement: Placement, caches: dict[int, Path]) -> list[str]:
    peaks = [_alone(peak, cache, placement) for cache in caches.values()]
    fewer, more = caches
    return [placement, *(f"{peak / 1e6:.0f}" for peak in peaks), f"{(peaks[1] - peaks[0]) / (more - fewer):.0f}"]


def _pace(cache: Path, case: Case) -> Pace:
    """Read the batches of one pass."""
    teacher = open_cache(cache).teacher(placement=case.placement)
    order = teacher.order(torch.Generator().manual_seed(time.time_ns()))
    batches = torch.split(order[: _AT_MOST[case.placement]], _BATCH)

    def take() -> None:
        if case.ahead:
            teacher.expect(batches)
        for ids in batches:
            teacher.place.rows(ids, 0)

    if case.cold:
        _drop(cache)
    else:
        take()
    blocks = resource.getrusage(resource.RUSAGE_SELF).ru_inblock
    began = time.perf_counter()
    take()
    seconds, rows = time.perf_counter() - began, sum(map(len, batches))
    read = _SECTOR * (resource.getrusage(resource.RUSAGE_SELF).ru_inblock - blocks)
    return Pace(rows / seconds, read / rows)


def _drop(cache: Path) -> None:
    """Drop the files of a cache, and all record files, from the system's page cache."""
    gc.collect()  # of earlier passes: what is mapped stays
    for path in (*cache.rglob("*"), *Path(os.environ["KDCACHE_HOME"]).rglob("*.records")):
        if path.is_file():
            handle = os.open(path, os.O_RDONLY)
            os.fsync(handle)  # what is not written yet stays
            os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
            os.close(handle)


def _alone(work: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
    """Call a function in a new process, and return its result."""
    with ProcessPoolExecutor(1, _PROCESSES) as pool:
        return pool.submit(work, *args, **kwargs).result()


def peak(cache: Path, placement: Placement) -> int:
    """Return by how many bytes the memory of this process grows at most while it reads batches from a cache."""
    before, taken, done = _anonymous(), [0], threading.Event()

    def watch() -> None:
        while not done.wait(0.002):
            taken.append(_anonymous() - before)

    watcher = threading.Thread(target=watch)
    watcher.start()
    teacher = open_cache(cache).teacher(placement=placement)
    batches = torch.split(teacher.order(torch.Generator().manual_seed(0)), _BATCH)
    teacher.expect(batches)
    for ids in batches[: _AT_MOST[placement] // _BATCH]:
        teacher.place.rows(ids, 0)
    done.set()
    watcher.join()
    return max(taken)


def _anonymous() -> int:
    """Return the anonymous memory of this process in bytes; pages of files are not included, they can be evicted."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("RssAnon"))


if __name__ == "__main__":
    main()

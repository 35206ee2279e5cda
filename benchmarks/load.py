"""Measure how long a cache takes to write and to load: `python benchmarks/load.py`.

A cache of a million rows of 1000 classes is written shard by shard, including flushing, digests and commit markers.
Then a whole view is read into memory, compared with `np.load` of the same arrays from `.npy` files; both from the page
cache, interleaved, medians. The bounds: reading takes at most 12 times as long as np.load; writing reaches 500,000
rows/s with k = 16 and a uniform tail.

The rows are synthetic (`common.py`), encoded, and repeated after 50,000. That is more than a chunk holds, so that
compression does not gain from the repetition.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

import numpy as np
from common import encoded, in_turn, planned, write_cache

from kdcache.cache.format import zarr_store
from kdcache.cache.planner import Candidate, described
from kdcache.cli import output

_BOUND = 12


def main() -> None:
    """Print the table."""
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--folder", type=Path, help="folder for temporary files")
    arguments.add_argument("--rounds", type=int, default=7)
    arguments.add_argument(
        "--quick", action="store_true", help="small sizes; the results do not compare with the bounds"
    )
    asked = arguments.parse_args()
    samples, classes, distinct = (20_000, 100, 5000) if asked.quick else (1_000_000, 1000, 50_000)
    rounds = 1 if asked.quick else asked.rounds
    table = []
    for chosen in (planned(classes, top_k=4, rank=48), planned(classes, top_k=16, tail="uniform")):
        with tempfile.TemporaryDirectory(dir=asked.folder) as folder:
            table.append(_row(chosen, Path(folder), samples, distinct, rounds))
    output.table(
        f"a cache of {samples:,} rows, {classes} classes: sizes in MB, times in ms",
        ["encoding", "raw", "files", "np.load", "load", "ratio", "bound", "written, rows/s"],
        table,
    )


def _row(chosen: Candidate, folder: Path, samples: int, distinct: int, rounds: int) -> list[str]:
    """Return the row of one encoding: write a cache, and load it."""
    written = write_cache(folder / "made-up.kdcache", encoded(chosen, distinct), samples)
    everything = range(samples)
    arrays = zarr_store.read_rows(written.path, written.plan, 0, everything).arrays()
    for name, values in arrays.items():
        np.save(folder / f"{name}.npy", values.numpy())
    works = {
        "np.load": lambda: [np.load(folder / f"{name}.npy") for name in arrays],
        "load": lambda: zarr_store.read_rows(written.path, written.plan, 0, everything),
    }
    seconds = in_turn(works, rounds)
    raw = sum(values.numel() * values.element_size() for values in arrays.values())
    shards = (path for name in arrays for path in written.path.rglob(f"{name}/c/**/*") if path.is_file())
    return [
        described(chosen),
        *(f"{size / 1e6:.2f}" for size in (raw, sum(path.stat().st_size for path in shards))),
        *(f"{1000 * seconds[work]:.1f}" for work in works),
        f"{seconds['load'] / seconds['np.load']:.1f}",
        str(_BOUND),
        f"{samples / written.seconds:,.0f}",
    ]


if __name__ == "__main__":
    main()

"""Memory does not grow with the rows; the benchmark runs."""

from __future__ import annotations

import os
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers.forked import captured, script
from helpers.paths import ROOT
from helpers.placement import (
    FROM_DISK,
)
from helpers.processes import FORKS, PATIENCE, in_a_process

from kdcache import Cache, open_cache
from kdcache.cache.format.codec import Rows
from kdcache.cache.format.encoding import Encoding
from kdcache.cache.format.fingerprints import SKETCH_PARTS, Inputs
from kdcache.cache.format.schema import Sharding
from kdcache.cache.placement import choose, mmap
from kdcache.cache.placement.choose import PLACEMENTS, Placement
from kdcache.cache.writer import CacheWriter

LARGE = (25_000, 100_000)


@pytest.fixture(scope="module")
def large(digits: Cache, folder: Path) -> list[Path]:
    return [large_cache(folder / f"{samples}.kdcache", digits, samples) for samples in LARGE]


def large_cache(path: Path, like: Cache, samples: int) -> Path:
    """A cache of rows of 2 kB, all alike, one view."""
    plan, encoding = like.manifest.plan, Encoding(num_classes=1000, top_k=1000, tail="none", dtype="float16")
    plan = plan.model_copy(
        update={
            "class_encoding": encoding,
            "views": plan.views.model_copy(update={"count": 1}),
            "dataset": plan.dataset.model_copy(
                update={"samples": samples, "class_names": tuple(map(str, range(1000)))}
            ),
            "shape": Sharding(shard_rows=16_384, chunk_rows=1024, fingerprint_stride=16_384),
        }
    )
    writer = CacheWriter.begin(path, plan, np.zeros(samples, np.int32), np.zeros(samples, np.uint64))
    inputs = Inputs(np.zeros(1, np.uint32), np.zeros((1, SKETCH_PARTS), np.float32))
    for shard in range(plan.shards):
        count = len(plan.shard_ids(shard))
        flat = torch.full((count, 1000), -6.9, dtype=torch.float16)
        rows = Rows(flat, None, torch.zeros(count), torch.zeros(count, len(encoding.statistics), dtype=torch.float16))
        writer.write(0, shard, rows, inputs)
    writer.seal(like.manifest.summary)
    return path


def peak_of(cache: Path, kept: Path, placed: Placement, told: Any) -> None:
    """Tell how much memory of its own this process took for a part of an epoch; it ends with rows on their way."""
    os.environ["KDCACHE_HOME"] = str(kept)
    for module, name in (
        (mmap, "_WINDOW"),
        (mmap, "_RESIDENT"),
        (choose, "_READ_BYTES"),
        (choose, "_MIXED_BYTES"),
        (choose, "_BLOCK_BYTES"),
    ):
        setattr(module, name, 2**22)
    before, taken, done = own_memory(), [0], threading.Event()

    def watch() -> None:
        while not done.wait(0.002):
            taken.append(own_memory() - before)

    watcher = threading.Thread(target=watch)
    watcher.start()
    teacher = open_cache(cache).teacher(placement=placed)
    batches = torch.split(teacher.order(torch.Generator().manual_seed(0)), 128)
    teacher.prefetch(batches)
    for ids in batches[: len(batches) // 4]:
        assert teacher.source.rows(ids, 0).log_probs[:, 0].eq(torch.tensor(-6.9).half()).all()
    done.set()
    watcher.join()
    told.put(max(taken))


def own_memory() -> int:
    """Bytes of memory that are not those of files."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("RssAnon"))


@pytest.mark.parametrize("placed", FROM_DISK)
def test_memory_does_not_grow_with_the_rows(placed: Placement, large: list[Path], kept_here: Path) -> None:
    told, peaks = FORKS.Queue(), []
    for cache in large:
        process = in_a_process(peak_of, cache, kept_here, placed, told)
        peaks.append(told.get(timeout=PATIENCE))
        process.join(PATIENCE)
        assert process.exitcode == 0
    for file in kept_here.rglob("*.records"):
        file.unlink()  # pytest keeps the folder
    rows = (LARGE[1] - LARGE[0]) * 2000
    assert peaks[1] - peaks[0] < rows / 3


def test_the_benchmark_runs() -> None:
    done = captured(script, ROOT / "benchmarks" / "larger_than_memory.py", "--quick", cwd=ROOT)
    assert done.returncode == 0, done.stderr
    lines = [line.split() for line in done.stdout.splitlines()]
    paces = [line for line in lines if line[0] in PLACEMENTS and line[1] in ("yes", "no")]
    assert [line[0] for line in paces] == ["host", *["mmap"] * 4, *["stream"] * 2]
    assert all(float(line[3].replace(",", "")) > 0 for line in paces)
    assert [line[0] for line in lines if len(line) == 4 and line[0] in PLACEMENTS] == ["host", *FROM_DISK]

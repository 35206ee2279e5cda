"""Count the bytes of a new cache that are read after the teacher pass: once at most, whatever the number of ranks."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers.processes import exit_code, in_a_process
from helpers.tiny import TinyTeacher
from torch.distributed import TCPStore  # type: ignore[attr-defined]  # torch does not list it

from kdcache import Cache, Samples, dump_teacher, open_cache
from kdcache.cache import summary
from kdcache.cache.inspect.summary import take_census
from kdcache.config.cache import CacheSpec
from kdcache.data.images import ArrayImages
from kdcache.errors import CorruptError, InterruptedRun
from kdcache.runtime.distributed import join_ranks
from kdcache.runtime.progress import Silent, Task

COUNT, CLASSES, SHARDS = 20_000, 50, 10
SPEC = CacheSpec(shard_rows=COUNT // SHARDS, batch_size=500)


class Counter(Silent):
    """Counts the bytes of the files of a cache that are opened for reading after the pass.

    A file counts with its whole size whenever it is opened, even if only a part of it is read.
    """

    def __init__(self, cache: Path) -> None:
        self.cache, self.is_counting, self.bytes = str(cache), False, 0
        sys.addaudithook(self._hook)

    def _hook(self, event: str, args: tuple[Any, ...]) -> None:
        if self.is_counting and event == "open" and str(args[0]).startswith(self.cache):
            flags = args[2] if isinstance(args[2], int) else 0
            path = Path(args[0])
            is_read = args[1] is not None and not flags & (os.O_WRONLY | os.O_RDWR)  # os.open has no mode, for fsync
            if is_read and path.is_file():
                self.bytes += path.stat().st_size

    @contextmanager
    def task(self, what: str, total: int, unit: str) -> Iterator[Task]:
        with super().task(what, total, unit) as task:
            yield task
        self.is_counting = what.startswith("teacher")


def many() -> Samples:
    pixels = torch.randint(-8, 9, (COUNT, 1, 4, 4), generator=torch.Generator().manual_seed(0)) / 8
    names = tuple(f"class {c}" for c in range(CLASSES))
    return Samples("many", "train", ArrayImages(pixels), np.arange(COUNT, dtype=np.int32) % CLASSES, names, [])


def dump(out: Path, **more: Any) -> Cache:
    return dump_teacher(TinyTeacher(CLASSES), many(), out, spec=SPEC, **more)


def dump_and_count(out: Path, result: Path, environment: dict[str, str]) -> None:
    os.environ.update(environment)
    counter = Counter(out)
    with join_ranks() as ranks:
        # The progress of other ranks than the first is silent: their first file after the pass is the manifest.
        counter.is_counting = not ranks.is_first
        dump(out, ranks=ranks, progress=counter)
    result.write_text(str(counter.bytes))


@pytest.mark.parametrize("count", [1, 3])
def test_a_new_cache_is_read_once_at_most(count: int, tmp_path: Path) -> None:
    out = tmp_path / "c.kdcache"
    store = TCPStore("localhost", 0, is_master=True, wait_for_workers=False)
    shared = {"WORLD_SIZE": str(count), "MASTER_ADDR": "localhost", "MASTER_PORT": str(store.port)}
    shared["TORCHELASTIC_USE_AGENT_STORE"] = "True"
    results = [tmp_path / f"rank-{rank}" for rank in range(count)]
    processes = [
        in_a_process(dump_and_count, out, result, {**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)})
        for rank, result in enumerate(results)
    ]
    assert [exit_code(process) for process in processes] == [0] * count
    size = open_cache(out).bytes_on_disk
    of_rank = [int(result.read_text()) for result in results]
    assert of_rank[0] > 0
    assert sum(of_rank) <= 1.1 * size
    assert max(of_rank) <= 0.3 * size, "labels, keys, markers and manifest"


def test_what_is_counted_while_rows_are_written_is_what_is_stored(tmp_path: Path) -> None:
    for name, spec in {
        "dense": SPEC,
        "bytes": SPEC.model_copy(update={"dtype": "uint8"}),
        "head": SPEC.model_copy(update={"top_k": 5, "rank": 3}),
        "float32": SPEC.model_copy(update={"top_k": 5, "tail": "uniform", "dtype": "float32"}),
    }.items():
        cache = dump_teacher(TinyTeacher(CLASSES), many(), tmp_path / name, spec=spec)
        stored = summary.collect_statistics(cache.path, cache.manifest.plan)
        assert summary.summary_of(stored, cache.manifest.plan) == cache.manifest.summary, name
        sharpness, confidence = summary.histograms(stored)
        census = take_census(cache, 0)
        assert (census.sharpness, census.confidence) == (sharpness, confidence), name


def test_a_resumed_cache_has_the_summary_and_the_picture_of_an_uninterrupted_one(tmp_path: Path) -> None:
    class Stops(Silent):
        left = 15

        @contextmanager
        def task(self, what: str, total: int, unit: str) -> Iterator[Task]:
            yield self if what == "teacher" else Idle()

        def advance(self, amount: int = 1, note: str = "") -> None:
            self.left -= 1
            if not self.left:
                raise KeyboardInterrupt

    class Idle:
        def advance(self, amount: int = 1, note: str = "") -> None: ...

    once = dump(tmp_path / "once.kdcache")
    with pytest.raises(InterruptedRun):
        dump(tmp_path / "c.kdcache", progress=Stops())
    resumed = dump(tmp_path / "c.kdcache")
    assert resumed.manifest == once.manifest
    assert (resumed.path / "card.png").read_bytes() == (once.path / "card.png").read_bytes()


def test_a_byte_that_flips_before_the_seal_is_found_by_the_next_reader(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    collect = summary.collect_statistics
    name = "data.zarr/log_probs/c/0/3/0"

    def flip(cache: Path, *rest: Any) -> Any:
        data = bytearray((cache / name).read_bytes())
        data[len(data) // 2] ^= 1
        (cache / name).write_bytes(data)
        return collect(cache, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(summary, "collect_statistics", flip)
        dump(tmp_path / "c.kdcache")
    with pytest.raises(CorruptError, match=name):
        open_cache(tmp_path / "c.kdcache")


def test_a_file_that_is_lost_before_the_seal_is_not_sealed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    collect = summary.collect_statistics
    name = "data.zarr/log_probs/c/0/3/0"

    def cut(cache: Path, *rest: Any) -> Any:
        (cache / name).write_bytes(b"")
        return collect(cache, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(summary, "collect_statistics", cut)
        with pytest.raises(CorruptError, match=name) as caught:
            dump(tmp_path / "c.kdcache")
    assert "run the same command again" in caught.value.fix
    assert dump(tmp_path / "c.kdcache").manifest.digest == dump(tmp_path / "once.kdcache").manifest.digest

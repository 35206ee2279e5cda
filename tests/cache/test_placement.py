"""Wherever the rows of a cache are held, the teacher says the same, bit for bit; and what is on disk stays there."""

from __future__ import annotations

import dataclasses
import errno
import functools
import hashlib
import itertools
import json
import os
import pickle
import resource
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import psutil
import pytest
import torch
from helpers.cli import kdcache
from helpers.paths import ROOT
from helpers.processes import FORKS, PATIENCE, in_a_process
from helpers.tiny import FLIP, TinyTeacher, tiny_samples
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from kdcache import Cache, dump_teacher, open_cache, train_student
from kdcache.cache.format import sharding, zarr_store
from kdcache.cache.format.codec import Rows, decode, encode
from kdcache.cache.format.fingerprints import SKETCH_PARTS, Inputs
from kdcache.cache.format.schema import Encoding, Sharding
from kdcache.cache.placement import choose, mmap, prefetch, stream
from kdcache.cache.placement.choose import PLACEMENTS, Placement
from kdcache.cache.teacher import CachedTeacher
from kdcache.cache.writer import CacheWriter
from kdcache.config.loader import load_pipeline
from kdcache.config.schema import CacheSpec
from kdcache.data.datasets import load_split
from kdcache.data.views import View
from kdcache.errors import CorruptError, IncompleteError, UsageError
from kdcache.models.small import SmallCNN
from kdcache.runtime import resources
from kdcache.runtime.resources import free_disk, free_memory, home
from kdcache.train.inputs import CacheOptions

RECIPE = ROOT / "pipelines" / "digits.yaml"
COUNT, SHARD, CHUNK = 37, 16, 4  # the last shard has two chunks, and the last chunk one row
FROM_DISK: tuple[Placement, ...] = ("mmap", "stream")


@pytest.fixture(scope="module", autouse=True)
def small_windows() -> Iterator[None]:
    """Windows and blocks so small that tiny caches have several of them."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(mmap, "_WINDOW_ROWS", 8)
        patch.setattr(mmap, "_READERS", 2)
        patch.setattr(mmap, "_RESIDENT", 2**15)
        patch.setattr(choose, "_READ_BYTES", 2**8)
        patch.setattr(choose, "_MIXED_BYTES", 2**10)
        patch.setattr(choose, "_BLOCK_BYTES", 2**7)
        yield


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """As in a DataLoader's workers: the last bits of a matrix product depend on the number of threads."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(autouse=True)
def kept_here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where kdcache keeps its own files in a test."""
    monkeypatch.setenv("KDCACHE_HOME", str(tmp_path / "home"))
    return tmp_path / "home"


class Made(NamedTuple):
    """A cache of two views, and the rows that were written, which have never left memory."""

    cache: Cache
    rows: tuple[Rows, ...]

    def logits(self, ids: Tensor, view: int) -> Tensor:
        """What the teacher is to say."""
        plan = self.cache.manifest.plan
        labels = torch.from_numpy(self.cache.labels).long()
        return decode(self.rows[view][ids.long()], labels[ids.long()], plan.encoding, self.basis)

    @property
    def basis(self) -> Any:
        return zarr_store.read_basis(self.cache.path, self.cache.manifest.plan)


ENCODINGS: dict[str, dict[str, Any]] = {
    "dense fp16": {"top_k": "all"},
    "dense fp32": {"top_k": "all", "dtype": "float32"},
    "dense uint8, of odd width": {"top_k": "all", "dtype": "uint8", "num_classes": 11},
    "uniform, indices uint8": {"top_k": 3, "tail": "uniform"},
    "uniform, indices uint16": {"top_k": 5, "tail": "uniform", "num_classes": 300},
    "uniform, indices uint32": {"top_k": 1, "tail": "uniform", "num_classes": 70_000},
    "lowrank, of odd width": {"top_k": 3, "tail": "lowrank", "rank": 7, "num_classes": 40},
}


def make(
    folder: Path, num_classes: int = 10, count: int = COUNT, shard: int = SHARD, chunk: int = CHUNK, **kept: Any
) -> Made:
    # A batch is a shard here, so that encoding shard by shard, as below, does the same arithmetic.
    spec = CacheSpec(**kept, views=2, seed=5, shard_rows=shard, batch_size=shard, pilot_rows=16)
    labels = [-1 if i % 5 == 0 else i % num_classes for i in range(count)]
    samples, teacher = tiny_samples(count, num_classes, labels), TinyTeacher(num_classes)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sharding, "LARGEST_CHUNK", chunk)
        cache = dump_teacher(teacher, samples, folder / "made.kdcache", transform=FLIP, spec=spec)
    plan = cache.manifest.plan
    assert (plan.shape.shard_rows, plan.shape.chunk_rows) == (shard, chunk)
    basis = zarr_store.read_basis(cache.path, plan)

    def encoded(view: int) -> Rows:
        seen = View(samples, plan.views.transform, plan.views.seed, view)
        parts = []
        for start in range(0, count, shard):
            images, truth, *_ = seen.__getitems__(range(start, min(start + shard, count)))
            parts.append(encode(teacher(images), truth, plan.encoding, basis))
        return Rows.concatenate(parts)

    return Made(cache, (encoded(0), encoded(1)))


@functools.cache
def made_once(folder: Path, name: str) -> Made:
    return make(folder / name.replace(",", "").replace(" ", "-"), **ENCODINGS[name])


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("places")


@pytest.fixture(params=ENCODINGS)
def made(request: pytest.FixtureRequest, folder: Path) -> Made:
    """A cache of each encoding, made once."""
    return made_once(folder, request.param)


@pytest.fixture
def lowrank(folder: Path) -> Made:
    return made_once(folder, "lowrank, of odd width")


@pytest.fixture
def copied(tmp_path: Path) -> Made:
    """A cache to be damaged."""
    return make(tmp_path, top_k="all")


@pytest.fixture(scope="module")
def larger(folder: Path) -> Made:
    """A cache of 2 views of 2000 samples, 52 bytes a row: 0.208 MB."""
    return make(folder / "larger", count=2000, shard=1024, chunk=1024, dtype="float32")


def check(teacher: CachedTeacher, made: Made, ids: Tensor, view: int) -> None:
    """That the teacher says what it is to say, bit for bit."""
    logits = teacher(ids, view)
    assert logits.dtype == torch.float32
    assert torch.equal(logits, made.logits(ids, view)), f"{teacher.placement}, view {view}, ids {ids.tolist()}"


def drawn(seed: int, count: int = COUNT) -> Tensor:
    return torch.randperm(count, generator=torch.Generator().manual_seed(seed))


# The same logits.


@pytest.mark.parametrize("placed", PLACEMENTS)
def test_every_place_gives_what_was_written(placed: Placement, made: Made) -> None:
    teacher = made.cache.teacher(placement=placed)
    assert (teacher.placement, teacher.why) == (placed, "as requested")
    for view in (1, 0):
        check(teacher, made, torch.cat([drawn(view), torch.tensor([36, 0, 36, 36, 17])]), view)
        check(teacher, made, torch.arange(36, 30, -1, dtype=torch.int32), view)
        check(teacher, made, torch.tensor([], dtype=torch.int64), view)
        for one in (0, 17, 36):
            check(teacher, made, torch.tensor([one]), view)


# A few batches come again and again, in one view and the other.
IDS = st.one_of(
    st.sampled_from([[5], [36, 0, 9], [1, 2, 3, 4]]),
    st.lists(st.integers(0, COUNT - 1), max_size=9),
).map(lambda ids: torch.tensor(ids, dtype=torch.int64))
BATCHES = st.lists(IDS, max_size=6)
VIEWS = st.integers(0, 1)


class Announce(NamedTuple):
    """Batches of a view are announced, as ids of this type."""

    batches: list[Tensor]
    view: int
    dtype: torch.dtype


class Follow(NamedTuple):
    """Of what was announced, so many batches are left out, then so many are asked for."""

    skip: int
    take: int


class Ask(NamedTuple):
    """A batch that nobody has announced."""

    ids: Tensor
    view: int


TYPES = st.sampled_from([torch.int64, torch.int32])
ACTS = st.lists(
    st.one_of(
        st.builds(Announce, BATCHES, VIEWS, TYPES),
        st.builds(Follow, st.integers(0, 2), st.integers(0, 6)),
        st.builds(Ask, IDS, VIEWS),
    ),
    max_size=8,
)


@pytest.mark.parametrize(("placed", "blocks"), [("host", 0), ("mmap", 0), ("stream", 1), ("stream", 3)])
def test_whatever_was_announced_the_answer_is_right(
    placed: Placement, blocks: int, lowrank: Made, monkeypatch: pytest.MonkeyPatch
) -> None:
    width = sum(value[0].numel() * value.element_size() for value in lowrank.rows[0].arrays().values())
    monkeypatch.setattr(choose, "_MIXED_BYTES", blocks * CHUNK * width)
    teacher = lowrank.cache.teacher(placement=placed)

    @given(ACTS)
    @settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
    def answers(acts: list[Announce | Follow | Ask]) -> None:
        announced: Iterator[Tensor] = iter(())
        view = 0
        for act in acts:
            match act:
                case Announce():
                    teacher.prefetch([ids.to(act.dtype) for ids in act.batches], act.view)
                    announced, view = iter(act.batches), act.view
                case Follow():
                    for ids in itertools.islice(announced, act.skip, act.skip + act.take):
                        check(teacher, lowrank, ids, view)
                case Ask():
                    check(teacher, lowrank, act.ids, act.view)

    answers()


@pytest.mark.parametrize("placed", FROM_DISK)
def test_announced_batches_are_fetched_ahead_and_no_other(placed: Placement, lowrank: Made) -> None:
    teacher = lowrank.cache.teacher(placement=placed)
    batches = torch.split(drawn(0), 5)
    asked_for = count_fetches(teacher)
    teacher.prefetch(batches)
    for ids in batches:
        check(teacher, lowrank, ids, 0)
    assert torch.equal(torch.cat(asked_for), torch.cat(batches)), "each row once, in this order"
    assert len(asked_for) < len(batches), "several batches at once"
    asked_for.clear()
    for ids in batches:
        check(teacher, lowrank, ids, 0)
    assert len(asked_for) == len(batches), "an announcement is good for once"


def count_fetches(teacher: CachedTeacher) -> list[Tensor]:
    """The ids of each fetch of a place on disk from now on."""
    asked_for: list[Tensor] = []
    ahead: prefetch.Prefetcher = vars(teacher.source)["_prefetcher"]
    fetch = ahead._fetch

    def counted(ids: Tensor, view: int) -> Rows:
        asked_for.append(ids)
        return fetch(ids, view)

    ahead._fetch = counted
    return asked_for


@pytest.mark.parametrize("placed", FROM_DISK)
def test_a_batch_in_between_does_not_end_what_was_announced(placed: Placement, lowrank: Made) -> None:
    teacher = lowrank.cache.teacher(placement=placed)
    batches = torch.split(drawn(0), 5)
    asked_for = count_fetches(teacher)
    teacher.prefetch(batches)
    other = torch.tensor([3, 1])
    for ids in batches:
        check(teacher, lowrank, other, 0)
        check(teacher, lowrank, ids, 0)
        check(teacher, lowrank, other, 1)
    assert sum(len(ids) == 2 and torch.equal(ids, other) for ids in asked_for) == 2 * len(batches)
    assert sum(map(len, asked_for)) == COUNT + 2 * 2 * len(batches)


@pytest.mark.parametrize("placed", FROM_DISK)
@pytest.mark.parametrize("taken", [0, 1, 4])
def test_the_same_batches_may_be_announced_for_another_view(placed: Placement, taken: int, lowrank: Made) -> None:
    teacher = lowrank.cache.teacher(placement=placed)
    batches = torch.split(drawn(0), 5)
    for view in (0, 1, 0):
        teacher.prefetch(batches, view)
        for ids in batches[:taken]:
            check(teacher, lowrank, ids, view)
        check(teacher, lowrank, batches[taken], 1 - view)


@pytest.mark.parametrize("placed", FROM_DISK)
def test_the_caller_may_use_its_tensors_again(placed: Placement, lowrank: Made) -> None:
    teacher = lowrank.cache.teacher(placement=placed)
    ids = torch.arange(COUNT)
    teacher.prefetch([ids])
    ids += 1
    ids %= COUNT
    check(teacher, lowrank, ids, 0)
    same = torch.empty(5, dtype=torch.int64)
    teacher.prefetch(same.copy_(batch) for batch in torch.split(drawn(0)[:35], 5))
    for batch in torch.split(drawn(0)[:35], 5):
        check(teacher, lowrank, batch, 0)


def test_pages_of_every_view_are_given_back(lowrank: Made, kept_here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    teacher = lowrank.cache.teacher(placement="mmap")
    monkeypatch.setattr(mmap, "_RESIDENT", 0)
    for view in (0, 1):
        check(teacher, lowrank, drawn(0), view)
    mapped = Path("/proc/self/smaps").read_text().split(str(kept_here))[1:]
    assert len(mapped) == 2
    assert all("Rss:                   0 kB" in part for part in mapped)


# The order.


@pytest.mark.parametrize("placed", PLACEMENTS)
@pytest.mark.parametrize("count", [1, 15, COUNT])
def test_the_order_is_of_all_ids_and_follows_from_the_seed(placed: Placement, count: int, tmp_path: Path) -> None:
    teacher = make(tmp_path, count=count, top_k="all").cache.teacher(placement=placed)

    def order(seed: int) -> list[int]:
        return teacher.order(torch.Generator().manual_seed(seed)).tolist()

    for seed in range(5):
        assert sorted(order(seed)) == list(range(count))
        assert order(seed) == order(seed)
    if count > 1:
        assert len({tuple(order(seed)) for seed in range(5)}) == 5
    generator = torch.Generator().manual_seed(0)
    assert teacher.order(generator).tolist() == order(0)
    assert count == 1 or teacher.order(generator).tolist() != order(0), "the next epoch has another"


@pytest.mark.parametrize(("size", "mixed"), [(CHUNK, 1), (CHUNK, 3), (3 * CHUNK, 2), (CHUNK, 100)])
def test_a_block_shuffled_order_mixes_whole_blocks(size: int, mixed: int, lowrank: Made) -> None:
    place = stream.StreamedRows(lowrank.cache.path, lowrank.cache.manifest.plan, size, mixed)
    first_groups, neighbors = set(), 0
    for seed in range(20):
        order = place.order(torch.Generator().manual_seed(seed)).tolist()
        neighbors += sum(a // size == b // size for a, b in itertools.pairwise(order))
        first_groups.add(tuple(order[: mixed * size]))
        while order:
            blocks = list(dict.fromkeys(one // size for one in order))[:mixed]
            whole = sorted(one for one in range(COUNT) if one // size in blocks)
            assert sorted(order[: len(whole)]) == whole
            order = order[len(whole) :]
    assert len(first_groups) > 15, "blocks and rows are drawn at random"
    if mixed > 1:
        # In a random order of so many blocks of four, so many neighbors are of one block.
        assert neighbors < 1.3 * 20 * COUNT * (size - 1) / (min(mixed * size, COUNT) - 1)


def count_reads(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int, int]]:
    """(view, first id, last id + 1) of every read of the store from now on."""
    reads: list[tuple[int, int, int]] = []
    read = zarr_store.RowReader.read

    def counted(reader: zarr_store.RowReader, view: int, ids: range) -> Rows:
        reads.append((view, ids.start, ids.stop))
        return read(reader, view, ids)

    monkeypatch.setattr(zarr_store.RowReader, "read", counted)
    return reads


@pytest.mark.parametrize("announced", [True, False])
@pytest.mark.parametrize(
    ("size", "mixed", "batch"), [(CHUNK, 1, 3), (CHUNK, 2, 3), (CHUNK, 3, 1), (3 * CHUNK, 1, 5), (CHUNK, 100, 4)]
)
def test_a_stream_reads_each_block_once_an_epoch(
    announced: bool, size: int, mixed: int, batch: int, lowrank: Made, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = stream.StreamedRows(lowrank.cache.path, lowrank.cache.manifest.plan, size, mixed)
    teacher = dataclasses.replace(lowrank.cache.teacher(placement="stream"), source=place)
    generator = torch.Generator().manual_seed(mixed)
    firsts = range(0, COUNT, size)
    for view in (0, 1):
        # The last block is short: where it lies not at the end, batches and blocks are out of step from there on.
        batches = torch.split(teacher.order(generator), batch)
        with monkeypatch.context() as patch:
            reads = count_reads(patch)
            if announced:
                teacher.prefetch(batches, view)
            for ids in batches:
                check(teacher, lowrank, ids, view)
        assert sorted(reads) == [(view, first, min(first + size, COUNT)) for first in firsts]


# Workers and copies.


class Asked(Dataset[Any]):
    """Asks teachers from wherever it is: in a worker of a DataLoader."""

    def __init__(self, teachers: Sequence[CachedTeacher]) -> None:
        self.teachers = teachers

    def __getitems__(self, ids: list[int]) -> tuple[list[int], int, list[Tensor]]:
        some = torch.tensor(ids)
        return ids, os.getpid(), [teacher(some, view) for teacher in self.teachers for view in (0, 1)]

    def __getitem__(self, index: int) -> tuple[list[int], int, list[Tensor]]:
        ids, process, logits = self.__getitems__([index])
        self.teachers[0].prefetch([torch.tensor([index])])  # a worker may announce on its own account
        return ids, process, [*logits[1:], self.teachers[0](torch.tensor([index]))]


def as_it_is(batch: Any) -> Any:
    return batch


@pytest.mark.filterwarnings("ignore:.*use of fork:DeprecationWarning")  # from Python 3.12 on, of any thread
@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_workers_are_given_the_same(method: str, lowrank: Made, monkeypatch: pytest.MonkeyPatch) -> None:
    teachers = [lowrank.cache.teacher(placement=placed) for placed in ("host", *FROM_DISK)]
    read, reading = zarr_store.RowReader.read, threading.Event()

    def slow(reader: zarr_store.RowReader, view: int, ids: range) -> Rows:
        reading.set()
        time.sleep(0.02)
        return read(reader, view, ids)

    monkeypatch.setattr(zarr_store.RowReader, "read", slow)
    batches = torch.split(drawn(1), 6)
    for teacher in teachers:
        check(teacher, lowrank, drawn(0), 1)
        teacher.prefetch(batches, 0)
        check(teacher, lowrank, batches[0], 0)
    # With the lock of the stream taken, and a thread in the middle of a read, when the workers are made.
    reading.clear()
    assert reading.wait(PATIENCE)
    loader: DataLoader[Any] = DataLoader(
        Asked(teachers),
        batch_sampler=[ids.tolist() for ids in batches],
        num_workers=2,
        multiprocessing_context=method,
        collate_fn=as_it_is,
        timeout=PATIENCE,
    )
    processes, seen = set(), []
    for ids, process, logits in loader:
        processes.add(process)
        seen += ids
        for number, found in enumerate(logits):
            assert torch.equal(found, lowrank.logits(torch.tensor(ids), number % 2)), (number, ids)
    assert len(processes - {os.getpid()}) == 2
    assert seen == drawn(1).tolist()
    for teacher in teachers:
        for batch in batches[1:]:
            check(teacher, lowrank, batch, 0)


@pytest.mark.filterwarnings("ignore:.*use of fork:DeprecationWarning")
@pytest.mark.parametrize("placed", ["host", *FROM_DISK])
def test_a_worker_may_announce(placed: Placement, lowrank: Made) -> None:
    teacher = lowrank.cache.teacher(placement=placed)
    teacher.prefetch(torch.split(drawn(1), 6), 0)
    loader: DataLoader[Any] = DataLoader(
        Asked([teacher]),
        batch_size=None,
        sampler=range(8),
        num_workers=2,
        multiprocessing_context="fork",
        timeout=PATIENCE,
    )
    for (one,), _, (other_view, announced) in loader:
        assert torch.equal(other_view, lowrank.logits(torch.tensor([one]), 1))
        assert torch.equal(announced, lowrank.logits(torch.tensor([one]), 0))


@pytest.mark.parametrize("placed", PLACEMENTS)
def test_a_copy_of_a_teacher_is_the_teacher(placed: Placement, lowrank: Made) -> None:
    teacher = lowrank.cache.teacher(placement=placed)
    teacher.prefetch(torch.split(drawn(0), 5), 1)
    check(teacher, lowrank, drawn(0)[:5], 1)
    copy = pickle.loads(pickle.dumps(teacher))  # noqa: S301
    assert (copy.placement, copy.why) == (teacher.placement, teacher.why)
    generators = [torch.Generator().manual_seed(3) for _ in range(2)]
    assert torch.equal(copy.order(generators[0]), teacher.order(generators[1]))
    copy.prefetch([drawn(2)], 0)
    for ids in (drawn(2), drawn(3)):
        check(copy, lowrank, ids, 0)
    check(teacher, lowrank, drawn(0)[5:10], 1)


# Record files.


def record_files(made: Made, kept: Path) -> list[Path]:
    folder = kept / "records" / made.cache.manifest.digest.removeprefix("sha256:")
    return [folder / f"view-{view}.records" for view in (0, 1)]


def joined(rows: Rows) -> bytes:
    """Rows as a record file has them: of each row one part after the other."""
    parts = [values.numpy() for values in rows.arrays().values()]
    return b"".join(part[row].tobytes() for row in range(len(rows)) for part in parts)


def check_records(made: Made, kept: Path) -> None:
    """That whole record files lie there, and nothing else but the lock."""
    files = record_files(made, kept)
    for file, rows in zip(files, made.rows, strict=True):
        content = file.read_bytes()
        assert content == joined(rows)
        said = {"size": len(content), "sha256": hashlib.sha256(content).hexdigest()}
        assert json.loads(file.with_suffix(".json").read_bytes()) == said
    assert sorted(path.name for path in files[0].parent.iterdir()) == [
        "lock", "view-0.json", "view-0.records", "view-1.json", "view-1.records"
    ]  # fmt: skip


def mapped_teacher(made: Made) -> CachedTeacher:
    return made.cache.teacher(placement="mmap")


def test_records_are_made_once_and_kept_by_the_caches_digest(
    made: Made, kept_here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mapped_teacher(made)
    check_records(made, kept_here)
    before = [(path, path.stat().st_ino, path.stat().st_mtime_ns) for path in kept_here.rglob("*")]
    reads = count_reads(monkeypatch)
    check(mapped_teacher(made), made, drawn(0), 1)
    assert [(path, path.stat().st_ino, path.stat().st_mtime_ns) for path in kept_here.rglob("*")] == before
    assert reads == [(0, 0, 1)], "of the store one row, to know what one looks like"


def flip(path: Path, where: int) -> None:
    content = bytearray(path.read_bytes())
    content[where] ^= 1
    path.write_bytes(content)


def left_behind(path: Path) -> None:
    """As a writer that was killed leaves it, half way through the first file."""
    path.with_suffix(".partial").write_bytes(path.read_bytes()[:100])
    path.with_suffix(".json").unlink()
    path.unlink()


DAMAGE: dict[str, Callable[[Path], object]] = {
    "first byte": lambda path: flip(path, 0),
    "last byte": lambda path: flip(path, -1),
    "truncated": lambda path: os.truncate(path, path.stat().st_size - 1),
    "empty": lambda path: os.truncate(path, 0),
    "longer": lambda path: path.write_bytes(path.read_bytes() + b"\0"),
    "missing": lambda path: path.unlink(),
    "left behind": left_behind,
    "without its digest": lambda path: path.with_suffix(".json").unlink(),
    "half a digest": lambda path: os.truncate(path.with_suffix(".json"), 20),
    "an empty digest": lambda path: path.with_suffix(".json").write_bytes(b""),
    "not a digest": lambda path: path.with_suffix(".json").write_bytes(b"[]"),
    "another digest": lambda path: flip(path.with_suffix(".json"), -10),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_damaged_records_are_made_anew(damage: str, lowrank: Made, kept_here: Path) -> None:
    mapped_teacher(lowrank)
    first, second = record_files(lowrank, kept_here)
    untouched = second.stat().st_ino
    DAMAGE[damage](first)
    teacher = mapped_teacher(lowrank)
    check_records(lowrank, kept_here)
    for view in (0, 1):
        check(teacher, lowrank, drawn(0), view)
    assert second.stat().st_ino == untouched


@pytest.mark.parametrize("announced", [True, False])
@pytest.mark.parametrize("damage", ["missing", "truncated", "empty"])
def test_records_that_go_before_they_are_mapped(damage: str, announced: bool, lowrank: Made, kept_here: Path) -> None:
    teacher = mapped_teacher(lowrank)
    DAMAGE[damage](record_files(lowrank, kept_here)[1])
    if announced:
        teacher.prefetch([drawn(0)], 1)
    with pytest.raises(CorruptError, match=r"view-1\.records cannot be mapped") as caught:
        teacher(drawn(0), 1)
    assert "open the cache's teacher again" in caught.value.fix
    check(teacher, lowrank, drawn(0), 0)
    check(mapped_teacher(lowrank), lowrank, drawn(0), 1)


def test_records_that_do_not_fit_are_refused_before_one_is_written(
    lowrank: Made, kept_here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    size = len(joined(lowrank.rows[0]))
    monkeypatch.setattr(mmap, "free_disk", lambda _: 2 * size - 1)
    with pytest.raises(IncompleteError, match="do not fit into") as caught:
        mapped_teacher(lowrank)
    assert "KDCACHE_HOME" in caught.value.fix
    assert [path.name for path in kept_here.rglob("*") if path.is_file()] == ["lock"]
    monkeypatch.setattr(mmap, "free_disk", lambda _: 2 * size)
    mapped_teacher(lowrank)
    # What lies there needs no room; what is damaged gives its own back.
    monkeypatch.setattr(mmap, "free_disk", lambda _: 0)
    mapped_teacher(lowrank)
    flip(record_files(lowrank, kept_here)[1], 0)
    monkeypatch.setattr(mmap, "free_disk", lambda folder: size * (not (folder / "view-1.records").exists()))
    mapped_teacher(lowrank)
    check_records(lowrank, kept_here)


def map_until_killed(cache: Path, kept: Path, at: int) -> None:
    """Make records, killed just before the `at`-th read of the store, or change of a file in kdcache's own folder."""
    os.environ["KDCACHE_HOME"] = str(kept)
    opened = open_cache(cache)
    count = itertools.count(1)

    def die() -> None:
        if next(count) == at:
            os.kill(os.getpid(), signal.SIGKILL)

    def hook(event: str, args: tuple[Any, ...]) -> None:
        writes = event == "open" and isinstance(args[2], int) and args[2] & (os.O_WRONLY | os.O_RDWR)
        if (writes or event in ("os.rename", "os.remove")) and str(args[0]).startswith(str(kept)):
            die()

    read = zarr_store.RowReader.read

    def counted(reader: zarr_store.RowReader, view: int, ids: range) -> Rows:
        die()
        return read(reader, view, ids)

    pytest.MonkeyPatch().setattr(zarr_store.RowReader, "read", counted)
    choose._READ_BYTES = 2**16
    sys.addaudithook(hook)
    opened.teacher(placement="mmap")


def test_killed_at_any_moment_no_half_file_has_the_final_name(
    larger: Made, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = [joined(rows) for rows in larger.rows]
    killed = halves = 0
    for at in itertools.count(1):
        kept = tmp_path / str(at)
        process = in_a_process(map_until_killed, larger.cache.path, kept, at)
        process.join(PATIENCE)
        files = record_files(larger, kept)
        assert all(
            not file.exists() or file.read_bytes() == content for file, content in zip(files, whole, strict=True)
        )
        if process.exitcode == 0:
            break
        assert process.exitcode == -signal.SIGKILL
        killed += 1
        halves += any(0 < path.stat().st_size < len(whole[0]) for path in kept.rglob("*.partial"))
        monkeypatch.setenv("KDCACHE_HOME", str(kept))
        check(mapped_teacher(larger), larger, torch.arange(0, 2000, 7), 1)
        check_records(larger, kept)
    assert killed >= 2 * (3 + 3), "of each file it is begun, parts are read, it is named, and its digest written"
    assert halves


def map_at_once(cache: Path, kept: Path, together: Any, told: Any) -> None:
    os.environ["KDCACHE_HOME"] = str(kept)
    torch.set_num_threads(1)
    opened, reads, read = open_cache(cache), [], zarr_store.RowReader.read

    def slow(reader: zarr_store.RowReader, view: int, ids: range) -> Rows:
        reads.append(ids)
        time.sleep(0.05)
        return read(reader, view, ids)

    pytest.MonkeyPatch().setattr(zarr_store.RowReader, "read", slow)
    together.wait()
    teacher = opened.teacher(placement="mmap")
    told.put((len(reads) - 1, teacher(drawn(0), 1).numpy()))


def test_processes_that_make_them_at_once_make_them_once(lowrank: Made, kept_here: Path) -> None:
    together, told = FORKS.Barrier(2), FORKS.Queue()
    both = [in_a_process(map_at_once, lowrank.cache.path, kept_here, together, told) for _ in range(2)]
    answers = [told.get(timeout=PATIENCE) for _ in both]
    for process in both:
        process.join(PATIENCE)
        assert process.exitcode == 0
    for _, logits in answers:
        assert torch.equal(torch.from_numpy(logits), lowrank.logits(drawn(0), 1))
    assert sorted(parts for parts, _ in answers) == [0, 2]
    check_records(lowrank, kept_here)


def map_with_a_limit(cache: Path, kept: Path, limit: int) -> None:
    os.environ["KDCACHE_HOME"] = str(kept)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    with pytest.raises(OSError, match="File too large") as caught:
        open_cache(cache).teacher(placement="mmap")
    assert caught.value.errno == errno.EFBIG
    assert [path.name for path in kept.rglob("*") if path.is_file()] == ["lock"]


def test_a_file_that_cannot_be_written_leaves_nothing(lowrank: Made, kept_here: Path) -> None:
    process = in_a_process(map_with_a_limit, lowrank.cache.path, kept_here, len(joined(lowrank.rows[0])) - 1)
    process.join(PATIENCE)
    assert process.exitcode == 0
    check(mapped_teacher(lowrank), lowrank, drawn(0), 1)
    check_records(lowrank, kept_here)


# Damaged stores.


def damage_chunk(made: Made, view: int, shard: int) -> None:
    flip(made.cache.path / f"data.zarr/log_probs/c/{view}/{shard}/0", 30)


@pytest.mark.parametrize(
    "damage",
    [damage_chunk, lambda made, view, shard: (made.cache.path / f"data.zarr/tail/c/{view}/{shard}/0").unlink()],
)
@pytest.mark.parametrize("placed", ["device", "host", "mmap"])
def test_a_store_that_is_damaged_is_no_teacher(
    placed: Placement, damage: Callable[[Made, int, int], None], tmp_path: Path, kept_here: Path
) -> None:
    made = make(tmp_path, **ENCODINGS["lowrank, of odd width"])
    damage(made, 1, 1)
    with pytest.raises(CorruptError, match=r"data\.zarr"):
        made.cache.teacher(placement=placed)
    assert not list(kept_here.rglob("view-1*"))


def test_damage_that_a_stream_comes_upon_reaches_the_caller(copied: Made) -> None:
    ids, well = torch.arange(16, 20), torch.arange(16)
    damage_chunk(copied, 1, 1)
    for announced in ([], [ids], [well, ids], [well[:4], well[4:8], ids, well[8:]], [ids, well, well, well]):
        teacher = copied.cache.teacher(placement="stream")
        teacher.prefetch(announced, 1)
        for batch in announced or [ids]:
            if batch is not ids:
                check(teacher, copied, batch, 1)
                continue
            with pytest.raises(CorruptError, match="log_probs"):
                teacher(ids, 1)
            with pytest.raises(CorruptError, match="log_probs"):
                teacher(ids, 1)
        check(teacher, copied, torch.arange(COUNT), 0)


# Which place.


MB = 10**6
EXCEED = "0.2 MB exceed half of"


@pytest.mark.parametrize(
    ("device", "on_device", "memory", "disk", "expected", "why"),
    [
        ("meta", 0.84, 0, 0, "device", "0.2 MB of 0.8 MB free on it"),
        ("meta", 0.82, 0.42, 0, "host", "0.2 MB of 0.4 MB free"),
        ("cpu", 100, 0.42, 0, "host", "0.2 MB of 0.4 MB free"),
        ("cpu", 0, 0.41, 0.24, "mmap", f"{EXCEED} 0.4 MB free memory"),
        (
            "cpu",
            0,
            0.41,
            0.23,
            "stream",
            "0.2 MB exceed half of 0.4 MB free memory and 90% of 0.2 MB free disk in {home}",
        ),
        ("cpu", 0, -1, 0, "stream", "0.2 MB exceed half of -1.0 MB free memory and 90% of 0.0 MB free disk in {home}"),
    ],
)
def test_auto_takes_the_first_place_that_the_rows_fit(
    device: str,
    on_device: float,
    memory: float,
    disk: float,
    expected: Placement,
    why: str,
    larger: Made,
    kept_here: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    free = {"meta": on_device, "cpu": memory}
    monkeypatch.setattr(choose, "free_memory", lambda device="cpu": int(free[torch.device(device).type] * MB))
    monkeypatch.setattr(choose, "free_disk", lambda _: int(disk * MB))
    teacher = larger.cache.teacher(device)
    assert (teacher.placement, teacher.why) == (expected, why.format(home=kept_here))
    assert teacher(torch.arange(5), 1).device.type == device


def test_auto_counts_the_records_that_are_there_already(larger: Made, monkeypatch: pytest.MonkeyPatch) -> None:
    mapped_teacher(larger)
    monkeypatch.setattr(choose, "free_memory", lambda _device="cpu": 0)
    monkeypatch.setattr(choose, "free_disk", lambda _: 0)
    assert larger.cache.teacher().placement == "mmap"


def test_a_placement_that_is_not_known_is_refused(lowrank: Made) -> None:
    with pytest.raises(UsageError, match="unknown placement 'memory'") as caught:
        lowrank.cache.teacher(placement="memory")  # type: ignore[arg-type]
    assert caught.value.fix == "use one of auto, device, host, mmap, stream"


def test_free_memory_is_what_the_containers_limit_leaves(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resources, "_CGROUP", tmp_path / "none")
    whole = free_memory()
    assert whole == pytest.approx(psutil.virtual_memory().available, rel=0.2)
    monkeypatch.setattr(resources, "_CGROUP", tmp_path)

    def says(limit: str, current: int, cached: int) -> None:
        (tmp_path / "memory.max").write_text(f"{limit}\n")
        (tmp_path / "memory.current").write_text(f"{current}\n")
        # Shared memory counts as `file`, and cannot be dropped.
        (tmp_path / "memory.stat").write_text(
            f"anon 5\nfile {cached + 77}\nshmem 77\ninactive_file {cached - 3}\nactive_file 3\n"
        )

    says("1000000", 900_000, 600_000)
    assert free_memory() == 700_000
    says("max", 900_000, 600_000)
    assert free_memory() == pytest.approx(whole, rel=0.2)
    says(str(2**62), 900_000, 600_000)
    assert free_memory() == pytest.approx(whole, rel=0.2)


def test_free_disk_is_that_of_a_folder_to_be(tmp_path: Path) -> None:
    there = os.statvfs(tmp_path)
    assert free_disk(tmp_path / "a" / "b") == pytest.approx(there.f_bavail * there.f_frsize, rel=0.05)


def test_where_kdcache_keeps_its_own_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert home() == tmp_path / "home"
    monkeypatch.setenv("KDCACHE_HOME", "")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert home() == tmp_path / "kdcache"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", "/somebody")
    assert home() == Path("/somebody/.cache/kdcache")


# Students.


@pytest.fixture(scope="module")
def digits(folder: Path) -> Cache:
    """A cache of the digits, in chunks of 64 of its 1000 rows."""
    torch.manual_seed(7)
    samples = load_split(load_pipeline(RECIPE, []).dataset, "train")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sharding, "LARGEST_CHUNK", 64)
        return dump_teacher(SmallCNN(10, 1, width=8), samples, folder / "digits.kdcache")


def test_a_student_is_the_same_wherever_the_rows_are(digits: Cache, tmp_path: Path) -> None:
    pipeline = load_pipeline(RECIPE, ["student.train.epochs=2", "student.train.batch_size=50"])
    weights = {}
    for placed in PLACEMENTS:
        run = tmp_path / placed
        checkpoint = train_student(pipeline, digits, run, CacheOptions(placed)).checkpoint
        weights[placed] = checkpoint.read_bytes()
        assert json.loads((run / "metrics.json").read_text())["placement"] == [placed]
        first, second = (float(line.split(",")[2]) for line in (run / "metrics.csv").read_text().splitlines()[1:])
        assert second < first
    assert weights["host"] == weights["device"] == weights["mmap"] != weights["stream"]


def test_the_command_says_where_the_rows_are(digits: Cache, tmp_path: Path) -> None:
    common = ("train-student", RECIPE, "--cache", digits.path, "--set", "student.train.epochs=1", "--device", "cpu")
    done = kdcache(*common, "-o", tmp_path / "a")
    assert "placement of the cache: host (" in done.stderr
    assert " MB free)" in done.stderr
    done = kdcache(*common, "-o", tmp_path / "b", "--placement", "stream")
    assert "placement of the cache: stream (as requested)" in done.stderr
    assert json.loads((tmp_path / "b" / "metrics.json").read_text())["placement"] == ["stream"]
    done = kdcache(*common, "-o", tmp_path / "c", "--loss", "ce")
    assert "held" not in done.stderr
    assert json.loads((tmp_path / "c" / "metrics.json").read_text())["placement"] == []


# Memory.


LARGE = (25_000, 100_000)


@pytest.fixture(scope="module")
def large(digits: Cache, folder: Path) -> list[Path]:
    return [large_cache(folder / f"{samples}.kdcache", digits, samples) for samples in LARGE]


def large_cache(path: Path, like: Cache, samples: int) -> Path:
    """A cache of rows of 2 kB, all alike, one view."""
    plan, encoding = like.manifest.plan, Encoding(num_classes=1000, top_k=1000, tail="none", dtype="float16")
    plan = plan.model_copy(
        update={
            "encoding": encoding,
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
    command = [sys.executable, "-W", "error", "benchmarks/larger_than_memory.py", "--quick"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True, timeout=PATIENCE)
    lines = [line.split() for line in done.stdout.splitlines()]
    paces = [line for line in lines if line[0] in PLACEMENTS and line[1] in ("yes", "no")]
    assert [line[0] for line in paces] == ["host", *["mmap"] * 4, *["stream"] * 2]
    assert all(float(line[3].replace(",", "")) > 0 for line in paces)
    assert [line[0] for line in lines if len(line) == 4 and line[0] in PLACEMENTS] == ["host", *FROM_DISK]

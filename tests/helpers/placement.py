"""Caches and teachers for the tests of placement."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from helpers.paths import ROOT
from helpers.tiny import FLIP, TinyTeacher, tiny_samples
from kdcache import Cache, dump_teacher
from kdcache.cache.format import sharding, stored_bases, zarr_store
from kdcache.cache.format.codec import Rows, decode, encode
from kdcache.cache.placement.choose import Placement
from kdcache.cache.teacher import CachedTeacher
from kdcache.config.cache import CacheSpec
from kdcache.data.views import View

RECIPE = ROOT / "pipelines" / "digits.yaml"


COUNT, SHARD, CHUNK = 37, 16, 4  # the last shard has two chunks, and the last chunk one row


FROM_DISK: tuple[Placement, ...] = ("mmap", "stream")


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
        return stored_bases.read_basis(self.cache.path, self.cache.manifest.plan)


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
    basis = stored_bases.read_basis(cache.path, plan)

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


def check(teacher: CachedTeacher, made: Made, ids: Tensor, view: int) -> None:
    """That the teacher says what it is to say, bit for bit."""
    logits = teacher(ids, view)
    assert logits.dtype == torch.float32
    assert torch.equal(logits, made.logits(ids, view)), f"{teacher.placement}, view {view}, ids {ids.tolist()}"


def drawn(seed: int, count: int = COUNT) -> Tensor:
    return torch.randperm(count, generator=torch.Generator().manual_seed(seed))


def count_reads(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int, int]]:
    """(view, first id, last id + 1) of every read of the store from now on."""
    reads: list[tuple[int, int, int]] = []
    read = zarr_store.RowReader.read

    def counted(reader: zarr_store.RowReader[Rows], view: int, ids: range) -> Rows:
        reads.append((view, ids.start, ids.stop))
        return read(reader, view, ids)

    monkeypatch.setattr(zarr_store.RowReader, "read", counted)
    return reads


def mapped_teacher(made: Made) -> CachedTeacher:
    return made.cache.teacher(placement="mmap")

"""Teachers in workers of a DataLoader, and copies of teachers."""

from __future__ import annotations

import os
import pickle
import threading
import time
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from helpers.placement import (
    FROM_DISK,
    Made,
    check,
    drawn,
)
from helpers.processes import PATIENCE
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from kdcache.cache.format import zarr_store
from kdcache.cache.format.codec import Rows
from kdcache.cache.placement.choose import PLACEMENTS, Placement
from kdcache.cache.teacher import CachedTeacher


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
@pytest.mark.parametrize("method", ["fork", "forkserver"])
def test_workers_are_given_the_same(method: str, lowrank: Made, monkeypatch: pytest.MonkeyPatch) -> None:
    teachers = [lowrank.cache.teacher(placement=placed) for placed in ("host", *FROM_DISK)]
    read, reading = zarr_store.RowReader.read, threading.Event()

    def slow(reader: zarr_store.RowReader[Rows], view: int, ids: range) -> Rows:
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

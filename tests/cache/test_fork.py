"""Operations on whole caches in processes that were forked from one that has done them."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers.tiny import TinyTeacher, tiny_samples
from torch.utils.data import DataLoader, Dataset

from kdcache import Cache, dump_teacher, open_cache
from kdcache.cache import parallel
from kdcache.cache.inspect.audit import audit
from kdcache.cache.inspect.diff import compare
from kdcache.cache.inspect.self_fidelity import measure_itself
from kdcache.cache.inspect.summary import take_census
from kdcache.cache.summary import summarize
from kdcache.config.cache import CacheSpec
from kdcache.curate.select import select

SPEC = CacheSpec(top_k=3, tail="uniform", shard_rows=8, pilot_rows=16)

PATIENCE = 120
"""Seconds after which a process hangs."""


def opened(folder: Path) -> Cache:
    path = folder / "whole.kdcache"
    return open_cache(path) if path.exists() else dump_teacher(TinyTeacher(12), tiny_samples(37, 12), path, spec=SPEC)


def name(folder: Path) -> Path:
    return folder / f"{os.getpid()}-{time.monotonic_ns()}.kdcache"


OPERATIONS: dict[str, Callable[[Path], object]] = {
    "summarize": lambda folder: take_census(opened(folder)),
    "summary": lambda folder: summarize(opened(folder).path, opened(folder).manifest.plan),
    "verify": lambda folder: audit(opened(folder).path),
    "diff": lambda folder: compare(opened(folder), opened(folder)),
    "fidelity": lambda folder: measure_itself(opened(folder)),
    "select": lambda folder: select(opened(folder), name(folder), samples=np.arange(20)).manifest.summary,
    "dump": lambda folder: dump_teacher(TinyTeacher(12), tiny_samples(9, 12), name(folder), spec=SPEC).manifest.summary,
}


def ends_well(function: Callable[[], object]) -> bool:
    """Return whether a function returns in a forked process."""
    process = os.fork()
    if process == 0:  # pragma: no cover
        try:
            torch.set_num_threads(1)  # as a worker of a DataLoader: libgomp's threads are not forked either
            function()
            os._exit(0)
        finally:
            os._exit(1)
    deadline = time.monotonic() + PATIENCE
    while time.monotonic() < deadline:
        ended, status = os.waitpid(process, os.WNOHANG)
        if ended:
            return os.waitstatus_to_exitcode(status) == 0
        time.sleep(0.02)
    os.kill(process, signal.SIGKILL)
    os.waitpid(process, 0)
    return False


@pytest.mark.filterwarnings("ignore:.*use of fork:DeprecationWarning")
@pytest.mark.parametrize("operation", OPERATIONS)
def test_what_the_parent_has_done_a_forked_child_can_do(operation: str, tmp_path: Path) -> None:
    OPERATIONS[operation](tmp_path)
    assert ends_well(lambda: OPERATIONS[operation](tmp_path))


@pytest.mark.filterwarnings("ignore:.*use of fork:DeprecationWarning")
def test_a_child_of_a_child_and_a_fork_during_the_work_too(tmp_path: Path) -> None:
    cache = opened(tmp_path)
    take_census(cache)
    assert ends_well(lambda: ends_well(lambda: take_census(cache)) or os._exit(1))
    assert all(parallel.over(ends_well, [(lambda: take_census(cache),)] * 2))


class Counts(Dataset[Any]):
    """A data set that reads the whole cache for each item."""

    def __init__(self, cache: Cache) -> None:
        self.cache = cache

    def __len__(self) -> int:
        return 4

    def __getitem__(self, index: int) -> int:
        return take_census(self.cache).rows


@pytest.mark.filterwarnings("ignore:.*use of fork:DeprecationWarning")
def test_forked_loading_processes_can_do_it(tmp_path: Path) -> None:
    cache = opened(tmp_path)
    take_census(cache)
    loader: DataLoader[Any] = DataLoader(
        Counts(cache), batch_size=2, num_workers=2, multiprocessing_context="fork", timeout=PATIENCE
    )
    assert torch.cat(list(loader)).tolist() == [37] * 4

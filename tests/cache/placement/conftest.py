"""Fixtures of the tests in this folder."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from helpers.placement import (
    ENCODINGS,
    RECIPE,
    Made,
    made_once,
    make,
)

from kdcache import Cache, dump_teacher
from kdcache.cache.format import sharding
from kdcache.cache.placement import choose, mmap
from kdcache.config.loader import load_pipeline
from kdcache.data.datasets import load_split
from kdcache.models.small import SmallCNN


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


@pytest.fixture(scope="module")
def larger(folder: Path) -> Made:
    """A cache of 2 views of 2000 samples, 52 bytes a row: 0.208 MB."""
    return make(folder / "larger", count=2000, shard=1024, chunk=1024, dtype="float32")


@pytest.fixture(scope="module")
def digits(folder: Path) -> Cache:
    """A cache of the digits, in chunks of 64 of its 1000 rows."""
    torch.manual_seed(7)
    samples = load_split(load_pipeline(RECIPE, []).dataset, "train")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sharding, "LARGEST_CHUNK", 64)
        return dump_teacher(SmallCNN(10, 1, width=8), samples, folder / "digits.kdcache")

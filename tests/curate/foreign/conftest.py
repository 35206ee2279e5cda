"""Fixtures of the tests in this folder."""

from __future__ import annotations

from pathlib import Path

import pytest
from helpers.foreign import (
    CLASSES,
    DRAWN,
    SPEC,
    VIEWS,
    Images,
    Seeing,
    ml_dr_of,
)

from kdcache import Cache, dump_teacher
from kdcache.config.cache import CacheSpec
from kdcache.curate.foreign import cache_of_files


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Images:
    return Images(tmp_path_factory.mktemp("images"))


@pytest.fixture(scope="module")
def dumped(images: Images, tmp_path_factory: pytest.TempPathFactory) -> Cache:
    """A cache of ours, with random crops."""
    out = tmp_path_factory.mktemp("dumped") / "c.kdcache"
    spec = CacheSpec(shard_rows=8, views=VIEWS, seed=5, dtype="float32", top_k=6, rank=3, pilot_rows=16)
    return dump_teacher(Seeing(CLASSES), images.samples, out, transform=DRAWN, spec=spec)


@pytest.fixture
def cropped(images: Images, tmp_path: Path) -> Cache:
    folder = ml_dr_of(images, tmp_path / "reinforced")
    return cache_of_files(folder, "ml-dr", images.samples, tmp_path / "c.kdcache", spec=SPEC)

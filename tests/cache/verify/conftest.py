"""Fixtures of the tests in this folder."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from helpers.caches import Made
from helpers.tiny import FLIP, TinyTeacher, tiny_samples
from helpers.verify import CROP, LABELS, SPEC

from kdcache import Cache, dump_teacher
from kdcache.cache.format.schema import Sharding
from kdcache.config.cache import CacheSpec


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Cache:
    """Two views of twelve samples: a shard of two chunks, and one whose second chunk holds nothing."""
    with pytest.MonkeyPatch.context() as patch:
        shape = Sharding(shard_rows=8, chunk_rows=4, fingerprint_stride=1)
        patch.setattr("kdcache.dump.plan.sharding_of", lambda *_: shape)
        out = tmp_path_factory.mktemp("whole") / "whole.kdcache"
        return dump_teacher(TinyTeacher(), tiny_samples(12, labels=LABELS), out, transform=FLIP, spec=SPEC)


@pytest.fixture
def copy(whole: Cache, tmp_path: Path) -> Path:
    """Its copy, to be damaged."""
    return Path(shutil.copytree(whole.path, tmp_path / "copy.kdcache"))


@pytest.fixture(scope="module")
def seen(tmp_path_factory: pytest.TempPathFactory) -> Made:
    """Two views of 100 samples, of which every third left a fingerprint, through a transform that draws at random."""
    samples, teacher = tiny_samples(100), TinyTeacher()
    spec = CacheSpec(views=2, seed=5, shard_rows=48, dtype="float32")
    cache = dump_teacher(teacher, samples, tmp_path_factory.mktemp("seen") / "c.kdcache", transform=CROP, spec=spec)
    assert cache.manifest.plan.shape.fingerprint_stride == 3
    return Made(cache, samples, teacher)

"""Stores whose numbers were changed on purpose, with digests that agree: always one error, never another end."""

from __future__ import annotations

import json
import resource
import shutil
import struct
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers.corruption import forge, refresh
from helpers.tiny import TinyTeacher, tiny_samples
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from kdcache import Cache, dump_teacher, open_cache
from kdcache.cache.inspect.audit import audit
from kdcache.config.cache import CacheSpec
from kdcache.curate.select import select
from kdcache.data.alignment import align, apply_alignment
from kdcache.data.replay import check_matches_cache
from kdcache.errors import CorruptError, KdcacheError, MismatchError

SPEC = CacheSpec(top_k=3, tail="lowrank", rank=4, shard_rows=8, pilot_rows=16)
HOSTILE: list[Any] = [0, -1, 1, 2**31, 2**62, 2**63, 2**64, 10**400, "7", None, True, 1.5, [], {}]
few = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Cache:
    return dump_teacher(TinyTeacher(), tiny_samples(12), tmp_path_factory.mktemp("w") / "whole.kdcache", spec=SPEC)


def numbers(record: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Yield the path to every integer in a JSON value."""
    if isinstance(record, int) and not isinstance(record, bool):
        yield path
    items = record.items() if isinstance(record, dict) else enumerate(record) if isinstance(record, list) else ()
    for key, value in items:
        yield from numbers(value, (*path, key))


def put(record: Any, path: tuple[Any, ...], value: Any) -> None:
    for key in path[:-1]:
        record = record[key]
    record[path[-1]] = value


def everything(path: Path) -> None:
    """Read all that there is of a cache."""
    cache = open_cache(path)
    cache.teacher(placement="host")(torch.arange(min(len(cache), 100)))
    if failure := audit(path).failure:
        raise failure


def ends_with_one_error(path: Path) -> None:
    """Check that reading a cache, in 2 GiB more than now, returns the right rows or raises a KdcacheError."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with suppress(KdcacheError):
        everything(path)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 2**20


def test_hostile_numbers_in_the_metadata_of_an_array(whole: Cache, tmp_path: Path) -> None:
    names = sorted(path.relative_to(whole.path) for path in whole.path.glob("data.zarr/*/zarr.json"))
    cases = [(name, where) for name in names for where in numbers(json.loads((whole.path / name).read_bytes()))]
    copy = tmp_path / "copy.kdcache"
    shutil.copytree(whole.path, copy)

    @few
    @given(case=st.sampled_from(cases), value=st.sampled_from(HOSTILE))
    def check(case: tuple[Path, tuple[Any, ...]], value: Any) -> None:
        name, where = case
        metadata = json.loads((whole.path / name).read_bytes())
        put(metadata, where, value)
        try:
            (copy / name).write_text(json.dumps(metadata))
            refresh(copy)
            ends_with_one_error(copy)
        finally:
            shutil.copy(whole.path / name, copy / name)
            shutil.copy(whole.path / "manifest.json", copy / "manifest.json")

    check()


def test_hostile_numbers_in_the_plan(whole: Cache, tmp_path: Path) -> None:
    cases = list(numbers(json.loads((whole.path / "manifest.json").read_bytes())["plan"]))
    copy = tmp_path / "copy.kdcache"
    shutil.copytree(whole.path, copy)

    @few
    @given(where=st.sampled_from(cases), value=st.sampled_from(HOSTILE[:-5]))
    def check(where: tuple[Any, ...], value: Any) -> None:
        try:
            forge(copy, lambda manifest: put(manifest["plan"], where, value))
            ends_with_one_error(copy)
        except ValueError as error:  # this test cannot write so long a number
            assert "digits" in str(error)
        finally:
            shutil.copy(whole.path / "manifest.json", copy / "manifest.json")

    check()


@pytest.mark.parametrize("array", ["log_probs", "logsumexp", "labels", "fingerprints", "tail_basis"])
@pytest.mark.parametrize("offset", [1, 2**31, 2**62, 2**63 - 1, 2**63, 2**64 - 2])
def test_a_chunk_that_begins_beyond_its_file(whole: Cache, tmp_path: Path, array: str, offset: int) -> None:
    copy = Path(shutil.copytree(whole.path, tmp_path / "copy.kdcache"))
    file = next(path for path in sorted((copy / "data.zarr" / array / "c").rglob("*")) if path.is_file())
    data = bytearray(file.read_bytes())
    chunks = json.loads((copy / "data.zarr" / array / "zarr.json").read_bytes())
    inner = chunks["codecs"][0]["configuration"]["chunk_shape"]
    count = int(np.prod([a // b for a, b in zip(chunks["chunk_grid"]["configuration"]["chunk_shape"], inner,
                                                strict=True)]))  # fmt: skip
    struct.pack_into("<Q", data, len(data) - 4 - 16 * count, offset)
    file.write_bytes(data)
    refresh(copy)
    with pytest.raises(CorruptError):
        everything(copy)


@pytest.mark.parametrize("kept", [range(20), range(1), range(36)])
def test_a_second_cache_that_is_smaller_than_the_one_that_was_matched(kept: range, tmp_path: Path) -> None:
    samples = tiny_samples(37)
    cache = dump_teacher(TinyTeacher(), samples, tmp_path / "whole.kdcache", spec=SPEC)
    other = select(cache, tmp_path / "part.kdcache", samples=np.array(kept))
    present = np.delete(np.arange(37), 3)
    alignment = align(samples.keys()[present], samples.labels[present], cache.sample_keys, cache.labels)
    matched = apply_alignment(samples, alignment._replace(positions=present[alignment.positions]))
    check_matches_cache(cache, matched, None, None)
    with pytest.raises(MismatchError, match=rf"part.kdcache holds {len(kept)} samples"):
        check_matches_cache(other, matched, None, None)

"""Files are checked before their first use, and once per machine: against changed, replaced and restored files."""

from __future__ import annotations

import hashlib
import json
import os
import pickle
import shutil
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from helpers.cli import kdcache
from helpers.processes import FORKS, PATIENCE
from helpers.tiny import FLIP, TinyTeacher, tiny_samples
from hypothesis import given, settings
from hypothesis import strategies as st

from kdcache import Cache, KdcacheError, dump_teacher, open_cache
from kdcache.cache import reader
from kdcache.cache.format import verified_files
from kdcache.cache.format.read_records import read_manifest
from kdcache.cache.format.schema import MANIFEST, FileRecord, canonical, seal
from kdcache.cache.format.store_files import common_files, shard_files
from kdcache.cache.format.verified_files import VerifiedFiles, check_when_read, record_of
from kdcache.cache.remote.address import source
from kdcache.cache.remote.mirror import mirror
from kdcache.config.cache import CacheSpec
from kdcache.errors import CorruptError

SPEC = CacheSpec(views=2, top_k=3, shard_rows=32, pilot_rows=64)
HASHED: list[str] = []


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Cache:
    out = tmp_path_factory.mktemp("made") / "c.kdcache"
    return dump_teacher(TinyTeacher(), tiny_samples(90), out, transform=FLIP, spec=SPEC)


@pytest.fixture
def cache(made: Cache, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A copy whose files were last changed long enough ago, in a home of its own."""
    monkeypatch.setenv("KDCACHE_HOME", str(tmp_path / "home"))
    monkeypatch.setattr(verified_files, "_SETTLED_SECONDS", 0.0)
    hashed = verified_files.record_of
    HASHED.clear()

    def noted(path: Path) -> FileRecord:
        HASHED.append(path.name)
        return hashed(path)

    monkeypatch.setattr(verified_files, "record_of", noted)
    yield Path(shutil.copytree(made.path, tmp_path / "c.kdcache"))
    verified_files._opened.clear()


@pytest.fixture
def large(cache: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The same, as if it were too large to be checked when it is opened."""
    monkeypatch.setattr(reader, "_CHECKED_WHEN_OPENED", 0)
    return cache


def shards_of(cache: Path, of: str = "data.zarr/") -> list[Path]:
    """Files of shards, whose names begin with `of`."""
    manifest = read_manifest(cache / MANIFEST)
    common = {*common_files(manifest.plan)}
    files = [cache / name for name in manifest.files if name.startswith(of) and name not in common]
    assert files
    return files


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 3] ^= 1
    path.write_bytes(content)


def test_a_cache_is_hashed_once(cache: Path) -> None:
    files = len(read_manifest(cache / MANIFEST).files)
    open_cache(cache)
    assert len(HASHED) == files
    open_cache(cache)
    open_cache(cache).check_files()
    assert len(HASHED) == files


def test_what_was_changed_lately_is_hashed_again(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(verified_files, "_SETTLED_SECONDS", 3600.0)
    open_cache(cache)
    before = len(HASHED)
    open_cache(cache)
    assert len(HASHED) == 2 * before


@pytest.mark.parametrize("how", ["written", "size kept and times restored", "replaced", "link", "removed", "longer"])
def test_a_file_that_was_changed_after_it_was_checked_is_found(how: str, cache: Path) -> None:
    open_cache(cache)
    victim = shards_of(cache)[5]
    status = victim.stat()
    if how == "written":
        flip(victim)
    elif how == "size kept and times restored":
        flip(victim)
        os.utime(victim, ns=(status.st_atime_ns, status.st_mtime_ns))
    elif how == "replaced":
        other = victim.with_name("other")
        shutil.copy2(victim, other)
        flip(other)
        os.utime(other, ns=(status.st_atime_ns, status.st_mtime_ns))
        other.replace(victim)
    elif how == "link":
        victim.rename(cache.parent / "elsewhere")
        victim.symlink_to(cache.parent / "elsewhere")
    elif how == "removed":
        victim.unlink()
    else:
        victim.write_bytes(victim.read_bytes() + b"\0")
    with pytest.raises(CorruptError, match=str(victim.relative_to(cache))):
        open_cache(cache)


def test_a_copy_elsewhere_is_checked_for_itself(cache: Path, tmp_path: Path) -> None:
    open_cache(cache)
    copy = Path(shutil.copytree(cache, tmp_path / "copy.kdcache"))
    flip(shards_of(copy)[0])
    with pytest.raises(CorruptError, match="sha256"):
        open_cache(copy)
    open_cache(cache)


@pytest.mark.parametrize("content", ["", "[]", "{", '{"a": 3}', '{"a": ["x"]}', "\0\xff"])
def test_a_damaged_memory_is_not_trusted(content: str, cache: Path, tmp_path: Path) -> None:
    open_cache(cache)
    (memory,) = (tmp_path / "home/verified").iterdir()
    memory.write_text(content, encoding="latin-1")
    HASHED.clear()
    open_cache(cache)
    assert len(HASHED) == len(read_manifest(cache / MANIFEST).files)


def test_a_home_that_cannot_be_written_costs_time_only(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("KDCACHE_HOME", str(tmp_path / "file"))
    open_cache(cache)
    assert len(open_cache(cache)) == 90


# Large caches


def test_a_large_cache_is_opened_without_reading_its_shards(large: Path) -> None:
    opened = open_cache(large)
    assert len(HASHED) == len([*common_files(opened.manifest.plan)])
    opened.check_files()
    assert len(HASHED) == len(opened.manifest.files)
    assert torch.equal(opened.teacher()(torch.arange(90)), open_cache(large).teacher()(torch.arange(90)))
    assert len(HASHED) == len(opened.manifest.files)


@pytest.mark.parametrize("placement", ["host", "mmap", "stream"])
def test_no_row_of_a_damaged_shard_is_used(placement: str, large: Path) -> None:
    flip(shards_of(large)[-1])
    opened = open_cache(large)
    with pytest.raises(CorruptError, match="sha256"):
        teacher = opened.teacher(placement=placement)  # type: ignore[call-overload]
        for view in range(2):
            teacher(torch.arange(90), view)


def test_records_that_are_there_need_no_shard(large: Path) -> None:
    expected = open_cache(large).teacher(placement="mmap")(torch.arange(90), 1)
    shutil.rmtree(large.parent / "home/verified")
    HASHED.clear()
    opened = open_cache(large)
    assert torch.equal(opened.teacher(placement="mmap")(torch.arange(90), 1), expected)
    plan = opened.manifest.plan
    assert len(HASHED) == len([*common_files(plan), *shard_files(plan, 0, 0)]), "the width of a row is read from one"


def test_a_stream_reads_the_shards_that_are_whole(large: Path) -> None:
    expected = open_cache(large).teacher()(torch.arange(32), 0)
    verified_files._opened.clear()
    shutil.rmtree(large.parent / "home")
    flip(shards_of(large, "data.zarr/logsumexp/c/1")[-1])
    teacher = open_cache(large).teacher(placement="stream")
    assert torch.equal(teacher(torch.arange(32), 0), expected)
    with pytest.raises(CorruptError, match="sha256"):
        teacher(torch.arange(90), 1)


def _read_elsewhere(pickled: bytes, told: object) -> None:
    teacher = pickle.loads(pickled)  # noqa: S301
    try:
        teacher(torch.arange(90), 1)
        told.send("read")  # type: ignore[attr-defined]
    except KdcacheError as error:
        told.send(error.what)  # type: ignore[attr-defined]


def test_another_process_checks_what_it_reads(large: Path) -> None:
    teacher = open_cache(large).teacher(placement="stream")
    pickled = pickle.dumps(teacher)
    flip(shards_of(large)[-1])
    here, there = FORKS.Pipe()
    process = FORKS.Process(target=_read_elsewhere, args=(pickled, there))
    process.start()
    assert here.poll(PATIENCE)
    assert "sha256" in here.recv()
    process.join()


@pytest.mark.parametrize("command", ["select", "diff", "summarize", "card", "convert"])
def test_commands_that_read_everything_check_everything_first(command: str, large: Path, tmp_path: Path) -> None:
    flip(shards_of(large)[-1])
    out = tmp_path / ("out.npz" if command == "convert" else "out.kdcache")
    arguments: dict[str, list[object]] = {
        "select": [large, "--samples", "0-9", "-o", out],
        "diff": [large, large],
        "summarize": [large],
        "card": [large],
        "convert": [large, "-o", out],
    }
    done = kdcache(command, *arguments[command])
    assert done.exit_code == 5, done.output
    assert "sha256" in done.stderr
    assert not out.exists()


def test_a_mirror_is_hashed_once_and_found_out_when_it_changes(cache: Path, tmp_path: Path) -> None:
    digest = read_manifest(cache / MANIFEST).digest
    address = source(f"file://{cache}", digest)
    folder = mirror(address, None, None).folder
    assert mirror(address, None, None).fetched == 0
    HASHED.clear()
    assert mirror(address, None, None).fetched == 0
    assert HASHED == []
    flip(shards_of(folder)[2])
    assert mirror(address, None, None).fetched == 1
    assert record_of(shards_of(folder)[2]).sha256 == hashlib.sha256(shards_of(cache)[2].read_bytes()).hexdigest()


# Figures of speed: many files


@settings(deadline=None, max_examples=30)
@given(
    names=st.lists(
        st.text('abcé"/ 0\n', min_size=1, max_size=8).filter(lambda name: ".." not in name), max_size=6, unique=True
    ),
    size=st.integers(0, 2**62),
)
def test_a_manifest_is_written_as_indented_json(made: Cache, names: list[str], size: int) -> None:
    plain = [name for name in names if str(Path(name)) == name and not name.startswith("/")]
    files = {name: FileRecord(size=size, sha256=hashlib.sha256(name.encode()).hexdigest()) for name in plain}
    manifest = seal(made.manifest.plan, made.manifest.summary, files)
    indented = json.dumps(manifest.model_dump(), indent=1, ensure_ascii=False, allow_nan=False) + "\n"
    assert canonical(manifest) == indented.encode()
    zeroed = indented.replace(manifest.digest, "sha256:" + "0" * 64).encode()
    assert manifest.digest == f"sha256:{hashlib.sha256(zeroed).hexdigest()}"


def test_thousands_of_known_files_are_recognized_in_moments(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KDCACHE_HOME", str(tmp_path / "home"))
    monkeypatch.setattr(verified_files, "_SETTLED_SECONDS", 0.0)
    (tmp_path / "many").mkdir()
    for index in range(3000):
        (tmp_path / "many" / str(index)).write_bytes(b"x")
    record = FileRecord(size=1, sha256=hashlib.sha256(b"x").hexdigest())
    expected = {str(index): record for index in range(3000)}

    def opened() -> float:
        began = time.process_time()
        files = VerifiedFiles(tmp_path / "many", "sha256:" + "1" * 64, expected)
        assert files.find_unchecked() == []
        check_when_read(files)
        files.check()
        return time.process_time() - began

    first = opened()
    assert min(opened() for _ in range(3)) < first / 3
    verified_files._opened.clear()

"""Files of sealed and unsealed caches."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path

import pytest
from helpers.cli import ok, refused
from helpers.corruption import contents, flipped
from helpers.verify import failed, unseal, where

from kdcache import Cache
from kdcache.cache.format.integrity import NOT_LISTED
from kdcache.cache.format.schema import MANIFEST, commit_file
from kdcache.cache.inspect.audit import audit
from kdcache.errors import CorruptError, IncompleteError


def accusation(cache: Path) -> str:
    """What an audit comes to that finds damage, be it in what all else is read by."""
    try:
        failure = audit(cache).failure
    except CorruptError as error:
        failure = error
    assert isinstance(failure, CorruptError)
    return failure.what


def test_a_whole_cache_is_whole(copy: Path, whole: Cache) -> None:
    (copy / "README.md").write_text("The card is prose.")
    found = audit(copy)
    assert (found.problems, found.failure) == ([], None)
    assert found.digest == whole.manifest.digest
    assert (found.files, found.rows) == (len(contents(whole.path)), 24)
    assert whole.manifest.digest in ok("verify", copy)


WAYS: dict[str, Callable[[bytes], bytes | None]] = {
    "removed": lambda data: None,
    "emptied": lambda data: b"",
    "cut short": lambda data: data[:-1],
    "halved": lambda data: data[: len(data) // 2],
    "grown": lambda data: data + b"\0",
    **{f"flipped at {p}": lambda data, p=p: flipped(data, round(p * (len(data) - 1))) for p in (0, 0.2, 0.5, 0.9, 1)},  # type: ignore[misc]
}


def put(path: Path, data: bytes | None) -> None:
    if data is None:
        path.unlink()
    else:
        path.write_bytes(data)


@pytest.mark.parametrize("way", WAYS)
def test_every_damaged_file_is_named(way: str, copy: Path) -> None:
    files = {name: data for name, data in contents(copy).items() if name != MANIFEST}
    assert len(files) == 2 * 2 * (7 + 1) + 2 * 2 + 3 + 13
    for name, data in files.items():
        put(copy / name, WAYS[way](data))
    found = audit(copy)
    assert sorted(where(found)) == sorted(files)
    assert isinstance(found.failure, CorruptError)


def test_a_damaged_file_is_the_only_one_that_is_named(copy: Path) -> None:
    files = {name: data for name, data in contents(copy).items() if name != MANIFEST}
    for number, (name, data) in enumerate(files.items()):
        (copy / name).write_bytes(flipped(data, number % len(data)))
        assert where(audit(copy)) == [name]
        (copy / name).write_bytes(data)
    assert audit(copy).failure is None


def test_a_changed_manifest_is_found(copy: Path) -> None:
    data = (copy / MANIFEST).read_bytes()
    for spoil in WAYS.values():
        put(copy / MANIFEST, spoil(data))
        assert MANIFEST in accusation(copy)
    for position in range(0, len(data), len(data) // 97):
        (copy / MANIFEST).write_bytes(flipped(data, position))
        assert MANIFEST in accusation(copy)


def test_the_command_names_the_file_and_the_manifest(copy: Path) -> None:
    name = "data.zarr/tail/c/1/1/0"
    before = (copy / name).read_bytes()
    (copy / name).write_bytes(flipped(before, 3))
    done = failed(5, copy)
    then, now = (hashlib.sha256(data).hexdigest()[:12] for data in (before, (copy / name).read_bytes()))
    problem = f"{name}: has the sha256 {now}..., {then}... was written"
    assert done.output.count(problem) == done.stdout.count(problem) == 1, (
        "the report has it, and the error refers to it"
    )
    assert "is damaged: 1 problem, listed in the report" in done.stderr
    as_json = failed(5, copy, "--json")
    assert problem in as_json.stderr
    assert name in as_json.stdout
    assert "20 checked" in done.stdout, "the four rows of that shard were not"
    (copy / MANIFEST).write_bytes(flipped((copy / MANIFEST).read_bytes(), 1000))
    assert MANIFEST in refused(5, "verify", copy)


def test_files_that_no_digest_covers_are_found(copy: Path) -> None:
    strays = ["data.zarr/.x", "data.zarr/log_probs/c/0/2/0", "data.zarr/x/zarr.json", "commits/0/2.json", "commits/x"]
    for name in strays[:-1]:
        (copy / name).parent.mkdir(parents=True, exist_ok=True)
        (copy / name).write_bytes(b"")
    (copy / strays[-1]).symlink_to(copy / MANIFEST)
    found = audit(copy)
    assert [tuple(finding) for finding in found.problems] == [(name, NOT_LISTED) for name in strays]
    assert found.failure is not None
    assert "delete" in found.failure.fix
    said = failed(5, copy).stdout
    assert all(name in said for name in strays)


def test_what_is_no_cache(tmp_path: Path) -> None:
    assert "there is no cache" in refused(2, "verify", tmp_path / "nowhere")
    assert "neither manifest nor plan" in refused(2, "verify", tmp_path)


def test_an_unsealed_cache_is_incomplete(copy: Path) -> None:
    unseal(copy, (0, 1), (1, 0), (1, 1))
    found = audit(copy)
    assert (found.problems, found.digest, found.rows) == ([], None, 8)
    assert isinstance(found.failure, IncompleteError)
    assert "3 of its 4 shards are missing" in found.failure.what
    assert "3 of its 4 shards are missing" in failed(3, copy).stderr


def test_damage_to_an_unsealed_cache_is_found(copy: Path) -> None:
    unseal(copy, (1, 1))
    markers = [json.loads(marker.read_bytes()) for marker in sorted(copy.glob("commits/*/*.json"))]
    files = [name for marker in markers for name in marker["files"]]
    assert len(files) == 3 * 7
    for number, name in enumerate(files):
        data = (copy / name).read_bytes()
        put(copy / name, list(WAYS.values())[number % len(WAYS)](data))
        found = audit(copy)
        assert where(found) == [name]
        assert isinstance(found.failure, CorruptError)
        (copy / name).write_bytes(data)
    (copy / files[0]).unlink()
    done = failed(5, copy)
    assert files[0] in done.stdout
    assert "dump-teacher" in done.stderr


@pytest.mark.parametrize("name", ["labels/c/1", "sample_keys/c/0", "tail_basis/c/0/0", "log_probs/zarr.json"])
def test_damage_to_what_all_shards_share_is_found_before_it_is_sealed(name: str, copy: Path) -> None:
    unseal(copy, (1, 1))
    path = copy / "data.zarr" / name
    data = path.read_bytes()
    for spoil in (WAYS["removed"], WAYS["emptied"], WAYS["flipped at 0"]):
        put(path, spoil(data))
        assert name.split("/", maxsplit=1)[0] in accusation(copy)
        path.write_bytes(data)


def test_a_marker_that_was_changed_is_found(copy: Path) -> None:
    unseal(copy, (1, 1))
    marker = copy / commit_file(0, 1)
    data = marker.read_bytes()
    for position in range(0, len(data), 41):
        marker.write_bytes(flipped(data, position))
        assert "/0/1" in accusation(copy), "the marker, or a file that is not as it says"
    listed = json.loads(data)["files"]
    first = next(iter(listed))
    for files in ({}, listed | {"../../elsewhere": listed[first]}, dict(list(listed.items())[1:])):
        marker.write_bytes((json.dumps({"files": files}, indent=1) + "\n").encode())
        assert where(audit(copy)) == [commit_file(0, 1)]

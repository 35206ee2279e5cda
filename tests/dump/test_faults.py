"""Kills, full disks, flipped bits and forged manifests: the cache is whole, or can be gone on with, or is refused."""

from __future__ import annotations

import errno
import itertools
import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers.corruption import (
    FORGED,
    BatchMinded,
    as_written,
    contents,
    dump,
    flipped,
    forge,
    refresh,
    setting,
    shaped,
)
from helpers.paths import TESTS
from helpers.processes import in_a_process
from helpers.tiny import tiny_samples
from torch import Tensor

from kdcache import Cache, dump_teacher, open_cache
from kdcache.cache.format.read_records import read_manifest, read_plan
from kdcache.cache.format.zarr_store import read_inputs
from kdcache.config.cache import CacheSpec
from kdcache.errors import CorruptError, IncompleteError, KdcacheError, MismatchError, UsageError


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Cache:
    """A sealed cache that was never interrupted."""
    return dump(tmp_path_factory.mktemp("whole") / "whole.kdcache")


@pytest.fixture
def copy(whole: Cache, tmp_path: Path) -> Path:
    """Its copy, to be damaged."""
    return Path(shutil.copytree(whole.path, tmp_path / "copy.kdcache"))


@pytest.fixture
def begun(whole: Cache, tmp_path: Path) -> Path:
    """The same cache, unsealed, with its second shard still to be done."""
    out = tmp_path / "begun.kdcache"
    process = in_a_process(dump_until_killed, out, LAST_MARKER)
    process.join()
    assert process.exitcode == -signal.SIGKILL
    with pytest.raises(IncompleteError, match="1 of its 2 shards are missing"):
        open_cache(out)
    return out


# Kills.


def dump_until_killed(out: Path, at: int | str) -> None:
    """Dump, killed just before the `at`-th change of a file below `out`'s folder, or before the first that `at` names.

    A change is a file opened for writing, renamed or deleted.
    """
    count = itertools.count(1)
    folder = str(out.parent)

    def hook(event: str, args: tuple[Any, ...]) -> None:
        writes = event == "open" and isinstance(args[2], int) and args[2] & (os.O_WRONLY | os.O_RDWR)
        if (writes or event in ("os.rename", "os.remove")) and str(args[0]).startswith(folder):
            number = next(count)
            if at in (number, f"{event} {Path(args[0]).relative_to(out.parent)}"):
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(hook)
    dump(out)


LAST_MARKER = "os.rename begun.kdcache/commits/0/1.json.partial"


def check_goes_on(out: Path, whole: Cache) -> None:
    """Check that what a kill left is not a cache unless it is sealed, and that the same call completes it."""
    if not (out / "manifest.json").exists():
        with pytest.raises((IncompleteError, UsageError)):
            open_cache(out)
    dump(out)
    assert contents(out) == contents(whole.path)
    assert open_cache(out).manifest.digest == whole.manifest.digest
    assert [path.name for path in out.parent.iterdir()] == [out.name]


def test_killed_at_any_change_of_a_file_it_goes_on_to_the_same_cache(whole: Cache, tmp_path: Path) -> None:
    at, killed_within = 1, 0
    while True:
        out = tmp_path / str(at) / "c.kdcache"
        out.parent.mkdir()
        process = in_a_process(dump_until_killed, out, at)
        process.join()
        if process.exitcode == 0:
            break
        assert process.exitcode == -signal.SIGKILL
        killed_within += out.exists()
        # A cache is made beside its place: of the changes there, one in four will do.
        at += 1 if out.exists() else 4
        check_goes_on(out, whole)
    assert killed_within >= 2 * (6 * 3 + 2), (
        "of each shard, each array is cleared, written and renamed, then the marker"
    )
    assert contents(out) == contents(whole.path)


def test_killed_at_any_moment_it_goes_on_to_the_same_cache(whole: Cache, tmp_path: Path) -> None:
    draw = random.Random(0)  # noqa: S311
    for attempt in range(10):
        out = tmp_path / str(attempt) / "c.kdcache"
        out.parent.mkdir()
        process = in_a_process(dump_until_killed, out, "never")
        while process.is_alive() and not list(out.parent.iterdir()):
            time.sleep(0.001)
        time.sleep(draw.uniform(0, 0.1))
        process.kill()
        process.join()
        check_goes_on(out, whole)


def test_killed_again_and_again_it_ends_with_the_same_cache(whole: Cache, tmp_path: Path) -> None:
    out = tmp_path / "again" / "c.kdcache"
    out.parent.mkdir()
    for at in (38, 64, 7, 21, 41, 48, 49, 50, 51, 52, 53, 65):
        process = in_a_process(dump_until_killed, out, at)
        process.join()
        assert process.exitcode == -signal.SIGKILL
    check_goes_on(out, whole)


def test_killed_between_manifest_and_plan_it_is_a_sealed_cache(whole: Cache, tmp_path: Path) -> None:
    out = tmp_path / "c.kdcache"
    process = in_a_process(dump_until_killed, out, "os.remove c.kdcache/plan.json")
    process.join()
    assert process.exitcode == -signal.SIGKILL
    assert (out / "plan.json").exists()
    assert open_cache(out).manifest == whole.manifest
    check_goes_on(out, whole)


def test_what_a_crash_may_leave_does_no_harm(begun: Path, whole: Cache) -> None:
    # Without its marker a shard is nothing, whatever lies there: a crash of the machine may leave any bytes.
    files = [path for path in contents(begun) if path.startswith("data.zarr/") and path.endswith(("c/0/1/0", "c/0/1"))]
    assert len(files) == 6
    ways: tuple[Callable[[bytes], bytes], ...] = (lambda _: b"", lambda _: b"\0" * 100, lambda data: data[:-7])
    for name, spoil in zip(sorted(files), 2 * ways, strict=True):
        (begun / name).write_bytes(spoil((whole.path / name).read_bytes()))
    orphans = ["data.zarr/logsumexp/c/0/1.0a1b.partial", "data.zarr/sketches/c/0/1/0.0a1b.partial"]
    for orphan in [*orphans, "commits/0/1.json.partial", "manifest.json.partial"]:
        (begun / orphan).write_bytes(b"{")
    check_goes_on(begun, whole)


def test_another_shards_unfinished_file_is_left_alone(begun: Path) -> None:
    other = begun / "data.zarr/logsumexp/c/0/10.0a1b.partial"
    other.write_bytes(b"of another rank")
    dump(begun)
    assert other.read_bytes() == b"of another rank"


@pytest.mark.parametrize(
    ("name", "spoil"),
    [
        ("commits/0/0.json", lambda data: data[:40]),
        ("commits/0/0.json", lambda data: b'{\n "files": {}\n}\n'),
        ("data.zarr/log_probs/c/0/0/0", lambda data: b""),
        ("data.zarr/logsumexp/c/0/0", lambda data: bytes([data[0] ^ 1]) + data[1:]),
        ("data.zarr/statistics/c/0/0/0", lambda data: None),
        ("data.zarr/fingerprints/c/0/0", lambda data: data[:-1]),
        ("data.zarr/sketches/c/0/0/0", lambda data: None),
        ("data.zarr/labels/c/0", lambda data: b""),
        ("data.zarr/sample_keys/c/1", lambda data: None),
        ("data.zarr/log_probs/zarr.json", lambda data: data.replace(b'"fill_value": 0.0', b'"fill_value": 1.0')),
        ("data.zarr/zarr.json", lambda data: b"{"),
    ],
)
def test_what_was_damaged_before_going_on_is_made_good(
    name: str, spoil: Callable[[bytes], bytes | None], begun: Path, whole: Cache
) -> None:
    before = (begun / name).read_bytes()
    after = spoil(before)
    assert after != before
    if after is None:
        (begun / name).unlink()
    else:
        (begun / name).write_bytes(after)
    dump(begun)
    assert contents(begun) == contents(whole.path)


def test_a_changed_plan_is_not_gone_on_with(begun: Path) -> None:
    path = begun / "plan.json"
    plan, data = read_plan(path), path.read_bytes()
    for position in range(len(data)):
        path.write_bytes(flipped(data, position))
        try:
            assert read_plan(path) != plan
        except CorruptError:
            continue
    path.write_bytes(data.replace(b'"seed": 3', b'"seed": 2'))
    with pytest.raises(MismatchError, match=r"views.seed: 2, 3"):
        dump(begun)


def test_every_name_is_on_the_disk_before_the_marker_that_vouches_for_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # A power cut takes what was not flushed: a file needs its own flush, and every folder on its path one that came
    # after the name was put into it. Folders are told by inode, as the cache is renamed once.
    changed: dict[int, int] = {}
    flushed: dict[int, int] = {}
    vouched: list[Path] = []
    clock = itertools.count(1)

    def not_on_disk(path: Path) -> list[Path]:
        chain = list(itertools.takewhile(lambda folder: folder != tmp_path.parent, path.parents))
        inodes = {here: here.stat().st_ino for here in (path, *chain)}
        return [here for here, inode in inodes.items() if flushed.get(inode, 0) <= changed.get(inode, 0)]

    def spy(real: Callable[..., Any], note: Callable[..., None]) -> Callable[..., Any]:
        def call(*args: Any, **more: Any) -> Any:
            result = real(*args, **more)
            note(*args)
            return result

        return call

    def named(path: str | Path) -> None:
        changed[Path(path).parent.stat().st_ino] = next(clock)

    def renamed(source: str | Path, path: str | Path) -> None:
        if Path(path).parent.parent.name == "commits":
            shard = Path(path).stem
            store = Path(path).parents[2] / "data.zarr"
            vouched.extend(store.glob(f"*/c/0/{shard}/0"))
            vouched.extend(store / name / f"c/0/{shard}" for name in ("logsumexp", "fingerprints"))
            assert [not_on_disk(file) for file in vouched] == [[]] * len(vouched)
        if Path(path).name == "manifest.json":
            apart = (path, Path(path).with_name("writer.lock"))  # of which nothing is to survive a crash
            everything = [file for file in Path(path).parent.rglob("*") if file.is_file() and file not in apart]
            assert len(everything) == 6 * 2 + 2 * 2 + 9 + 2 + 2
            assert [not_on_disk(file) for file in everything] == [[]] * len(everything)
        named(path)

    def kept(handle: int) -> None:
        flushed[os.fstat(handle).st_ino] = next(clock)

    monkeypatch.setattr(os, "fsync", spy(os.fsync, kept))
    monkeypatch.setattr(os, "mkdir", spy(os.mkdir, lambda path, *_: named(path)))
    monkeypatch.setattr(os, "rename", spy(os.rename, renamed))
    monkeypatch.setattr(os, "replace", spy(os.replace, renamed))
    out = tmp_path / "new" / "c.kdcache"
    dump(out)
    monkeypatch.undo()
    assert len(vouched) == 12
    assert not_on_disk(out / "manifest.json") == []


# Full disks.


def dump_with_a_limit(out: Path, limit: int, rows: int) -> None:
    """Dump where no file may grow over `limit` bytes."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    with pytest.raises(OSError, match="File too large") as caught:
        dump_larger(out, rows)
    assert caught.value.errno == errno.EFBIG


def dump_larger(out: Path, rows: int) -> Cache:
    return dump_teacher(BatchMinded(), tiny_samples(2 * rows), out, spec=CacheSpec(dtype="float32", shard_rows=rows))


def test_a_file_that_cannot_be_written_leaves_a_cache_to_go_on_with(tmp_path: Path) -> None:
    out = tmp_path / "limited" / "c.kdcache"
    once = dump_larger(tmp_path / "once.kdcache", 1000)
    sizes = {name: len(data) for name, data in contents(once.path).items()}
    limit = sizes["data.zarr/log_probs/c/0/0/0"] - 1
    assert max(size for name, size in sizes.items() if "log_probs/c" not in name) < limit
    process = in_a_process(dump_with_a_limit, out, limit, 1000)
    process.join()
    assert process.exitcode == 0
    # The second shard is smaller than the limit, and may be written before the first one's failure is told.
    with pytest.raises(IncompleteError, match=r"[12] of its 2 shards are missing"):
        open_cache(out)
    assert dump_larger(out, 1000).manifest.digest == once.manifest.digest
    assert contents(out) == contents(once.path)


FILL_THE_DISK = """
import errno, pathlib, subprocess, sys
sys.path.insert(0, sys.argv[1])
from helpers.corruption import contents, dump
from helpers.pictures import set_small
set_small(True)
disk, whole = pathlib.Path(sys.argv[2]), pathlib.Path(sys.argv[3])
subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", disk], check=True)
dump(disk / "once.kdcache")
left = subprocess.run(["stat", "-f", "-c", "%f %S", disk], check=True, stdout=subprocess.PIPE, text=True).stdout
blocks, size = map(int, left.split())
for room in map(int, sys.argv[4:]):
    ballast, out = disk / "ballast", disk / f"{room}.kdcache"
    ballast.write_bytes(bytes((blocks - room) * size))
    try:
        dump(out)
    except OSError as error:
        assert error.errno == errno.ENOSPC, error
        assert not list(disk.glob("*.partial"))
        print(room, "manifest" if (out / "manifest.json").exists() else "plan" if out.exists() else "nothing")
    else:
        print(room, "sealed")
    ballast.unlink()
    if not (out / "manifest.json").exists():
        dump(out)
    assert contents(out) == contents(whole), room
    subprocess.run(["rm", "-r", out], check=True)
"""


def test_a_full_disk_leaves_nothing_or_a_cache_to_go_on_with(whole: Cache, tmp_path: Path) -> None:
    private = ["unshare", "--map-root-user", "--mount"]
    mount = [*private, "mount", "-t", "tmpfs", "tmpfs", str(tmp_path)]
    if not shutil.which("unshare") or subprocess.run(mount, check=False).returncode:
        pytest.skip("this machine lets nobody mount a small disk of his own")
    script = [sys.executable, "-c", FILL_THE_DISK, str(TESTS), str(tmp_path), str(whole.path)]
    # Where a folder takes no room of its own the stages lie below 32 blocks, elsewhere above 40.
    rooms = [4, *range(10, 34, 3), *range(50, 74, 6), 100]
    done = subprocess.run([*private, *script, *map(str, rooms)], stdout=subprocess.PIPE, text=True, check=True)
    ends = [line.split()[1] for line in done.stdout.splitlines()]
    assert len(ends) == len(rooms)
    assert {"nothing", "plan", "sealed"} <= set(ends), "it was to fill up at every stage"


# Damage to a sealed cache.


def test_any_flipped_byte_of_the_manifest_is_found(copy: Path) -> None:
    path = copy / "manifest.json"
    data = path.read_bytes()
    for position in range(len(data)):
        path.write_bytes(flipped(data, position))
        with pytest.raises(CorruptError):
            read_manifest(path)


@pytest.mark.parametrize("place", [0.0, 0.3, 0.7, 1.0])
def test_a_flipped_byte_of_any_file_is_found(place: float, whole: Cache, copy: Path) -> None:
    files = contents(whole.path)
    assert len(files) == 28
    for name, data in files.items():
        (copy / name).write_bytes(flipped(data, round(place * (len(data) - 1))))
        with pytest.raises(CorruptError, match=name):
            open_cache(copy)
        (copy / name).write_bytes(data)
    open_cache(copy)


def removed(path: Path) -> None:
    path.unlink()


def emptied(path: Path) -> None:
    path.write_bytes(b"")


def cut_short(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def grown(path: Path) -> None:
    path.write_bytes(path.read_bytes() + b"\n")


def linked(path: Path) -> None:
    path.symlink_to(path.rename(path.with_name("elsewhere")))


def made_a_folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


def made_a_pipe(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


NAMES = (
    "data.zarr/zarr.json",
    "data.zarr/indices/zarr.json",
    "data.zarr/log_probs/c/0/1/0",
    "data.zarr/logsumexp/c/0/0",
    "data.zarr/fingerprints/c/0/1",
    "data.zarr/sketches/c/0/0/0",
    "data.zarr/labels/c/0",
    "commits/0/1.json",
)


@pytest.mark.parametrize("damage", [removed, emptied, cut_short, grown, linked, made_a_folder, made_a_pipe])
def test_a_file_that_is_not_what_was_written_is_named(damage: Callable[[Path], None], copy: Path) -> None:
    for name in NAMES:
        kept = copy.with_name("kept")
        shutil.copytree(copy, kept)
        damage(copy / name)
        with pytest.raises(CorruptError, match=name) as caught:
            open_cache(copy)
        assert caught.value.exit_code == 5
        shutil.rmtree(copy)
        kept.rename(copy)


def test_several_damaged_files_are_counted(copy: Path) -> None:
    for name in NAMES[2:]:
        removed(copy / name)
    with pytest.raises(CorruptError, match="6 files of 27"):
        open_cache(copy)


def test_what_is_no_cache_is_refused(tmp_path: Path, copy: Path) -> None:
    with pytest.raises(UsageError, match="there is no cache"):
        open_cache(tmp_path / "nowhere")
    with pytest.raises(UsageError, match="neither manifest nor plan"):
        open_cache(tmp_path)
    (tmp_path / "letter").write_text("Dear")
    with pytest.raises(UsageError, match="is not a cache"):
        open_cache(tmp_path / "letter")
    (copy / "manifest.json").unlink()
    with pytest.raises(CorruptError, match=r"manifest.json is missing"):
        open_cache(copy)


# Forged manifests: the digest fits, and what it vouches for cannot be.


def read_whole(path: Path) -> Tensor:
    """Everything that can be read of a cache; the logits of its twelve samples."""
    cache = open_cache(path)
    read_inputs(path, cache.manifest.plan, view=0)
    return cache.teacher()(torch.arange(12))


def test_forging_is_done_well(copy: Path) -> None:
    unforged = (copy / "manifest.json").read_bytes()
    forge(copy, shaped())
    assert (copy / "manifest.json").read_bytes() == unforged
    forge(copy, setting("a forger", "plan", "notes"))
    assert open_cache(copy).manifest.plan.notes == "a forger"
    read_whole(copy)


@pytest.mark.parametrize("what", FORGED)
def test_a_forged_manifest_is_refused(what: str, copy: Path) -> None:
    before = (copy / "manifest.json").read_bytes()
    forge(copy, FORGED[what])
    assert (copy / "manifest.json").read_bytes() != before
    with pytest.raises(CorruptError):
        read_whole(copy)


def test_a_file_that_belongs_to_no_cache_is_not_vouched_for(copy: Path) -> None:
    shutil.copy(copy / "commits/0/0.json", copy / "commits/0/2.json")
    open_cache(copy)
    forge(copy, lambda manifest: setting(manifest["files"]["commits/0/0.json"], "files", "commits/0/2.json")(manifest))
    with pytest.raises(CorruptError, match="lists 28 files, its plan has 27"):
        open_cache(copy)


@pytest.mark.parametrize(("number", "fix"), [(99, "upgrade"), (0, "dump the teacher again")])
def test_another_version_is_told_apart_from_damage(number: int, fix: str, copy: Path, begun: Path) -> None:
    def of_another_version(plan: Any) -> None:
        plan["format_version"] = number
        del plan["shape"]["fingerprint_stride"]  # as in version 0; a later one may have any keys

    forge(copy, lambda manifest: of_another_version(manifest["plan"]))
    plan = json.loads((begun / "plan.json").read_bytes())
    of_another_version(plan)
    (begun / "plan.json").write_bytes(as_written(plan))
    calls: list[tuple[Callable[[Path], Cache], Path]] = [(open_cache, copy), (open_cache, begun), (dump, begun)]
    for call, path in calls:
        with pytest.raises(CorruptError, match=f"format version {number}; this kdcache reads version 1") as caught:
            call(path)
        assert fix in caught.value.fix


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"null",
        b"{}",
        b"[" * 100_000,
        b'{"plan": ' * 100_000,
        b"\xff\xfe{}",
        b"\0" * 50,
        b'{"plan": {"a": "\\ud800"}}',
    ],
    ids=["empty", "null", "bare", "deep", "deeper", "utf-16", "zeros", "surrogate"],
)
def test_a_manifest_that_is_none_is_refused(data: bytes, copy: Path) -> None:
    (copy / "manifest.json").write_bytes(data)
    with pytest.raises(CorruptError):
        open_cache(copy)


def test_a_manifest_in_another_spelling_is_refused(copy: Path) -> None:
    path = copy / "manifest.json"
    content = json.loads(path.read_bytes())
    doubled = path.read_bytes().replace(b'"notes": ""', b'"notes": "x", "notes": ""')
    for other in (json.dumps(content).encode(), as_written(dict(reversed(content.items()))), doubled):
        path.write_bytes(other)
        with pytest.raises(CorruptError):
            open_cache(copy)


# Forged stores: the files are those that the manifest lists, and do not lie as the plan says.


STORES: dict[str, Callable[[Any], object]] = {
    "shape": setting([1, 13, 3], "shape"),
    "shape immense": setting([1, 2**40, 3], "shape"),
    "type": setting("uint8", "data_type"),
    "type unknown": setting("pickle", "data_type"),
    "type missing": lambda metadata: metadata.pop("data_type") and None,
    "shards": setting([1, 16, 3], "chunk_grid", "configuration", "chunk_shape"),
    "names of chunks": setting({"name": "default", "configuration": {"separator": "."}}, "chunk_key_encoding"),
    "names of version 2": setting({"name": "v2", "configuration": {"separator": "/"}}, "chunk_key_encoding"),
    "codec unknown": setting([{"name": "numcodecs.pickle", "configuration": {}}], "codecs"),
    "codecs none": setting([], "codecs"),
    "not sharded": setting([{"name": "bytes", "configuration": {"endian": "little"}}], "codecs"),
    "group": lambda _: {"zarr_format": 3, "node_type": "group", "attributes": {}},
    "version 2": setting(2, "zarr_format"),
    "list": lambda metadata: [metadata],
}


@pytest.mark.parametrize("what", STORES)
def test_an_array_that_does_not_lie_as_the_plan_says_is_refused(what: str, copy: Path) -> None:
    for name in ("log_probs", "sample_keys", "sketches") if "shape" not in what else ("log_probs",):
        path = copy / f"data.zarr/{name}/zarr.json"
        before = path.read_bytes()
        metadata = json.loads(before)
        path.write_text(json.dumps(STORES[what](metadata) or metadata))
        refresh(copy)
        with pytest.raises(CorruptError, match=name):
            read_whole(copy)
        path.write_bytes(before)
    refresh(copy)
    read_whole(copy)


@pytest.mark.parametrize("name", ["log_probs/c/0/0/0", "labels/c/0", "fingerprints/c/0/0", "sketches/c/0/0/0"])
def test_a_chunk_that_a_shard_says_it_has_not_is_not_read_as_zeros(name: str, copy: Path) -> None:
    # A shard of one chunk that was never written: nothing but an index, and the crc32c of that.
    (copy / "data.zarr" / name).write_bytes(b"\xff" * 16 + bytes.fromhex("104c2fef"))
    refresh(copy)
    with pytest.raises(CorruptError, match=rf"chunk 0 of .*{name} is missing"):
        read_whole(copy)


def test_a_class_that_there_is_not_is_refused(copy: Path) -> None:
    import tensorstore

    folder = copy / "data.zarr/indices"
    spec = {"driver": "zarr3", "kvstore": {"driver": "file", "path": str(folder)}}
    tensorstore.open(spec, open=True, write=True).result()[0, 3, 1].write(np.uint8(10)).result()
    refresh(copy)
    with pytest.raises(CorruptError, match="class index of 10"):
        open_cache(copy).teacher()


def test_nothing_is_allocated_for_rows_that_the_files_cannot_hold(copy: Path) -> None:
    # Plan and metadata agree on eight milliard rows in shards of four, whose files have room for some fifty chunks.
    rows = 2**33

    def plan(manifest: Any) -> None:
        manifest["plan"]["dataset"]["samples"] = rows
        shaped(shard_rows=rows // 2, chunk_rows=2**14)(manifest)

    forge(copy, plan)
    for path in (copy / "data.zarr").glob("*/zarr.json"):
        metadata = json.loads(path.read_bytes())
        along = 1 if len(metadata["shape"]) > 1 else 0
        of_inputs = metadata["dimension_names"][along] == "fingerprint"
        metadata["shape"][along] = rows
        metadata["chunk_grid"]["configuration"]["chunk_shape"][along] = rows // 2
        metadata["codecs"][0]["configuration"]["chunk_shape"][along] = rows // 2 if of_inputs else 2**14
        path.write_text(json.dumps(metadata))
    refresh(copy)
    tracemalloc.start()
    try:
        with pytest.raises(CorruptError, match="too small"):
            read_whole(copy)
        assert tracemalloc.get_traced_memory()[1] < 2**24
    finally:
        tracemalloc.stop()


def test_a_damaged_cache_is_never_a_wrong_number(copy: Path, whole: Cache) -> None:
    # Whatever a few random changes do to the files: refused, or the same logits.
    draw = random.Random(1)  # noqa: S311
    right = read_whole(whole.path)
    files = sorted(contents(copy))
    for _ in range(150):
        path = copy / draw.choice(files)
        data = path.read_bytes()
        start = draw.randrange(len(data))
        spoiled = data[:start] + draw.randbytes(draw.randrange(4)) + data[start + draw.randrange(40) :]
        path.write_bytes(spoiled)
        try:
            assert torch.equal(read_whole(copy), right)
        except KdcacheError as error:
            assert isinstance(error, CorruptError)
            assert spoiled != data
        else:
            assert spoiled == data
        path.write_bytes(data)

"""Record files of memory-mapped rows."""

from __future__ import annotations

import errno
import hashlib
import itertools
import json
import os
import resource
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.placement import (
    COUNT,
    ENCODINGS,
    Made,
    check,
    count_reads,
    drawn,
    make,
    mapped_teacher,
)
from helpers.processes import FORKS, PATIENCE, in_a_process

from kdcache import open_cache
from kdcache.cache.format import zarr_store
from kdcache.cache.format.codec import Rows
from kdcache.cache.placement import choose, mmap
from kdcache.cache.placement.choose import Placement
from kdcache.errors import CorruptError, IncompleteError


@pytest.fixture
def copied(tmp_path: Path) -> Made:
    """A cache to be damaged."""
    return make(tmp_path, top_k="all")


def record_files(made: Made, kept: Path) -> list[Path]:
    folder = kept / "records" / made.cache.manifest.digest.removeprefix("sha256:")
    return [folder / f"view-{view}.records" for view in (0, 1)]


def joined(rows: Rows) -> bytes:
    """Rows as a record file has them: of each row one part after the other."""
    parts = [values.numpy() for values in rows.arrays().values()]
    return b"".join(part[row].tobytes() for row in range(len(rows)) for part in parts)


def check_records(made: Made, kept: Path) -> None:
    """That whole record files lie there, and nothing else but the lock."""
    files = record_files(made, kept)
    for file, rows in zip(files, made.rows, strict=True):
        content = file.read_bytes()
        assert content == joined(rows)
        said = {"size": len(content), "sha256": hashlib.sha256(content).hexdigest()}
        assert json.loads(file.with_suffix(".json").read_bytes()) == said
    assert sorted(path.name for path in files[0].parent.iterdir()) == [
        "lock", "view-0.json", "view-0.records", "view-1.json", "view-1.records"
    ]  # fmt: skip


def test_records_are_made_once_and_kept_by_the_caches_digest(
    made: Made, kept_here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mapped_teacher(made)
    check_records(made, kept_here)
    before = [(path, path.stat().st_ino, path.stat().st_mtime_ns) for path in kept_here.rglob("*")]
    reads = count_reads(monkeypatch)
    check(mapped_teacher(made), made, drawn(0), 1)
    assert [(path, path.stat().st_ino, path.stat().st_mtime_ns) for path in kept_here.rglob("*")] == before
    assert reads == [(0, 0, 1)], "of the store one row, to know what one looks like"


def flip(path: Path, where: int) -> None:
    content = bytearray(path.read_bytes())
    content[where] ^= 1
    path.write_bytes(content)


def left_behind(path: Path) -> None:
    """As a writer that was killed leaves it, half way through the first file."""
    path.with_suffix(".partial").write_bytes(path.read_bytes()[:100])
    path.with_suffix(".json").unlink()
    path.unlink()


DAMAGE: dict[str, Callable[[Path], object]] = {
    "first byte": lambda path: flip(path, 0),
    "last byte": lambda path: flip(path, -1),
    "truncated": lambda path: os.truncate(path, path.stat().st_size - 1),
    "empty": lambda path: os.truncate(path, 0),
    "longer": lambda path: path.write_bytes(path.read_bytes() + b"\0"),
    "missing": lambda path: path.unlink(),
    "left behind": left_behind,
    "without its digest": lambda path: path.with_suffix(".json").unlink(),
    "half a digest": lambda path: os.truncate(path.with_suffix(".json"), 20),
    "an empty digest": lambda path: path.with_suffix(".json").write_bytes(b""),
    "not a digest": lambda path: path.with_suffix(".json").write_bytes(b"[]"),
    "another digest": lambda path: flip(path.with_suffix(".json"), -10),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_damaged_records_are_made_anew(damage: str, lowrank: Made, kept_here: Path) -> None:
    mapped_teacher(lowrank)
    first, second = record_files(lowrank, kept_here)
    untouched = second.stat().st_ino
    DAMAGE[damage](first)
    teacher = mapped_teacher(lowrank)
    check_records(lowrank, kept_here)
    for view in (0, 1):
        check(teacher, lowrank, drawn(0), view)
    assert second.stat().st_ino == untouched


@pytest.mark.parametrize("announced", [True, False])
@pytest.mark.parametrize("damage", ["missing", "truncated", "empty"])
def test_records_that_go_before_they_are_mapped(damage: str, announced: bool, lowrank: Made, kept_here: Path) -> None:
    teacher = mapped_teacher(lowrank)
    DAMAGE[damage](record_files(lowrank, kept_here)[1])
    if announced:
        teacher.prefetch([drawn(0)], 1)
    with pytest.raises(CorruptError, match=r"view-1\.records cannot be mapped") as caught:
        teacher(drawn(0), 1)
    assert "open the cache's teacher again" in caught.value.fix
    check(teacher, lowrank, drawn(0), 0)
    check(mapped_teacher(lowrank), lowrank, drawn(0), 1)


def test_records_that_do_not_fit_are_refused_before_one_is_written(
    lowrank: Made, kept_here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    size = len(joined(lowrank.rows[0]))
    monkeypatch.setattr(mmap, "free_disk", lambda _: 2 * size - 1)
    with pytest.raises(IncompleteError, match="do not fit into") as caught:
        mapped_teacher(lowrank)
    assert "KDCACHE_HOME" in caught.value.fix
    assert [path.name for path in kept_here.rglob("*") if path.is_file()] == ["lock"]
    monkeypatch.setattr(mmap, "free_disk", lambda _: 2 * size)
    mapped_teacher(lowrank)
    # What lies there needs no room; what is damaged gives its own back.
    monkeypatch.setattr(mmap, "free_disk", lambda _: 0)
    mapped_teacher(lowrank)
    flip(record_files(lowrank, kept_here)[1], 0)
    monkeypatch.setattr(mmap, "free_disk", lambda folder: size * (not (folder / "view-1.records").exists()))
    mapped_teacher(lowrank)
    check_records(lowrank, kept_here)


def map_until_killed(cache: Path, kept: Path, at: int) -> None:
    """Make records, killed just before the `at`-th read of the store, or change of a file in kdcache's own folder."""
    os.environ["KDCACHE_HOME"] = str(kept)
    opened = open_cache(cache)
    count = itertools.count(1)

    def die() -> None:
        if next(count) == at:
            os.kill(os.getpid(), signal.SIGKILL)

    def hook(event: str, args: tuple[Any, ...]) -> None:
        writes = event == "open" and isinstance(args[2], int) and args[2] & (os.O_WRONLY | os.O_RDWR)
        if (writes or event in ("os.rename", "os.remove")) and str(args[0]).startswith(str(kept)):
            die()

    read = zarr_store.RowReader.read

    def counted(reader: zarr_store.RowReader[Rows], view: int, ids: range) -> Rows:
        die()
        return read(reader, view, ids)

    pytest.MonkeyPatch().setattr(zarr_store.RowReader, "read", counted)
    choose._READ_BYTES = 2**16
    sys.addaudithook(hook)
    opened.teacher(placement="mmap")


def test_killed_at_any_moment_no_half_file_has_the_final_name(
    larger: Made, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = [joined(rows) for rows in larger.rows]
    killed = halves = 0
    for at in itertools.count(1):
        kept = tmp_path / str(at)
        process = in_a_process(map_until_killed, larger.cache.path, kept, at)
        process.join(PATIENCE)
        files = record_files(larger, kept)
        assert all(
            not file.exists() or file.read_bytes() == content for file, content in zip(files, whole, strict=True)
        )
        if process.exitcode == 0:
            break
        assert process.exitcode == -signal.SIGKILL
        killed += 1
        halves += any(0 < path.stat().st_size < len(whole[0]) for path in kept.rglob("*.partial"))
        monkeypatch.setenv("KDCACHE_HOME", str(kept))
        check(mapped_teacher(larger), larger, torch.arange(0, 2000, 7), 1)
        check_records(larger, kept)
    assert killed >= 2 * (3 + 3), "of each file it is begun, parts are read, it is named, and its digest written"
    assert halves


def map_at_once(cache: Path, kept: Path, together: Any, told: Any) -> None:
    os.environ["KDCACHE_HOME"] = str(kept)
    torch.set_num_threads(1)
    opened, reads, read = open_cache(cache), [], zarr_store.RowReader.read

    def slow(reader: zarr_store.RowReader[Rows], view: int, ids: range) -> Rows:
        reads.append(ids)
        time.sleep(0.05)
        return read(reader, view, ids)

    pytest.MonkeyPatch().setattr(zarr_store.RowReader, "read", slow)
    together.wait()
    teacher = opened.teacher(placement="mmap")
    told.put((len(reads) - 1, teacher(drawn(0), 1).numpy()))


def test_processes_that_make_them_at_once_make_them_once(lowrank: Made, kept_here: Path) -> None:
    together, told = FORKS.Barrier(2), FORKS.Queue()
    both = [in_a_process(map_at_once, lowrank.cache.path, kept_here, together, told) for _ in range(2)]
    answers = [told.get(timeout=PATIENCE) for _ in both]
    for process in both:
        process.join(PATIENCE)
        assert process.exitcode == 0
    for _, logits in answers:
        assert torch.equal(torch.from_numpy(logits), lowrank.logits(drawn(0), 1))
    assert sorted(parts for parts, _ in answers) == [0, 2]
    check_records(lowrank, kept_here)


def map_with_a_limit(cache: Path, kept: Path, limit: int) -> None:
    os.environ["KDCACHE_HOME"] = str(kept)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    with pytest.raises(OSError, match="File too large") as caught:
        open_cache(cache).teacher(placement="mmap")
    assert caught.value.errno == errno.EFBIG
    assert [path.name for path in kept.rglob("*") if path.is_file()] == ["lock"]


def test_a_file_that_cannot_be_written_leaves_nothing(lowrank: Made, kept_here: Path) -> None:
    process = in_a_process(map_with_a_limit, lowrank.cache.path, kept_here, len(joined(lowrank.rows[0])) - 1)
    process.join(PATIENCE)
    assert process.exitcode == 0
    check(mapped_teacher(lowrank), lowrank, drawn(0), 1)
    check_records(lowrank, kept_here)


def damage_chunk(made: Made, view: int, shard: int) -> None:
    flip(made.cache.path / f"data.zarr/log_probs/c/{view}/{shard}/0", 30)


@pytest.mark.parametrize(
    "damage",
    [damage_chunk, lambda made, view, shard: (made.cache.path / f"data.zarr/tail/c/{view}/{shard}/0").unlink()],
)
@pytest.mark.parametrize("placed", ["device", "host", "mmap"])
def test_a_store_that_is_damaged_is_no_teacher(
    placed: Placement, damage: Callable[[Made, int, int], None], tmp_path: Path, kept_here: Path
) -> None:
    made = make(tmp_path, **ENCODINGS["lowrank, of odd width"])
    damage(made, 1, 1)
    with pytest.raises(CorruptError, match=r"data\.zarr"):
        made.cache.teacher(placement=placed)
    assert not list(kept_here.rglob("view-1*"))


def test_damage_that_a_stream_comes_upon_reaches_the_caller(copied: Made) -> None:
    ids, well = torch.arange(16, 20), torch.arange(16)
    damage_chunk(copied, 1, 1)
    for announced in ([], [ids], [well, ids], [well[:4], well[4:8], ids, well[8:]], [ids, well, well, well]):
        teacher = copied.cache.teacher(placement="stream")
        teacher.prefetch(announced, 1)
        for batch in announced or [ids]:
            if batch is not ids:
                check(teacher, copied, batch, 1)
                continue
            with pytest.raises(CorruptError, match="log_probs"):
                teacher(ids, 1)
            with pytest.raises(CorruptError, match="log_probs"):
                teacher(ids, 1)
        check(teacher, copied, torch.arange(COUNT), 0)

"""Scratch names next to an output: what kdcache has not made there is never deleted."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers.tiny import TinyTeacher, tiny_samples

from kdcache import Cache, dump_teacher
from kdcache.cache.lock import LOCK
from kdcache.config.cache import CacheSpec
from kdcache.curate.decoded_files import logits_of_cache
from kdcache.curate.dense_logits import cache_of_logits
from kdcache.curate.foreign import cache_of_files, files_of_cache
from kdcache.curate.merge import merge
from kdcache.curate.scratch import MARKER, scratch_file
from kdcache.curate.select import select
from kdcache.errors import MismatchError, UsageError

SAMPLES = tiny_samples(37, 12)
LOGITS = np.random.default_rng(0).normal(0, 3, (37, 12)).astype(np.float32)
SPEC = CacheSpec(shard_rows=8)


def contents(folder: Path) -> dict[str, bytes | str | None]:
    """Everything below a folder: bytes of files, targets of links, None for folders."""
    return {
        str(path.relative_to(folder)): str(path.readlink())
        if path.is_symlink()
        else path.read_bytes()
        if path.is_file()
        else None
        for path in folder.rglob("*")
    }


def a_folder_with_a_file(path: Path) -> None:
    path.mkdir()
    (path / "mine.txt").write_text("mine")


def a_file(path: Path) -> None:
    path.write_text("mine")


def a_link_to_a_folder(path: Path) -> None:
    (path.parent / "elsewhere").mkdir()
    (path.parent / "elsewhere" / "mine.txt").write_text("mine")
    path.symlink_to(path.parent / "elsewhere")


def a_dangling_link(path: Path) -> None:
    path.symlink_to(path.parent / "nowhere")


def another_file_next_to_the_marker(path: Path) -> None:
    with pytest.raises(KeyboardInterrupt), scratch_file(path):
        raise KeyboardInterrupt
    path.mkdir()
    (path / MARKER).write_bytes(b"")
    (path / "mine.txt").write_text("mine")


def a_file_named_like_the_marker(path: Path) -> None:
    path.mkdir()
    (path / MARKER).write_text("my own notes")


def data_without_the_marker(path: Path) -> None:
    path.mkdir()
    (path / "data").write_text("mine")


FOREIGN = [
    a_folder_with_a_file,
    a_file,
    a_link_to_a_folder,
    a_dangling_link,
    another_file_next_to_the_marker,
    a_file_named_like_the_marker,
    data_without_the_marker,
]


def an_empty_folder(path: Path) -> None:
    path.mkdir()


def left_by_a_killed_process(path: Path) -> None:
    code = (
        "import os, sys; from pathlib import Path; from kdcache.curate.scratch import scratch_file\n"
        "with scratch_file(Path(sys.argv[1])) as data: data.write_bytes(b'half'); os._exit(9)"
    )
    assert subprocess.run([sys.executable, "-c", code, str(path)], check=False).returncode == 9
    assert {file.name for file in path.iterdir()} == {MARKER, "data"}


def killed_before_the_marker_was_written(path: Path) -> None:
    path.mkdir()
    (path / MARKER).touch()


OURS = [an_empty_folder, left_by_a_killed_process, killed_before_the_marker_was_written]


def npz(folder: Path) -> Path:
    np.savez(folder / "l.npz", logits=LOGITS)
    return folder / "l.npz"


def pt(folder: Path) -> Path:
    torch.save(torch.from_numpy(LOGITS), folder / "l.pt")
    return folder / "l.pt"


@pytest.mark.parametrize("source", [npz, pt])
@pytest.mark.parametrize("occupy", FOREIGN)
def test_convert_refuses_a_scratch_name_that_is_taken(
    tmp_path: Path, occupy: Callable[[Path], None], source: Callable[[Path], Path]
) -> None:
    file, scratch = source(tmp_path), tmp_path / "c.kdcache.logits"
    occupy(scratch)
    before = contents(tmp_path)
    with pytest.raises(UsageError, match=r"c\.kdcache\.logits exists and was not made by kdcache"):
        cache_of_logits(file, SAMPLES, tmp_path / "c.kdcache", spec=SPEC)
    assert contents(tmp_path) == before


@pytest.mark.parametrize("source", [npz, pt])
def test_convert_does_not_delete_the_folder_that_holds_its_source(
    tmp_path: Path, source: Callable[[Path], Path]
) -> None:
    folder = tmp_path / "c.kdcache.logits"
    folder.mkdir()
    file = source(folder)
    before = contents(tmp_path)
    with pytest.raises(UsageError, match="was not made by kdcache"):
        cache_of_logits(file, SAMPLES, tmp_path / "c.kdcache", spec=SPEC)
    assert contents(tmp_path) == before


def test_an_npy_file_needs_no_scratch_name(tmp_path: Path) -> None:
    folder = tmp_path / "c.kdcache.logits"
    folder.mkdir()
    np.save(folder / "l.npy", LOGITS)
    cache_of_logits(folder / "l.npy", SAMPLES, tmp_path / "c.kdcache", spec=SPEC)
    np.testing.assert_array_equal(np.load(folder / "l.npy"), LOGITS)


@pytest.mark.parametrize("occupy", OURS)
def test_convert_takes_over_what_kdcache_has_left(tmp_path: Path, occupy: Callable[[Path], None]) -> None:
    file = npz(tmp_path)
    occupy(tmp_path / "c.kdcache.logits")
    cache_of_logits(file, SAMPLES, tmp_path / "c.kdcache", spec=SPEC)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["c.kdcache", "l.npz"]


def test_scratch_data_is_deleted_after_an_error_and_what_others_put_there_stays(tmp_path: Path) -> None:
    np.savez(tmp_path / "l.npz", logits=LOGITS[:, :11])
    with pytest.raises(MismatchError):
        cache_of_logits(tmp_path / "l.npz", SAMPLES, tmp_path / "c.kdcache", spec=SPEC)
    assert [path.name for path in tmp_path.iterdir()] == ["l.npz"]
    with scratch_file(tmp_path / "scratch") as data:
        data.write_text("ours")
        (tmp_path / "scratch" / "mine.txt").write_text("mine")
    assert contents(tmp_path / "scratch") == {"mine.txt": b"mine"}


def test_a_scratch_folder_in_use_is_refused(tmp_path: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from kdcache.curate.scratch import scratch_file\n"
        "with scratch_file(Path(sys.argv[1])) as data: data.write_bytes(b'x'); print('held', flush=True); input()"
    )
    scratch = tmp_path / "c.kdcache.logits"
    file = npz(tmp_path)
    command = [sys.executable, "-c", code, str(scratch)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "held\n"
        with pytest.raises(UsageError, match="is used by another kdcache process"):
            cache_of_logits(file, SAMPLES, tmp_path / "c.kdcache", spec=SPEC)
        assert (scratch / "data").read_bytes() == b"x"
        holder.communicate("\n")
    assert not scratch.exists()
    cache_of_logits(file, SAMPLES, tmp_path / "c.kdcache", spec=SPEC)


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> tuple[Cache, Cache]:
    """Caches of two parts of a data set."""
    folder = tmp_path_factory.mktemp("parts")
    whole = dump_teacher(TinyTeacher(12), SAMPLES, folder / "whole.kdcache", spec=SPEC)
    return (
        select(whole, folder / "first.kdcache", samples=np.arange(16)),
        select(whole, folder / "rest.kdcache", samples=np.arange(16, 37), data=SAMPLES),
    )


DERIVE: dict[str, Callable[[tuple[Cache, Cache], Path], object]] = {
    "select": lambda parts, out: select(parts[0], out, samples=np.arange(8)),
    "merge": lambda parts, out: merge(parts, out, data=SAMPLES),
    "convert": lambda _, out: cache_of_logits(_npy(out.parent), SAMPLES, out, spec=SPEC),
    "import": lambda _, out: cache_of_files(out.parent, "fkd", SAMPLES, out),
}


def _npy(folder: Path) -> Path:
    np.save(folder / "l.npy", LOGITS)
    return folder / "l.npy"


@pytest.mark.parametrize("occupy", [a_folder_with_a_file, a_file, a_link_to_a_folder, a_dangling_link])
@pytest.mark.parametrize("command", DERIVE)
def test_a_taken_partial_name_is_refused(
    tmp_path: Path, parts: tuple[Cache, Cache], command: str, occupy: Callable[[Path], None]
) -> None:
    _npy(tmp_path)
    occupy(tmp_path / "out.kdcache.partial")
    before = contents(tmp_path)
    with pytest.raises(UsageError, match=r"out\.kdcache\.partial exists and was not made by kdcache"):
        DERIVE[command](parts, tmp_path / "out.kdcache")
    assert contents(tmp_path) == before


@pytest.mark.parametrize("command", ["select", "merge", "convert"])
@pytest.mark.parametrize("left", [(), (LOCK,), (LOCK, "plan.json")], ids=str)
def test_a_partial_folder_of_a_killed_process_is_taken_over(
    tmp_path: Path, parts: tuple[Cache, Cache], command: str, left: tuple[str, ...]
) -> None:
    partial = tmp_path / "out.kdcache.partial"
    partial.mkdir()
    for name in left:
        (partial / name).write_bytes(b"")
    DERIVE[command](parts, tmp_path / "out.kdcache")
    assert not partial.exists()
    assert (tmp_path / "out.kdcache" / "manifest.json").is_file()


@pytest.mark.parametrize("suffix", [".npz", ".npy"])
@pytest.mark.parametrize("occupy", FOREIGN)
def test_an_export_refuses_a_scratch_name_that_is_taken(
    tmp_path: Path, parts: tuple[Cache, Cache], occupy: Callable[[Path], None], suffix: str
) -> None:
    occupy(tmp_path / f"l{suffix}.partial")
    before = contents(tmp_path)
    with pytest.raises(UsageError, match="was not made by kdcache"):
        logits_of_cache(parts[0], tmp_path / f"l{suffix}")
    assert contents(tmp_path) == before


@pytest.mark.parametrize("suffix", [".npz", ".npy"])
@pytest.mark.parametrize("occupy", OURS)
def test_an_export_takes_over_what_kdcache_has_left(
    tmp_path: Path, parts: tuple[Cache, Cache], occupy: Callable[[Path], None], suffix: str
) -> None:
    occupy(tmp_path / f"l{suffix}.partial")
    logits_of_cache(parts[0], tmp_path / f"l{suffix}")
    assert [path.name for path in tmp_path.iterdir()] == [f"l{suffix}"]


@pytest.mark.parametrize("occupy", [a_file, a_folder_with_a_file, a_link_to_a_folder, a_dangling_link])
def test_an_export_replaces_nothing(tmp_path: Path, parts: tuple[Cache, Cache], occupy: Callable[[Path], None]) -> None:
    occupy(tmp_path / "l.npz")
    before = contents(tmp_path)
    with pytest.raises(UsageError, match="exists already"):
        logits_of_cache(parts[0], tmp_path / "l.npz")
    with pytest.raises(UsageError, match="exists already"):
        files_of_cache(parts[0], "fkd", tmp_path / "l.npz", SAMPLES)
    assert contents(tmp_path) == before

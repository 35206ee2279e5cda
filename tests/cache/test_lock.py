"""One run at a time writes a cache: a second is told who the first is, and a killed one is in nobody's way."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import signal
import socket
import time
from multiprocessing.process import BaseProcess
from pathlib import Path

import pytest
from helpers.processes import command_line, exit_code, in_a_process, recipe, until
from helpers.tiny import TinyTeacher, tiny_samples
from torch import Tensor

from kdcache import dump_teacher, open_cache
from kdcache.cache.lock import LOCK, hold, release
from kdcache.cache.writer import CacheWriter
from kdcache.config.cache import CacheSpec
from kdcache.errors import InterruptedRun, UsageError
from kdcache.runtime.progress import Silent

SPEC = CacheSpec(top_k=3, tail="uniform", pilot_rows=1, shard_rows=4, batch_size=4)
STAY = {"SAMPLE": "11", "HAPPENS": "time.sleep(3600 * os.path.exists(os.environ['OUT']))"}


def begin(folder: Path, number: int, environment: dict[str, str], *more: object) -> BaseProcess:
    out = folder / "c.kdcache"
    arguments = ("dump-teacher", folder / "tiny.yaml", "-o", out, "--device", "cpu", *more)
    return in_a_process(command_line, folder / f"said{number}", environment, *arguments)


def said(folder: Path, number: int) -> str:
    return (folder / f"said{number}").read_text()


@pytest.mark.parametrize("workers", [0, 2])
def test_a_second_run_is_refused_while_the_first_is_alive_and_goes_on_at_once_when_it_is_killed(
    workers: int, tmp_path: Path
) -> None:
    recipe(tmp_path)
    more = ("--set", f"cache.num_workers={workers}")
    out, marker = tmp_path / "c.kdcache", tmp_path / "c.kdcache" / "commits" / "0" / "0.json"
    first = begin(tmp_path, 1, {**STAY, "OUT": str(out)}, *more)
    try:
        until(marker.exists)
        before = marker.stat().st_mtime_ns
        assert exit_code(begin(tmp_path, 2, {}, *more)) == 2
        assert f"c.kdcache is being written by process {first.pid} on {socket.gethostname()}" in said(tmp_path, 2)
        assert "teacher:" not in said(tmp_path, 2), "it is refused before the work begins"
        assert first.is_alive()
        assert marker.stat().st_mtime_ns == before
    finally:
        first.kill()
    first.join()
    # At once: processes that the killed one had started may be there still.
    assert exit_code(begin(tmp_path, 3, {}, *more)) == 0
    assert "resuming " in said(tmp_path, 3)
    assert not (out / LOCK).exists()
    assert LOCK not in json.loads((out / "manifest.json").read_text())["files"]
    others = tmp_path / "others"
    others.mkdir()
    recipe(others)
    assert exit_code(begin(others, 1, {}, *more)) == 0
    assert open_cache(out).manifest.digest == open_cache(others / "c.kdcache").manifest.digest


def test_a_cache_that_is_being_derived_is_not_begun_by_another_command(tmp_path: Path) -> None:
    cache = dump_teacher(TinyTeacher(), tiny_samples(12), tmp_path / "whole.kdcache", spec=SPEC)
    out = tmp_path / "part.kdcache"
    select = ("select", cache.path, "--samples", "0-7", "-o", out)
    first = in_a_process(stopped_before_the_seal, tmp_path / "said1", out, *select)
    try:
        until((out / LOCK).exists)
        until((tmp_path / "there").exists)
        assert exit_code(in_a_process(command_line, tmp_path / "said2", {}, *select)) == 2
        assert f"is being written by process {first.pid} on " in said(tmp_path, 2)
    finally:
        first.kill()
    first.join()
    assert exit_code(in_a_process(command_line, tmp_path / "said3", {}, *select)) == 0
    assert len(open_cache(out)) == 8
    assert not (out / LOCK).exists()


def stopped_before_the_seal(told: Path, out: Path, *arguments: object) -> None:
    """A command that waits for ever where it would seal."""

    def wait(*_: object) -> None:
        (out.parent / "there").touch()
        time.sleep(3600)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(CacheWriter, "seal", wait)
        command_line(told, {}, *arguments)


class Loser(Silent):
    """Ends the process with code 2 if the cache is complete already."""

    def say(self, message: str) -> None:
        if "is complete" in message:
            os._exit(2)


def dump_at(start: float, out: Path) -> None:
    """Dump, and exit with 0 if this process made the cache."""
    time.sleep(max(start - time.time(), 0))
    try:
        dump_teacher(TinyTeacher(), tiny_samples(12), out, spec=SPEC, progress=Loser())
    except UsageError as error:
        assert "another process" in error.what or "written by process" in error.what or "sealed cache" in error.what
        assert "the same command again" in error.fix or "wait until that process ends" in error.fix
        os._exit(2)


def test_of_several_that_begin_at_the_same_moment_one_makes_the_cache(tmp_path: Path) -> None:
    whole = dump_teacher(TinyTeacher(), tiny_samples(12), tmp_path / "whole.kdcache", spec=SPEC)
    for attempt in range(8):
        out = tmp_path / str(attempt) / "c.kdcache"
        out.parent.mkdir()
        start = time.time() + 0.3
        ended = sorted(exit_code(process) for process in [in_a_process(dump_at, start, out) for _ in range(4)])
        assert ended == [0, 2, 2, 2]
        assert open_cache(out).manifest.digest == whole.manifest.digest
        assert [path.name for path in out.parent.iterdir()] == ["c.kdcache"]


def test_what_ends_in_an_error_or_an_interruption_lets_go(tmp_path: Path) -> None:
    out = tmp_path / "c.kdcache"

    class Interrupted(TinyTeacher):
        def forward(self, images: Tensor) -> Tensor:
            if out.exists() and 11 / 8 in images[:, 0, 0, 0]:
                raise KeyboardInterrupt
            return super().forward(images)

    with pytest.raises(InterruptedRun, match="interrupted"):
        dump_teacher(Interrupted(), tiny_samples(12), out, spec=SPEC)
    assert (out / LOCK).exists()
    process = in_a_process(dump_at, 0.0, out)
    assert exit_code(process) == 0


def test_a_folder_that_is_no_longer_there_is_held_by_nobody(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="is being written by another process"):
        hold(tmp_path / "c.kdcache", tmp_path / "c.kdcache.partial")


def test_a_killed_run_that_had_not_yet_made_the_folder_is_in_nobodys_way(tmp_path: Path) -> None:
    out = tmp_path / "c.kdcache"
    process = in_a_process(killed_before_the_folder_is_there, out)
    process.join()
    assert process.exitcode == -signal.SIGKILL
    assert (tmp_path / "c.kdcache.partial" / LOCK).exists()
    dump_teacher(TinyTeacher(), tiny_samples(12), out, spec=SPEC)
    assert [path.name for path in tmp_path.iterdir()] == ["c.kdcache"]


def killed_before_the_folder_is_there(out: Path) -> None:
    rename = Path.rename

    def kill(path: Path, target: Path) -> Path:
        if target == out:
            os.kill(os.getpid(), signal.SIGKILL)
        return rename(path, target)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Path, "rename", kill)
        dump_teacher(TinyTeacher(), tiny_samples(12), out, spec=SPEC)


def test_without_locks_on_the_file_system_it_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", refuse)
    assert len(dump_teacher(TinyTeacher(), tiny_samples(12), tmp_path / "c.kdcache", spec=SPEC)) == 12


def test_held_twice_by_one_process_is_held_once(tmp_path: Path) -> None:
    hold(tmp_path, tmp_path)
    hold(tmp_path, tmp_path)
    assert exit_code(in_a_process(hold_or_exit, tmp_path)) == 2
    release(tmp_path)
    release(tmp_path)
    assert exit_code(in_a_process(hold_or_exit, tmp_path)) == 0


def hold_or_exit(folder: Path) -> None:
    try:
        hold(folder, folder)
    except UsageError:
        os._exit(2)

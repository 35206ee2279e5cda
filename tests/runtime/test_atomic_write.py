"""Files are written completely or not at all: after a failure, a kill at any step, or on a full disk."""

from __future__ import annotations

import errno
import os
import resource
import signal
import sys
from pathlib import Path
from typing import Any

import pytest
from helpers.processes import exit_code, in_a_process

from kdcache.runtime.atomic_write import move_into_place, open_atomic, write_file


def test_a_file_is_written_and_leaves_no_temporary_file(tmp_path: Path) -> None:
    assert write_file(tmp_path / "state.json", "é\n") == tmp_path / "state.json"
    assert (tmp_path / "state.json").read_bytes() == "é\n".encode()
    write_file(tmp_path / "state.json", b"second")
    with open_atomic(tmp_path / "stream", suffix=".1.partial") as file:
        file.write(b"12")
        assert [path.name for path in tmp_path.glob("stream*")] == ["stream.1.partial"]
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == {"state.json": b"second", "stream": b"12"}


@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "No space left on device"), KeyboardInterrupt()])
def test_a_failure_while_writing_leaves_the_earlier_file(tmp_path: Path, error: BaseException) -> None:
    path = write_file(tmp_path / "state.json", b"first")

    def fail_halfway() -> None:
        with open_atomic(path) as file:
            file.write(b"half")
            raise error

    with pytest.raises(type(error)):
        fail_halfway()
    assert {entry.name: entry.read_bytes() for entry in tmp_path.iterdir()} == {"state.json": b"first"}


def write_beyond_a_limit(path: Path, limit: int) -> None:
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    try:
        write_file(path, bytes(limit + 1))
    except OSError as error:
        assert error.errno == errno.EFBIG
        os._exit(7)


def test_a_disk_that_takes_no_more_bytes_leaves_the_earlier_file(tmp_path: Path) -> None:
    path = write_file(tmp_path / "state.json", b"first")
    assert exit_code(in_a_process(write_beyond_a_limit, path, 2**16)) == 7
    assert {entry.name: entry.read_bytes() for entry in tmp_path.iterdir()} == {"state.json": b"first"}


def write_and_die(path: Path, event: str) -> None:
    def hook(name: str, args: tuple[Any, ...]) -> None:
        if name == event and str(args[0]).startswith(str(path)):
            os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(hook)
    write_file(path, b"second")


@pytest.mark.parametrize("event", ["open", "os.rename"])
def test_a_kill_before_the_rename_leaves_the_earlier_file(tmp_path: Path, event: str) -> None:
    path = write_file(tmp_path / "state.json", b"first")
    assert exit_code(in_a_process(write_and_die, path, event)) == -signal.SIGKILL
    assert path.read_bytes() == b"first"
    write_file(path, b"second")
    assert {entry.name: entry.read_bytes() for entry in tmp_path.iterdir()} == {"state.json": b"second"}


def test_a_file_and_its_folder_are_flushed_before_and_after_the_rename(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    steps: list[str] = []
    fsync, replace = os.fsync, Path.replace

    def record_fsync(handle: int) -> None:
        steps.append(f"fsync {Path(f'/proc/self/fd/{handle}').readlink().name}")
        fsync(handle)

    def record_replace(path: Path, target: Path) -> Path:
        steps.append(f"rename {path.name}")
        return replace(path, target)

    monkeypatch.setattr(os, "fsync", record_fsync)
    monkeypatch.setattr(Path, "replace", record_replace)
    write_file(tmp_path / "a", b"1")
    assert steps == ["fsync a.partial", "rename a.partial", f"fsync {tmp_path.name}"]
    steps.clear()
    (tmp_path / "run.partial").mkdir()
    (tmp_path / "run.partial" / "metrics.json").write_bytes(b"{}")
    move_into_place(tmp_path / "run.partial", tmp_path / "run")
    assert steps == ["fsync metrics.json", "fsync run.partial", "rename run.partial", f"fsync {tmp_path.name}"]
    assert (tmp_path / "run" / "metrics.json").read_bytes() == b"{}"

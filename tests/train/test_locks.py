"""One process at a time writes a run folder; the workers of a sweep end with the process that started them."""

from __future__ import annotations

import os
import signal
import socket
import sys
import time
from collections.abc import Callable, Iterator
from multiprocessing.process import BaseProcess
from pathlib import Path

import psutil
import pytest
from helpers.forked import forked_workers
from helpers.paths import ROOT
from helpers.processes import command_line, exit_code, in_a_process, until

from kdcache.errors import UsageError
from kdcache.runtime.folder_lock import locked

RECIPE = ROOT / "pipelines" / "digits.yaml"
LONG = ["--set", "student.train.epochs=3000", "--device", "cpu", "--loss", "ce"]
SHORT = ["--set", "student.train.epochs=1", "--device", "cpu"]


def start(log: Path, *arguments: object) -> BaseProcess:
    log.touch()
    return in_a_process(command_line, log, {"OMP_NUM_THREADS": "1"}, *arguments)


def with_forked_workers(log: Path, *arguments: object) -> None:
    with forked_workers():
        command_line(log, {}, *arguments)


def output_of(log: Path, *arguments: object) -> tuple[int, str]:
    code = exit_code(start(log, *arguments))
    return code, log.read_text()


def hold(folder: Path, ready: Path) -> None:
    """Hold a lock in a process of its own, until it is killed."""
    sys.argv = ["/bin/kdcache", "train-student", "two words"]
    with locked(folder):
        ready.touch()
        time.sleep(600)


@pytest.fixture
def started() -> Iterator[Callable[[BaseProcess], None]]:
    processes: list[BaseProcess] = []
    yield processes.append
    for process in processes:
        process.kill()
        process.join()


Register = Callable[[BaseProcess], None]


def test_a_second_run_of_the_same_folder_is_refused_and_names_the_first(started: Register, tmp_path: Path) -> None:
    out = tmp_path / "run"
    first = start(tmp_path / "first", "train-student", RECIPE, "-o", out, *LONG)
    started(first)
    until((tmp_path / "run.partial" / "state.pt").exists)
    code, message = output_of(tmp_path / "second", "train-student", RECIPE, "-o", out, *LONG)
    assert code == 2
    assert f"{out} is being written by process {first.pid} on {socket.gethostname()} (" in message
    assert first.is_alive()
    first.kill()
    first.join()
    resumed = start(tmp_path / "third", "train-student", RECIPE, "-o", out, *LONG)
    started(resumed)
    until(lambda: "resuming after epoch" in (tmp_path / "third").read_text())
    assert resumed.pid is not None
    os.kill(resumed.pid, signal.SIGINT)
    assert exit_code(resumed) == 130
    assert sorted(path.name for path in tmp_path.iterdir()) == ["first", "run.partial", "second", "third"]


def descendants(process: BaseProcess) -> list[psutil.Process]:
    return psutil.Process(process.pid).children(recursive=True)


def test_workers_of_a_sweep_end_when_their_parent_is_killed(started: Register, tmp_path: Path) -> None:
    out = tmp_path / "sweep"
    arguments = ["sweep", RECIPE, "-o", out, "-j", 2, "--seeds", 2, "--over", "loss=ce", "--device", "cpu"]
    parent = start(tmp_path / "log", *arguments, "--set", "student.train.epochs=3000")
    started(parent)
    until(lambda: len(list(out.glob("loss=ce/seed*.partial/state.pt"))) == 2)
    second = output_of(tmp_path / "second", *arguments, "--set", "student.train.epochs=3000")
    assert second[0] == 2
    assert f"is being written by process {parent.pid} on" in second[1]
    workers = descendants(parent)
    assert len(workers) >= 2
    parent.kill()
    parent.join()
    _, alive = psutil.wait_procs(workers, 60)
    assert alive == []
    before = {path: path.stat().st_mtime_ns for path in out.rglob("state.pt")}
    # The folders are free at once: students that are begun with the same command are resumed.
    again = in_a_process(with_forked_workers, tmp_path / "again", *arguments, "--set", "student.train.epochs=3000")
    started(again)
    until(lambda: all(path.stat().st_mtime_ns > before[path] for path in before))
    for seed in range(2):
        until(lambda: f"loss=ce, seed {seed}: resuming after epoch" in (tmp_path / "again").read_text())  # noqa: B023


def test_the_lock_of_a_killed_process_is_free_and_leaves_no_file(started: Register, tmp_path: Path) -> None:
    folder, ready = tmp_path / "folder", tmp_path / "ready"
    process = in_a_process(hold, folder, ready)
    started(process)
    until(ready.exists)
    holder = rf"process {process.pid} on {socket.gethostname()} \(kdcache train-student 'two words'\)"
    with pytest.raises(UsageError, match=f"is being written by {holder}"), locked(folder):
        pytest.fail("two processes hold the lock")
    process.kill()
    process.join()
    with locked(folder):
        pass
    assert list(tmp_path.iterdir()) == [ready]


def test_a_lock_is_released_by_an_error_and_not_held_by_a_forked_child(tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    with pytest.raises(ValueError, match="inside"), locked(folder):
        raise ValueError("inside")
    assert list(tmp_path.iterdir()) == []
    with locked(folder):
        child = os.fork()
        if child == 0:
            time.sleep(60)
            os._exit(0)
    try:
        with locked(folder):
            pass
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)

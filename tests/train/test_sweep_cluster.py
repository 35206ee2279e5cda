"""A sweep in the workers of a cluster: the students are those of a sweep on one machine, whatever dies in between."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Iterator
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any, NamedTuple

import psutil
import pytest
from click.testing import Result
from helpers.dask_processes import DaskProcesses
from helpers.processes import command_line, exit_code, in_a_process, until
from helpers.students import EPOCHS, STEPS, command, contents, write_home
from hypothesis import given
from hypothesis import strategies as st

import kdcache
from kdcache.cache.parallel import Cluster
from kdcache.errors import UsageError
from kdcache.runtime.progress import Silent
from kdcache.train.sweep import sweep
from kdcache.train.sweep_cluster import _Shown
from kdcache.train.sweep_groups import Job, all_jobs
from kdcache.train.sweep_points import Point, combinations

IN_THE_SECOND_EPOCH = STEPS + 2

ONCE = """
import pathlib
try:
    pathlib.Path({fuse!r}).unlink()
except FileNotFoundError:
    pass
else:
    {what}
"""
"""What a student does in one of its steps, for the first that comes to it."""

KILL_WORKER = "import signal, threading; os.kill(os.getppid(), signal.SIGKILL); threading.Event().wait()"
KILL_ITSELF = "import signal; os.kill(os.getpid(), signal.SIGKILL)"
WAIT = """
import pathlib, threading
for name in (str(os.getpid()), "waits"):
    pathlib.Path({pids!r}, name).touch()
threading.Event().wait()
"""


class Place(NamedTuple):
    """A cluster of two workers, and a file that a student executes in its step `fails_at`."""

    home: Path
    cluster: DaskProcesses
    happens: Path

    def sweep(self, out: Path, *more: object) -> list[object]:
        given = ["--cache", self.home / "tiny.kdcache", "--placement", "mmap", "-o", out]
        return ["sweep", self.home / "tiny.yaml", *given, *more]

    def on_cluster(self, out: Path, *more: object) -> list[object]:
        return self.sweep(out, "--scheduler", self.cluster.address, *more)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Place]:
    folder = tmp_path_factory.mktemp("cluster")
    happens = folder / "happens.py"
    happens.write_text("pass")
    running = DaskProcesses(folder, {"HAPPENS": f"exec(open({str(happens)!r}).read())"})
    try:
        for _ in range(2):
            running.add_worker()
        (folder / "home").mkdir()
        home = write_home(folder / "home")
        running.wait_for_workers(2)
        yield Place(home, running, happens)
    finally:
        running.end()


@pytest.fixture
def happens(place: Place) -> Iterator[Path]:
    yield place.happens
    place.happens.write_text("pass")


def assert_same(result: Result, ours: Path, place: Place, theirs: Path, *more: object) -> None:
    """Sweep on this machine, too, and compare the run folders, and the results that are printed."""
    assert result.exit_code == 0, result.output
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HAPPENS", "pass")
        here = command(*place.sweep(theirs, *more))
    assert here.exit_code == 0, here.output

    def told(text: str, out: Path) -> Any:
        content = json.loads(text.replace(str(out), "OUT"))
        for point in content["points"]:
            for timed in (point, *point["students"]):
                assert timed.pop("seconds") > 0
        return content

    assert told(result.stdout, ours) == told(here.stdout, theirs)
    runs = sorted(path.relative_to(theirs) for path in theirs.glob("*/seed*"))
    assert sorted(path.relative_to(ours) for path in ours.glob("*/seed*")) == runs
    for run in runs:
        assert contents(ours / run) == contents(theirs / run)
    left = {path.name for path in ours.rglob("*") if path.name.startswith(".") or path.name.endswith(".partial")}
    assert not left


@pytest.mark.parametrize("together", [[], ["--together"]])
def test_students_of_a_cluster_are_those_of_this_machine(place: Place, tmp_path: Path, together: list[str]) -> None:
    more = ["--over", "loss=ce,dtkd", "--seeds", 2, "--json", *together]
    there = command(*place.on_cluster(tmp_path / "there", *more))
    assert_same(there, tmp_path / "there", place, tmp_path / "here", *more)
    assert "training in 2 workers with 2 threads" in there.stderr
    assert there.stderr.count("placement of the cache: mmap") == 1
    before = {path: path.stat() for path in (tmp_path / "there").rglob("model.safetensors")}
    # Nothing is left to train, and no cluster is asked.
    again = command(*place.sweep(tmp_path / "there", "--scheduler", "tcp://127.0.0.1:1", *more))
    assert again.exit_code == 0, again.output
    assert "trained already: 4 of 4 students" in again.stderr
    assert again.stdout == there.stdout
    assert {path: path.stat() for path in before} == before


@pytest.mark.parametrize(("what", "together"), [(KILL_WORKER, ["--together"]), (KILL_ITSELF, [])])
def test_what_a_killed_process_had_begun_is_resumed_to_the_same_students(
    place: Place, tmp_path: Path, happens: Path, what: str, together: list[str]
) -> None:
    fuse = tmp_path / "fuse"
    fuse.touch()
    happens.write_text(ONCE.format(fuse=str(fuse), what=what))
    workers = place.cluster.workers()
    more = ["--over", "loss=ce,kd", "--seeds", 1, "--set", f"student.args.fails_at={IN_THE_SECOND_EPOCH}", "--json"]
    there = command(*place.on_cluster(tmp_path / "there", *more, *together))
    assert not fuse.exists()
    assert "resuming after epoch 1 of 3" in there.stderr
    if what == KILL_WORKER:
        until(lambda: len(now := place.cluster.workers()) == 2 and now != workers)
    assert_same(there, tmp_path / "there", place, tmp_path / "here", *more, *together)


def test_a_student_that_kills_its_process_again_and_again_fails_alone(
    place: Place, tmp_path: Path, happens: Path
) -> None:
    happens.write_text(KILL_ITSELF)
    # In the first epoch: a process that resumes after an epoch counts its steps from there.
    more = ["--over", "student.args.fails_at=[-1,3]", "--seeds", 1, "--json"]
    done = command(*place.on_cluster(tmp_path / "there", *more))
    assert done.exit_code == 3
    assert "1 of 2 students failed; fails_at=3, seed 5: the process that trained it died, by SIGKILL" in done.stderr
    well, killed = json.loads(done.stdout)["points"]
    assert well["test_mean"] is not None
    assert "died, by SIGKILL, on" in killed["students"][0]["failed"]
    assert "repeated 3 times" in killed["students"][0]["failed"]
    happens.write_text("pass")
    resumed = command(*place.on_cluster(tmp_path / "there", *more))
    assert "trained already: 1 of 2 students" in resumed.stderr
    assert_same(resumed, tmp_path / "there", place, tmp_path / "here", *more)


def test_a_student_that_fails_or_raises_does_not_stop_the_others(place: Place, tmp_path: Path, happens: Path) -> None:
    done = command(*place.on_cluster(tmp_path / "a", "--over", "student.train.lr=[1e30, 0.1]", "--seeds", 1, "--json"))
    assert done.exit_code == 3
    assert "1 of 2 students failed; lr=1e" in done.stderr
    assert [point["test_mean"] is None for point in json.loads(done.stdout)["points"]] == [True, False]
    happens.write_text("raise ValueError('not a number')")
    more = ["--over", f"student.args.fails_at=[{IN_THE_SECOND_EPOCH},-1]", "--seeds", 1]
    crashed = command(*place.on_cluster(tmp_path / "b", *more))
    assert isinstance(crashed.exception, RuntimeError)
    assert "ValueError: not a number" in str(crashed.exception)
    assert "code.py" in str(crashed.exception)
    (trained,) = (tmp_path / "b").glob("*/seed5")
    assert trained.parent.name == "fails_at=1", "the name of -1"


def waiting_students(place: Place, tmp_path: Path, cluster: DaskProcesses) -> tuple[BaseProcess, list[object], Path]:
    """Begin a sweep in a process of its own, whose students wait in the second epoch."""
    pids = tmp_path / "pids"
    pids.mkdir()
    place.happens.write_text(WAIT.format(pids=str(pids)))
    more = ["--over", f"student.args.fails_at={IN_THE_SECOND_EPOCH}", "--seeds", 1, "--json", "--device", "cpu"]
    arguments = [*place.sweep(tmp_path / "there", *more), "--scheduler", cluster.address]
    client = in_a_process(command_line, tmp_path / "log", {}, *arguments)
    if cluster.scheduler is cluster.processes[-1]:  # there is no worker yet
        waits = f"waiting for a worker at {cluster.address}"
        until(lambda: (tmp_path / "log").exists() and waits in (tmp_path / "log").read_text())
        cluster.add_worker()
    until(lambda: (pids / "waits").exists() or client.exitcode is not None)
    assert client.exitcode is None, (tmp_path / "log").read_text()
    (pids / "waits").unlink()
    return client, more[:-2], pids


@pytest.mark.parametrize("signal_number", [signal.SIGINT, signal.SIGKILL])
def test_the_students_of_an_interrupted_or_killed_sweep_end_and_are_resumed(
    place: Place, tmp_path: Path, happens: Path, signal_number: int
) -> None:
    client, more, pids = waiting_students(place, tmp_path, place.cluster)
    assert client.pid is not None
    os.kill(client.pid, signal_number)
    code, said = exit_code(client), (tmp_path / "log").read_text()
    if signal_number == signal.SIGINT:
        assert code == 130, said
        assert f"the trained students are kept in {tmp_path / 'there'}" in said
        assert "Traceback" not in said
    until(lambda: not any(psutil.pid_exists(int(path.name)) for path in pids.iterdir()))
    happens.write_text("pass")
    resumed = command(*place.on_cluster(tmp_path / "there", *more))
    assert "resuming after epoch 1 of 3" in resumed.stderr
    assert_same(resumed, tmp_path / "there", place, tmp_path / "here", *more)


@pytest.fixture
def own_cluster(place: Place, tmp_path: Path) -> Iterator[DaskProcesses]:
    """A cluster without workers."""
    (tmp_path / "own").mkdir()
    running = DaskProcesses(tmp_path / "own", place.cluster.environment)
    yield running
    running.end()


@pytest.fixture
def cluster_of_commands(place: Place, tmp_path: Path) -> Iterator[DaskProcesses]:
    """A cluster without workers, whose processes are started as users start them: each is a new interpreter."""
    (tmp_path / "own").mkdir()
    running = DaskProcesses(tmp_path / "own", place.cluster.environment, forked=False)
    yield running
    running.end()


def test_a_sweep_ends_with_the_scheduler_and_is_resumed_by_another_one(
    place: Place, tmp_path: Path, happens: Path, cluster_of_commands: DaskProcesses
) -> None:
    client, more, pids = waiting_students(place, tmp_path, cluster_of_commands)
    cluster_of_commands.scheduler.kill()
    assert exit_code(client) == 3
    assert (
        f"the dask scheduler at {cluster_of_commands.address} does not answer any more"
        in (tmp_path / "log").read_text()
    )
    until(lambda: not any(psutil.pid_exists(int(path.name)) for path in pids.iterdir()))
    happens.write_text("pass")
    resumed = command(*place.on_cluster(tmp_path / "there", *more))
    assert "resuming after epoch 1 of 3" in resumed.stderr
    assert_same(resumed, tmp_path / "there", place, tmp_path / "here", *more)


FORGET = """
for name in [name for name in sys.modules if name.partition(".")[0] == "kdcache"]:
    del sys.modules[name]
"""
"""The worker is a fork of a process that has imported kdcache."""

WITHOUT_KDCACHE = """
import sys
class Finder:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "kdcache":
            raise ModuleNotFoundError("No module named 'kdcache'", name="kdcache")
sys.meta_path.insert(0, Finder())
"""
OTHER_VERSION = """
import importlib.metadata as metadata, sys
metadata.version = lambda name, original=metadata.version: "0.0.9" if name == {name!r} else original(name)
"""
WITHOUT_FOLDER = """
import errno, sys
def hook(event, args):
    if event == "open" and str(args[0]).startswith({folder!r}):
        raise FileNotFoundError(errno.ENOENT, "No such file or directory", args[0])
sys.addaudithook(hook)
"""


UNFIT = {
    "kdcache": (WITHOUT_KDCACHE + FORGET, "cannot run kdcache .*No module named .*kdcache"),
    "version": (OTHER_VERSION.format(name="kdcache") + FORGET, "has kdcache 0.0.9, and this process has "),
    "folder": (WITHOUT_FOLDER, "the worker .* on .* does not see {folder}: No such file or directory"),
}
"""What a worker runs before it begins, and the words of the error."""


def add_unfit_worker(cluster: DaskProcesses, folder: Path, out: Path, preload: str) -> None:
    code = folder / "preload.py"
    code.write_text(preload.format(folder=str(out)) if preload == WITHOUT_FOLDER else preload)
    cluster.add_worker("--preload", code)


@pytest.mark.parametrize("which", UNFIT)
def test_a_worker_that_cannot_train_is_named_before_the_first_student(
    place: Place, tmp_path: Path, own_cluster: DaskProcesses, which: str
) -> None:
    out, (preload, words) = tmp_path / "there", UNFIT[which]
    own_cluster.add_worker()
    add_unfit_worker(own_cluster, tmp_path, out, preload)
    own_cluster.wait_for_workers(2)
    points, cache = combinations(place.home / "tiny.yaml", [], []), kdcache.open_cache(place.home / "tiny.kdcache")
    with pytest.raises(UsageError, match=words.format(folder=out)):
        sweep(points, 1, [cache], out, scheduler=own_cluster.address)
    assert not list(out.glob("*/seed*"))


@pytest.mark.parametrize("which", ["folder"])
def test_a_worker_that_comes_later_and_cannot_train_is_named(
    place: Place, tmp_path: Path, own_cluster: DaskProcesses, which: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, (preload, words) = tmp_path / "there", UNFIT[which]
    add_unfit_worker(own_cluster, tmp_path, out, preload)
    own_cluster.wait_for_workers(1)
    monkeypatch.setattr(Cluster, "ask", lambda *_: {})  # as if it were not there yet
    points, cache = combinations(place.home / "tiny.yaml", [], []), kdcache.open_cache(place.home / "tiny.kdcache")
    with pytest.raises(UsageError, match=words.format(folder=out)):
        sweep(points, 1, [cache], out, scheduler=own_cluster.address)
    assert not list(out.glob("*/seed*"))


@pytest.mark.parametrize(
    ("address", "options", "words"),
    [
        ("tcp://127.0.0.1:1", [], "no dask scheduler answers at 'tcp://127.0.0.1:1'"),
        ("threads", [], "no dask scheduler answers at 'threads'"),
        ("tcp://127.0.0.1:1", ["-j", 2], "-j 2 is for processes of this machine"),
    ],
)
def test_an_address_without_a_scheduler_is_refused(
    place: Place, tmp_path: Path, address: str, options: list[object], words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("kdcache.cache.parallel._CONNECT_TIMEOUT", 1)
    done = command(*place.sweep(tmp_path / "out", "--scheduler", address, *options))
    assert done.exit_code == 2
    assert words in done.stderr
    assert "use threads" not in done.stderr


def test_torchrun_does_not_start_a_sweep_of_a_cluster(
    place: Place, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UsageError, match="trained by the dask workers, and torchrun started 2"):
        sweep(combinations(place.home / "tiny.yaml", [], []), 1, [], tmp_path, scheduler=place.cluster.address)


class Counted(Silent):
    def __init__(self) -> None:
        self.done: list[int] = []

    def advance(self, amount: int = 1, note: str = "") -> None:
        self.done.append(amount)


def jobs_of(folder: Path) -> list[Job]:
    pipeline = kdcache.load_pipeline(folder / "tiny.yaml")
    return all_jobs([Point("one", pipeline), Point("two", pipeline)], 2, folder)


MESSAGES = st.lists(st.tuples(st.integers(0, 1), st.integers(-3, 3 * EPOCHS)), max_size=20)


@given(messages=MESSAGES)
def test_an_epoch_that_is_trained_twice_counts_once(place: Place, messages: list[tuple[int, int]]) -> None:
    jobs, counted = jobs_of(place.home), Counted()
    shown = _Shown([jobs[:3], jobs[3:]], counted, counted)
    for index, epochs in messages:
        shown.on_message(index, ["epochs", epochs, "a note"])
    assert all(amount >= 0 for amount in counted.done)
    assert sum(counted.done) <= 4 * EPOCHS
    for index in range(2):
        shown.end(index)
    assert sum(counted.done) == 4 * EPOCHS

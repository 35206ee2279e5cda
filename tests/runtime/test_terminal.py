"""Progress for callers from Python, and Ctrl-C in their scripts."""

from __future__ import annotations

import os
import pickle
import signal
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from helpers.paths import ROOT
from helpers.tiny import TinyTeacher, tiny_samples
from torch import Tensor, nn

import kdcache
from kdcache.errors import InterruptedRun
from kdcache.runtime.progress import delayed_task

RECIPE = ROOT / "pipelines" / "digits.yaml"


def short(*overrides: str) -> kdcache.Pipeline:
    return kdcache.load_pipeline(
        RECIPE, ["teacher.train.epochs=1", "student.train.epochs=1", "loss={name: ce}", *overrides]
    )


CALLS: dict[str, tuple[Callable[[Path, kdcache.Progress | bool | None], object], str]] = {
    "dump_teacher": (
        lambda out, progress: kdcache.dump_teacher(TinyTeacher(), tiny_samples(), out, progress=progress),
        "teacher: 37 of 37 rows",
    ),
    "train_teacher": (lambda out, progress: kdcache.train_teacher(short(), out, progress=progress), "training: "),
    "train_student": (
        lambda out, progress: kdcache.train_student(short(), None, out, progress=progress),
        "test: 500 of 500 images",
    ),
    "evaluate": (
        lambda out, progress: kdcache.evaluate(TinyTeacher(), tiny_samples(), progress=progress),
        "evaluate: 37 of 37 images",
    ),
}


@pytest.mark.parametrize("name", CALLS)
def test_progress_is_shown_on_request_alone(name: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    call, words = CALLS[name]
    call(tmp_path / "silent", None)
    call(tmp_path / "off", False)
    assert capfd.readouterr() == ("", "")
    call(tmp_path / "shown", True)
    shown = capfd.readouterr()
    assert words in shown.err
    assert shown.out == ""


def test_of_several_processes_the_first_one_shows_progress(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("RANK", "1")
    kdcache.evaluate(TinyTeacher(), tiny_samples(), progress=True)
    assert capfd.readouterr() == ("", "")


class Own:
    """A reporter of a user."""

    def __init__(self) -> None:
        self.done: dict[str, int] = {}

    @contextmanager
    def task(self, what: str, total: int, unit: str) -> Iterator[Own]:
        self.done.setdefault(what, 0)
        self.what = what
        yield self

    def advance(self, amount: int = 1, note: str = "") -> None:
        self.done[self.what] += amount

    def say(self, message: str) -> None:
        pass


def test_a_reporter_of_ones_own_is_told_of_everything(tmp_path: Path) -> None:
    reporter: kdcache.Progress = (own := Own())
    cache = kdcache.dump_teacher(TinyTeacher(), tiny_samples(), tmp_path / "c.kdcache", progress=reporter)
    kdcache.CachedDataset(tiny_samples(), cache, progress=reporter)
    kdcache.evaluate(TinyTeacher(), tiny_samples(), progress=reporter)
    assert (own.done["teacher"], own.done["evaluate"]) == (37, 37)


# Ctrl-C.


class Interrupted(nn.Module):
    """A network at whose n-th batch the user presses Ctrl-C."""

    def __init__(self, after: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Flatten(), nn.LazyLinear(10))
        self.after = after

    def forward(self, images: Tensor) -> Tensor:
        self.after -= 1
        if self.after == 0:
            os.kill(os.getpid(), signal.SIGINT)
        logits: Tensor = self.layers(images)
        return logits


def dump(out: Path, after: int) -> None:
    torch.manual_seed(0)
    model = Interrupted(-1)
    model(torch.zeros(1, 1, 4, 4))
    model.after = after
    kdcache.dump_teacher(model, tiny_samples(), out, shard_rows=8, batch_size=4, top_k=3, tail="uniform")


NETWORK = """
import os, signal, torch

class Network(torch.nn.Sequential):
    def __init__(self, num_classes):
        super().__init__(torch.nn.Flatten(), torch.nn.Linear(64, num_classes))
        self.steps = 0

    def forward(self, images):
        self.steps += self.training
        if self.steps == int(os.environ["STEP"]):
            os.kill(os.getpid(), signal.SIGINT)
        return super().forward(images)
"""


def interrupted(call: Callable[[], object]) -> str:
    """Return what an interrupted call says, after checking that its traceback is short."""
    try:
        call()
    except KeyboardInterrupt as error:
        assert not isinstance(error, Exception), "a user's loop over runs would continue with the next one"
        frames = traceback.extract_tb(error.__traceback__)
        own = [frame for frame in frames if "/kdcache/" in frame.filename]
        assert len(own) == 1, frames
        assert error.__suppress_context__
        assert isinstance(error, kdcache.InterruptedRun)
        assert pickle.loads(pickle.dumps(error)).fix == error.fix  # noqa: S301  # workers of a sweep send it
        assert error.fix
        return error.what
    return pytest.fail("the call was not interrupted")


def test_an_interrupted_dump_says_what_is_kept_and_resumes(tmp_path: Path) -> None:
    out = tmp_path / "c.kdcache"
    assert "keeps its finished shards" in interrupted(lambda: dump(out, 20))
    dump(out, -1)
    assert len(kdcache.open_cache(out)) == 37


def test_a_dump_that_is_interrupted_before_its_pass_leaves_nothing(tmp_path: Path) -> None:
    assert "nothing was written" in interrupted(lambda: dump(tmp_path / "c.kdcache", 1))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("network", ["student", "teacher"])
def test_an_interrupted_training_says_what_is_kept(
    network: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "network.py").write_text(NETWORK)
    pipeline = short(
        f"{network}.model={tmp_path / 'network.py'}:Network", f"{network}.train.epochs=3", f"{network}.args={{}}"
    )
    out = tmp_path / "run"

    def train() -> None:
        if network == "student":
            kdcache.train_student(pipeline, None, out)
        else:
            kdcache.train_teacher(pipeline, out)

    monkeypatch.setenv("STEP", "4")
    assert "no partial file was kept" in interrupted(train)
    assert [path.name for path in tmp_path.iterdir() if path.suffix != ".py"] in ([], ["__pycache__"])
    monkeypatch.setenv("STEP", "40")
    assert f"the run is kept in {out}.partial" in interrupted(train)
    monkeypatch.setenv("STEP", "-1")
    train()
    assert (out / "model.safetensors").is_file()


def test_an_interrupt_that_says_what_is_kept_is_not_replaced() -> None:
    first = InterruptedRun("kept", "resume")
    assert InterruptedRun.of(first, "other", "other") is first
    assert InterruptedRun.of(KeyboardInterrupt(), "other", "fix").args == ("other\nfix: fix",)


@pytest.mark.parametrize(("seconds", "reported"), [(0.0, 3), (3600.0, None)])
def test_an_operation_is_reported_if_it_takes_long(seconds: float, reported: int | None) -> None:
    own = Own()
    with delayed_task(own, "content keys", 3, "images", seconds) as task:
        for _ in range(3):
            task.advance()
    assert own.done.get("content keys") == reported

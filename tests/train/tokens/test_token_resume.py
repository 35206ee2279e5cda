"""Runs of language models that are killed or interrupted anywhere, and resumed: to the bit as if they never were."""

from __future__ import annotations

import json
import signal
from pathlib import Path

import pytest
from click.testing import Result
from helpers.language_training import cache_of, taught, text_pipeline
from helpers.processes import exit_code, in_a_process
from helpers.resuming import epochs_kept, train_alone, unfinished
from helpers.students import command, contents

EPOCHS = 3

STUDENT = """
import os, signal
from transformers import GPT2Config, GPT2LMHeadModel

class Student(GPT2LMHeadModel):
    # At the beginning of the epoch that the environment names something happens.
    def train(self, mode=True):
        if mode:
            self.epochs = getattr(self, "epochs", 0) + 1
            if self.epochs == int(os.environ.get("EPOCH", "-1")):
                exec(os.environ["HAPPENS"])
        return super().train(mode)

def student(vocab_size):
    return Student(GPT2Config(vocab_size=vocab_size, n_embd=16, n_layer=2, n_head=2, n_positions=64, resid_pdrop=0.2))
"""
CTRL_C = "os.kill(os.getpid(), signal.SIGINT)"


@pytest.fixture(scope="module")
def home_of_all(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A pipeline of a student with dropout, and its cache."""
    folder = tmp_path_factory.mktemp("resume")
    cache_of(taught([9, 4, 23, 3, 7, 12, 2, 30, 16, 8, 8, 5]), folder / "t.kdcache", top_k=8)
    (folder / "student.py").write_text(STUDENT)
    train = {"epochs": EPOCHS, "ema_decay": 0.8, "held_out_fraction": 0.2, "schedule": "onecycle"}
    loss = {"name": "ctkd", "temperature": {"ramp_epochs": 2}}
    pipeline = text_pipeline(f"{folder / 'student.py'}:student", {}, train=train, loss=loss)
    (folder / "text.yaml").write_text(pipeline.to_yaml())
    return folder


def arguments(home: Path, out: Path) -> list[object]:
    return ["train-student", home / "text.yaml", "--cache", home / "t.kdcache", "-o", out]


def train(home: Path, out: Path) -> Result:
    return command(*arguments(home, out))


@pytest.fixture(scope="module")
def whole(home_of_all: Path) -> Path:
    done = train(home_of_all, home_of_all / "whole")
    assert done.exit_code == 0, done.output
    assert json.loads((home_of_all / "whole" / "metrics.json").read_text())["epochs"] == EPOCHS
    return home_of_all / "whole"


def test_a_run_killed_at_any_commit_resumes_to_the_same_result(home_of_all: Path, whole: Path, tmp_path: Path) -> None:
    out, said = tmp_path / "run", tmp_path / "said"

    def runs(kill: tuple[str, bool] | None) -> int:
        process = in_a_process(train_alone, said, out, kill, *arguments(home_of_all, out))
        return exit_code(process)

    for after, kept in ((False, 0), (True, 1), (False, 1), (True, 2)):
        assert runs(("/state.pt.partial", after)) == -signal.SIGKILL, said.read_text()
        assert epochs_kept(out) == kept
        assert not out.exists()
    assert runs(("/metrics.json.partial", True)) == -signal.SIGKILL, said.read_text()
    assert runs(None) == 0, said.read_text()
    assert f"resuming after epoch {EPOCHS} of {EPOCHS}" in said.read_text()
    assert contents(out) == contents(whole)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["run", "said"]


def test_ctrl_c_keeps_the_run_and_says_how_to_resume(
    home_of_all: Path, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "run"
    monkeypatch.setenv("HAPPENS", CTRL_C)
    monkeypatch.setenv("EPOCH", "2")
    stopped = train(home_of_all, out)
    assert stopped.exit_code == 130, stopped.output
    assert f"the run is kept in {unfinished(out)}" in stopped.stderr
    assert 0 < epochs_kept(out) < EPOCHS
    monkeypatch.delenv("EPOCH")
    done = train(home_of_all, out)
    assert done.exit_code == 0
    assert "resuming after epoch" in done.stderr
    assert contents(out) == contents(whole)


def test_ctrl_c_in_the_first_epoch_leaves_nothing(
    home_of_all: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HAPPENS", CTRL_C)
    monkeypatch.setenv("EPOCH", "1")
    stopped = train(home_of_all, tmp_path / "run")
    assert stopped.exit_code == 130, stopped.output
    assert "no partial file was kept" in stopped.stderr
    assert list(tmp_path.iterdir()) == []

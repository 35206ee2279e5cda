"""A run that was killed or interrupted anywhere, and gone on with, ends as one that never was: to the byte."""

from __future__ import annotations

import csv
import json
import shutil
import signal
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import Result
from helpers.paths import ROOT
from helpers.processes import command_line, exit_code, in_a_process
from helpers.ranks import run_with_torchrun
from helpers.resuming import epochs_kept, train_alone, train_as_a_rank, unfinished
from helpers.students import command, contents
from helpers.trainers import meeting_place, together
from PIL import Image
from safetensors.torch import load_file

from kdcache import load_pipeline, open_cache, train_student

EPOCHS = 4

NETWORKS = """
import os, random, resource, signal, numpy, torch
from torch import nn

class Teacher(nn.Module):
    def __init__(self, num_classes):
        super().__init__()
        weight = torch.randn(16, num_classes, generator=torch.Generator().manual_seed(1))
        self.register_buffer("weight", weight)

    def forward(self, images):
        return images.flatten(1) @ self.weight

class Student(nn.Module):
    # Draws from every generator there is. At the step that the environment names something happens.
    def __init__(self, num_classes):
        super().__init__()
        self.layers = nn.Sequential(nn.Flatten(), nn.Linear(16, 12), nn.BatchNorm1d(12), nn.Dropout(0.3), nn.ReLU())
        self.classifier = nn.Linear(12, num_classes)
        self.steps = 0
        random.seed(1)
        numpy.random.seed(1)

    def forward(self, images):
        logits = self.classifier(self.layers(images))
        if self.training:
            self.steps += 1
            logits = logits + 0.1 * (random.random() + numpy.random.random())
            if self.steps == int(os.environ.get("STEP", "-1")):
                exec(os.environ["HAPPENS"])
        return logits
"""
STEPS = 5  # an epoch: 84 images in batches of 20
CTRL_C = "os.kill(os.getpid(), signal.SIGINT)"


@pytest.fixture(scope="module")
def home_of_all(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A pipeline over 120 images in two views, and its cache."""
    folder = tmp_path_factory.mktemp("resume")
    draw = np.random.default_rng(0)
    images, labels = draw.integers(0, 9, (120, 4, 4), np.uint8), draw.integers(0, 5, 120)
    np.savez(folder / "tiny.npz", images=images, labels=labels)
    (folder / "networks.py").write_text(NETWORKS)
    (folder / "tiny.yaml").write_text(
        f"dataset: {{name: npz, root: {folder / 'tiny.npz'}, validation_fraction: 0.2, test_fraction: 0.1}}\n"
        "transform: [RandomHorizontalFlip: {p: 0.5}, ToDtype: {dtype: float32}]\n"
        "eval_transform: [ToDtype: {dtype: float32}]\n"
        f"teacher: {{model: '{folder / 'networks.py'}:Teacher'}}\n"
        "cache: {views: 2, seed: 3}\n"
        "student:\n"
        f"  model: '{folder / 'networks.py'}:Student'\n"
        f"  train: {{epochs: {EPOCHS}, batch_size: 20, lr: 0.1, schedule: onecycle, ema_decay: 0.8,\n"
        "    view_order: random,\n"
        "    early_stopping_patience: 3, seed: 5}\n"
        "loss: {name: ctkd, temperature: {ramp_epochs: 2}}\n"
    )
    done = command("dump-teacher", folder / "tiny.yaml", "-o", folder / "tiny.kdcache")
    assert done.exit_code == 0, done.output
    return folder


def arguments(home: Path, out: Path, *more: object) -> list[object]:
    return ["train-student", home / "tiny.yaml", "--cache", home / "tiny.kdcache", "-o", out, *more]


def train(home: Path, out: Path, *more: object) -> Result:
    return command(*arguments(home, out, *more))


@pytest.fixture(scope="module")
def whole(home_of_all: Path) -> Path:
    """The run folder of a run that was never interrupted."""
    done = train(home_of_all, home_of_all / "whole")
    assert done.exit_code == 0, done.output
    assert json.loads((home_of_all / "whole" / "metrics.json").read_text())["epochs"] == EPOCHS
    return home_of_all / "whole"


def test_a_run_killed_at_any_commit_resumes_to_the_same_result(home_of_all: Path, whole: Path, tmp_path: Path) -> None:
    out, said = tmp_path / "run", tmp_path / "said"

    def runs(kill: tuple[str, bool] | None) -> int:
        process = in_a_process(train_alone, said, out, kill, *arguments(home_of_all, out))
        return exit_code(process)

    for epoch in range(1, EPOCHS + 1):
        for after in (False, True):
            assert runs(("/state.pt.partial", after)) == -signal.SIGKILL, said.read_text()
            assert epochs_kept(out) == epoch - 1 + after
            assert not out.exists()
    for commit in ("/model.safetensors.partial", "/metrics.json.partial"):
        assert runs((commit, True)) == -signal.SIGKILL, said.read_text()
        assert epochs_kept(out) == EPOCHS
    assert runs(("/state.pt", False)) == -signal.SIGKILL
    assert runs(None) == 0, said.read_text()
    assert said.read_text().count(f"resuming after epoch {EPOCHS} of {EPOCHS}") == 4
    assert contents(out) == contents(whole)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["run", "said"]


@pytest.mark.parametrize("commit", ["/state.pt", "/begun.json", ""])
def test_a_run_killed_while_its_folder_is_renamed_resumes_to_the_same_result(
    commit: str, home_of_all: Path, whole: Path, tmp_path: Path
) -> None:
    out, said = tmp_path / "run", tmp_path / "said"
    killed = in_a_process(train_alone, said, out, (commit, commit != ""), *arguments(home_of_all, out))
    assert exit_code(killed) == -signal.SIGKILL
    assert not out.exists()
    assert train(home_of_all, out).exit_code == 0
    assert contents(out) == contents(whole)


def test_ctrl_c_in_a_later_epoch_keeps_the_run_and_says_how_to_resume(
    home_of_all: Path, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "run"
    monkeypatch.setenv("HAPPENS", CTRL_C)
    monkeypatch.setenv("STEP", str(STEPS + 2))
    stopped = train(home_of_all, out)
    assert stopped.exit_code == 130
    assert f"the run is kept in {unfinished(out)}" in stopped.stderr
    assert "run the same command again to resume" in stopped.stderr
    assert epochs_kept(out) == 1
    monkeypatch.setenv("STEP", str(2 * STEPS + 1))  # of this process: in the fourth epoch
    assert train(home_of_all, out).exit_code == 130
    assert epochs_kept(out) == 3
    monkeypatch.delenv("STEP")
    done = train(home_of_all, out)
    assert done.exit_code == 0
    assert "resuming after epoch 3 of 4" in done.stderr
    assert contents(out) == contents(whole)


def test_ctrl_c_in_the_first_epoch_leaves_nothing(
    home_of_all: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HAPPENS", CTRL_C)
    monkeypatch.setenv("STEP", "2")
    stopped = train(home_of_all, tmp_path / "run")
    assert stopped.exit_code == 130
    assert "no partial file was kept" in stopped.stderr
    assert list(tmp_path.iterdir()) == []


@pytest.fixture
def interrupted(home_of_all: Path, tmp_path: Path) -> Path:
    """The name of a run that was interrupted in its third epoch."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HAPPENS", CTRL_C)
        patch.setenv("STEP", str(2 * STEPS + 1))
        assert train(home_of_all, tmp_path / "run").exit_code == 130
    return tmp_path / "run"


def test_another_command_for_its_folder_is_refused_and_changes_nothing(
    home_of_all: Path, whole: Path, interrupted: Path
) -> None:
    for words, *others in (
        ("student.train.lr was 0.1, and is 0.2 now", "--set", "student.train.lr=0.2"),
        ("loss.name was ctkd, and is kd now", "--loss", "kd"),
        ("student.train.epochs was 4, and is 9 now", "--set", "student.train.epochs=9"),
    ):
        refused = train(home_of_all, interrupted, *others)
        assert refused.exit_code == 4
        assert f"{unfinished(interrupted)} holds another run that was interrupted: {words}" in refused.stderr
        assert epochs_kept(interrupted) == 2
    assert train(home_of_all, interrupted).exit_code == 0
    assert contents(interrupted) == contents(whole)


def test_another_cache_is_another_run(home_of_all: Path, interrupted: Path, tmp_path: Path) -> None:
    other = tmp_path / "other.kdcache"
    assert command("dump-teacher", home_of_all / "tiny.yaml", "-o", other, "--set", "cache.dtype=uint8").exit_code == 0
    refused = command("train-student", home_of_all / "tiny.yaml", "--cache", other, "-o", interrupted)
    # The pipeline says how a cache is dumped, too; the cache that is at hand is another one all the same.
    assert refused.exit_code == 4
    assert "caches was ['" in refused.stderr


@pytest.mark.parametrize("damage", ["cut", "flipped", "emptied"])
def test_a_damaged_state_is_refused_and_kept(damage: str, home_of_all: Path, interrupted: Path) -> None:
    state = unfinished(interrupted) / "state.pt"
    whole = state.read_bytes()
    state.write_bytes(
        {"cut": whole[: len(whole) // 2], "flipped": bytes(b ^ 255 for b in whole[:64]) + whole[64:], "emptied": b""}[
            damage
        ]
    )
    refused = train(home_of_all, interrupted)
    assert refused.exit_code == 5
    assert f"cannot read {state}" in refused.stderr
    assert f"delete {unfinished(interrupted)}, and start again" in refused.stderr
    state.write_bytes(whole)
    assert train(home_of_all, interrupted).exit_code == 0


def test_a_run_that_diverges_leaves_nothing(
    home_of_all: Path, interrupted: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HAPPENS", "logits.mul_(float('nan'))")
    for step, out in ((1, tmp_path / "new"), (STEPS + 1, tmp_path / "later"), (1, interrupted)):
        monkeypatch.setenv("STEP", str(step))
        failed = train(home_of_all, out)
        assert failed.exit_code == 5
        assert "the loss became nan in epoch" in failed.stderr
    assert list(tmp_path.iterdir()) == []


UNREADABLE = "from kdcache.errors import CorruptError; raise CorruptError('cannot read image 3', 'mend it')"


@pytest.mark.parametrize(("happens", "code"), [(UNREADABLE, 5), ("raise RuntimeError('out of memory')", 1)])
def test_a_failure_that_can_be_fixed_keeps_the_state(
    happens: str, code: int, home_of_all: Path, whole: Path, interrupted: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HAPPENS", happens)
    monkeypatch.setenv("STEP", "2")
    assert train(home_of_all, interrupted).exit_code == code
    assert epochs_kept(interrupted) == 2
    assert train(home_of_all, interrupted.with_name("new")).exit_code == code
    assert not list(interrupted.parent.glob("new*"))
    monkeypatch.delenv("STEP")
    assert train(home_of_all, interrupted).exit_code == 0
    assert contents(interrupted) == contents(whole)


def test_a_full_disk_keeps_the_previous_state_and_the_run_resumes(
    home_of_all: Path, whole: Path, tmp_path: Path
) -> None:
    out, said = tmp_path / "run", tmp_path / "said"
    full = {"STEP": str(2 * STEPS + 1), "HAPPENS": "resource.setrlimit(resource.RLIMIT_FSIZE, (2000, 2000))"}
    process = in_a_process(command_line, said, full, *arguments(home_of_all, out, "--device", "cpu"))
    assert exit_code(process) == 3, said.read_text()
    assert "free disk space there, and run the same command again" in said.read_text()
    assert epochs_kept(out) == 2
    assert train(home_of_all, out).exit_code == 0
    assert contents(out) == contents(whole)


def test_patience_counts_the_epochs_before_an_interruption(
    home_of_all: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    patient = [
        "--set",
        "student.train.epochs=30",
        "--set",
        "student.train.lr=1e-9",
        "--set",
        "student.train.ema_decay=null",
    ]
    assert train(home_of_all, tmp_path / "whole", *patient).exit_code == 0
    rows = list(csv.DictReader((tmp_path / "whole" / "metrics.csv").read_text().splitlines()))
    assert len(rows) < 30
    monkeypatch.setenv("HAPPENS", CTRL_C)
    monkeypatch.setenv("STEP", str((len(rows) - 1) * STEPS + 1))
    assert train(home_of_all, tmp_path / "run", *patient).exit_code == 130
    monkeypatch.delenv("STEP")
    assert train(home_of_all, tmp_path / "run", *patient).exit_code == 0
    assert contents(tmp_path / "run") == contents(tmp_path / "whole")


def test_two_processes_of_which_one_is_killed_resume_to_the_same_result(home_of_all: Path, tmp_path: Path) -> None:
    def runs(out: Path, kill: tuple[str, bool] | None = None) -> list[int]:
        store = meeting_place()
        given = arguments(home_of_all, out, "--loss", "dtd+dist")
        processes = together(store, 2, train_as_a_rank, tmp_path / "said", out, kill, *given)
        codes = [exit_code(processes[0])]
        if codes != [0]:
            processes[1].kill()  # as torchrun does
        return [*codes, exit_code(processes[1])]

    whole, out = tmp_path / "whole", tmp_path / "run"
    assert runs(whole) == [0, 0], (tmp_path / "said").read_text()
    assert runs(out, ("/state.pt.partial", True))[0] == -signal.SIGKILL
    assert epochs_kept(out) == 1
    assert runs(out) == [0, 0], (tmp_path / "said").read_text()
    assert contents(out) == contents(whole)


@pytest.fixture(scope="module")
def whole_of_two(home_of_all: Path) -> Path:
    """The run folder of two processes that were never interrupted."""
    out = home_of_all / "whole of two"
    done = run_with_torchrun(2, [*arguments(home_of_all, out), "--device", "cpu"])
    assert done.returncode == 0, done.stderr
    return out


@pytest.mark.parametrize(
    ("victim", "step"), [(1, STEPS - 1), (0, 2 * STEPS + 2)], ids=["1, first epoch", "0, third epoch"]
)
def test_torchrun_starts_the_processes_again_which_resume_to_the_same_result(
    home_of_all: Path, whole_of_two: Path, tmp_path: Path, victim: int, step: int
) -> None:
    out = tmp_path / "run"
    first = f"(os.environ['RANK'], os.environ['TORCHELASTIC_RESTART_COUNT']) == ('{victim}', '0')"
    killed = tmp_path / "killed"
    once = f"{first} and (open({str(killed)!r}, 'w').close(), os.kill(os.getpid(), signal.SIGKILL))"
    command = [*arguments(home_of_all, out), "--device", "cpu"]
    done = run_with_torchrun(2, command, "--max-restarts=1", STEP=str(step), HAPPENS=once)
    assert done.returncode == 0, done.stderr
    assert killed.exists()  # torchrun may report another process first, which lost its connection to this one
    resumed = "resuming after epoch 2 of 4" in done.stderr
    assert resumed == (step > STEPS)
    assert contents(out) == contents(whole_of_two)


def test_a_finished_run_is_not_started_again_but_printed(home_of_all: Path, whole: Path) -> None:
    before = contents(whole)
    again = train(home_of_all, whole)
    assert (again.exit_code, f"{whole} is complete: nothing to do" in again.stderr) == (0, True)
    assert f"run       {whole}\n" in again.stdout
    metrics = json.loads((whole / "metrics.json").read_text())
    assert f"accuracy {metrics['test']['accuracy']:.2%}" in again.stdout
    assert contents(whole) == before


def test_a_finished_run_of_other_settings_is_refused_with_both_values(
    home_of_all: Path, whole: Path, tmp_path: Path
) -> None:
    before, other = contents(whole), tmp_path / "other.kdcache"
    assert command("dump-teacher", home_of_all / "tiny.yaml", "-o", other, "--set", "cache.dtype=uint8").exit_code == 0
    recipe, cache = home_of_all / "tiny.yaml", ["--cache", home_of_all / "tiny.kdcache"]
    commands: dict[str, list[object]] = {
        "student.train.lr was 0.1, and is 0.2 now; student.train.epochs was 4, and is 9 now": [
            *cache, "--set", "student.train.lr=0.2", "--set", "student.train.epochs=9"],
        "loss.name was ctkd, and is kd now": [*cache, "--loss", "kd"],
        "caches was ['sha256:": ["--cache", other],
        "student.train.seed was 5, and is 6 now": [*cache, "--seed", 6],
    }  # fmt: skip
    for words, more in commands.items():
        refused = command("train-student", recipe, "-o", whole, *more)
        assert refused.exit_code == 4, refused.stderr
        assert f"{whole} is a complete run with other settings: " in refused.stderr
        for part in words.split("; "):
            assert part in refused.stderr
    assert contents(whole) == before


def test_a_student_and_a_teacher_of_one_pipeline_are_not_the_same_run(tmp_path: Path) -> None:
    recipe, out = ROOT / "pipelines" / "digits.yaml", tmp_path / "run"
    few = ["--set", "teacher.train.epochs=1", "--set", "student.train.epochs=1", "-o", out]
    assert command("train-teacher", recipe, *few).exit_code == 0
    again = command("train-teacher", recipe, *few)
    assert (again.exit_code, "is complete: nothing to do" in again.stderr) == (0, True)
    refused = command("train-student", recipe, *few, "--loss", "ce")
    assert (refused.exit_code, "network was teacher, and is student now" in refused.stderr) == (4, True)


def test_after_a_class_was_renamed_a_run_is_another_one(tmp_path: Path) -> None:
    def images(*names: str) -> None:
        shutil.rmtree(tmp_path / "images", ignore_errors=True)
        for index, name in enumerate(names):
            folder = tmp_path / "images" / "train" / name
            folder.mkdir(parents=True)
            for number in range(6):
                pixels = np.full((8, 8, 3), 60 * index + number, np.uint8)
                Image.fromarray(pixels).save(folder / f"{number}.png")

    recipe = tmp_path / "mine.yaml"
    recipe.write_text(
        f"dataset: {{name: image-folder, root: {tmp_path / 'images'}, validation_fraction: 0, test_fraction: 0}}\n"
        "transform: [ToImage: {}, ToDtype: {dtype: float32, scale: true}]\n"
        "teacher: {model: 'small:mlp', train: {epochs: 1}}\n"
    )
    images("ant", "bee", "cat")
    assert command("train-teacher", recipe, "-o", tmp_path / "run").exit_code == 0
    assert command("train-teacher", recipe, "-o", tmp_path / "run").exit_code == 0
    images("bee", "cat", "wasp")
    weights = f"teacher.weights={tmp_path / 'run' / 'model.safetensors'}"
    dump = command("dump-teacher", recipe, "-o", tmp_path / "c.kdcache", "--set", weights)
    assert dump.exit_code == 4
    assert "was trained with other classes: 'ant' is 'bee' in the data set (3 class names differ)" in dump.stderr
    refused = command("train-teacher", recipe, "-o", tmp_path / "run")
    assert refused.exit_code == 4
    assert "class_names was ['ant', 'bee', 'cat'], and is ['bee', 'cat', 'wasp'] now" in refused.stderr


def test_the_result_of_a_finished_run_has_its_weights(home_of_all: Path, whole: Path) -> None:
    resolved = load_pipeline(home_of_all / "tiny.yaml")
    done = train_student(resolved, open_cache(home_of_all / "tiny.kdcache"), whole)
    metrics = json.loads((whole / "metrics.json").read_text())
    assert (done.best._asdict(), done.seconds) == (metrics["best"], metrics["seconds"])
    assert (done.test and done.test._asdict()) == metrics["test"]
    torch.testing.assert_close(dict(done.model.state_dict()), load_file(whole / "model.safetensors"))


@pytest.mark.parametrize("missing", ["metrics.json", "model.safetensors"])
def test_a_folder_that_is_not_a_finished_run_is_refused(
    missing: str, home_of_all: Path, whole: Path, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    shutil.copytree(whole, out)
    (out / missing).unlink()
    refused = train(home_of_all, out)
    assert refused.exit_code == 2
    assert f"{out} exists and is not a complete run: it has no {missing}" in refused.stderr


def test_a_folder_that_has_the_name_of_an_unfinished_run_by_chance_is_kept(home_of_all: Path, tmp_path: Path) -> None:
    notes = tmp_path / "run.partial" / "notes.txt"
    notes.parent.mkdir()
    notes.write_text("mine")
    refused = train(home_of_all, tmp_path / "run")
    assert (refused.exit_code, "was not made by kdcache" in refused.stderr) == (2, True)
    assert notes.read_text() == "mine"

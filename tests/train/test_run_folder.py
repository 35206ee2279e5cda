"""The run folder: what it holds, who is told of the metrics, and that several processes write one."""

from __future__ import annotations

import csv
import json
import os
import resource
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from helpers.paths import ROOT
from helpers.processes import command_line, exit_code
from helpers.trainers import meeting_place, together
from matplotlib.image import imread
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import (  # type: ignore[import-untyped]
    EventAccumulator,
)
from torch import nn

from kdcache import Cache, Pipeline, dump_teacher, load_pipeline, load_split, train_student
from kdcache.cache.decoded_teacher import DecodedTeacher
from kdcache.cli import main
from kdcache.errors import CorruptError, InterruptedRun, UsageError
from kdcache.train.loop import Epoch
from kdcache.train.plots import draw_curves
from kdcache.train.run_folder import check_free, check_trackers

RECIPE = ROOT / "pipelines" / "digits.yaml"
FILES = ["curves.png", "metrics.csv", "metrics.json", "model.safetensors", "resolved.yaml", "versions.json"]


def pipeline(*overrides: str) -> Pipeline:
    return load_pipeline(RECIPE, ["student.train.epochs=3", *overrides])


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Cache:
    torch.manual_seed(1)
    model, samples = nn.Sequential(nn.Flatten(), nn.Linear(64, 10)), load_split(pipeline().dataset, "train")
    return dump_teacher(model, samples, tmp_path_factory.mktemp("cache") / "digits.kdcache")


def lines(run: Path) -> list[dict[str, str]]:
    return list(csv.DictReader((run / "metrics.csv").read_text().splitlines()))


# Trackers.


def told(run: Path) -> dict[str, list[tuple[int, float]]]:
    """What TensorBoard would show: of each metric (epoch, value)."""
    (folder,) = {path.parent for path in (run / "logs").rglob("*tfevents*")}
    events = EventAccumulator(str(folder))
    events.Reload()
    return {tag: [(event.step, event.value) for event in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


def check_told(run: Path) -> None:
    rows = lines(run)
    found = told(run)
    for key in ("lr", "loss", "cross_entropy", "distillation", "validation_accuracy", "validation_loss"):
        assert [epoch for epoch, _ in found[key]] == [int(row["epoch"]) for row in rows]
        assert [value for _, value in found[key]] == pytest.approx([float(row[key]) for row in rows], rel=1e-6)
    assert {float(row[f"{who}_temperature"]) for row in rows for who in ("student", "teacher")} == {4.0}


def test_tensorboard_gets_every_line(cache: Cache, tmp_path: Path) -> None:
    train_student(pipeline("student.train.trackers=[tensorboard]"), cache, tmp_path / "run")
    check_told(tmp_path / "run")
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == sorted([*FILES, "logs"])


def test_tensorboard_gets_every_line_once_from_a_resumed_run(
    cache: Cache, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    resolved = pipeline("student.train.trackers=[tensorboard]")
    asked = 0
    original = DecodedTeacher.__call__

    def interrupting(teacher: Any, *given: Any) -> Any:
        nonlocal asked
        asked += 1
        if asked == 40:  # in the last of three epochs, each of 16 batches
            os.kill(os.getpid(), signal.SIGINT)
        return original(teacher, *given)

    monkeypatch.setattr(DecodedTeacher, "__call__", interrupting)
    with pytest.raises(InterruptedRun, match="the run is kept in"):
        train_student(resolved, cache, tmp_path / "run")
    train_student(resolved, cache, tmp_path / "run")
    check_told(tmp_path / "run")


def test_a_tracker_that_is_not_installed_is_refused_before_anything_is_written(cache: Cache, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="the tracker swanlab is not installed") as caught:
        train_student(pipeline("student.train.trackers=[tensorboard, swanlab]"), cache, tmp_path / "run")
    assert "pip install swanlab" in caught.value.fix
    assert list(tmp_path.iterdir()) == []
    check_trackers(["tensorboard"])


def test_a_run_that_fails_takes_its_logs_with_it(cache: Cache, tmp_path: Path) -> None:
    spoilt = pipeline(
        "student.train.trackers=[tensorboard]", "student.train.lr=1e12", "student.train.warmup_epochs=2.9"
    )
    with pytest.raises(CorruptError):
        train_student(spoilt, cache, tmp_path / "run")
    assert list(tmp_path.iterdir()) == []


# Curves.


def row(number: int, **more: Any) -> dict[str, Any]:
    plain = Epoch(number, 0, 0.1, 2.0 / number, 1.5 / number, 0.5 / number, None, None, None, None)
    return {**plain._asdict(), **more}


def inked(path: Path) -> np.ndarray[Any, Any]:
    """Which pixels of a PNG are not white, [H, W]."""
    assert path.read_bytes().startswith(b"\x89PNG")
    drawn: np.ndarray[Any, Any] = imread(path)[:, :, :3].min(axis=2) < 0.99
    return drawn


def test_curves_are_drawn_of_one_epoch_and_of_many_validated_or_not(tmp_path: Path) -> None:
    validated = {"validation_accuracy": 0.5, "validation_loss": 1.0}
    cases = {
        "one": [row(1)],
        "plain": [row(i) for i in range(1, 60)],
        "validated": [row(i, **validated) for i in range(1, 60)],
    }
    for name, rows in cases.items():
        draw_curves(rows, tmp_path / f"{name}.png")
        drawn = inked(tmp_path / f"{name}.png")
        assert drawn.shape == (432, 1080)
        assert 0.005 < drawn.mean() < 0.3
    # The second axes are there when there is something to show on them: their left edge is a line in the middle.
    middle = slice(500, 640)
    edges = {name: int(inked(tmp_path / f"{name}.png")[:, middle].sum(axis=0).max()) for name in cases}
    assert edges["validated"] > 250 > edges["plain"]


@pytest.mark.usefixtures("real_pictures")
def test_a_run_without_validation_has_curves_and_no_accuracies(tmp_path: Path) -> None:
    np.savez(tmp_path / "few.npz", images=np.random.default_rng(0).integers(0, 9, (40, 4, 4), np.uint8),
             labels=np.arange(40) % 4)  # fmt: skip
    (tmp_path / "few.yaml").write_text(
        f"dataset: {{name: npz, root: {tmp_path / 'few.npz'}, validation_fraction: 0, test_fraction: 0}}\n"
        "student: {model: 'small:mlp', train: {epochs: 2}}\nloss: {name: ce}\n"
    )
    result = train_student(load_pipeline(tmp_path / "few.yaml"), None, tmp_path / "run")
    assert (result.test, result.best.epoch, result.best.validation_accuracy) == (None, 2, None)
    assert [line["validation_accuracy"] for line in lines(tmp_path / "run")] == ["", ""]
    assert json.loads((tmp_path / "run" / "metrics.json").read_text())["test"] is None
    assert inked(tmp_path / "run" / "curves.png").any()


def test_a_run_is_not_written_into_a_cache_or_over_other_files(cache: Cache, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="exists"):
        check_free(tmp_path)
    with pytest.raises(UsageError):
        check_free(cache.path / "run")
    check_free(tmp_path / "run")


# A disk without room, for every file that is written.


@pytest.mark.parametrize("command", ["train-student", "sweep"])
@pytest.mark.parametrize("largest", [60, 1200, 3000, 11000, 30000])
def test_after_any_file_had_no_room_the_same_command_succeeds(command: str, largest: int, tmp_path: Path) -> None:
    more = {"train-student": ["--loss", "ce"], "sweep": ["--over", "loss=ce", "--seeds", "1"]}[command]
    epochs = ["--set", "student.train.epochs=1", "--device", "cpu"]
    arguments = [command, str(RECIPE), "-o", str(tmp_path / "out"), *more, *epochs]
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (largest, limits[1]))  # Python turns its signal into an OSError
    try:
        full = CliRunner().invoke(main, arguments)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert (full.exit_code, "free disk space" in full.stderr) == (3, True)
    if command == "train-student" and largest < 3000:
        assert list(tmp_path.iterdir()) == []
    again = CliRunner().invoke(main, arguments)
    assert again.exit_code == 0, again.output


# Several processes.


def train_as_a_rank(rank: int, environment: dict[str, str], folder: Path, arguments: list[str]) -> None:
    command_line(folder / f"said-{rank}", environment, *arguments)


def test_two_processes_write_one_run_folder_and_what_one_process_would(cache: Cache, tmp_path: Path) -> None:
    def arguments(out: str) -> list[str]:
        sets = ["student.train.epochs=2", "student.train.lr=0.002", "student.train.trackers=[tensorboard]"]
        given = ["train-student", RECIPE, "--cache", cache.path, "-o", tmp_path / out, "--device", "cpu", "--json"]
        return [*map(str, given), "--loss", "ctkd", *(part for one in sets for part in ("--set", one))]

    alone = CliRunner().invoke(main, arguments("alone"))
    assert alone.exit_code == 0, alone.output
    store = meeting_place()
    processes = together(store, 2, train_as_a_rank, tmp_path, arguments("run"))
    codes = [exit_code(process) for process in processes]
    first, second = ((tmp_path / f"said-{rank}").read_text() for rank in range(2))
    assert codes == [0, 0], first + second
    assert first.count('"best": {') == 1
    assert second == "", "the second has nothing to say"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["alone", "run", "said-0", "said-1"]
    run, expected = tmp_path / "run", tmp_path / "alone"
    assert sorted(path.name for path in run.iterdir()) == sorted([*FILES, "logs"])
    assert [epoch for epoch, _ in told(run)["teacher_temperature"]] == [1, 2]
    assert (run / "resolved.yaml").read_bytes() == (expected / "resolved.yaml").read_bytes()
    weights, others = load_file(run / "model.safetensors"), load_file(expected / "model.safetensors")
    torch.testing.assert_close(weights, others, rtol=1e-5, atol=1e-5)
    for ours, theirs in zip(lines(run), lines(expected), strict=True):
        assert ours.keys() == theirs.keys()
        for key, value in ours.items():
            assert float(value) == pytest.approx(float(theirs[key]), rel=1e-3)
    assert lines(expected)[1]["teacher_temperature"] != lines(expected)[0]["teacher_temperature"]
    found, wanted = (json.loads((folder / "metrics.json").read_text()) for folder in (run, expected))
    for varying in ("seconds", "best", "test"):
        found.pop(varying), wanted.pop(varying)
    assert found == wanted

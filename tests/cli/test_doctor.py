"""`kdcache doctor`: what is well is said to be well, and each thing that is not is named, with its exit code."""

from __future__ import annotations

import json
from importlib import metadata
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from torch import nn

from kdcache import dump_teacher, load_pipeline
from kdcache.cli import main
from kdcache.config.recipes import recipe
from kdcache.config.schema import ModelSpec
from kdcache.doctor import examine_machine
from kdcache.models import build_model, save_weights
from kdcache.models.teacher import load_teacher

MODELS = """
import torch

class Small(torch.nn.Module):
    def __init__(self, num_classes, outputs=None, largest=1000):
        super().__init__()
        self.linear = torch.nn.Linear(64, outputs or num_classes)
        self.largest = largest

    def forward(self, images):
        if len(images) > self.largest:
            raise torch.OutOfMemoryError("out of memory: tried to allocate 2 GiB")
        return self.linear(images.flatten(1))
"""


@pytest.fixture
def weights(tmp_path: Path) -> Path:
    save_weights(build_model(ModelSpec(model="small:mlp"), 10, (1, 8, 8)), tmp_path / "teacher.safetensors")
    (tmp_path / "models.py").write_text(MODELS)
    return tmp_path / "teacher.safetensors"


def doctor(*arguments: object) -> tuple[int, dict[str, str], str]:
    """Exit code, what was found by name, and what was said of the first problem."""
    done = CliRunner().invoke(main, ["doctor", *map(str, arguments), "--json", "--device", "cpu"])
    told = json.loads(done.stdout)
    assert told["ok"] == (done.exit_code == 0)
    assert told["ok"] == all(check["fix"] is None for check in told["checks"])
    return done.exit_code, {check["name"]: check["result"] for check in told["checks"]}, done.stderr


def sets(*given: str) -> list[str]:
    return [part for one in given for part in ("--set", one)]


def test_a_machine_is_described(tmp_path: Path) -> None:
    out = tmp_path / "not" / "there" / "yet"
    code, found, _ = doctor("-o", out)
    assert code == 0
    assert list(found) == ["versions", "extras", "devices", "accelerate", "memory", "disk", "write speed"]
    assert f"torch {torch.__version__.partition('+')[0]}" in found["versions"]
    assert "CPU cores" in found["devices"]
    assert found["write speed"].endswith(f"MB/s in {tmp_path}")
    assert list(tmp_path.iterdir()) == []
    plain = CliRunner().invoke(main, ["doctor", "-o", str(out)])
    assert (plain.exit_code, plain.stderr) == (0, "")
    assert [line.split("  ")[0] for line in plain.stdout.splitlines()] == list(found)


def test_extras_are_those_of_the_package(monkeypatch: pytest.MonkeyPatch) -> None:
    wanted = [
        "torch>=2.4",
        "pydantic>=2.7; extra == 'one'",
        "not-there[all]>=1 ; extra == 'two'",
        "pytest; extra == 'test'",
    ]
    monkeypatch.setattr(metadata, "requires", lambda _: wanted)
    (said,) = (finding.result for finding in examine_machine(Path()) if finding.what == "extras")
    assert said == f"not-there not installed, pydantic {metadata.version('pydantic')}"


def test_a_configuration_of_accelerate_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "default_config.yaml").touch()
    monkeypatch.setattr("kdcache.doctor.default_config_file", str(tmp_path / "default_config.yaml"))
    (said,) = (finding.result for finding in examine_machine(tmp_path) if finding.what == "accelerate")
    assert said == str(tmp_path / "default_config.yaml")


def test_a_folder_that_cannot_be_written_to_is_a_problem(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuses(**_: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("tempfile.TemporaryFile", refuses)  # root, who runs tests in containers, may write anywhere
    code, found, said = doctor("-o", tmp_path)
    assert (code, found["write speed"]) == (2, f"cannot write to {tmp_path}: Permission denied")
    assert "with -o" in said


def test_a_pipeline_that_can_run_is_well_and_its_cache_is_as_large_as_said(weights: Path, tmp_path: Path) -> None:
    code, found, _ = doctor("smoke", "-o", tmp_path, *sets(f"teacher.weights={weights}"))
    assert code == 0
    assert found["data set"] == "digits: 1,000 train, 297 validation, 500 test images, 10 classes"
    assert found["transform"] == "1 x 8 x 8"
    assert found["student"].startswith("1,210 parameters, ")
    pipeline = load_pipeline(recipe("smoke"), [f"teacher.weights={weights}"])
    loaded = load_teacher(pipeline)
    cache = dump_teacher(
        loaded.model, loaded.samples, tmp_path / "c.kdcache", transform=loaded.transform, spec=pipeline.cache
    )
    stored = sum(path.stat().st_size for path in (cache.path / "data.zarr").rglob("*") if path.is_file()) / 1e6
    said = float(found["teacher"].partition("estimated cache: ")[2].split()[0])
    assert said == pytest.approx(stored, rel=0.5)


PROBLEMS = {
    "teacher.weights=nowhere.pt": (2, "teacher", "checkpoint not found: nowhere.pt"),
    "teacher.args={width: 8}": (4, "teacher", "does not fit the network"),
    "dataset={name: image-folder, root: nowhere}": (2, "data set", "folder not found: nowhere"),
    "eval_transform=null": (2, "transform", "the transform is random"),
    "student.model=small:rnn": (2, "student", "no small network 'rnn'"),
    "student.weights=nowhere.pt": (2, "student", "checkpoint not found: nowhere.pt"),
    "student.train.trackers=[aim]": (2, "student", "the tracker aim is not installed"),
    "student.train.epochs=0": (2, "pipeline", "student.train.epochs"),
}


@pytest.mark.parametrize(("given", "expected"), PROBLEMS.items(), ids=PROBLEMS)
def test_what_is_not_well_is_named(given: str, expected: tuple[int, str, str], weights: Path, tmp_path: Path) -> None:
    code, what, words = expected
    found_code, found, said = doctor("smoke", "-o", tmp_path, *sets(f"teacher.weights={weights}", given))
    assert (found_code, words in found[what], words in said) == (code, True, True)


@pytest.mark.parametrize("args", ["outputs: 7", "largest: 10"])
@pytest.mark.parametrize("who", ["teacher", "student"])
def test_a_network_of_other_classes_or_too_large_is_found(who: str, args: str, weights: Path, tmp_path: Path) -> None:
    given = [f"teacher.weights={weights}", f"{who}.model={tmp_path / 'models.py'}:Small", f"{who}.args={{{args}}}"]
    if who == "teacher":
        outputs = 7 if "outputs" in args else 10
        save_weights(nn.ModuleDict({"linear": nn.Linear(64, outputs)}), weights)
    code, found, _ = doctor("smoke", "-o", tmp_path, *sets(*given))
    assert code == 4
    assert ("the data set has 10 classes" if "outputs" in args else "does not fit the memory") in found[who]


def test_a_full_disk_is_found(weights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kdcache.dump.estimate.free_disk", lambda _: 1000)
    code, found, _ = doctor("smoke", "-o", tmp_path, *sets(f"teacher.weights={weights}"))
    assert (code, "0.000 GB are free there" in found["teacher"]) == (3, True)


def test_all_problems_are_told_and_the_first_gives_the_exit_code(tmp_path: Path) -> None:
    given = sets("teacher.weights=nowhere.pt", "student.model=small:rnn")
    done = CliRunner().invoke(main, ["doctor", "smoke", "-o", str(tmp_path), "--device", "cpu", *given])
    assert done.exit_code == 2
    assert done.stdout.count("PROBLEM: ") == 2
    assert "error: checkpoint not found: nowhere.pt" in done.stderr
    assert "train-teacher" in done.stderr
    done = CliRunner().invoke(main, ["doctor", "--set", "cache.views=2"])
    assert (done.exit_code, "--set needs a pipeline" in done.stderr) == (2, True)


def test_a_pipeline_of_a_teacher_or_a_student_alone_is_looked_at(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    np.savez(tmp_path / "mine.npz", images=rng.integers(0, 255, (40, 8, 8), np.uint8), labels=np.arange(40) % 4)
    (tmp_path / "mine.yaml").write_text(
        f"dataset: {{name: npz, root: {tmp_path / 'mine.npz'}}}\nstudent: {{model: 'small:mlp'}}"
    )
    code, found, _ = doctor(tmp_path / "mine.yaml")
    assert (code, list(found)[-3:]) == (0, ["data set", "transform", "student"])
    assert found["data set"] == "mine: 32 train, 4 validation, 4 test images, 4 classes"

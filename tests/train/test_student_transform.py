"""A student with a transform of its own is validated, tested and evaluated on images as it was trained on."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from click.testing import CliRunner, Result

from kdcache.cli import main
from kdcache.config.loader import load_pipeline
from kdcache.config.schema import Pipeline
from kdcache.config.transform import Transform
from kdcache.errors import UsageError
from kdcache.train.student_transform import evaluation_transform

FLOAT: dict[str, Any] = {"ToDtype": {"dtype": "float32", "scale": True}}
INVERTED = {"Normalize": {"mean": [0.5] * 3, "std": [-0.5] * 3}}
PLAIN = {"Normalize": {"mean": [0.5] * 3, "std": [0.5] * 3}}
SEEN: Transform = [FLOAT, PLAIN]


def command(*arguments: object) -> Result:
    return CliRunner().invoke(main, [*map(str, arguments), "--device", "cpu"])


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A pipeline over images of four classes, told apart by brightness and color, and the cache of its teacher."""
    folder = tmp_path_factory.mktemp("own")
    draw = np.random.default_rng(0)
    labels = np.arange(400) % 4
    colors = np.array([[10, 10, 120], [200, 30, 30], [110, 190, 60], [240, 240, 240]])
    images = np.clip(colors[labels][:, None, None] + draw.integers(-20, 21, (400, 8, 8, 3)), 0, 255).astype(np.uint8)
    np.savez(folder / "colors.npz", images=images, labels=labels)
    content = {
        "dataset": {"name": "npz", "root": str(folder / "colors.npz"), "validation_fraction": 0.2},
        "transform": SEEN,
        "teacher": {"model": "small:cnn", "args": {"width": 4}, "train": {"epochs": 8}},
        "cache": {"dtype": "float32"},
        "student": {"model": "small:cnn", "args": {"width": 4}, "train": {"epochs": 8}},
        "loss": {"name": "kd"},
    }
    (folder / "colors.yaml").write_text(yaml.safe_dump(content))
    assert command("train-teacher", folder / "colors.yaml", "-o", folder / "teacher").exit_code == 0
    weights = f"teacher.weights={folder / 'teacher' / 'model.safetensors'}"
    done = command("dump-teacher", folder / "colors.yaml", "-o", folder / "c.kdcache", "--set", weights)
    assert done.exit_code == 0, done.output
    return folder


CASES: dict[str, tuple[Transform, Transform]] = {
    "another normalization": ([FLOAT, INVERTED], [FLOAT, INVERTED]),
    "another normalization, with augmentations": (
        [{"RandomHorizontalFlip": {}}, {"RandomCrop": {"size": 8, "padding": 1}}, FLOAT, INVERTED],
        [FLOAT, INVERTED],
    ),
    "another size": (
        [{"Resize": {"size": [16, 16]}}, FLOAT, INVERTED],
        [{"Resize": {"size": [16, 16]}}, FLOAT, INVERTED],
    ),
    "channels permuted": (
        [{"RandomApply": {"transforms": [{"RandomChannelPermutation": {}}], "p": 0.3}}, FLOAT, INVERTED],
        [FLOAT, INVERTED],
    ),
    "gray": ([{"Grayscale": {"num_output_channels": 3}}, FLOAT, INVERTED],
             [{"Grayscale": {"num_output_channels": 3}}, FLOAT, INVERTED]),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_validation_test_and_evaluate_use_the_fixed_steps_of_the_students_transform(
    case: str, folder: Path, tmp_path: Path
) -> None:
    own, expected = CASES[case]
    run, sets = tmp_path / "run", ["--set", f"student.transform={json.dumps(own)}"]
    done = command("train-student", folder / "colors.yaml", "--cache", folder / "c.kdcache", "-o", run, *sets)
    assert done.exit_code == 0, done.output
    assert load_pipeline(run / "resolved.yaml").eval_transform == expected
    told = f"the student is evaluated with {json.dumps(expected)}"
    assert (told in done.stderr) == (expected != own)
    metrics = json.loads((run / "metrics.json").read_text())
    assert metrics["best"]["validation_accuracy"] > 0.9
    assert metrics["test"]["accuracy"] > 0.9
    evaluated = command("evaluate", run, "--cache", folder / "c.kdcache", "--json")
    (score,) = json.loads(evaluated.stdout)["scores"]
    assert score["top1"] == metrics["test"]["accuracy"]
    assert score["negative_log_likelihood"] == pytest.approx(metrics["test"]["loss"], rel=1e-4)
    assert score["teacher"]["same_class"] > 0.9, "compared with the teacher, the student has its own pixels too"
    checkpoint = command(
        "evaluate", "--pipeline", folder / "colors.yaml", *sets, "--network", "student", run / "model.safetensors",
        "--json",
    )  # fmt: skip
    assert json.loads(checkpoint.stdout)["scores"][0]["top1"] == score["top1"]


def test_a_sweep_measures_its_students_in_the_same_way(folder: Path, tmp_path: Path) -> None:
    own = f"student.transform={json.dumps([FLOAT, INVERTED])}"
    done = command(
        "sweep", folder / "colors.yaml", "--cache", folder / "c.kdcache", "-o", tmp_path / "sweep", "--seeds", 1,
        "--set", own, "--json",
    )  # fmt: skip
    assert done.exit_code == 0, done.output
    assert json.loads(done.stdout)["points"][0]["test_mean"] > 0.9


def pipeline(folder: Path, own: Transform, **more: Any) -> Pipeline:
    loaded = load_pipeline(folder / "colors.yaml", [f"student.transform={json.dumps(own)}"])
    return loaded.model_copy(update=more)


@pytest.mark.parametrize(
    "step",
    [
        {"RandomRotation": {"degrees": [-10, 10]}},
        {"RandomAffine": {"degrees": 5, "scale": [0.9, 1.1], "shear": [-5, 5]}},
        {"ColorJitter": {"brightness": [0.5, 2.0], "hue": 0.1}},
        {"RandomErasing": {"p": 1.0, "scale": [0.02, 0.1]}},
    ],
)
def test_an_augmentation_that_may_change_nothing_is_left_out(step: dict[str, Any], folder: Path) -> None:
    resolved = pipeline(folder, [step, FLOAT, PLAIN])
    assert evaluation_transform(resolved, resolved.section("student"), SEEN) == [FLOAT, PLAIN]


@pytest.mark.parametrize(
    "step",
    [
        {"RandomInvert": {"p": 1.0}},
        {"RandomHorizontalFlip": {"p": 1}},
        {"RandomRotation": {"degrees": [90, 90]}},
        {"RandomAffine": {"degrees": 5, "scale": [2.0, 2.5]}},
        {"RandomAffine": {"degrees": 0, "shear": [-5, 5, 10, 20]}},
        {"ColorJitter": {"brightness": [2.0, 2.0]}},
        {"RandomApply": {"transforms": [{"RandomRotation": {"degrees": [10, 20]}}]}},
        {"RandomApply": {"transforms": [{"RandomInvert": {}}], "p": 1}},
        {"RandomApply": {"transforms": [PLAIN]}},
        {"RandomOrder": {"transforms": [{"RandomInvert": {}}]}},
        {"RandomResize": {"min_size": 4, "max_size": 9}},
    ],
)
def test_what_is_not_an_augmentation_alone_is_refused_with_a_proposal(step: dict[str, Any], folder: Path) -> None:
    resolved = pipeline(folder, [step, FLOAT, PLAIN])
    with pytest.raises(UsageError, match=r"cannot be derived from student\.transform") as caught:
        evaluation_transform(resolved, resolved.section("student"), SEEN)
    assert f"eval_transform: {json.dumps([FLOAT, PLAIN])}" in caught.value.fix


def test_random_crops_to_another_size_are_refused_with_center_crops_proposed(folder: Path, tmp_path: Path) -> None:
    for step, proposed in (
        ({"RandomResizedCrop": {"size": 7}}, [{"Resize": {"size": [8]}}, {"CenterCrop": {"size": 7}}]),
        ({"RandomCrop": {"size": 6}}, [{"CenterCrop": {"size": 6}}]),
    ):
        own = ["--set", f"student.transform={json.dumps([step, FLOAT])}"]
        out = tmp_path / "run"
        done = command("train-student", folder / "colors.yaml", "--cache", folder / "c.kdcache", "-o", out, *own)
        assert done.exit_code == 2
        assert f"eval_transform: {json.dumps([*proposed, FLOAT])}" in done.stderr
        assert list(tmp_path.iterdir()) == []


def test_an_eval_transform_of_the_pipeline_is_used_as_it_is(folder: Path) -> None:
    given: Transform = [FLOAT]
    resolved = pipeline(folder, [{"RandomInvert": {"p": 1.0}}, FLOAT], eval_transform=given)
    assert evaluation_transform(resolved, resolved.section("student"), SEEN) == given

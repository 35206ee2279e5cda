"""`evaluate` and `report` on samples that are not images, on caches with other outputs, and without class logits."""

from __future__ import annotations

import json
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
from helpers.cli import kdcache, ok, refused

_CODE = """
from torch import nn

class Net(nn.Module):
    def __init__(self, num_classes, width):
        super().__init__()
        self.body = nn.Sequential(nn.Linear(6, width), nn.ReLU())
        self.head = nn.Linear(width, num_classes)
    def forward(self, x):
        return self.head(self.body(x))

def big(num_classes):
    return Net(num_classes, 24)

def small(num_classes):
    return Net(num_classes, 8)

def embedder(num_classes):
    return nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 24))
"""


class Runs(NamedTuple):
    """A cache of feature vectors with logits and features, and students with class logits and without."""

    folder: Path

    @property
    def cache(self) -> Path:
        return self.folder / "c.kdcache"

    @property
    def classifier(self) -> Path:
        return self.folder / "classifier"

    @property
    def embedder(self) -> Path:
        return self.folder / "embedder"


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Runs:
    made = Runs(tmp_path_factory.mktemp("outputs"))
    rng = np.random.default_rng(0)
    x = rng.normal(size=(200, 6)).astype(np.float32)
    np.savez(made.folder / "x.npz", x=x, y=(x @ rng.normal(size=(6, 3))).argmax(1))
    (made.folder / "net.py").write_text(_CODE)
    (made.folder / "p.yaml").write_text(
        f"""
dataset: {{name: npz, root: {made.folder}/x.npz}}
teacher: {{model: {made.folder}/net.py:big, train: {{epochs: 3}}}}
cache: {{outputs: {{features: {{fidelity: 0.01}}}}}}
student: {{model: {made.folder}/net.py:small, train: {{epochs: 2}}}}
loss: {{logits: {{name: dtkd}}, features: {{name: rkd, weight: 0.1}}}}
"""
    )
    pipeline = made.folder / "p.yaml"
    ok("train-teacher", pipeline, "-o", made.folder / "t")
    weights = f"teacher.weights={made.folder}/t/model.safetensors"
    ok("dump-teacher", pipeline, "--set", weights, "-o", made.cache)
    ok("train-student", pipeline, "--cache", made.cache, "-o", made.classifier)
    alone = ["--set", f"student.model={made.folder}/net.py:embedder"]
    loss = [
        "--set",
        "loss={logits: false, features: {name: mse}}",
        "--set",
        "student.outputs={features: {source: '2'}}",
    ]
    ok("train-student", pipeline, "--cache", made.cache, *alone, *loss, "-o", made.embedder)
    return made


def test_a_report_on_samples_that_are_not_images(runs: Runs, tmp_path: Path) -> None:
    told = json.loads(ok("report", runs.classifier, "--cache", runs.cache, "-o", tmp_path / "r.html", "--json"))
    page = (tmp_path / "r.html").read_text()
    assert "Hardest samples" in page and "log p(label)" in page and "data:image/png" not in page
    assert "Other outputs of the teacher" in page and "vectors of 24" in page
    assert told["outputs"]["output features"].startswith("vectors of 24")
    assert "top-1" in ok("evaluate", runs.classifier, "--cache", runs.cache)


@pytest.mark.parametrize("with_cache", [True, False])
def test_a_report_on_a_student_without_class_logits(with_cache: bool, runs: Runs, tmp_path: Path) -> None:
    cache = ["--cache", runs.cache] if with_cache else []
    told = json.loads(ok("report", runs.embedder, *cache, "-o", tmp_path / "r.html", "--json"))
    page = (tmp_path / "r.html").read_text()
    assert told["notes"] == ["The runs have no class logits: sections of class predictions are left out."]
    assert "Learning curves" in page and "Calibration" not in page and "kdcache report RUN" not in page
    assert ("Other outputs of the teacher" in page) == with_cache


def test_a_run_names_the_losses_of_all_outputs(runs: Runs, tmp_path: Path) -> None:
    named = [json.loads((run / "metrics.json").read_text())["loss"] for run in (runs.classifier, runs.embedder)]
    assert named == ["dtkd + features: rkd", "features: mse"]
    told = kdcache(
        "train-student", runs.folder / "p.yaml", "--cache", runs.cache, "--loss", "kd", "-o", tmp_path / "run"
    )
    assert told.exit_code == 0
    assert "--loss kd replaces the losses of the pipeline, that of the output features too" in told.stderr
    assert json.loads((tmp_path / "run/metrics.json").read_text())["loss"] == "kd"


def test_what_has_no_class_logits_is_not_measured_by_them(runs: Runs, tmp_path: Path) -> None:
    error = refused(2, "evaluate", runs.embedder)
    assert "was trained without class logits" in error and f"kdcache evaluate {runs.embedder} --cache" in error
    error = refused(2, "report", runs.classifier, runs.embedder, "-o", tmp_path / "r.html")
    assert "was trained without class logits, and" in error and not (tmp_path / "r.html").exists()

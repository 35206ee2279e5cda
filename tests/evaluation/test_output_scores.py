"""`evaluate` on the vectors, scores and further classes of students, against plain numpy on what they say."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import pytest
import torch
from helpers.cli import kdcache, ok, refused
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file

from kdcache import load_split, open_cache
from kdcache.config.yaml_lines import write_yaml
from kdcache.evaluation.output_scores import linear_cka, measures_of
from kdcache.train.held_out import held_out_ids

COUNT = 200
_CODE = """
from torch import nn

class Teacher(nn.Module):
    def __init__(self, num_classes):
        super().__init__()
        self.body = nn.Sequential(nn.Linear(6, 9), nn.Tanh())
        self.score, self.kinds, self.head = nn.Linear(9, 1), nn.Linear(9, 4), nn.Linear(9, num_classes)
    def forward(self, x):
        values = self.body(x)
        return {"logits": self.head(values), "body": values, "score": self.score(values), "kinds": self.kinds(values)}

class Student(nn.Module):
    def __init__(self, num_classes, width=4):
        super().__init__()
        self.body = nn.Linear(6, width)
        self.score, self.kinds = nn.Linear(width, 1), nn.Linear(width, 4)
    def forward(self, x):
        values = self.body(x)
        return {"body": values, "score": self.score(values), "kinds": self.kinds(values)}

class Classifier(Student):
    def __init__(self, num_classes, width=4):
        super().__init__(num_classes, width)
        self.head = nn.Linear(width, num_classes)
    def forward(self, x):
        return {**super().forward(x), "logits": self.head(self.body(x))}
"""
OUTPUTS = {
    "body": {"encoding": "float32"},
    "score": {"kind": "score"},
    "kinds": {"kind": "classes", "fidelity": 0.001},
}


class Runs(NamedTuple):
    """A cache of three outputs and class logits, and students of them."""

    folder: Path

    @property
    def cache(self) -> Path:
        return self.folder / "c.kdcache"

    @property
    def student(self) -> Path:
        return self.folder / "student"

    @property
    def x(self) -> npt.NDArray[np.float32]:
        x: npt.NDArray[np.float32] = np.load(self.folder / "x.npz")["x"]
        return x

    @property
    def groups(self) -> npt.NDArray[np.int64]:
        groups: npt.NDArray[np.int64] = np.load(self.folder / "x.npz")["groups"]
        return groups


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Runs:
    made = Runs(tmp_path_factory.mktemp("outputs"))
    rng = np.random.default_rng(0)
    x = rng.normal(size=(COUNT, 6)).astype(np.float32)
    groups = np.array([(4 * query, 4 * query + 1, 4 * query + 2) for query in range(COUNT // 4)])
    np.savez(made.folder / "x.npz", x=x, y=(x @ rng.normal(size=(6, 3))).argmax(1), groups=groups)
    (made.folder / "net.py").write_text(_CODE)
    root, net = str(made.folder / "x.npz"), f"{made.folder}/net.py"
    losses = {
        "logits": False,
        "body": {"name": "mse"},
        "score": {"name": "mse"},
        "kinds": {"name": "kd"},
    }
    pipeline: dict[str, Any] = {
        "dataset": {"name": "npz", "root": root, "validation_fraction": 0.0, "test_fraction": 0.0},
        "teacher": {"model": f"{net}:Teacher", "train": {"epochs": 1, "batch_size": 60}},
        "cache": {"outputs": OUTPUTS},
        "student": {"model": f"{net}:Student", "train": {"epochs": 8, "batch_size": 30, "held_out_fraction": 0.2}},
        "loss": losses,
    }
    (made.folder / "p.yaml").write_text(write_yaml(pipeline))
    whole = {**pipeline, "student": {**pipeline["student"], "train": {"epochs": 1, "batch_size": 30}}}
    (made.folder / "whole.yaml").write_text(write_yaml(whole))
    classes = {**whole, "loss": {"logits": {"name": "kd"}, "body": {"name": "rkd"}}}
    classes["student"] = {**classes["student"], "model": f"{net}:Classifier"}
    classes["dataset"] = {**classes["dataset"], "test_fraction": 0.2}
    (made.folder / "classes.yaml").write_text(write_yaml(classes))
    ok("train-teacher", made.folder / "p.yaml", "-o", made.folder / "t")
    weights = ["--set", f"teacher.weights={made.folder}/t/model.safetensors"]
    ok("dump-teacher", made.folder / "p.yaml", *weights, "-o", made.cache)
    for name, run in {"p": "student", "whole": "whole", "classes": "classes"}.items():
        known = ["--allow-missing"] if name == "classes" else []
        said = ok("train-student", made.folder / f"{name}.yaml", "--cache", made.cache, *known, "-o", made.folder / run)
        assert ("held-out loss" in said) == (run == "student")
        assert ("not measured: no test split, or no class logits" in said) == (run != "classes")
    return made


def said_by(runs: Runs) -> dict[str, npt.NDArray[np.float64]]:
    """What the student says of all samples, by hand."""
    weights = {name: value.double().numpy() for name, value in load_file(runs.student / "model.safetensors").items()}
    maps = load_file(runs.student / "projections.safetensors")
    body = runs.x @ weights["body.weight"].T + weights["body.bias"]
    return {
        "body": body @ maps["body.weight"].double().numpy().T + maps["body.bias"].double().numpy(),
        **{name: body @ weights[f"{name}.weight"].T + weights[f"{name}.bias"] for name in ("score", "kinds")},
    }


def scores_of(*arguments: object) -> dict[str, dict[str, Any]]:
    told = json.loads(ok("evaluate", *arguments, "--json"))
    return {score["output"]: score for score in told["outputs"]}


def test_the_outputs_of_a_student_are_measured_on_samples_that_were_held_out(runs: Runs) -> None:
    samples = load_split("npz", "train", root=runs.folder / "x.npz", validation_fraction=0.0, test_fraction=0.0)
    held = held_out_ids(samples, 0.2)
    groups = runs.groups[np.isin(runs.groups, held).all(axis=1)]
    ids, said, cache = groups.flatten(), said_by(runs), open_cache(runs.cache)
    assert 20 <= len(ids) == len(held) <= 42
    found = scores_of(runs.student, "--cache", runs.cache)
    assert all(score["held_out"] and score["rows"] == len(ids) for score in found.values())

    def teacher(name: str) -> npt.NDArray[np.float64]:
        values: npt.NDArray[np.float64] = cache.teacher(name)(torch.from_numpy(ids)).double().numpy()
        return values

    ours, theirs = said["body"][ids], teacher("body")
    cosines = (ours * theirs).sum(1) / np.linalg.norm(ours, axis=1) / np.linalg.norm(theirs, axis=1)
    assert found["body"]["one_minus_cosine"] == pytest.approx(1 - cosines.mean(), rel=1e-4)
    error = ((ours - theirs) ** 2).sum() / ((theirs - theirs.mean(0)) ** 2).sum()
    assert found["body"]["relative_error"] == pytest.approx(error, rel=1e-4)

    ours, theirs = said["score"][ids, 0], teacher("score")[:, 0]
    assert found["score"]["correlation"] == pytest.approx(np.corrcoef(ours, theirs)[0, 1], rel=1e-4)
    mine, its = ours.reshape(-1, 3), theirs.reshape(-1, 3)
    pairs = [(group[a] > group[b], other[a] > other[b]) for group, other in zip(mine, its, strict=True)
             for a, b in ((0, 1), (0, 2), (1, 2))]  # fmt: skip
    assert found["score"]["same_order"] == pytest.approx(np.mean([one == two for one, two in pairs]))

    ours, theirs = said["kinds"][ids], teacher("kinds")
    assert found["kinds"]["same_class"] == pytest.approx((ours.argmax(1) == theirs.argmax(1)).mean())
    assert found["kinds"]["one_minus_cosine"] is None and found["body"]["same_order"] is None


def test_the_table_says_on_which_samples(runs: Runs) -> None:
    text = ok("evaluate", runs.student, runs.folder / "whole", "--cache", runs.cache)
    assert "held out" in text and "150 trained on" in text and "student.train.held_out_fraction=0.1" in text
    for column in ("1 - cosine", "error", "CKA", "correlation", "same order", "agreement", "TV, T=1"):
        assert column in text
    assert "top-1" not in text  # none of them has class logits


def test_students_with_class_logits_have_both_tables(runs: Runs) -> None:
    runs_of_both = [runs.folder / "classes", runs.student]
    text = ok("evaluate", *runs_of_both, "--cache", runs.cache, "--rows", "12")
    of_classes, of_outputs = text.split("Outputs, against the teacher")
    assert "top-1" in of_classes and str(runs.student) not in of_classes
    assert str(runs.student) in of_outputs and str(runs.folder / "classes") in of_outputs
    assert "12 held out" in of_outputs and "12 trained on" in of_outputs
    assert "was trained without class logits" in refused(2, "evaluate", *runs_of_both)


def test_a_cache_without_class_logits_has_nothing_to_compare_a_classifier_with(runs: Runs, tmp_path: Path) -> None:
    only = tmp_path / "only.kdcache"
    ok("select", runs.cache, "--output", "body", "-o", only)
    plain = tmp_path / "plain"
    ok("train-student", runs.folder / "classes.yaml", "--set", "loss={name: ce}", "-o", plain)
    assert "holds no class logits" in refused(4, "evaluate", plain, "--cache", only)
    told = kdcache("evaluate", runs.folder / "classes", "--cache", only)
    assert told.exit_code == 0, told.stderr
    assert "are not compared" in told.stderr and "CKA" in told.stdout


def test_an_output_of_another_length_without_a_map_is_measured_by_its_alignment() -> None:
    generator = torch.Generator().manual_seed(0)
    student, teacher = (torch.randn(50, width, generator=generator, dtype=torch.float64) for width in (3, 8))
    measures = measures_of("vector", student, teacher)
    assert measures.one_minus_cosine is None and measures.relative_error is None
    assert measures.alignment is not None and 0 < measures.alignment < 1


@given(st.integers(0, 10**6), st.integers(1, 6), st.floats(0.1, 10))
def test_the_alignment_of_vectors_is_that_of_their_kernels(seed: int, width: int, scale: float) -> None:
    """Linear CKA is HSIC(K, L) / sqrt(HSIC(K, K) HSIC(L, L)) of centered linear kernels, and ignores rotations."""
    rng = np.random.default_rng(seed)
    x, y = rng.normal(size=(20, width)), rng.normal(size=(20, 4))
    center = np.eye(20) - 1 / 20
    ours, theirs = (center @ values @ values.T @ center for values in (x, y))
    wanted = (ours * theirs).sum() / np.sqrt((ours * ours).sum() * (theirs * theirs).sum())
    assert linear_cka(torch.from_numpy(x), torch.from_numpy(y)) == pytest.approx(wanted, rel=1e-9)
    rotation = np.linalg.qr(rng.normal(size=(width, width)))[0]
    assert linear_cka(torch.from_numpy(x), torch.from_numpy(scale * x @ rotation + 3)) == pytest.approx(1, rel=1e-9)


def test_measures_of_constant_outputs_are_not_given() -> None:
    same, other = torch.ones(6, 1, dtype=torch.float64), torch.arange(6, dtype=torch.float64)[:, None]
    measures = measures_of("score", other, same, 2)
    assert measures.relative_error is None and measures.correlation is None and measures.same_order is None
    assert measures_of("score", same, other, 2).same_order == 0
    assert linear_cka(same, other) is None


@pytest.mark.parametrize("reordered", [True, False])
def test_a_data_set_in_another_order_is_matched_by_content(reordered: bool, runs: Runs, tmp_path: Path) -> None:
    arrays = np.load(runs.folder / "x.npz")
    order = np.random.default_rng(1).permutation(COUNT) if reordered else np.arange(COUNT)
    inverse = np.argsort(order)
    np.savez(tmp_path / "x.npz", x=arrays["x"][order], y=arrays["y"][order], groups=inverse[arrays["groups"]])
    pipeline = (runs.folder / "p.yaml").read_text().replace(str(runs.folder / "x.npz"), str(tmp_path / "x.npz"))
    (tmp_path / "p.yaml").write_text(pipeline)
    aligned = ["--align"] if reordered else []
    ok("train-student", tmp_path / "p.yaml", "--cache", runs.cache, *aligned, "-o", tmp_path / "run")
    found, wanted = (scores_of(run, "--cache", runs.cache) for run in (tmp_path / "run", runs.student))
    assert found["score"]["rows"] == wanted["score"]["rows"]
    if not reordered:
        assert found["score"]["correlation"] == wanted["score"]["correlation"]

"""Samples of a cache that a student is not trained on: the epoch selected by their loss, and what `evaluate` says."""

from __future__ import annotations

import csv
import json
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from helpers.cli import ok
from helpers.interrupts import interrupt_after_checkpoints
from helpers.processes import exit_code
from helpers.trainers import meeting_place, together
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import Tensor
from torch.nn import functional as F

from kdcache import Cache, dump_teacher, load_split, open_cache
from kdcache.cache.teacher import Teacher, TeacherWithOutputs, TeacherWrapper
from kdcache.config.schema import Pipeline
from kdcache.config.yaml_lines import write_yaml
from kdcache.data.images import ArrayImages
from kdcache.data.samples import Samples
from kdcache.errors import KdcacheError
from kdcache.models import build_model
from kdcache.runtime.progress import Silent
from kdcache.train.held_out import connected_parts, held_out_ids
from kdcache.train.inputs import inputs_from_caches
from kdcache.train.train import Student, train_on, train_student, train_together

COUNT, EPOCHS = 240, 6
CODE = """
from torch import nn

def vectors(num_classes):
    return nn.Sequential(nn.Linear(6, 12), nn.Tanh(), nn.Linear(12, 5))

def scorer(num_classes, width=2):
    return nn.Sequential(nn.Linear(6, width), nn.Tanh(), nn.Linear(width, 1))

def narrow(num_classes):
    return nn.Sequential(nn.Linear(6, 3), nn.Tanh())
"""
MSE = {"logits": False, "said": {"name": "mse"}}
MARGINS = {"logits": False, "said": {"name": "margin_mse"}}


class Made:
    """Samples without labels, a cache of vectors of them, and one of scores that are compared within groups."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        x = np.random.default_rng(0).normal(size=(COUNT, 6)).astype(np.float32)
        self.x = torch.from_numpy(x)
        # Four passages per query: each positive with each of three negatives, so that groups of a query share samples.
        self.groups = np.array([(4 * query, 4 * query + n) for query in range(COUNT // 4) for n in (1, 2, 3)])
        np.savez(folder / "vectors.npz", x=x)
        np.savez(folder / "scores.npz", x=x, groups=self.groups)
        (folder / "net.py").write_text(CODE)
        self.vectors = self._dump("vectors", "vectors", {"said": {"encoding": "float16", "source": "2"}})
        self.scores = self._dump("scores", "scorer", {"said": {"kind": "score", "source": "2"}}, width=9)

    def _dump(self, data: str, name: str, outputs: Any, **args: Any) -> Cache:
        torch.manual_seed(1)
        teacher = build_model({"model": f"{self.folder}/net.py:{name}", "args": args}, 0, (6,))
        samples = load_split(self.pipeline(data, {"name": "ce"}).dataset, "train")
        return dump_teacher(teacher, samples, self.folder / f"{data}.kdcache", outputs=outputs, logits=False)

    def pipeline(self, data: str, loss: dict[str, Any], model: str = "narrow", **train: Any) -> Pipeline:
        source = {"narrow": "1"}.get(model, "2")
        known = {"epochs": EPOCHS, "batch_size": 24, "lr": 0.05, "held_out_fraction": 0.25, **train}
        outputs = {} if "said" not in loss else {"said": {"source": source}}
        root = str(self.folder / f"{data}.npz")
        return Pipeline.model_validate(
            {
                "dataset": {"name": "npz", "root": root, "validation_fraction": 0.0, "test_fraction": 0.0},
                "student": {"model": f"{self.folder}/net.py:{model}", "outputs": outputs, "train": known},
                "loss": loss,
            }
        )


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    return Made(tmp_path_factory.mktemp("held_out"))


def epochs_of(run: Path) -> list[dict[str, str]]:
    with (run / "metrics.csv").open(newline="") as lines:
        return list(csv.DictReader(lines))


def selected(run: Path) -> dict[str, Any]:
    best: dict[str, Any] = json.loads((run / "metrics.json").read_text())["best"]
    return best


def said_by(run: Path, x: Tensor) -> Tensor:
    """What the selected student says after its linear map, in plain torch."""
    weights = load_file(run / "model.safetensors")
    values = torch.tanh(F.linear(x, weights["0.weight"], weights["0.bias"]))
    last = load_file(run / "projections.safetensors") if "2.weight" not in weights else weights
    names = ("said.weight", "said.bias") if "2.weight" not in weights else ("2.weight", "2.bias")
    return F.linear(values, *(last[name] for name in names))


# The last epochs are worse in the first case, whose learning rate is too high to stay in a minimum.
@pytest.mark.parametrize("train", [{"lr": 1.5, "schedule": "constant"}, {"ema_decay": 0.9}, {"held_out_fraction": 0.5}])
def test_the_epoch_of_the_lowest_loss_on_vectors_that_are_held_out_is_selected(
    train: dict[str, Any], made: Made, tmp_path: Path
) -> None:
    train_student(made.pipeline("vectors", MSE, **train), made.vectors, tmp_path / "run")
    losses = [float(row["validation_loss"]) for row in epochs_of(tmp_path / "run")]
    best = selected(tmp_path / "run")
    assert best["epoch"] == 1 + int(np.argmin(losses))
    if "lr" in train:
        assert best["epoch"] < EPOCHS
    samples = load_split(made.pipeline("vectors", MSE).dataset, "train")
    held = held_out_ids(samples, train.get("held_out_fraction", 0.25))
    wanted = made.vectors.teacher("said")(torch.from_numpy(held))
    found = said_by(tmp_path / "run", made.x[held])
    assert F.mse_loss(found, wanted).item() == pytest.approx(best["validation_loss"], rel=1e-5)
    assert json.loads((tmp_path / "run/metrics.json").read_text())["held_out"] == len(held)


class Shifted(TeacherWrapper):
    """A teacher that says something else of some samples."""

    def __init__(self, teacher: Teacher, ids: npt.NDArray[np.int64]) -> None:
        super().__init__(teacher)
        self._ids = torch.from_numpy(ids)

    def __call__(self, ids: Tensor, view: int = 0) -> Tensor:
        """Return outputs [B, D]."""
        return super().__call__(ids, view) + 5 * (torch.isin(ids, self._ids) * torch.sin(ids))[:, None]


@pytest.mark.parametrize("data", ["vectors", "scores"])
def test_samples_that_are_held_out_are_not_trained_on(data: str, made: Made, tmp_path: Path) -> None:
    pipeline, cache = (
        (made.pipeline("vectors", MSE, epochs=2), made.vectors)
        if data == "vectors"
        else (made.pipeline("scores", MARGINS, "scorer", epochs=2), made.scores)
    )
    inputs = inputs_from_caches(pipeline, [cache])
    held = held_out_ids(inputs.samples, 0.25)
    assert isinstance(inputs.teacher, TeacherWithOutputs)
    other = replace(inputs, teacher=inputs.teacher.each(lambda part: Shifted(part, held)))
    train_on(pipeline, inputs, tmp_path / "plain")
    train_on(pipeline, other, tmp_path / "shifted")
    for plain, shifted in zip(*(epochs_of(tmp_path / run) for run in ("plain", "shifted")), strict=True):
        assert plain["loss"] == shifted["loss"]
        assert float(shifted["validation_loss"]) > 2 * float(plain["validation_loss"])


@pytest.mark.parametrize("batch", [24, 100])
def test_the_loss_of_groups_that_are_held_out(batch: int, made: Made, tmp_path: Path) -> None:
    pipeline = made.pipeline("scores", MARGINS, "scorer", batch_size=batch)
    train_student(pipeline, made.scores, tmp_path / "run")
    held = held_out_ids(load_split(pipeline.dataset, "train"), 0.25)
    groups = made.groups[np.isin(made.groups, held).all(axis=1)]
    assert len(groups) == 3 * len(held) / 4
    ours, theirs = (
        of[torch.from_numpy(groups), 0]
        for of in (said_by(tmp_path / "run", made.x), made.scores.teacher("said")(torch.arange(COUNT)))
    )
    margins = [scores[:, 0] - scores[:, 1] for scores in (ours, theirs)]
    whole_batches = len(groups) // (batch // 2) * (batch // 2)
    rest = len(groups) - whole_batches
    count = whole_batches if rest == 1 else len(groups)
    wanted = F.mse_loss(margins[0][:count], margins[1][:count]).item()
    assert selected(tmp_path / "run")["validation_loss"] == pytest.approx(wanted, rel=1e-5)


def test_students_that_are_trained_together_are_what_each_is_alone(made: Made, tmp_path: Path) -> None:
    pipelines = [made.pipeline("vectors", MSE, data_seed=0, seed=seed, held_out_fraction=0.25) for seed in (0, 1)]
    pipelines.append(made.pipeline("vectors", MSE, data_seed=0, held_out_fraction=0.5))
    inputs = inputs_from_caches(pipelines[0], [made.vectors])
    students = [
        Student(pipeline, inputs, tmp_path / f"together{number}", Silent()) for number, pipeline in enumerate(pipelines)
    ]
    ended: dict[int, Any] = {}
    train_together(students, ended.__setitem__)
    assert not any(isinstance(outcome, Exception) for outcome in ended.values())
    for number, pipeline in enumerate(pipelines):
        train_student(pipeline, made.vectors, tmp_path / f"alone{number}")
        runs = [tmp_path / f"{name}{number}" for name in ("alone", "together")]
        assert epochs_of(runs[0]) == epochs_of(runs[1])
        for name in ("model.safetensors", "projections.safetensors"):
            assert (runs[0] / name).read_bytes() == (runs[1] / name).read_bytes()


def test_an_interrupted_run_selects_the_same_epoch(made: Made, tmp_path: Path) -> None:
    pipeline = made.pipeline("vectors", MSE, lr=0.9, schedule="constant", ema_decay=0.5)
    train_student(pipeline, made.vectors, tmp_path / "whole")
    with pytest.MonkeyPatch.context() as patch:
        interrupt_after_checkpoints(EPOCHS - 1, patch)
        with pytest.raises(KeyboardInterrupt):
            train_student(pipeline, made.vectors, tmp_path / "run")
    train_student(pipeline, made.vectors, tmp_path / "run")
    for name in ("model.safetensors", "projections.safetensors"):
        assert (tmp_path / "run" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


def as_a_rank(rank: int, environment: dict[str, str], out: Path, pipeline: Pipeline, cache: Path) -> None:
    os.environ.update(environment)
    train_student(pipeline, open_cache(cache), out)


@pytest.mark.process
def test_processes_measure_what_one_measures(made: Made, tmp_path: Path) -> None:
    pipeline = made.pipeline("scores", MARGINS, "scorer", epochs=2)
    train_student(pipeline, made.scores, tmp_path / "alone")
    store = meeting_place()
    processes = together(store, 2, as_a_rank, tmp_path / "shared", pipeline, made.scores.path)
    assert [exit_code(process) for process in processes] == [0] * 2
    for one, two in zip(*(epochs_of(tmp_path / run) for run in ("alone", "shared")), strict=True):
        assert float(two["validation_loss"]) == pytest.approx(float(one["validation_loss"]), rel=1e-4)


def test_training_ends_when_the_loss_of_samples_that_are_held_out_does_not_fall(made: Made, tmp_path: Path) -> None:
    pipeline = made.pipeline("vectors", MSE, lr=0.9, schedule="constant", epochs=40, early_stopping_patience=2)
    train_student(pipeline, made.vectors, tmp_path / "run")
    assert len(epochs_of(tmp_path / "run")) == selected(tmp_path / "run")["epoch"] + 2 < 40


# Which samples are held out


@given(
    st.integers(2, 40).flatmap(
        lambda count: st.tuples(
            st.just(count),
            st.lists(st.lists(st.integers(0, count - 1), min_size=2, max_size=2, unique=True), min_size=1, max_size=60),
        )
    )
)
def test_parts_are_those_of_a_search_through_the_groups(case: tuple[int, list[list[int]]]) -> None:
    count, groups = case
    found = connected_parts(np.array(groups), count)
    for start in range(count):
        seen, waiting = {start}, [start]
        while waiting:
            here = waiting.pop()
            new = {other for group in groups if here in group for other in group} - seen
            seen |= new
            waiting += new
        assert found[start] == min(seen)


def unlabeled(count: int, groups: npt.NDArray[np.int64] | None = None) -> Samples:
    return Samples(
        "some", "train", ArrayImages(torch.zeros(count, 2)), np.full(count, -1, np.int32), (), [], groups=groups
    )


@given(st.integers(20, 300), st.floats(0.1, 0.9))
def test_so_many_samples_are_held_out(count: int, fraction: float) -> None:
    held = held_out_ids(unlabeled(count), fraction)
    assert abs(len(held) - fraction * count) <= 1 and len(np.unique(held)) == len(held)


def test_no_sample_of_a_group_that_is_held_out_is_in_another_group() -> None:
    rng = np.random.default_rng(3)
    groups = np.concatenate([10 * query + np.stack([rng.permutation(9)[:3] for _ in range(5)]) for query in range(20)])
    held = held_out_ids(unlabeled(200, groups), 0.3)
    inside = np.isin(groups, held)
    assert (inside.all(axis=1) == inside.any(axis=1)).all() and 0.2 < inside.mean() < 0.4
    assert np.isin(held, groups).all()  # a sample without a group would measure nothing


REFUSED: dict[str, tuple[dict[str, Any], str, str]] = {
    "too few": ({"held_out_fraction": 0.001}, "would hold out 0 of the 240 samples", "raise"),
    "too many": (
        {"held_out_fraction": 0.999},
        "would hold out 240 of the 240 samples",
        "lower",
    ),
    "early stopping": (
        {"held_out_fraction": 0.0, "early_stopping_patience": 2},
        "early_stopping_patience has no effect",
        "train.held_out_fraction",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_select_an_epoch_is_refused(case: str, made: Made, tmp_path: Path) -> None:
    train, what, fix = REFUSED[case]
    with pytest.raises(KdcacheError) as raised:
        train_student(made.pipeline("vectors", MSE, **train), made.vectors, tmp_path / "run")
    assert what in raised.value.what and fix in raised.value.fix and not (tmp_path / "run").exists()


def test_groups_that_are_all_connected_cannot_be_held_out() -> None:
    with pytest.raises(KdcacheError, match=r"0 of the 1 parts, within which groups share samples") as raised:
        held_out_ids(unlabeled(5, np.array([(0, 1), (1, 2), (2, 3), (3, 4)])), 0.4)
    assert raised.value.fix == "set train.held_out_fraction to 0"


def test_a_validation_split_selects_by_accuracy(tmp_path: Path) -> None:
    given = {"dataset": {"name": "digits"}, "student": {"model": "small:mlp", "train": {"held_out_fraction": 0.1}}}
    pipeline = Pipeline.model_validate({**given, "loss": {"name": "ce"}})
    with pytest.raises(KdcacheError, match="the validation split of digits selects the epoch"):
        train_student(pipeline, None, tmp_path / "run")


def test_labels_select_an_epoch_without_a_validation_split(made: Made, tmp_path: Path) -> None:
    np.savez(tmp_path / "labeled.npz", x=made.x.numpy(), y=made.x[:, :3].argmax(dim=1).numpy())
    unlabeled_one = made.pipeline("vectors", {"name": "ce"}, epochs=3)
    dataset = unlabeled_one.dataset.model_copy(update={"root": str(tmp_path / "labeled.npz")})
    pipeline = unlabeled_one.model_copy(update={"dataset": dataset})
    train_student(pipeline, None, tmp_path / "run")
    samples = load_split(pipeline.dataset, "train")
    held = held_out_ids(samples, 0.25)
    weights = load_file(tmp_path / "run/model.safetensors")
    logits = torch.tanh(F.linear(made.x[held], weights["0.weight"], weights["0.bias"]))
    wanted = F.cross_entropy(logits, torch.from_numpy(samples.labels[held]).long()).item()
    assert selected(tmp_path / "run")["validation_loss"] == pytest.approx(wanted, rel=1e-5)


def test_a_sweep_compares_the_losses(made: Made, tmp_path: Path) -> None:
    pipeline = made.pipeline("vectors", MSE, epochs=2)
    (tmp_path / "p.yaml").write_text(write_yaml(pipeline.model_dump(mode="json", exclude_defaults=True)))
    sweep = [
        "sweep",
        tmp_path / "p.yaml",
        "--cache",
        made.vectors.path,
        "--over",
        "student.train.lr=0.001,0.05",
        "--seeds",
        1,
    ]
    text = ok(*sweep, "-o", tmp_path / "s")
    assert "Loss on samples that were held out" in text and "held-out loss" in text and "validation" not in text
    points = json.loads((tmp_path / "s/sweep.json").read_text())["points"]
    low, high = (point["held_out_mean"] for point in points)
    assert high < low  # so small a learning rate hardly moves the weights
    for point in points:
        (student,) = point["students"]
        assert student["held_out"] == point["held_out_mean"] == selected(Path(student["run"]))["validation_loss"]

"""Summaries and fidelities that a manifest states, and the rows do not."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers.corruption import forge, setting
from helpers.paths import GOLDEN
from helpers.tiny import FLIP, TinyTeacher, tiny_samples
from helpers.verify import failed, where
from torch import Tensor

from kdcache import Cache, dump_teacher
from kdcache.cache.format.encoding import Fidelity
from kdcache.cache.inspect.audit import audit
from kdcache.config.cache import CacheSpec
from kdcache.curate.select import select
from kdcache.errors import CorruptError

SPEC = CacheSpec(top_k=3, tail="lowrank", rank=4, views=2, seed=5, shard_rows=32, pilot_rows=64)


class Sharper(TinyTeacher):
    """Its rows have almost no tail."""

    def forward(self, images: Tensor) -> Tensor:
        return 4 * super().forward(images)


@pytest.fixture(scope="module")
def planned(tmp_path_factory: pytest.TempPathFactory) -> Cache:
    out = tmp_path_factory.mktemp("planned") / "planned.kdcache"
    return dump_teacher(TinyTeacher(30), tiny_samples(100, 30), out, transform=FLIP, spec=SPEC)


@pytest.fixture
def forged(planned: Cache, tmp_path: Path) -> Path:
    return Path(shutil.copytree(planned.path, tmp_path / "forged.kdcache"))


SUMMARY: dict[str, list[float | None]] = {
    "teacher_accuracy": [1.0, 0.0, None],
    "mean_sharpness": [0.0, -3.0, 1e9],
    "mean_entropy": [0.0, 3.401],
    "mean_top_probability": [1.0, 0.03],
}


@pytest.mark.parametrize(("name", "value"), [(name, value) for name, values in SUMMARY.items() for value in values])
def test_an_invented_summary_is_named_with_both_values(forged: Path, planned: Cache, name: str, value: object) -> None:
    forge(forged, setting(value, "summary", name))
    done = failed(5, forged)
    right = getattr(planned.manifest.summary, name)
    assert f"manifest.json, summary.{name}: states {value}, its rows give {right}" in done.stdout


@pytest.mark.parametrize("name", ["mean_sharpness", "mean_entropy", "mean_top_probability", "teacher_accuracy"])
def test_a_summary_that_is_slightly_better_is_found(forged: Path, planned: Cache, name: str) -> None:
    right = getattr(planned.manifest.summary, name)
    forge(forged, setting(right * (1 + 1e-6), "summary", name))
    assert where(audit(forged)) == [f"manifest.json, summary.{name}"]
    forge(forged, setting(right, "summary", name))
    assert audit(forged).failure is None


FIDELITY: dict[str, tuple[list[int] | dict[str, float], str]] = {
    "rows": ([0], "rows"),
    "many rows": ([17], "rows"),
    "hopeless": ({"1": 0.99, "2": 0.99, "4": 0.99, "8": 0.99}, "total_variation.1"),
    "negative": ({"1": -0.1, "2": 0.1, "4": 0.1, "8": 0.1}, "total_variation.1"),
    "more than 1": ({"1": 0.1, "2": 0.1, "4": 0.1, "8": 1.1}, "total_variation.8"),
    "a temperature less": ({"1": 0.1, "2": 0.1, "4": 0.1}, "total_variation"),
    "a temperature more": ({"1": 0.1, "2": 0.1, "4": 0.1, "8": 0.1, "16": 0.1}, "total_variation"),
    "none": ({}, "total_variation"),
}


@pytest.mark.parametrize("what", FIDELITY)
def test_an_impossible_fidelity_is_named(forged: Path, what: str) -> None:
    value, name = FIDELITY[what]
    if isinstance(value, list):
        forge(forged, setting(value[0], "plan", "fidelity", "rows"))
    else:
        forge(forged, setting(value, "plan", "fidelity", "total_variation"))
    done = failed(5, forged)
    assert f"manifest.json, plan.fidelity.{name}: states " in done.stdout


def test_a_perfect_fidelity_of_a_poor_tail_is_named(tmp_path: Path) -> None:
    spec = SPEC.model_copy(update={"top_k": 1, "tail": "uniform", "rank": None, "views": 1, "pilot_rows": 256})
    cache = dump_teacher(Sharper(30), tiny_samples(200, 30), tmp_path / "c.kdcache", spec=spec)
    assert audit(cache.path).failure is None
    forge(cache.path, setting({"1": 0.0, "2": 0.0, "4": 0.0, "8": 0.0}, "plan", "fidelity", "total_variation"))
    assert {f"manifest.json, plan.fidelity.total_variation.{t}" for t in (2, 4, 8)} <= {*where(audit(cache.path))}


def test_a_fidelity_where_nothing_was_measured_is_named(tmp_path: Path) -> None:
    cache = dump_teacher(TinyTeacher(), tiny_samples(20), tmp_path / "dense.kdcache")
    forge(cache.path, setting(Fidelity(rows=5, total_variation={"1": 0.0}).model_dump(), "plan", "fidelity"))
    assert where(audit(cache.path)) == ["manifest.json, plan.fidelity"]


def test_what_the_pilot_measured_is_between_the_bounds(planned: Cache, tmp_path: Path) -> None:
    """Of several teachers and encodings, and of caches that were derived from them."""
    assert audit(planned.path).failure is None
    made = [
        dump_teacher(teacher(30), tiny_samples(rows, 30), tmp_path / f"{index}", transform=FLIP, spec=spec)
        for index, (teacher, rows, spec) in enumerate(
            [
                (Sharper, 50, SPEC),
                (TinyTeacher, 50, SPEC.model_copy(update={"top_k": 1, "tail": "uniform", "rank": None})),
                (TinyTeacher, 100, SPEC.model_copy(update={"pilot_rows": 1})),
                (TinyTeacher, 7, SPEC.model_copy(update={"dtype": "float32"})),
            ]
        )
    ]
    auto = CacheSpec(top_k="auto", pilot_rows=64, shard_rows=32)
    made.append(dump_teacher(TinyTeacher(100), tiny_samples(100, 100), tmp_path / "auto", spec=auto))
    made.append(select(planned, tmp_path / "views", views=[0]))
    made.append(select(planned, tmp_path / "samples", samples=np.arange(40)))
    made.append(select(planned, tmp_path / "classes", classes=planned.manifest.plan.dataset.class_names[:20]))
    for cache in made:
        assert audit(cache.path).failure is None, cache


@pytest.mark.parametrize("name", ["dense-v1", "lowrank-v1"])
def test_the_golden_caches_state_what_their_rows_give(name: str) -> None:
    assert audit(GOLDEN / f"{name}.kdcache").failure is None


def test_labels_that_are_not_known_have_no_accuracy(tmp_path: Path) -> None:
    cache = dump_teacher(TinyTeacher(), tiny_samples(9, labels=[-1] * 9), tmp_path / "c.kdcache")
    assert audit(cache.path).failure is None
    forge(cache.path, setting(0.9, "summary", "teacher_accuracy"))
    failure = audit(cache.path).failure
    assert isinstance(failure, CorruptError)
    assert "states 0.9, its rows give None" in failure.what
    assert torch.equal(torch.from_numpy(cache.labels), torch.full((9,), -1, dtype=torch.int32))

"""Scorecards of networks that say a class of every pixel, against plain computations."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from helpers.cli import ok, refused
from helpers.scenes import scenes_folder
from torch.nn import functional as F

from kdcache import load_pipeline, load_split, open_cache
from kdcache.data.views import View
from kdcache.models.build import build_model
from kdcache.models.checkpoints import load_weights


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a trained teacher, its cache and a student."""
    made = scenes_folder(tmp_path_factory.mktemp("pixels"))
    short = ["--set", "teacher.train.epochs=2", "--set", "student.train.epochs=1"]
    ok("train-teacher", made / "p.yaml", *short, "-o", made / "teacher")
    ok("dump-teacher", made / "p.yaml", "-o", made / "t.kdcache")
    ok("train-student", made / "p.yaml", *short, "--cache", made / "t.kdcache", "-o", made / "student")
    return made


def test_scores_and_agreement_are_those_of_a_plain_loop(folder: Path) -> None:
    card = json.loads(ok("evaluate", folder / "student", "--cache", folder / "t.kdcache", "--json"))
    (found,) = card["scores"]
    pipeline, cache = load_pipeline(folder / "p.yaml"), open_cache(folder / "t.kdcache")
    network = build_model(pipeline.section("student"), 3, (3, 24, 32))
    load_weights(network, str(folder / "student" / "model.safetensors"))
    network.eval()
    test = View(load_split(pipeline.dataset, "test"), pipeline.eval_transform or [])
    batch = test.batch(list(range(len(test))), 0)
    assert batch.maps is not None
    with torch.no_grad():
        logits = F.interpolate(network(batch.images), (24, 32), mode="bilinear")
    known = batch.maps >= 0
    guess = logits.argmax(1)
    assert found["score"]["accuracy"] == pytest.approx(float((guess == batch.maps)[known].double().mean()))
    for label in range(3):
        truth, said = (batch.maps == label) & known, (guess == label) & known
        union = int((truth | said).sum())
        expected = None if not union else int((truth & said).sum()) / union
        assert found["score"]["iou"][label] == pytest.approx(expected)
    seen = View(load_split(pipeline.dataset, "train"), pipeline.transform or [], cache.manifest.plan.views.seed)
    with torch.no_grad():
        ours = F.interpolate(network(seen.batch(list(range(64)), 0).images), (6, 8), mode="bilinear")
    theirs = cache.teacher("pixels")(torch.arange(64), 0)
    assert found["teacher"]["images"] == 64
    assert found["teacher"]["same_class"] == pytest.approx(float((ours.argmax(1) == theirs.argmax(1)).double().mean()))
    distance = float((ours.softmax(1) - theirs.softmax(1)).abs().sum(1).mean()) / 2
    assert found["teacher"]["total_variation"] == pytest.approx(distance, rel=1e-4)


def test_the_table_has_the_intersection_over_union_of_each_class(folder: Path) -> None:
    printed = ok("evaluate", folder / "teacher", folder / "student", "--split", "validation")
    assert "mIoU" in printed and "Intersection over union" in printed
    assert [name for name in ("ground", "box", "disc") if f"\n{name}" in printed] == ["ground", "box", "disc"]
    assert "agreement" not in printed


def test_canaries_are_refused(folder: Path) -> None:
    said = refused(2, "evaluate", folder / "student", "--canaries", "1-2", "--references", "3-9")
    assert "one per pixel" in said


def test_a_sweep_shows_the_mean_iou(folder: Path, tmp_path: Path) -> None:
    printed = ok(
        "sweep",
        folder / "p.yaml",
        "--cache",
        folder / "t.kdcache",
        "--over",
        "loss=ce,kd",
        "--seeds",
        "2",
        "--together",
        "--set",
        "student.train.epochs=1",
        "-o",
        tmp_path / "sweep",
    )
    assert "Mean IoU, mean of 2 seeds" in printed
    points = json.loads((tmp_path / "sweep" / "sweep.json").read_text())["points"]
    for point in points:
        for student in point["students"]:
            metrics = json.loads((tmp_path / "sweep" / student["run"] / "metrics.json").read_text())
            assert student["test"] == pytest.approx(metrics["test"]["mean_iou"])
            assert student["validation"] == pytest.approx(metrics["best"]["validation_mean_iou"])

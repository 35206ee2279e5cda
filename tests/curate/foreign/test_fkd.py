"""Files of FKD become caches, and students see the crops that they record."""

from __future__ import annotations

import itertools
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers.foreign import (
    CLASSES,
    COUNT,
    VIEWS,
    Images,
    as_json,
    check_same_pixels,
    fkd_of,
    fkd_shows,
    from_fkd,
    kdcache,
    logits_of,
    unpacked,
)
from torch import Tensor
from torch.utils.data import DataLoader

from kdcache import CachedDataset, open_cache
from kdcache.cache.inspect.audit import audit
from kdcache.curate.foreign.sparse_labels import LEAST
from kdcache.data.recorded_crop import PixelBox, pixels_of
from kdcache.data.replay import replay, teacher_view
from kdcache.losses import distillation_loss
from kdcache.train.train import train_student


def fkd_says(output: Any, renormalized: bool = False) -> Tensor:
    """FKD's soft labels of all classes."""
    said: Tensor = torch.as_tensor(output)
    if said.shape[1:] == (CLASSES,):
        return said
    pairs = said if said.ndim == 3 else said.unsqueeze(2)
    classes, values = pairs[:, 0].long(), pairs[:, 1]
    if renormalized:
        return torch.zeros(len(pairs), CLASSES).scatter(1, classes, values / values.sum(dim=1, keepdim=True))
    even = (1 - values.sum(dim=1, keepdim=True)) / (CLASSES - values.shape[1])
    return even.expand(-1, CLASSES).scatter(1, classes, values)


@pytest.mark.parametrize("made", [{}, {"k": 10}, {"k": 1, "kind": "smoothing"}, {"kind": "all", "k": CLASSES}])
def test_what_fkd_says_is_what_the_cache_says(images: Images, tmp_path: Path, made: dict[str, Any]) -> None:
    cache = from_fkd(images, tmp_path, **made)
    assert audit(cache.path).failure is None
    assert cache.manifest.plan.encoding.top_k == made.get("k", 5)
    for number, path in enumerate(images.paths):
        _, _, output = unpacked(tmp_path / "labels" / "train" / path.parent.name / f"{path.stem}.tar")
        for view in range(VIEWS):
            found = cache.teacher()(torch.tensor([number]), view).softmax(dim=1)[0]
            torch.testing.assert_close(found, fkd_says(output)[view], rtol=2e-3, atol=1e-6)


def test_a_student_is_shown_the_crops_that_fkd_recorded(images: Images, tmp_path: Path) -> None:
    cache = from_fkd(images, tmp_path)
    assert replay(cache, images.samples).rounded == 0
    for view in range(VIEWS):
        seen = teacher_view(cache, images.samples, view)
        for number in range(COUNT):
            shown = seen[number].images[0]
            check_same_pixels(shown, fkd_shows(images, tmp_path / "labels", number, view))
            check_same_pixels(shown, images.cut(number, view))


def test_boxes_in_half_precision_are_off_by_a_pixel_at_most_and_stay_inside(images: Images, tmp_path: Path) -> None:
    cache = from_fkd(images, tmp_path, coords=np.float16)
    assert cache.crops is not None
    for view, number in itertools.product(range(VIEWS), range(COUNT)):
        width, height = images.image(number).size
        found = pixels_of(cache.crops(view)[number], "fraction", height, width)
        assert np.abs(np.subtract(found, images.boxes[number][view])).max() <= 1


def test_a_box_that_reaches_beyond_the_image_by_its_rounding_ends_there() -> None:
    box = np.array([np.float16(1 / 3), 0, np.float16(2 / 3) + 2**-12, 1, 0], np.float32)
    assert pixels_of(box, "fraction", 3000, 10) == PixelBox(1000, 0, 2000, 10)
    for wrong in ([0, 0, 2, 12, 0], [9, 0, 2, 1, 0]):
        with pytest.raises(ValueError, match="is not inside 10 x 10"):
            pixels_of(np.array(wrong, np.float32), "pixels", 10, 10)


def test_classes_without_any_mass_get_the_least_that_there_is(images: Images, tmp_path: Path) -> None:
    cache = from_fkd(images, tmp_path, kind="renormalized")
    path = images.paths[0]
    _, _, output = unpacked(tmp_path / "labels" / "train" / path.parent.name / f"{path.stem}.tar")
    found = cache.teacher()(torch.tensor([0]), 1).double().softmax(dim=1)[0]
    expected = fkd_says(output, renormalized=True)[1].double()
    assert (found - expected).abs().max() < 1e-6
    others = found[expected == 0]
    assert len(others) == CLASSES - 5
    torch.testing.assert_close(others, torch.full_like(others, LEAST / CLASSES), rtol=0.01, atol=0)


def test_a_student_is_trained_from_fkds_files_on_the_command_line(images: Images, tmp_path: Path) -> None:
    labels, out, run = fkd_of(images, tmp_path / "labels"), tmp_path / "c.kdcache", tmp_path / "run"
    pipeline, held_out = images.write("fraction"), ["--set", "dataset.test_fraction=0.3"]
    made = as_json("convert", labels, "--from", "fkd", "--pipeline", pipeline, *held_out, "-o", out, "--name", "giant")
    assert (made["plan"]["teacher"]["name"], made["plan"]["teacher"]["level"]) == ("giant", "unknown")
    about = kdcache("info", out).stdout
    assert "unknown: the logits are known up to an additive constant per sample" in about
    assert "not run by kdcache" in about
    assert as_json("verify", out, pipeline, "--replay", *held_out)["replay"]["rounded"] == 0
    replayed = kdcache("verify", out, pipeline, "--replay", *held_out).stdout
    assert "images are those that the cache was imported with" in replayed
    done = kdcache("verify", out, pipeline, "--teacher", *held_out)
    assert (done.exit_code, "was not run by kdcache" in done.stderr) == (2, True)
    done = kdcache("train-student", pipeline, "--cache", out, "-o", run, *held_out)
    assert done.exit_code == 0, done.output
    metrics = json.loads((run / "metrics.json").read_text())
    assert metrics["caches"] == [made["digest"]]
    assert metrics["replay"][0]["rounded"] == 0
    assert as_json("evaluate", run, "--cache", out)["scores"][0]["teacher"]["rows"] == len(open_cache(out))
    done = kdcache("report", run, "--cache", out, "-o", tmp_path / "report.html")
    assert done.exit_code == 0, done.output


def test_what_a_student_learns_from_are_the_recorded_crops(
    images: Images, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = from_fkd(images, tmp_path)
    shown: list[Tensor] = []
    from kdcache.train import step as train_step

    def watched(student: Tensor, teacher: Tensor, labels: Tensor, *rest: Any, **options: Any) -> Any:
        shown.append(teacher)
        return distillation_loss(student, teacher, labels, *rest, **options)

    monkeypatch.setattr(train_step, "distillation_loss", watched)
    train_student(images.pipeline, cache, tmp_path / "run")
    found = torch.cat(shown).softmax(dim=1)
    expected = torch.cat([logits_of(cache, view) for view in (0, 1)]).softmax(dim=1)
    assert sorted(found[:, 0].tolist()) == pytest.approx(sorted(expected[:, 0].tolist()), rel=1e-6)


def test_another_loop_gets_the_crops_too_in_its_workers_as_well(images: Images, tmp_path: Path) -> None:
    data = CachedDataset(images.samples, from_fkd(images, tmp_path))
    for workers in (0, 2):
        for epoch in (1, 2):
            data.set_epoch(epoch)
            for pixels, _, ids, views in DataLoader(data, batch_size=7, num_workers=workers):
                assert set(views.tolist()) == {epoch}
                expected = torch.stack([images.cut(number, epoch) for number in ids.tolist()])
                check_same_pixels(pixels, expected)


def test_some_of_the_samples_keep_their_own_crops(images: Images, tmp_path: Path) -> None:
    cache = from_fkd(images, tmp_path)
    some = tmp_path / "some"
    shutil.copytree(images.root / "data", some)
    for path in (some / "train").glob("class0[05]/*"):
        path.unlink()
    for left in (some / "train").iterdir():
        if not any(left.iterdir()):
            shutil.copy(images.paths[-1], left / "stranger.png")
    settings = ["--set", f"dataset.root={some}", "--set", "dataset.name=image-folder"]
    done = kdcache(
        "train-student", images.write("fraction"), "--cache", cache.path, "-o", tmp_path / "run", "--allow-missing",
        *settings,
    )  # fmt: skip
    assert done.exit_code == 0, done.output  # which has compared fingerprints of what is there

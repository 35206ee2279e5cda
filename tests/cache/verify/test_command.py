"""The command with a pipeline."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
from helpers.cli import kdcache, ok, refused
from helpers.corruption import contents
from helpers.verify import Values, another_library, unseal

from kdcache import open_cache

NETWORK = """
import torch
class Network(torch.nn.Module):
    def __init__(self, num_classes, seed, mirrored):
        super().__init__()
        self.mirrored = mirrored
        self.weight = torch.nn.Parameter(torch.randn(64, num_classes, generator=torch.Generator().manual_seed(seed)))
    def forward(self, images):
        return (images.flip(3) if self.mirrored else images).flatten(1) @ self.weight
def make(num_classes, seed=0, mirrored=False):
    return Network(num_classes, seed, mirrored)
"""


class Work(NamedTuple):
    """A folder with a pipeline and its cache; arrays of its data set."""

    recipe: Path
    cache: Path
    images: Values
    labels: Values

    def other(self, folder: Path, images: Values | None = None, labels: Values | None = None) -> list[str]:
        """Arguments that make the pipeline's data set another."""
        path = folder / "pictures.npz"
        given = {
            "images": self.images if images is None else images,
            "labels": self.labels if labels is None else labels,
        }
        np.savez(path, **given)  # type: ignore[arg-type]  # numpy's stub takes the names for its flags
        return ["--set", f"dataset.root={path}"]


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Work:
    folder = tmp_path_factory.mktemp("work")
    images = np.random.default_rng(0).integers(0, 255, (50, 8, 8), np.uint8)
    labels = np.arange(50) % 10
    np.savez(folder / "pictures.npz", images=images, labels=labels)
    (folder / "net.py").write_text(NETWORK)
    recipe = folder / "recipe.yaml"
    recipe.write_text(
        f"dataset: {{name: npz, root: {folder / 'pictures.npz'}, validation_fraction: 0.0, test_fraction: 0.0}}\n"
        "transform: [{RandomCrop: {size: 8, padding: 1}}, {ToDtype: {dtype: float32, scale: true}}]\n"
        "eval_transform: [{ToDtype: {dtype: float32, scale: true}}]\n"
        f"teacher: {{model: '{folder / 'net.py'}:make'}}\n"
        "cache: {top_k: 3, rank: 4, views: 2, shard_rows: 20, seed: 3}\n"
        "student: {model: 'small:mlp', train: {epochs: 1}}\n"
    )
    ok("dump-teacher", recipe, "-o", folder / "c.kdcache", "--device", "cpu")
    return Work(recipe, folder / "c.kdcache", images, labels)


def told(code: int, *arguments: object) -> Any:
    """What `--json` prints: nothing else goes to stdout."""
    done = kdcache("verify", *arguments, "--json")
    assert done.exit_code == code, done.output
    return json.loads(done.stdout)


def test_a_cache_of_the_pipeline_passes_all_checks(work: Work) -> None:
    text = ok("verify", work.cache, work.recipe, "--replay", "--teacher", "--device", "cpu")
    assert "the same 50 samples" in text
    assert "100 images are those that the teacher saw, bit for bit" in text
    assert "50 rows per view" in text
    found = told(0, work.cache, work.recipe, "--replay", "--teacher", "--rows", 7, "--device", "cpu")
    assert found["replay"] == {"checked": 100, "rounded": 0, "teacher_seen": True}
    assert [(one["view"], one["temperature"], one["rows"]) for one in found["teacher"]] == [
        (view, t, 7) for view in (0, 1) for t in (1, 2, 4, 8)
    ]
    for one in told(0, work.cache, work.recipe, "--teacher", "--device", "cpu")["teacher"]:
        assert f"{one['total_variation']:.5f}" in text
        assert f"{one['gradient_error']:.5f}" in text


def test_what_is_said_to_programs(work: Work, copy: Path) -> None:
    assert told(0, work.cache, work.recipe)["dataset"] == {"samples": 50}
    found = told(0, copy)
    assert found == {
        "cache": str(copy),
        "ok": True,
        "digest": open_cache(copy).manifest.digest,
        "files": len(contents(copy)),
        "rows": 24,
        "problems": [],
    }
    (copy / "commits/0/0.json").unlink()
    found = told(5, copy, work.recipe, "--replay")
    assert (found["ok"], found["rows"]) == (False, 24)
    assert found["problems"] == [{"where": "commits/0/0.json", "what": "is missing or not a plain file"}]
    assert "dataset" not in found, "of a damaged cache nothing more is said"
    (copy / "commits/0/0.json").write_bytes(b"")
    unseal(copy, (0, 0))
    found = told(3, copy)
    assert (found["ok"], found["digest"], found["problems"]) == (False, None, [])
    refused(4, "verify", work.cache, work.recipe, "--set", "dataset.validation_fraction=0.1")


def test_options_that_need_a_pipeline(work: Work) -> None:
    for options in (["--replay"], ["--teacher"], ["--set", "cache.top_k=4"]):
        assert f"kdcache verify {work.cache} PIPELINE" in refused(2, "verify", work.cache, *options)
    assert "nowhere.yaml" in refused(2, "verify", work.cache, "nowhere.yaml")


def test_another_data_set_is_refused(work: Work, tmp_path: Path) -> None:
    arguments = ["verify", work.cache, work.recipe]
    ok(*arguments, *work.other(tmp_path))
    shuffled = np.arange(50)
    shuffled[[5, 8]] = 8, 5
    same = {"images": work.images[shuffled], "labels": work.labels[shuffled]}
    assert "in another order, first at sample 5" in refused(4, *arguments, *work.other(tmp_path, **same))
    other = work.images.copy()
    other[7, 0, 0] ^= 1
    assert "1 of 50 samples" in refused(4, *arguments, *work.other(tmp_path, other))
    relabeled = work.labels.copy()
    relabeled[9] = 3
    assert "sample 9 of pictures/train has label 3, in the cache 9" in refused(
        4, *arguments, *work.other(tmp_path, labels=relabeled)
    )
    assert "has 40" in refused(4, *arguments, *work.other(tmp_path, work.images[:40], work.labels[:40]))


def test_another_teacher_is_refused(work: Work) -> None:
    arguments = ["verify", work.cache, work.recipe, "--teacher", "--device", "cpu", "--set"]
    assert "this teacher has the weights" in refused(4, *arguments, "teacher.args={seed: 1}")
    message = refused(4, *arguments, "teacher.args={mirrored: true}")
    assert "mean total variation" in message
    assert "the same class in" in message


def test_a_student_is_not_trained_on_other_pixels(work: Work, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    student = ["train-student", work.recipe, "--cache", work.cache, "--device", "cpu", "-o"]

    def recorded(name: str, *options: str) -> Any:
        done = kdcache(*student, tmp_path / name, *options)
        assert done.exit_code == 0, done.output
        return json.loads((tmp_path / name / "metrics.json").read_text())["replay"][0], done.stderr

    assert recorded("same")[0] == {"checked": 32, "rounded": 0}
    with monkeypatch.context() as patch:
        another_library(patch, lambda pixels, sample, view: pixels * (1 + 2**-23))
        found, said = recorded("rounded")
        assert found == {"checked": 32, "rounded": 32}
        assert "32 of 32 images differ from the teacher's by rounding alone" in said
        assert "100 of them up to rounding" in ok("verify", work.cache, work.recipe, "--replay")
    another_library(monkeypatch, lambda pixels, sample, view: pixels.roll(1, dims=2))
    assert "view 0 of sample 0 is not what" in refused(4, "verify", work.cache, work.recipe, "--replay")
    message = refused(4, *student, tmp_path / "refused")
    assert "--allow-other-pixels" in message.split("fix: ")[1]
    assert not (tmp_path / "refused").exists()
    found, said = recorded("allowed", "--allow-other-pixels")
    assert f"error: {found['other_pixels']}\n" in message
    assert "continuing because of --allow-other-pixels" in said

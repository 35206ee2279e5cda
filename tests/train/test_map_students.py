"""Students of maps: trained from a cache as from the teacher itself, compared with it, and refused."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers.cli import ok, refused
from torch import Tensor, nn
from torch.nn import functional

from kdcache import Cache, build_model, dump_teacher, load_split, open_cache, train_student
from kdcache.config.cache import CacheSpec
from kdcache.config.schema import Pipeline
from kdcache.data.views import View
from kdcache.losses.maps import pixel_kd, resized
from kdcache.models.checkpoints import load_weights

COUNT, CLASSES = 60, 6
CODE = """from train.test_map_students import Hiding, Scenes, Tokens

def teacher(num_classes): return Scenes(16, 0)
def student(num_classes): return Scenes(6, 1)
def large(num_classes): return Scenes(6, 1, stride=1)
def other(num_classes): return Scenes(6, 1, classes=5)
def tokens(num_classes): return Tokens(6, 1)
def hiding(num_classes): return Hiding(16, 1)
"""
PIPELINE = """dataset: {{name: npz, root: {folder}/scenes.npz, validation_fraction: 0, test_fraction: 0}}
transform: [{{ToDtype: {{dtype: float32, scale: true}}}}]
eval_transform: [{{ToDtype: {{dtype: float32, scale: true}}}}]
teacher: {{model: '{folder}/nets.py:teacher'}}
cache:
  logits: false
  num_workers: 0
  outputs:
    maps: {{kind: classes, places: grid, encoding: float32, over_places: true}}
    small: {{kind: classes, places: grid, source: maps}}
    features: {{places: grid}}
    depth: {{kind: score, places: grid}}
student:
  model: '{folder}/nets.py:student'
  train: {{epochs: 2, batch_size: 20, lr: 0.1, momentum: 0, nesterov: false, weight_decay: 0, schedule: constant}}
loss: {{logits: false, maps: {{name: pixel_kd, tau: 2.0}}}}
"""


class Scenes(nn.Module):
    """A fully convolutional network, whose maps have half the size of the images [B, 1, 16, 16]."""

    def __init__(self, width: int, seed: int, stride: int = 2, classes: int = CLASSES) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.first, self.second = nn.Conv2d(1, width, 3, padding=1), nn.Conv2d(width, width, 3, stride, padding=1)
        self.head = nn.Conv2d(width, classes, 1)

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        features = self.second(self.first(images).relu()).relu()
        maps = self.head(features) * 4
        return {"maps": maps, "features": features, "depth": maps[:, 0]}


class Tokens(Scenes):
    """Returns the places of its maps as tokens [B, 64, C] of a transformer, behind one of the whole image."""

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        places = super().forward(images)["maps"].flatten(2).transpose(1, 2)
        return {"maps": torch.cat([places.mean(dim=1, keepdim=True), places], dim=1)}


class Hiding(Scenes):
    """Sees the left half of each image alone, and says which of its places are in the other one, and in dark ones."""

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        hidden = torch.zeros(len(images), 8, 8, dtype=torch.bool)
        hidden[:, :, 4:] = True
        dark = functional.avg_pool2d(images, 2)
        left = images * (torch.arange(16) < 8)
        return {**super().forward(left), "hidden": hidden, "dark": (dark < 0.5).float()}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The pipeline `p.yaml` and the cache of its teacher, `c.kdcache`."""
    folder = tmp_path_factory.mktemp("maps")
    draw = np.random.default_rng(0)
    scenes = np.kron(draw.integers(0, 256, (COUNT, 4, 4)), np.ones((1, 4, 4))) + draw.integers(-20, 21, (COUNT, 16, 16))
    np.savez(folder / "scenes.npz", images=scenes.clip(0, 255).astype(np.uint8), labels=np.arange(COUNT) % 8)
    (folder / "nets.py").write_text(CODE)
    (folder / "p.yaml").write_text(PIPELINE.format(folder=folder))
    ok("dump-teacher", folder / "p.yaml", "-o", folder / "c.kdcache", "--device", "cpu")
    return folder


def images(folder: Path) -> Tensor:
    with np.load(folder / "scenes.npz") as stored:
        return torch.from_numpy(stored["images"]).unsqueeze(1).float() / 255


def trained(folder: Path, name: str, *settings: str) -> Path:
    more = [argument for setting in settings for argument in ("--set", setting)]
    ok(
        "train-student",
        folder / "p.yaml",
        "--cache",
        folder / "c.kdcache",
        "-o",
        folder / name,
        "--device",
        "cpu",
        *more,
    )
    return folder / name


def loss_of(name: str, output: str = "maps", **options: Any) -> str:
    return f"loss={json.dumps({'logits': False, output: {'name': name, **options}})}"


def test_one_step_is_that_of_the_teacher_itself(folder: Path) -> None:
    """One batch of all samples, so that their order does not matter; maps in float32, so that nothing is rounded."""
    run = trained(folder, "step", "student.train.epochs=1", f"student.train.batch_size={COUNT}")
    student, found = Scenes(6, 1), Scenes(6, 1)
    seen = images(folder)
    with torch.no_grad():
        wanted = Scenes(16, 0)(seen)["maps"]
    torch.autograd.backward(pixel_kd(student(seen)["maps"], wanted, 2.0).mean())
    torch.optim.SGD(student.parameters(), lr=0.1).step()
    load_weights(found, run / "model.safetensors")
    for name, value in student.state_dict().items():
        torch.testing.assert_close(found.state_dict()[name], value, rtol=1e-4, atol=1e-5, msg=name)


@pytest.mark.parametrize("mask", ["hidden", "dark"])
def test_the_student_says_which_places_count(mask: str, folder: Path) -> None:
    """SALT: the teacher's features where the student saw nothing."""
    settings = f"student.model={folder}/nets.py:hiding", loss_of("salt", "features", mask=mask)
    run = trained(folder, f"salt-{mask}", *settings, "student.train.epochs=1", f"student.train.batch_size={COUNT}")
    student, found = Hiding(16, 1), Hiding(16, 1)
    seen = images(folder)
    with torch.no_grad():
        wanted = open_cache(folder / "c.kdcache").teacher("features")(torch.arange(COUNT))
    said = student(seen)
    counts = said[mask].reshape(COUNT, 8, 8).float()
    assert 0 < counts.mean() < 1
    apart = (said["features"] - wanted).abs().mean(dim=1)
    torch.autograd.backward(((apart * counts).sum(dim=(1, 2)) / counts.sum(dim=(1, 2)).clamp_min(1)).mean())
    torch.optim.SGD(student.parameters(), lr=0.1).step()
    load_weights(found, run / "model.safetensors")
    for name, value in student.state_dict().items():
        torch.testing.assert_close(found.state_dict()[name], value, rtol=1e-4, atol=1e-5, msg=name)


def test_places_without_a_label_are_left_out(tmp_path: Path) -> None:
    """One step on all scenes, whose hood of the car has no label."""
    torch.manual_seed(0)
    scenes = load_split("scenes", "train")
    teacher = build_model({"model": "small:fcn", "args": {"width": 4}}, 8, (3, 48, 96)).eval()
    outputs = {"pixels": {"kind": "classes", "places": "grid", "source": "classifier", "encoding": "float32"}}
    spec = CacheSpec.model_validate({"logits": False, "num_workers": 0, "outputs": outputs})
    cache = dump_teacher(teacher, scenes, tmp_path / "c.kdcache", spec=spec)
    pipeline = {
        "dataset": {"name": "scenes"},
        "student": {
            "model": "small:fcn",
            "args": {"width": 2},
            "outputs": {"pixels": {"source": "classifier"}},
            "train": {"epochs": 1, "batch_size": 240, "lr": 1.0, "momentum": 0.0, "nesterov": False,
                      "weight_decay": 0.0, "schedule": "constant", "num_workers": 0},
        },
        "loss": {"logits": False, "pixels": {"name": "pixel_kd", "mask": "labels"}},
    }  # fmt: skip
    run = train_student(Pipeline.model_validate(pipeline), cache, tmp_path / "run")
    view = View(scenes, scenes.transform or [])
    batch = view.batch(range(240), 0)
    torch.manual_seed(0)
    student = build_model({"model": "small:fcn", "args": {"width": 2}}, 8, (3, 48, 96)).train()
    with torch.no_grad():
        wanted = teacher(batch.images).log_softmax(dim=1)
    assert batch.maps is not None
    labeled = (batch.maps[:, 2::4, 2::4] >= 0).float()  # the pixel at the center of each place
    assert 0.5 < labeled.mean() < 1
    log_q = student(batch.images).log_softmax(dim=1)
    apart = (wanted.exp() * (wanted - log_q)).sum(dim=1)
    torch.autograd.backward(((apart * labeled).sum(dim=(1, 2)) / labeled.sum(dim=(1, 2))).mean())
    torch.optim.SGD(student.parameters(), lr=1.0).step()
    for name, value in student.state_dict().items():
        torch.testing.assert_close(run.model.state_dict()[name], value, rtol=1e-3, atol=1e-5, msg=name)


@pytest.mark.parametrize(
    ("output", "name", "options"),
    [
        ("small", "pixel_kd", {"standardize": "channels"}),
        ("maps", "cwd", {}),
        ("features", "at", {"weight": 100.0}),
        ("features", "theia", {}),
        ("features", "salt", {"normalize": True}),
        ("features", "pixel_mse", {"standardize": "places"}),
        ("depth", "pixel_mse", {"weight": 0.02}),
    ],
)
def test_every_loss_falls(output: str, name: str, options: dict[str, Any], folder: Path) -> None:
    source = {"small": ["student.outputs={small: {source: maps}}"]}.get(output, [])
    run = trained(folder, f"{output}-{name}", loss_of(name, output, **options), "student.train.epochs=6", *source)
    with (run / "metrics.csv").open() as file:
        losses = [float(line["loss"]) for line in csv.DictReader(file)]
    assert losses[-1] < losses[0]
    is_mapped = output == "features" and name != "at"
    assert (run / "projections.safetensors").exists() == is_mapped


def test_a_student_of_a_larger_grid(folder: Path) -> None:
    run = trained(folder, "large", f"student.model={folder}/nets.py:large", loss_of("pixel_kd", align_corners=True))
    found = json.loads(ok("evaluate", run, "--cache", folder / "c.kdcache", "--device", "cpu", "--json"))["outputs"][0]
    student, cache = Scenes(6, 1, stride=1), open_cache(folder / "c.kdcache")
    load_weights(student, run / "model.safetensors")
    with torch.no_grad():
        ours = student(images(folder))["maps"]
    theirs = resized(cache.teacher("maps")(torch.arange(COUNT)), (16, 16), align_corners=True)
    assert found["same_class"] == pytest.approx(float((ours.argmax(1) == theirs.argmax(1)).float().mean()), abs=1e-3)
    apart = 0.5 * (ours.softmax(1) - theirs.softmax(1)).abs().sum(1).mean()
    assert found["total_variation"] == pytest.approx(float(apart), rel=1e-3)


def test_a_student_of_tokens_is_trained_as_one_of_maps(folder: Path) -> None:
    settings = "student.outputs={maps: {patches: [8, 8]}}", f"student.model={folder}/nets.py:tokens"
    of_tokens, of_maps = trained(folder, "tokens", *settings), trained(folder, "plain")
    weights = [Scenes(6, 1), Scenes(6, 1)]
    for network, run in zip(weights, (of_tokens, of_maps), strict=True):
        load_weights(network, run / "model.safetensors")
    for ours, theirs in zip(*(network.parameters() for network in weights), strict=True):
        torch.testing.assert_close(ours, theirs)


def test_students_are_compared_place_by_place(folder: Path) -> None:
    run = trained(folder, "features", loss_of("theia", "features"))
    text = ok("evaluate", run, "--cache", folder / "c.kdcache", "--device", "cpu")
    assert "CKA" in text


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ([loss_of("cwd", "small"), "student.outputs={small: {source: maps}}"], "dump the teacher's logits, not"),
        ([loss_of("kd")], "the loss kd is for rows of samples, and the output maps is a map per sample"),
        ([loss_of("pixel_mse")], "pixel_mse is for an output of kind vector or score, and maps is of kind classes"),
        ([loss_of("pixel_kd", align="cubic")], "loss.maps.align: Input should be 'bilinear' or 'nearest'"),
        ([loss_of("pixel_kd", standardize="places")], "loss.maps.standardize: Input should be 'none' or 'channels'"),
        (["student.outputs={maps: {pool: mean}}"], "pool is mean, and the loss pixel_kd compares maps"),
        (["student.model={folder}/nets.py:tokens"], "[2, 65, 6], and places is grid"),
        (["student.model={folder}/nets.py:other"], "of the student has 5 numbers, that of the teacher 6"),
        (["student.outputs={maps: {source: depth}}"], "[2, 8, 8], and places is grid"),
        ([loss_of("pixel_kd", mask="labels")], "pixel_kd of maps needs a class per pixel, and scenes has none"),
        ([loss_of("pixel_kd", mask="features")], "the mask of the output maps of the student has [2, 6, 8, 8]"),
        ([loss_of("pixel_kd", mask="dept")], "has no part or module 'dept', did you mean depth?"),
        ([loss_of("cwd", mask="depth")], "loss.maps.mask: unknown key: mask belongs to another kind"),
    ],
)  # fmt: skip
def test_what_cannot_be_compared_is_refused(settings: list[str], words: str, folder: Path, tmp_path: Path) -> None:
    more = [argument for setting in settings for argument in ("--set", setting.replace("{folder}", str(folder)))]
    given = (folder / "p.yaml", "--cache", folder / "c.kdcache", "-o", tmp_path / "r", "--device", "cpu", *more)
    assert words in refused(
        4 if any(part in words for part in ("places is grid", "of the student has", "no part or module")) else 2,
        "train-student",
        *given,
    )


def test_rows_of_samples_are_no_maps(folder: Path, tmp_path: Path) -> None:
    pooled = "cache.outputs={maps: {kind: classes, source: maps, pool: mean}}"
    ok("dump-teacher", folder / "p.yaml", "-o", tmp_path / "v.kdcache", "--device", "cpu", "--set", pooled)
    given = (folder / "p.yaml", "--cache", tmp_path / "v.kdcache", "-o", tmp_path / "r", "--device", "cpu")
    said = refused(2, "train-student", *given)
    assert "the loss pixel_kd is for maps, and the output maps is one row per sample" in said
    assert "take one of ccc, cosine, kd" in said


def test_a_student_trains_in_your_own_loop(folder: Path) -> None:
    """As docs/LOSSES.md has it."""
    cache: Cache = open_cache(folder / "c.kdcache")
    student = Scenes(6, 1)
    teacher = cache.teacher("small")
    ids = torch.arange(COUNT)
    optimizer = torch.optim.SGD(student.parameters(), lr=0.1)
    values = []
    for _ in range(20):
        loss = pixel_kd(student(images(folder))["maps"], teacher(ids)).mean()
        optimizer.zero_grad()
        torch.autograd.backward(loss)
        optimizer.step()
        values.append(float(loss.detach()))
    assert values[-1] < 0.5 * values[0]

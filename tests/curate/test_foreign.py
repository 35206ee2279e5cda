"""FKD's, ml-dr's and TinyViT's files become caches, and caches their files.

The files here are written, and read, by the peers' documented layouts and by Pillow and torchvision's first transforms,
which the peers use; nothing of the package takes part in that.
"""

from __future__ import annotations

import itertools
import json
import math
import os
import pickle
import shutil
import struct
import zipfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import tensorstore
import torch
import torchvision.transforms as v1
from click.testing import CliRunner, Result
from helpers.format_text import Kept, check_arrays
from helpers.tiny import TinyTeacher, tiny_samples
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader
from torchvision.transforms import functional as v1_functional

from kdcache import Cache, CachedDataset, Samples, dump_teacher, open_cache
from kdcache.cache.format import zarr_store
from kdcache.cache.inspect.audit import audit
from kdcache.cli import main
from kdcache.cli.convert import _LAYOUTS
from kdcache.config.loader import load_pipeline
from kdcache.config.schema import CacheSpec, Pipeline, Transform
from kdcache.curate.dense_logits import cache_of_logits, logits_of_cache
from kdcache.curate.foreign import SOURCES, TARGETS, cache_of_files, files_of_cache
from kdcache.curate.foreign.sparse_labels import LEAST
from kdcache.curate.merge import merge
from kdcache.curate.select import select
from kdcache.data.datasets import load_split
from kdcache.data.recorded_crop import PixelBox, pixels_of
from kdcache.data.replay import replay, teacher_view
from kdcache.data.transforms import transform_for_evaluation
from kdcache.data.views import View
from kdcache.dump.check_teacher import compare_with_teacher
from kdcache.errors import CorruptError, KdcacheError, MismatchError, UsageError
from kdcache.losses import Loss, distillation_loss
from kdcache.losses.presets import PARTS
from kdcache.train.train import train_student

CLASSES, COUNT, VIEWS, SIZE = 12, 26, 3, 8
MEAN, STD = [0.5, 0.4, 0.3], [0.2, 0.25, 0.3]
REST: Transform = [
    {"ToImage": {}},
    {"ToDtype": {"dtype": "float32", "scale": True}},
    {"Normalize": {"mean": MEAN, "std": STD}},
]
FRACTIONS: Transform = [{"RecordedCrop": {"size": SIZE, "unit": "fraction"}}, *REST]
PIXELS: Transform = [{"RecordedCrop": {"size": SIZE, "unit": "pixels"}}, *REST]
SPEC = CacheSpec(shard_rows=16, dtype="float32")
check_same_pixels = partial(torch.testing.assert_close, rtol=0.0, atol=1e-6)
"""A pixel is one of 256 levels, more than 0.01 apart here; torchvision's two transforms divide by 255 differently."""

Floats = npt.NDArray[np.floating[Any]]


class Images:
    """An image folder with a pipeline of its own, and what a teacher said of random crops of its images.

    Args:
        root: an empty folder.
    """

    def __init__(self, root: Path) -> None:
        random = np.random.default_rng(0)
        self.root, self.paths = root, []
        for number in range(COUNT):
            path = root / "data" / "train" / f"class{number % CLASSES:02}" / f"{number:03}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            sides = random.integers(17, 40, 2)
            Image.fromarray(random.integers(0, 256, (*sides, 3), np.uint8)).save(path)
            self.paths.append(path)
        self.paths.sort()
        self.write("fraction")
        torch.manual_seed(1)
        self.boxes = [
            [v1.RandomResizedCrop.get_params(self.image(i), [0.08, 1.0], [0.75, 4 / 3]) for _ in range(VIEWS)]
            for i in range(COUNT)
        ]
        self.flips = torch.rand(COUNT, VIEWS).lt(0.5).numpy()
        self.probabilities = torch.randn(COUNT, VIEWS, CLASSES).mul(2).softmax(dim=2).numpy()

    def write(self, unit: str | None) -> Path:
        shown = {"fraction": FRACTIONS, "pixels": PIXELS}.get(unit or "")
        said = {
            "dataset": {
                "name": "image-folder",
                "root": str(self.root / "data"),
                "validation_fraction": 0,
                "test_fraction": 0,
            },
            "eval_transform": [{"Resize": {"size": [SIZE, SIZE]}}, *REST],
            "cache": {"shard_rows": 8, "dtype": "float32"},
            "student": {"model": "small:mlp", "train": {"epochs": 2, "batch_size": 8}},
            **({"transform": shown} if shown else {}),
        }
        path = self.root / f"{unit}.yaml"
        path.write_text(json.dumps(said))
        return path

    @property
    def pipeline(self) -> Pipeline:
        return load_pipeline(self.root / "fraction.yaml")

    @property
    def samples(self) -> Samples:
        return load_split(self.pipeline.dataset, "train")

    def image(self, number: int) -> Image.Image:
        return Image.open(self.paths[number]).convert("RGB")

    def cut(self, number: int, view: int) -> Tensor:
        """What the teacher saw: Pillow's crop of these pixels, and nothing rounded."""
        top, left, height, width = self.boxes[number][view]
        image = (
            self.image(number)
            .crop((left, top, left + width, top + height))
            .resize((SIZE, SIZE), Image.Resampling.BILINEAR)
        )
        image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if self.flips[number, view] else image
        return torch.as_tensor(v1_functional.normalize(v1_functional.to_tensor(image), MEAN, STD))

    def top(self, number: int, k: int) -> tuple[Floats, npt.NDArray[np.int64]]:
        """The k largest of a sample's probabilities, [V, k], falling, and their classes."""
        order = np.argsort(-self.probabilities[number], axis=1)[:, :k]
        return np.take_along_axis(self.probabilities[number], order, axis=1), order


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Images:
    return Images(tmp_path_factory.mktemp("images"))


def logits_of(cache: Cache, view: int) -> Tensor:
    return cache.teacher()(torch.arange(len(cache)), view)


def kdcache(*arguments: object) -> Result:
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


def as_json(*arguments: object) -> Any:
    done = kdcache(*arguments, "--json")
    assert done.exit_code == 0, done.output
    return json.loads(done.stdout)


def unpacked(path: Path) -> Any:
    """As the peers read their own files."""
    return torch.load(path, "cpu", weights_only=False)


def saved(path: Path, held: Any) -> None:
    path.unlink(missing_ok=True)
    torch.save(held, path)


class Calls:
    """What ends every process that unpickles it."""

    def __reduce__(self) -> Any:
        return os._exit, (77,)


# FKD


def fkd_of(images: Images, folder: Path, k: int = 5, kind: str = "marginal", coords: type = np.float32) -> Path:
    for number, path in enumerate(images.paths):
        width, height = images.image(number).size
        of_image = np.array(images.boxes[number]) / [height, width, height, width]
        values, classes = images.top(number, k)
        if kind == "renormalized":
            values = values / values.sum(axis=1, keepdims=True)
        output: Any = np.stack([classes, values], axis=1).astype(np.float32)
        if kind == "smoothing":
            output = output[:, :, 0]
        if kind == "all":
            output = torch.from_numpy(images.probabilities[number])
        out = folder / "train" / path.parent.name / f"{path.stem}.tar"
        out.parent.mkdir(parents=True, exist_ok=True)
        torch.save([of_image.astype(coords), images.flips[number], output], out)
    return folder


def fkd_shows(images: Images, folder: Path, number: int, view: int) -> Tensor:
    """What FKD's students are shown."""
    image = images.image(number)
    coords, flips, _ = unpacked(
        folder / "train" / images.paths[number].parent.name / f"{images.paths[number].stem}.tar"
    )
    sides = (image.size[1], image.size[0], image.size[1], image.size[0])
    box = [share.item() * side for share, side in zip(coords[view], sides, strict=True)]
    cut = v1_functional.resized_crop(image, *box, [SIZE, SIZE], v1.InterpolationMode.BILINEAR)
    cut = v1_functional.hflip(cut) if flips[view] else cut
    return torch.as_tensor(v1_functional.normalize(v1_functional.to_tensor(cut), MEAN, STD))


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


def from_fkd(images: Images, tmp_path: Path, **made: Any) -> Cache:
    folder = fkd_of(images, tmp_path / "labels", **made)
    return cache_of_files(folder, "fkd", images.samples, tmp_path / "fkd.kdcache", transform=FRACTIONS, spec=SPEC)


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


# Level of the logits


LOSSES: list[dict[str, Any]] = [
    *({"name": name} for name in ["ce", *PARTS, "zscore+dtkd", "zscore+mse", "dtkd+dkd", "ka+dtd", "dtkd+mse"]),
    *({"name": name, "temperature": {"center": True}} for name in ("dtkd", "dtkd+mse", "dtkd+dist")),
]


@pytest.mark.parametrize("settings", LOSSES, ids=str)
def test_what_needs_the_level_is_what_changes_with_it(settings: dict[str, Any]) -> None:
    if settings["name"] == "truncated":
        settings = settings | {"adjustment": {"top": 5}}
    loss = Loss.model_validate(settings)
    random = torch.Generator().manual_seed(0)
    student, teacher = (torch.randn(16, CLASSES, generator=random, dtype=torch.float64) * 3 for _ in "vu")
    labels, theta = torch.arange(16) % CLASSES, torch.ones(1, dtype=torch.float64)
    level = torch.linspace(-5, 5, 16, dtype=torch.float64).unsqueeze(1)
    one, two = (
        distillation_loss(student, logits, labels, loss, 20, theta=theta).total for logits in (teacher, teacher + level)
    )
    changes = bool((one - two).abs() > 1e-6 * one.abs())
    assert changes == (loss.needs_level is not None)


def test_losses_that_need_the_level_are_refused_and_centered_ones_train(images: Images, tmp_path: Path) -> None:
    cache = from_fkd(images, tmp_path)
    pipeline = images.write("fraction")
    for name, what in (("dtkd", "temperature dtkd"), ("dtd", "dtd_flsw"), ("mse", "divergence mse")):
        done = kdcache("train-student", pipeline, "--cache", cache.path, "-o", tmp_path / "no", "--loss", name)
        assert done.exit_code == 2
        assert "only its probabilities were imported" in done.stderr
        assert what in done.stderr
        assert not (tmp_path / "no").exists()
    centered = ["--loss", "dtkd", "--set", "loss.temperature.center=true"]
    for number, loss in enumerate(
        (["--loss", "zscore+ka"], centered, ["--loss", "truncated", "--set", "loss.adjustment.top=5"])
    ):
        done = kdcache("train-student", pipeline, "--cache", cache.path, "-o", tmp_path / f"run{number}", *loss)
        assert done.exit_code == 0, done.output


# ml-dr


AUGMENTED = {"rand_augment": {"p": 0.5}, "random_erase": {"p": 0.25}, "mixup": {"p": 0.5}, "cutmix": {"p": 0.5}}


def ml_dr_of(
    images: Images,
    folder: Path,
    compress: bool = True,
    steps: dict[str, Any] | None = None,
    changed: dict[tuple[int, int], dict[str, Any]] | None = None,
) -> Path:
    """Reinforcements; `changed` says for (sample, view) what else was done to it."""
    steps, changed = steps or {}, changed or {}
    folder.mkdir()
    mixes = "mixup" in steps or "cutmix" in steps
    for number in range(COUNT):
        values, classes = images.top(number, 4)
        samples = []
        for view in range(VIEWS):
            done = changed.get((number, view), {})
            drawn = {
                "random_resized_crop": tuple(images.boxes[number][view]),
                "random_horizontal_flip": bool(images.flips[number, view]),
                **{name: done.get(name) for name in steps if name not in ("mixup", "cutmix")},
            }
            mixing = {name: done.get(name) for name in steps if name in ("mixup", "cutmix")}
            paired = any(value is not None for value in mixing.values())
            params: Any
            if compress:
                params = [7 if paired else None] if mixes else []
                params += [[value, value] if paired else value for value in drawn.values()] + list(mixing.values())
            else:
                params = {"uint8": ((), ()), "to_tensor": ((), ()), "normalize": ((), ())}
                params |= {name: (value, value) for name, value in drawn.items()} | mixing
            order = np.random.default_rng(number).permutation(4)
            samples.append({"params": params, "prob": (values[view, order].tolist(), classes[view, order].tolist())})
        torch.save((number, samples), folder / f"{number}.pth.tar", pickle_protocol=4)
    augmentation = {
        "uint8": {"enable": True},
        "random_resized_crop": {"enable": True, "size": SIZE},
        "random_horizontal_flip": {"enable": True, "p": 0.5},
        **{name: {"enable": True, **given} for name, given in steps.items()},
        "color_jitter": {"enable": False},
        "to_tensor": {"enable": True},
        "normalize": {"mean": MEAN, "std": STD},
    }
    config = {
        "dataset": "imagenet",
        "gpu": None,
        "reinforce": {"num_samples": VIEWS, "image_augmentation": augmentation},
    }
    torch.save(config, folder / "config.pth.tar")
    return folder


def ml_dr_shows(images: Images, folder: Path, number: int, view: int) -> Tensor:
    """What ml-dr's students are shown."""
    found, samples = unpacked(folder / f"{number}.pth.tar")
    assert found == number
    box, flip = samples[view]["params"]
    size = unpacked(folder / "config.pth.tar")["reinforce"]["image_augmentation"]["random_resized_crop"]["size"]
    sides = [size, size] if isinstance(size, int) else size
    cut = v1_functional.resized_crop(images.image(number), *box, sides, v1.InterpolationMode.BILINEAR)
    cut = v1_functional.hflip(cut) if flip else cut
    return torch.as_tensor(v1_functional.normalize(v1_functional.to_tensor(cut), MEAN, STD))


def ml_dr_says(values: list[float], classes: list[int]) -> Tensor:
    """ml-dr's soft labels, densified smoothly."""
    kept = torch.tensor(values)
    left = 1.0 - kept.sum()
    assert left >= 0, "its reader would take a softmax of these probabilities"
    even = torch.ones(CLASSES) * left / (CLASSES - len(values))
    even[classes] = kept
    return even


@pytest.mark.parametrize("compress", [True, False])
@pytest.mark.parametrize("steps", [{}, AUGMENTED], ids=["crops", "others, that left all alone"])
def test_ml_drs_crops_and_probabilities_are_the_caches(
    images: Images, tmp_path: Path, compress: bool, steps: dict[str, Any]
) -> None:
    untouched = {(number, 0): {"random_erase": (-1, -1, -1, -1)} for number in range(COUNT)} if steps else {}
    folder = ml_dr_of(images, tmp_path / "reinforced", compress, steps, untouched)
    cache = cache_of_files(folder, "ml-dr", images.samples, tmp_path / "c.kdcache", spec=SPEC)
    assert cache.manifest.plan.views.transform == PIXELS
    assert audit(cache.path).failure is None
    assert replay(cache, images.samples).rounded == 0
    for view in range(VIEWS):
        seen, found = teacher_view(cache, images.samples, view), logits_of(cache, view).softmax(dim=1)
        for number in range(COUNT):
            check_same_pixels(seen[number].images[0], images.cut(number, view))
            values, classes = unpacked(folder / f"{number}.pth.tar")[1][view]["prob"]
            torch.testing.assert_close(found[number], ml_dr_says(values, classes), rtol=2e-3, atol=1e-6)


@pytest.mark.parametrize("compress", [True, False])
@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("rand_augment", [(3, 0.5)]),
        ("random_erase", (1, 2, 3, 4)),
        ("random_erase", 5),
        ("mixup", 0.3),
        ("cutmix", [0.3, 1, 2, 3, 4]),
    ],
)
def test_what_ml_dr_has_changed_otherwise_is_refused_by_name(
    images: Images, tmp_path: Path, name: str, value: Any, compress: bool
) -> None:
    folder = ml_dr_of(images, tmp_path / "reinforced", compress, AUGMENTED, {(9, 1): {name: value}})
    with pytest.raises(UsageError, match=rf"reinforcement 1 in .*/9\.pth\.tar was changed by {name}"):
        cache_of_files(folder, "ml-dr", images.samples, tmp_path / "c.kdcache", spec=SPEC)
    assert not (tmp_path / "c.kdcache").exists()


def test_a_config_that_says_nothing_is_named(images: Images, tmp_path: Path) -> None:
    folder = ml_dr_of(images, tmp_path / "reinforced")
    plain: dict[str, Any] = {"random_horizontal_flip": {"p": 0.5}}
    for held, why in (
        ({"reinforce": {"image_augmentation": plain}}, "has the transforms random_horizontal_flip"),
        ({"reinforce": {"image_augmentation": {"random_resized_crop": {}}}}, "has the transforms random_resized_crop"),
        ({"reinforce": {"image_augmentation": plain | {"random_resized_crop": {"size": "x"}}}}, "size must be"),
        ({"reinforce": {"image_augmentation": [1]}}, "config.pth.tar does not state the augmentation"),
        ([], "config.pth.tar does not state the augmentation"),
        (Calls(), "config.pth.tar cannot be read"),
    ):
        saved(folder / "config.pth.tar", held)
        with pytest.raises(KdcacheError, match=why):
            cache_of_files(folder, "ml-dr", images.samples, tmp_path / "c.kdcache")
    (folder / "config.pth.tar").unlink()
    with pytest.raises(UsageError, match=r"not a folder of ml-dr files .* config\.pth\.tar"):
        cache_of_files(folder, "ml-dr", images.samples, tmp_path / "c.kdcache")


@pytest.mark.parametrize("place", [0, 3])
def test_another_transform_than_the_config_states_is_refused(images: Images, tmp_path: Path, place: int) -> None:
    folder = ml_dr_of(images, tmp_path / "reinforced")
    other: Transform = [{name: {**given} for name, given in step.items()} for step in PIXELS]
    ((_, given),) = other[place].items()
    given |= {"size": 9} if place == 0 else {"mean": [0.1, 0.2, 0.9]}
    with pytest.raises(MismatchError, match="differs from the one in the files of ml-dr"):
        cache_of_files(folder, "ml-dr", images.samples, tmp_path / "c.kdcache", transform=other, spec=SPEC)


def test_crops_behind_something_else_and_other_numbers_of_images_are_refused(images: Images, tmp_path: Path) -> None:
    resized = ml_dr_of(images, tmp_path / "resized", steps={"resize": {"size": 9}})
    with pytest.raises(UsageError, match="only random_resized_crop as the first step"):
        cache_of_files(resized, "ml-dr", images.samples, tmp_path / "c.kdcache")
    folder = ml_dr_of(images, tmp_path / "reinforced")
    shutil.copy(folder / "0.pth.tar", folder / f"{COUNT}.pth.tar")
    with pytest.raises(MismatchError, match="hold nothing out"):
        cache_of_files(folder, "ml-dr", images.samples, tmp_path / "c.kdcache")


# TinyViT


def tinyvit_of(images: Images, folder: Path, names: bool = False, k: int = 6) -> Path:
    random = np.random.default_rng(3)
    for epoch in range(VIEWS):
        made = folder / f"logits_top{k}_epoch{epoch}"
        made.mkdir(parents=True)
        order = random.permutation(COUNT)
        here, there = np.array_split(order, 2)
        for rank, part in enumerate((here, np.append(there, order[:1]))):  # as a sampler that pads
            keys = [images.paths[number].stem if names else str(number) for number in part]
            (made / f"rank{rank}-keys.txt").write_text("".join(f"{key}\n" for key in keys))
            with (made / f"rank{rank}-values.bin").open("wb") as opened:
                for number in part:
                    values, classes = (found[epoch] for found in images.top(int(number), k))
                    padding = rank == 1 and number == order[0]
                    opened.write(struct.pack("<i", -1 if padding else 2**31 - 1 - int(number)))
                    opened.write(classes.astype("<i2").tobytes() + values.astype("<f2").tobytes())
    return folder


def tinyvit_records(folder: Path, k: int = 6) -> dict[tuple[int, str], bytes]:
    """The record of each epoch and key; of several the first."""
    found: dict[tuple[int, str], bytes] = {}
    size = 4 + 4 * k
    for epoch in range(VIEWS):
        for rank in sorted((folder / f"logits_top{k}_epoch{epoch}").glob("rank*-keys.txt")):
            values = rank.with_name(rank.name.replace("keys.txt", "values.bin")).read_bytes()
            for row, key in enumerate(rank.read_text().split()):
                found.setdefault((epoch, key), values[row * size : (row + 1) * size])
    return found


@pytest.mark.parametrize("names", [False, True])
def test_tinyvits_rows_can_be_read_and_written_again(images: Images, tmp_path: Path, names: bool) -> None:
    folder, out = tinyvit_of(images, tmp_path / "logits", names), tmp_path / "c.kdcache"
    pipeline = images.write(None)
    made = as_json("convert", folder, "--from", "tinyvit", "--pipeline", pipeline, "-o", out)
    assert made["plan"]["views"]["transform"][0].keys() == {"DrawnElsewhere"}
    cache = open_cache(out)
    assert audit(out).failure is None
    records = tinyvit_records(folder)
    for view in range(VIEWS):
        found = logits_of(cache, view).softmax(dim=1)
        for number, path in enumerate(images.paths):
            _, *kept = struct.unpack("<i6h6e", records[view, path.stem if names else str(number)])
            even = max(1 - sum(kept[6:]), 0) / (CLASSES - 6)
            expected = torch.full((CLASSES,), even)
            expected[kept[:6]] = torch.tensor(kept[6:])
            torch.testing.assert_close(found[number], expected, rtol=2e-3, atol=2e-3)
    with_images = ["--pipeline", pipeline] if names else []
    as_json("convert", out, "--to", "tinyvit", "-o", tmp_path / "again", *with_images)
    again = tinyvit_records(tmp_path / "again")
    assert again.keys() == records.keys()
    for key, record in records.items():
        seed, *kept = struct.unpack("<i6h6e", record)
        found_seed, *found_kept = struct.unpack("<i6h6e", again[key])
        assert (found_seed, found_kept[:6]) == (seed, kept[:6])
        assert found_kept[6:] == pytest.approx(kept[6:], rel=2e-3, abs=1e-4)


def test_whatever_needs_no_images_works_with_tinyvits_rows(images: Images, tmp_path: Path) -> None:
    out, pipeline = tmp_path / "c.kdcache", images.write(None)
    cache = cache_of_files(tinyvit_of(images, tmp_path / "logits"), "tinyvit", images.samples, out, spec=SPEC)
    for command in (["info", out], ["verify", out], ["summarize", out], ["diff", out, out], ["card", out]):
        done = kdcache(*command)
        assert done.exit_code == 0, done.output
    chosen = np.array([20, 3, 11, 7])
    some = select(cache, tmp_path / "some.kdcache", samples=chosen)
    assert audit(some.path).failure is None
    torch.testing.assert_close(logits_of(some, 1), logits_of(cache, 1)[chosen], rtol=0, atol=0)
    kept, all_of_them = stored(some), stored(cache)
    np.testing.assert_array_equal(kept["seeds"], all_of_them["seeds"][:, chosen])
    assert all_of_them["seeds"].dtype == np.int32
    assert (all_of_them["seeds"] == 2**31 - 1 - np.arange(COUNT)).all()
    why = "drawn by code outside of kdcache"
    for command in (
        ["train-student", pipeline, "--cache", out, "-o", tmp_path / "run"],
        ["verify", out, pipeline, "--replay"],
    ):
        done = kdcache(*command)
        assert (done.exit_code, why in done.stderr, "teacher()" in done.stderr) == (2, True, True)
    with pytest.raises(UsageError, match=why):
        CachedDataset(images.samples, cache)


def test_epochs_that_are_no_views_and_other_images_are_refused(images: Images, tmp_path: Path) -> None:
    folder = tinyvit_of(images, tmp_path / "logits")
    (folder / "logits_top6_epoch1").rename(folder / "logits_top6_epoch9")
    with pytest.raises(UsageError, match=r"epochs \[0, 2, 9\]"):
        cache_of_files(folder, "tinyvit", images.samples, tmp_path / "c.kdcache")
    (folder / "logits_top6_epoch9").rename(folder / "logits_top6_epoch1")
    with pytest.raises(MismatchError, match="not in tiny/train, such as 20"):
        cache_of_files(folder, "tinyvit", tiny_samples(20, CLASSES), tmp_path / "c.kdcache")


# The other direction


DRAWN: Transform = [{"RandomResizedCrop": {"size": SIZE}}, {"RandomHorizontalFlip": {"p": 0.5}}, *REST]


class Seeing(TinyTeacher):
    """Sees all of an image of 8 x 8 in color."""

    def forward(self, images: Tensor) -> Tensor:
        return super().forward(images.mean(dim=1).reshape(len(images), 16, -1).mean(dim=2)) / 2


@pytest.fixture(scope="module")
def dumped(images: Images, tmp_path_factory: pytest.TempPathFactory) -> Cache:
    """A cache of ours, with random crops."""
    out = tmp_path_factory.mktemp("dumped") / "c.kdcache"
    spec = CacheSpec(shard_rows=8, views=VIEWS, seed=5, dtype="float32", top_k=6, rank=3, pilot_rows=16)
    return dump_teacher(Seeing(CLASSES), images.samples, out, transform=DRAWN, spec=spec)


SHOWS: dict[str, Callable[[Images, Path, int, int], Tensor]] = {"fkd": fkd_shows, "ml-dr": ml_dr_shows}


def said_by(target: str, images: Images, folder: Path, number: int) -> tuple[Floats, npt.NDArray[np.int64]]:
    """(probabilities, classes) [V, k] of a sample."""
    if target == "fkd":
        path = images.paths[number]
        _, _, output = unpacked(folder / "train" / path.parent.name / f"{path.stem}.tar")
        return output[:, 1], output[:, 0].astype(np.int64)
    pairs = [one["prob"] for one in unpacked(folder / f"{number}.pth.tar")[1]]
    for values, classes in pairs:
        ml_dr_says(values, classes)
    return np.array([values for values, _ in pairs]), np.array([classes for _, classes in pairs])


@pytest.mark.parametrize("target", ["fkd", "ml-dr"])
@pytest.mark.parametrize("flips", [True, False])
def test_their_readers_cut_what_our_teacher_saw(
    images: Images, dumped: Cache, tmp_path: Path, target: str, flips: bool
) -> None:
    cache = dumped
    if not flips:
        spec = CacheSpec(shard_rows=8, views=VIEWS, seed=5)
        cache = dump_teacher(
            Seeing(CLASSES), images.samples, tmp_path / "c.kdcache", transform=[DRAWN[0], *REST], spec=spec
        )
    out = tmp_path / "out"
    files_of_cache(cache, target, out, images.samples, top_k=5)
    for view in range(VIEWS):
        seen = teacher_view(cache, images.samples, view)
        probabilities = logits_of(cache, view).softmax(dim=1).numpy()
        for number in range(COUNT):
            shown = SHOWS[target](images, out, number, view)
            check_same_pixels(shown, seen[number].images[0])
            values, classes = (found[view] for found in said_by(target, images, out, number))
            np.testing.assert_allclose(values, probabilities[number][classes], rtol=1e-5)
            np.testing.assert_allclose(values, np.sort(probabilities[number])[:-6:-1], rtol=1e-5)
            assert len(set(classes.tolist())) == 5


@pytest.mark.parametrize("source", ["fkd", "ml-dr"])
@pytest.mark.parametrize("target", ["fkd", "ml-dr"])
def test_there_and_back_again(images: Images, tmp_path: Path, source: str, target: str) -> None:
    folder = (fkd_of if source == "fkd" else ml_dr_of)(images, tmp_path / "theirs")
    shown = {"fkd": FRACTIONS, "ml-dr": PIXELS}
    cache = cache_of_files(folder, source, images.samples, tmp_path / "a.kdcache", transform=shown[source], spec=SPEC)
    files_of_cache(cache, target, tmp_path / "out", images.samples)
    for number, view in itertools.product(range(0, COUNT, 5), range(VIEWS)):
        shown_there = SHOWS[target](images, tmp_path / "out", number, view)
        check_same_pixels(shown_there, images.cut(number, view))
    again = cache_of_files(
        tmp_path / "out", target, images.samples, tmp_path / "b.kdcache", transform=shown[target], spec=SPEC
    )
    for view in range(VIEWS):
        torch.testing.assert_close(
            logits_of(again, view).softmax(dim=1), logits_of(cache, view).softmax(dim=1), rtol=5e-3, atol=1e-4
        )
        mine, theirs = (teacher_view(made, images.samples, view) for made in (cache, again))
        check_same_pixels(mine[3].images, theirs[3].images)


def test_files_are_written_on_the_command_line_and_read_again(images: Images, dumped: Cache, tmp_path: Path) -> None:
    pipeline, pixels = images.write(None), images.write("pixels")
    said = as_json(
        "convert", dumped.path, "--to", "ml-dr", "--pipeline", pipeline, "-o", tmp_path / "out", "--top-k", 4
    )
    assert (said["samples"], said["views"], said["top_k"]) == (COUNT, VIEWS, 4)
    assert torch.load(tmp_path / "out" / "9.pth.tar", weights_only=True)[0] == 9  # as torch reads files by now
    done = kdcache("convert", tmp_path / "out", "--from", "ml-dr", "--pipeline", pixels, "-o", tmp_path / "c.kdcache")
    assert done.exit_code == 0, done.output
    assert "4 classes per row" in kdcache(
        "convert", dumped.path, "--to", "fkd", "--pipeline", pipeline, "-o", tmp_path / "labels", "--top-k", 4
    ).stdout  # fmt: skip
    assert list(_LAYOUTS.choices) == list(SOURCES) == list(TARGETS)


def still(samples: Samples, out: Path, transform: Transform, views: int = 1) -> Cache:
    spec = CacheSpec(shard_rows=8, views=views)
    return dump_teacher(Seeing(CLASSES), samples, out, transform=transform, spec=spec)


def test_what_their_readers_would_show_otherwise_is_refused(images: Images, dumped: Cache, tmp_path: Path) -> None:
    out, samples = tmp_path / "out", images.samples
    whole = still(samples, tmp_path / "a.kdcache", [{"Resize": {"size": [SIZE, SIZE]}}, *REST])
    jitter: Transform = [DRAWN[0], {"ColorJitter": {"brightness": 0.5}}, *REST]
    jittered = still(samples, tmp_path / "b.kdcache", jitter, 2)
    for cache in (whole, jittered):
        with pytest.raises(UsageError, match="are not plain crops"):
            files_of_cache(cache, "fkd", out, samples)
    with pytest.raises(UsageError, match="by its own code"):
        files_of_cache(dumped, "tinyvit", out)
    with pytest.raises(UsageError, match="the cache stores 6"):
        files_of_cache(dumped, "fkd", out, samples, top_k=7)
    with pytest.raises(UsageError, match="need the images"):
        files_of_cache(dumped, "fkd", out)
    bicubic = still(
        samples, tmp_path / "d.kdcache", [{"RandomResizedCrop": {"size": SIZE, "interpolation": "bicubic"}}, *REST]
    )
    with pytest.raises(UsageError, match="only crops bilinearly"):
        files_of_cache(bicubic, "ml-dr", out, samples)
    files_of_cache(bicubic, "fkd", tmp_path / "fkd", samples)
    with pytest.raises(UsageError, match="exists already"):
        files_of_cache(bicubic, "fkd", tmp_path / "fkd", samples)
    assert not out.exists()
    assert not list(tmp_path.glob("*.partial"))


def test_images_without_names_are_refused_for_fkd_and_numbered_for_ml_dr(tmp_path: Path) -> None:
    samples = tiny_samples(20, CLASSES)
    cropped: Transform = [{"RandomResizedCrop": {"size": 4}}]
    cache = dump_teacher(TinyTeacher(CLASSES), samples, tmp_path / "c.kdcache", transform=cropped)
    with pytest.raises(UsageError, match="are not in files"):
        files_of_cache(cache, "fkd", tmp_path / "out", samples)
    (tmp_path / "labels").mkdir()
    with pytest.raises(UsageError, match="are not in files"):
        cache_of_files(tmp_path / "labels", "fkd", samples, tmp_path / "a.kdcache", transform=FRACTIONS)


# What cannot be


COORDS, FLIPS = np.full((VIEWS, 4), 0.25, np.float32), np.zeros(VIEWS, bool)
PAIRS = np.stack([np.tile(np.arange(5.0), (VIEWS, 1)), np.full((VIEWS, 5), 0.1)], axis=1).astype(np.float32)


def off(values: Any, place: Any, value: float) -> Any:
    made = values.copy()
    made[place] = value
    return made


WRONG_FKD: dict[str, tuple[Any, str]] = {
    "a box that is NaN": ([off(COORDS, (1, 2), math.nan), FLIPS, PAIRS], "which is not a box in fractions"),
    "an infinite box": ([off(COORDS, (1, 2), math.inf), FLIPS, PAIRS], "which is not a box in fractions"),
    "a negative box": ([off(COORDS, (0, 0), -0.5), FLIPS, PAIRS], "which is not a box in fractions"),
    "an empty box": ([off(COORDS, (0, 3), 0), FLIPS, PAIRS], "which is not a box in fractions"),
    "a box outside": ([off(COORDS, (0, 1), 0.9), FLIPS, PAIRS], "which is not a box in fractions"),
    "a flip that is none": ([COORDS, np.full(VIEWS, 2), PAIRS], "which is not a box in fractions"),
    "fewer flips": ([COORDS, FLIPS[1:], PAIRS], "flips"),
    "other crops": ([COORDS[1:], FLIPS[1:], PAIRS[1:]], "2 crops"),
    "another k": ([COORDS, FLIPS, PAIRS[:, :, :4]], "with 4 classes"),
    "two parts": ([COORDS, PAIRS], "does not hold coords"),
    "a class too many": ([COORDS, FLIPS, off(PAIRS, (1, 0, 4), CLASSES)], "holds classes from 0 to 12"),
    "a class twice": ([COORDS, FLIPS, off(PAIRS, (1, 0, 4), 0)], "twice"),
    "half a class": ([COORDS, FLIPS, off(PAIRS, (1, 0, 4), 4.5)], "are not integers"),
    "a class that is NaN": ([COORDS, FLIPS, off(PAIRS, (1, 0, 4), math.nan)], "holds classes from -1"),
    "a negative probability": ([COORDS, FLIPS, off(PAIRS, (1, 1, 4), -0.1)], "are not probabilities"),
    "a probability that is NaN": ([COORDS, FLIPS, off(PAIRS, (1, 1, 4), math.nan)], "are not probabilities"),
    "more than all": ([COORDS, FLIPS, off(PAIRS, (1, 1, 4), 0.9)], "are not probabilities"),
    "other classes": ([COORDS, FLIPS, np.full((VIEWS, 11), 1 / 11, np.float32)], "neither"),
    "hard labels": ([COORDS, FLIPS, np.zeros(VIEWS, np.int64)], "hard labels"),
    "words": (["a", "b", "c"], "holds coords"),
    "objects": ([COORDS, FLIPS, np.array([{}])], "cannot be read"),
    "one crop many times": (
        [
            torch.tensor(COORDS[:1]).expand(10**6, 4),
            torch.zeros(1).expand(10**6),
            torch.tensor(PAIRS[:1]).expand(10**6, 2, 5),
        ],
        "is too small for coords",
    ),
    "code": ([COORDS, FLIPS, Calls()], "cannot be read"),
}


def with_zeros(path: Path) -> None:
    """With a million zeros beside what it holds."""
    with zipfile.ZipFile(path) as packed:
        members = {name: packed.read(name) for name in packed.namelist()}
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as packed:
        for name, held in members.items():
            packed.writestr(name, held + (b"." * 10**6 if name.endswith(".pkl") else b""))


@pytest.mark.parametrize("what", [*WRONG_FKD, "no file", "no bytes", "half of it", "other bytes", "zeros, compressed"])
def test_files_of_fkd_that_cannot_be_are_named(images: Images, tmp_path: Path, what: str) -> None:
    folder = fkd_of(images, tmp_path / "labels")
    path = folder / "train" / images.paths[11].parent.name / f"{images.paths[11].stem}.tar"
    whole, (held, why) = (
        path.read_bytes(),
        WRONG_FKD.get(what, (None, "missing" if what == "no file" else "cannot be read")),
    )
    if held is not None:
        saved(path, held)
    elif what == "no file":
        path.unlink()
    elif what == "zeros, compressed":
        with_zeros(path)
    else:
        path.write_bytes(
            {"no bytes": b"", "half of it": whole[: len(whole) // 2], "other bytes": b"PK" + whole[9:]}[what]
        )
    with pytest.raises(KdcacheError, match=why) as raised:
        cache_of_files(folder, "fkd", images.samples, tmp_path / "c.kdcache", transform=FRACTIONS, spec=SPEC)
    assert str(path) in str(raised.value)
    assert not (tmp_path / "c.kdcache").exists()


ONE = {"params": [(1, 2, 3, 4), False], "prob": ([0.4, 0.2, 0.1, 0.1], [3, 2, 1, 0])}


def one(**changes: Any) -> Any:
    return (9, [ONE, ONE | changes, ONE])


def deep(levels: int) -> Any:
    """Four of what is four of what is four ...: a few bytes, as each is one list four times."""
    values: Any = 0.4
    for _ in range(levels):
        values = [values] * 4
    return values


WRONG_ML_DR: dict[str, tuple[Any, str]] = {
    "another number": ((8, [ONE] * VIEWS), "is of sample 8"),
    "fewer": ((9, [ONE] * 2), "2 reinforcements"),
    "none": ((9, []), "no reinforcement"),
    "no pair": ([9], "does not hold a number"),
    "a number too long to be told": ((10**5_000, [ONE] * VIEWS), "does not hold a number"),
    "probabilities of probabilities": ((9, [ONE | {"prob": (deep(60), [3, 2, 1, 0])}] * VIEWS), "does not hold 4 prob"),
    "a box of three": (one(params=[(1, 2, 3), False]), "parameters for reinforcement 1 that do not fit"),
    "a box of halves": (one(params=[(1, 2, 3.5, 4), False]), "parameters for reinforcement 1 that do not fit"),
    "a box of words": (one(params=[("1", 2, 3, 4), False]), "parameters for reinforcement 1 that do not fit"),
    "a box too large for a float": (
        one(params=[(10**400, 2, 3, 4), False]),
        "parameters for reinforcement 1 that do not fit",
    ),
    "a negative box": (one(params=[(-1, 2, 3, 4), False]), "which is not a box in pixels"),
    "more parameters": (one(params=[(1, 2, 3, 4), False, 3]), "parameters for reinforcement 1 that do not fit"),
    "are not probabilities": (one(prob=None), "does not hold 4 probabilities"),
    "fewer probabilities": (one(prob=([0.5], [1])), "does not hold 4 probabilities"),
    "a class too many": (one(prob=([0.4, 0.2, 0.1, 0.1], [3, 2, 1, 12])), "holds classes"),
    "code": ((9, [ONE, Calls(), ONE]), "cannot be read"),
    "arrays": ((9, [ONE, np.zeros(3), ONE]), "cannot be read"),
}


def hostile_pickle(body: bytes) -> bytes:
    return pickle.PROTO + b"\x05" + pickle.NONE + body + pickle.STOP


HOSTILE_ML_DR = {
    "a memo of a billion": (pickle.LONG_BINPUT + struct.pack("<I", 2**31), "does not hold a number"),
    "bytes that are not there": (pickle.BYTEARRAY8 + struct.pack("<Q", 10**9), r"cannot be read \(KeyError\)"),
}


@pytest.mark.parametrize("what", [*WRONG_ML_DR, *HOSTILE_ML_DR, "no file", "half of it", "zeros, compressed"])
def test_files_of_ml_dr_that_cannot_be_are_named(images: Images, tmp_path: Path, what: str) -> None:
    folder = ml_dr_of(images, tmp_path / "reinforced")
    samples = images.samples
    path, (held, why) = folder / "9.pth.tar", WRONG_ML_DR.get(what, (None, "is missing|cannot be read"))
    if what == "no file":
        path.unlink()
    elif what == "half of it":
        path.write_bytes(path.read_bytes()[:300])
    elif what in HOSTILE_ML_DR:
        body, why = HOSTILE_ML_DR[what]
        with zipfile.ZipFile(path, "w") as packed:
            packed.writestr("archive/data.pkl", hostile_pickle(body))
    elif what == "zeros, compressed":
        with_zeros(path)
    else:
        path.unlink()
        torch.save(held, path, pickle_protocol=4)
    place = tmp_path / "c.kdcache"
    with pytest.raises(KdcacheError, match=why) as raised:
        cache_of_files(folder, "ml-dr", samples, place, spec=SPEC)
    assert str(path) in str(raised.value)
    assert not place.exists()


def test_a_box_outside_of_its_image_is_found_where_it_is_cut(images: Images, tmp_path: Path) -> None:
    folder = ml_dr_of(images, tmp_path / "reinforced")
    saved_as = {"params": [(1, 2, 300, 4), False], "prob": ONE["prob"]}
    torch.save((9, [ONE, saved_as, ONE]), folder / "9.pth.tar", pickle_protocol=4)
    with pytest.raises(CorruptError, match=r"sample 9 of image-folder/train, view 1: .* is not inside"):
        cache_of_files(folder, "ml-dr", images.samples, tmp_path / "c.kdcache", spec=SPEC)


def _without_keys(made: Path) -> None:
    (made / "rank1-keys.txt").unlink()


def _short(made: Path) -> None:
    values = made / "rank1-values.bin"
    values.write_bytes(values.read_bytes()[:-1])


def _other_class(made: Path) -> None:
    values = made / "rank0-values.bin"
    values.write_bytes(values.read_bytes()[:4] + struct.pack("<h", -5) + values.read_bytes()[6:])


def _not_there(made: Path) -> None:
    keys = made / "rank0-keys.txt"
    first, _, *others = keys.read_text().split()
    keys.write_text("\n".join([first, "nobody", *others]) + "\n")


def _empty(made: Path) -> None:
    shutil.rmtree(made)
    made.mkdir()


@pytest.mark.parametrize(
    ("damage", "why"),
    [
        (_without_keys, "rank1-keys.txt cannot be read"),
        (_short, "rank1-values.bin has 391 bytes"),
        (_other_class, "rank0-values.bin holds classes from -5"),
        (_not_there, "has no record with the key"),
        (_empty, "has no rank0-values.bin"),
    ],
)
def test_files_of_tinyvit_that_cannot_be_are_named(
    images: Images, tmp_path: Path, damage: Callable[[Path], None], why: str
) -> None:
    folder = tinyvit_of(images, tmp_path / "logits")
    damage(folder / "logits_top6_epoch1")
    with pytest.raises(CorruptError, match=why):
        cache_of_files(folder, "tinyvit", images.samples, tmp_path / "c.kdcache", spec=SPEC)
    assert not (tmp_path / "c.kdcache").exists()


WRONG_TRANSFORMS: dict[str, tuple[Transform | None, str]] = {
    "none": (None, "but not the rest of the transform"),
    "drawn here": (DRAWN, "but the transform starts with"),
    "pixels": (PIXELS, "boxes in the unit 'fraction'"),
    "behind something": ([*REST, FRACTIONS[0]], "but the transform starts with"),
    "twice": ([*FRACTIONS, FRACTIONS[0]], "has random steps after its recorded crop"),
    "and erased": ([*FRACTIONS, {"RandomErasing": {"p": 0.5}}], "has random steps after its recorded crop"),
    "no size": ([{"RecordedCrop": {}}, *REST], "missing"),
    "three sizes": ([{"RecordedCrop": {"size": [1, 2, 3]}}, *REST], "size must be"),
    "another unit": ([{"RecordedCrop": {"size": 8, "unit": "inches"}}, *REST], "boxes in the unit 'fraction'"),
    "another interpolation": ([{"RecordedCrop": {"size": 8, "interpolation": "wild"}}, *REST], "must be one of"),
}


@pytest.mark.parametrize("what", WRONG_TRANSFORMS)
def test_other_transforms_than_of_such_crops_are_refused(images: Images, tmp_path: Path, what: str) -> None:
    transform, why = WRONG_TRANSFORMS[what]
    folder = fkd_of(images, tmp_path / "labels")
    with pytest.raises(UsageError, match=why):
        cache_of_files(folder, "fkd", images.samples, tmp_path / "c.kdcache", transform=transform, spec=SPEC)
    assert not (tmp_path / "c.kdcache").exists()


def test_a_recorded_crop_has_one_place(images: Images) -> None:
    boxes = np.array([[[0, 0, 1, 1, 0]] * COUNT], np.float32)
    astray: list[Transform] = [[*REST, FRACTIONS[0]], [FRACTIONS[0], *FRACTIONS], [*REST, {"DrawnElsewhere": {}}]]
    for steps in astray:
        with pytest.raises(UsageError, match="can only be the first step"):
            View(images.samples, steps, crops=lambda view: boxes[view])
    with pytest.raises(UsageError, match="whose boxes are recorded for training images only"):
        transform_for_evaluation(FRACTIONS, FRACTIONS)
    with pytest.raises(UsageError, match="need one that is not"):
        transform_for_evaluation(None, FRACTIONS)


@pytest.mark.parametrize(
    ("arguments", "why"),
    [
        (["--from", "fkd", "--to", "fkd"], "import first, and then export the cache"),
        (["--from", "fkd", "--top-k", "3"], "is only for --to"),
        (["--from", "fkd"], "also pass --pipeline"),
    ],
)
def test_options_that_do_not_go_together_are_refused(tmp_path: Path, arguments: list[str], why: str) -> None:
    (tmp_path / "labels").mkdir()
    done = kdcache("convert", tmp_path / "labels", "-o", tmp_path / "out", *arguments)
    assert (done.exit_code, why in done.stderr) == (2, True)


def test_boxes_are_of_a_cache_and_of_no_dump(images: Images, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="whose boxes are stored in a cache"):
        dump_teacher(Seeing(CLASSES), images.samples, tmp_path / "c.kdcache", transform=FRACTIONS)
    cache = from_fkd(images, tmp_path)
    logits_of_cache(cache, tmp_path / "l.npz")
    with pytest.raises(UsageError, match="whose boxes are stored in a cache"):
        cache_of_logits(tmp_path / "l.npz", images.samples, tmp_path / "d.kdcache", transform=FRACTIONS)
    with pytest.raises(MismatchError, match="has the weights"):
        compare_with_teacher(cache, Seeing(CLASSES), images.samples)


# The array


def stored(cache: Cache) -> dict[str, npt.NDArray[Any]]:
    """The array of what was recorded, by TensorStore."""
    found = {}
    for name in ("crops", "seeds"):
        if (folder := cache.path / "data.zarr" / name).is_dir():
            spec = {"driver": "zarr3", "kvstore": {"driver": "file", "path": str(folder)}}
            found[name] = np.asarray(tensorstore.open(spec, read=True).result().read().result())
    return found


def boxes_of(images: Images) -> Floats:
    """[V, N, 5], in pixels."""
    boxes = np.array(images.boxes, np.float32).swapaxes(0, 1)
    return np.concatenate([boxes, images.flips.T[..., None]], axis=2)


@pytest.fixture
def cropped(images: Images, tmp_path: Path) -> Cache:
    folder = ml_dr_of(images, tmp_path / "reinforced")
    return cache_of_files(folder, "ml-dr", images.samples, tmp_path / "c.kdcache", spec=SPEC)


def test_any_zarr_reads_the_boxes_and_other_caches_have_none(images: Images, cropped: Cache, dumped: Cache) -> None:
    np.testing.assert_array_equal(stored(cropped)["crops"], boxes_of(images))
    assert stored(dumped) == {}
    assert "level" not in dumped.manifest.model_dump()["plan"]["teacher"]


def test_the_arrays_are_those_of_the_format(images: Images, cropped: Cache, tmp_path: Path) -> None:
    logits = tinyvit_of(images, tmp_path / "logits")
    drawn = cache_of_files(logits, "tinyvit", images.samples, tmp_path / "seeds.kdcache", spec=SPEC)
    for cache in (cropped, drawn):
        live = np.stack([logits_of(cache, view).numpy() for view in range(VIEWS)])
        check_arrays(Kept(cache, live))
    assert not any(values.any() for values in zarr_store.read_inputs(drawn.path, drawn.manifest.plan, 1))


def test_selected_and_merged_samples_keep_their_boxes(images: Images, cropped: Cache, tmp_path: Path) -> None:
    chosen = np.array([9, 2, 17, 4, 25])
    others = np.setdiff1d(np.arange(COUNT), chosen)
    parts = [
        select(cropped, tmp_path / f"{name}.kdcache", samples=ids, data=images.samples)
        for name, ids in (("some", chosen), ("rest", others))
    ]
    whole = merge(parts, tmp_path / "whole.kdcache", data=images.samples)
    order = np.concatenate([chosen, others])
    np.testing.assert_array_equal(stored(whole)["crops"], boxes_of(images)[:, order])
    for view in range(VIEWS):
        torch.testing.assert_close(logits_of(whole, view), logits_of(cropped, view)[order], rtol=0, atol=0)
    for cache in (*parts, whole):
        assert audit(cache.path).failure is None
    # Their images, in their order, are seen as the teacher saw them.
    samples = images.samples
    from kdcache.data.alignment import align, apply_alignment

    found = align(samples.keys(), samples.labels, whole.sample_keys, whole.labels)
    assert replay(whole, apply_alignment(samples, found)).rounded == 0
    fewer = select(cropped, tmp_path / "fewer.kdcache", views=[0, 1], top_k=2)
    np.testing.assert_array_equal(stored(fewer)["crops"], boxes_of(images)[:2])


def test_parts_with_other_views_are_no_parts_of_one(images: Images, cropped: Cache, tmp_path: Path) -> None:
    first = select(cropped, tmp_path / "first.kdcache", samples=np.arange(8))
    rest = select(cropped, tmp_path / "rest.kdcache", samples=np.arange(8, 16), views=[0])
    with pytest.raises(MismatchError, match="views: 3, 1"):
        merge([first, rest], tmp_path / "whole.kdcache")


def test_a_mirror_brings_the_boxes_of_the_views_that_are_asked_for(
    images: Images, cropped: Cache, tmp_path: Path
) -> None:
    url = f"file://{tmp_path / 'shared'}"
    assert kdcache("push", cropped.path, url).exit_code == 0
    pulled = kdcache("pull", url, tmp_path / "here", "--views", "0-1")
    assert pulled.exit_code == 0, pulled.output
    cache = open_cache(tmp_path / "here")
    assert cache.views == (0, 1)
    files = {path.name for path in (tmp_path / "here" / "data.zarr" / "crops" / "c").iterdir()}
    assert files == {"0", "1"}
    assert replay(cache, images.samples).rounded == 0
    assert cache.crops is not None
    np.testing.assert_array_equal(cache.crops(1), boxes_of(images)[1])
    backwards = np.arange(COUNT)[::-1]
    turned = select(cache, tmp_path / "turned.kdcache", views=[0, 1], samples=backwards, data=images.samples)
    torch.testing.assert_close(logits_of(turned, 1), logits_of(cropped, 1).flip(0), rtol=0, atol=0)
    with pytest.raises(UsageError, match="view 2 is needed"):
        select(cache, tmp_path / "all.kdcache", samples=backwards, data=images.samples)


def test_caches_of_other_crops_are_not_joined(images: Images, cropped: Cache, tmp_path: Path) -> None:
    moved = Images.__new__(Images)
    vars(moved).update(vars(images))
    moved.flips = ~images.flips
    folder = ml_dr_of(moved, tmp_path / "flipped")
    other = cache_of_files(folder, "ml-dr", images.samples, tmp_path / "d.kdcache", spec=SPEC)
    pipeline = load_pipeline(images.write("pixels"))
    train_student(pipeline, [cropped, cropped], tmp_path / "both")
    with pytest.raises(MismatchError, match="saw another crop of sample 0 in view 0"):
        train_student(pipeline, [cropped, other], tmp_path / "run")


def hostile(cache: Cache, tmp_path: Path, view: int, sample: int, box: list[float]) -> Path:
    """The cache with another box, sealed again by whoever made it so."""
    from kdcache.cache.format import array_specs
    from kdcache.cache.format.integrity import record_of
    from kdcache.cache.format.read_records import read_commit, read_manifest
    from kdcache.cache.format.schema import MANIFEST, canonical, commit_file, seal

    path = tmp_path / "hostile.kdcache"
    shutil.copytree(cache.path, path)
    folder = path / "data.zarr" / "crops"
    spec = {"driver": "zarr3", "kvstore": {"driver": "file", "path": str(folder)}}
    store = tensorstore.open(spec).result()
    store[view, sample].write(np.array(box, np.float32)).result()
    manifest = read_manifest(path / MANIFEST)
    files = dict(manifest.files)
    for shard in range(manifest.plan.shards):
        marker = path / commit_file(view, shard)
        commit = read_commit(marker)
        again = {name: record_of(path / name) for name in commit.files}
        marker.write_bytes(canonical(commit.model_copy(update={"files": again})))
        files |= again | {commit_file(view, shard): record_of(marker)}
    (path / MANIFEST).write_bytes(canonical(seal(manifest.plan, manifest.summary, files)))
    assert array_specs.recorded_arrays(manifest.plan).keys() == {"crops"}
    return path


BOXES: dict[str, list[float]] = {
    "NaN": [math.nan, 0, 1, 1, 0],
    "infinite": [0, 0, math.inf, 1, 0],
    "negative": [-1, 0, 1, 1, 0],
    "empty": [0, 0, 0, 1, 0],
    "halves": [0.5, 0, 1, 1, 0],
    "a flip of 2": [0, 0, 1, 1, 2],
    "too large for a float": [0, 0, 2**25, 1, 0],
}


@pytest.mark.parametrize("what", BOXES)
def test_hostile_boxes_are_found_and_refused(images: Images, cropped: Cache, tmp_path: Path, what: str) -> None:
    path = hostile(cropped, tmp_path, 1, 11, BOXES[what])
    failure = audit(path).failure
    assert failure is not None
    assert "view 1, sample 11" in failure.what
    cache = open_cache(path)
    assert cache.crops is not None
    with pytest.raises(CorruptError, match="which is none: view 1, sample 11"):
        teacher_view(cache, images.samples, 1)[0]


def test_a_changed_byte_of_the_boxes_is_found(cropped: Cache) -> None:
    file = cropped.path / "data.zarr" / "crops" / "c" / "2" / "1" / "0"
    data = bytearray(file.read_bytes())
    data[5] ^= 1
    file.write_bytes(bytes(data))
    with pytest.raises(CorruptError, match="crops/c/2/1/0"):
        open_cache(cropped.path)


@pytest.mark.parametrize("scheduler", ["threads", "processes"])
def test_a_conversion_that_stopped_goes_on_to_the_same_digest(images: Images, tmp_path: Path, scheduler: str) -> None:
    folder = fkd_of(images, tmp_path / "labels")
    made = cache_of_files(
        folder, "fkd", images.samples, tmp_path / "whole.kdcache", transform=FRACTIONS, spec=SPEC, name="t",
        scheduler=scheduler,
    )  # fmt: skip
    from kdcache.cache.format.schema import MANIFEST, PLAN, canonical, commit_file

    stopped = tmp_path / "stopped.kdcache"
    shutil.copytree(made.path, stopped)
    (stopped / MANIFEST).unlink()
    (stopped / PLAN).write_bytes(canonical(made.manifest.plan))
    for view, shard in ((0, 1), (2, 1), (1, 0)):
        (stopped / commit_file(view, shard)).unlink()
    again = cache_of_files(folder, "fkd", images.samples, stopped, transform=FRACTIONS, spec=SPEC, name="t")
    assert again.manifest.digest == made.manifest.digest

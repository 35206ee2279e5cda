"""Files of FKD, ml-dr and TinyViT, and the images that they are of."""

from __future__ import annotations

import json
import os
import struct
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import tensorstore
import torch
import torchvision.transforms as v1
from click.testing import CliRunner, Result
from PIL import Image
from torch import Tensor
from torchvision.transforms import functional as v1_functional

from helpers.tiny import TinyTeacher
from kdcache import Cache, Samples
from kdcache.cli import main
from kdcache.config.cache import CacheSpec
from kdcache.config.loader import load_pipeline
from kdcache.config.schema import Pipeline
from kdcache.config.transform import Transform
from kdcache.curate.foreign import cache_of_files
from kdcache.data.datasets import load_split

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


def from_fkd(images: Images, tmp_path: Path, **made: Any) -> Cache:
    folder = fkd_of(images, tmp_path / "labels", **made)
    return cache_of_files(folder, "fkd", images.samples, tmp_path / "fkd.kdcache", transform=FRACTIONS, spec=SPEC)


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


def ml_dr_says(values: list[float], classes: list[int]) -> Tensor:
    """ml-dr's soft labels, densified smoothly."""
    kept = torch.tensor(values)
    left = 1.0 - kept.sum()
    assert left >= 0, "its reader would take a softmax of these probabilities"
    even = torch.ones(CLASSES) * left / (CLASSES - len(values))
    even[classes] = kept
    return even


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


DRAWN: Transform = [{"RandomResizedCrop": {"size": SIZE}}, {"RandomHorizontalFlip": {"p": 0.5}}, *REST]


class Seeing(TinyTeacher):
    """Sees all of an image of 8 x 8 in color."""

    def forward(self, images: Tensor) -> Tensor:
        return super().forward(images.mean(dim=1).reshape(len(images), 16, -1).mean(dim=2)) / 2


ONE = {"params": [(1, 2, 3, 4), False], "prob": ([0.4, 0.2, 0.1, 0.1], [3, 2, 1, 0])}


def one(**changes: Any) -> Any:
    return (9, [ONE, ONE | changes, ONE])


def stored(cache: Cache) -> dict[str, npt.NDArray[Any]]:
    """The array of what was recorded, by TensorStore."""
    found = {}
    for name in ("crops", "seeds"):
        if (folder := cache.path / "data.zarr" / name).is_dir():
            spec = {"driver": "zarr3", "kvstore": {"driver": "file", "path": str(folder)}}
            found[name] = np.asarray(tensorstore.open(spec, read=True).result().read().result())
    return found

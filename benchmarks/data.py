"""Measure what it costs to load and transform images: `python benchmarks/data.py`.

The same images go through `kdcache` views (each seeded by its sample and view) and through the loop that one would
write with torchvision: `ImageFolder` for files, or a data set that makes a PIL image of an array as `CIFAR10` does,
with a plain `DataLoader` and transforms v2 or v1. The loops take turns; the table has medians, in microseconds per
image. The bounds: a random view at 32 pixels takes at most 1.1 times as long as v2, and 20,000 of images in memory are
made per second; at 224 pixels it takes at most 1.03 times as long.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from common import in_turn
from PIL import Image
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset
from torchvision import transforms as v1
from torchvision.datasets import ImageFolder
from torchvision.transforms import v2

from kdcache.cli import output
from kdcache.config.transform import Transform
from kdcache.data.images import ArrayImages, FileImages, Images
from kdcache.data.loader import Loader
from kdcache.data.samples import Samples
from kdcache.data.views import View

_BATCH = 128
_MEAN, _STD = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]
END: Transform = [
    {"ToImage": {}},
    {"ToDtype": {"dtype": "float32", "scale": True}},
    {"Normalize": {"mean": _MEAN, "std": _STD}},
]
_END_V2 = [v2.ToImage(), v2.ToDtype(torch.float32, scale=True), v2.Normalize(_MEAN, _STD)]
_END_V1 = [v1.ToTensor(), v1.Normalize(_MEAN, _STD)]


class Recipe(NamedTuple):
    """The same transform in three ways."""

    ours: Transform
    v2: list[Any]
    v1: list[Any]


_RECIPES = {
    "crop, flip": Recipe(
        [{"RandomCrop": {"size": 32, "padding": 4}}, {"RandomHorizontalFlip": {}}],
        [v2.RandomCrop(32, padding=4), v2.RandomHorizontalFlip()],
        [v1.RandomCrop(32, padding=4), v1.RandomHorizontalFlip()],
    ),
    "as it is": Recipe([], [], []),
    "resized crop, flip": Recipe(
        [{"RandomResizedCrop": {"size": 224}}, {"RandomHorizontalFlip": {}}],
        [v2.RandomResizedCrop(224), v2.RandomHorizontalFlip()],
        [v1.RandomResizedCrop(224), v1.RandomHorizontalFlip()],
    ),
    "resize, center": Recipe(
        [{"Resize": {"size": 256}}, {"CenterCrop": {"size": 224}}],
        [v2.Resize(256), v2.CenterCrop(224)],
        [v1.Resize(256), v1.CenterCrop(224)],
    ),
}


class _Pictures(Dataset[Any]):
    """Arrays as PIL images, as `torchvision.datasets.CIFAR10` returns them."""

    def __init__(self, pixels: np.ndarray, transform: Callable[[Any], Any]) -> None:
        self.pixels, self.transform = pixels, transform

    def __len__(self) -> int:
        return len(self.pixels)

    def __getitem__(self, index: int) -> tuple[Any, int]:
        return self.transform(Image.fromarray(self.pixels[index])), 0


def made_up(count: int, height: int, width: int) -> torch.Tensor:
    """Return smooth images [N, 3, H, W] uint8, which take about as long to decode as photographs."""
    coarse = torch.rand(count, 3, height // 8, width // 8, generator=torch.Generator().manual_seed(0))
    smooth = F.interpolate(coarse, size=(height, width), mode="bicubic")
    return (smooth.clamp(0, 1) * 255).byte()


def save(pixels: torch.Tensor, folder: Path) -> None:
    """Write images as JPEG files of one class."""
    (folder / "a").mkdir(parents=True)
    for index, image in enumerate(pixels):
        Image.fromarray(image.permute(1, 2, 0).numpy()).save(folder / "a" / f"{index:06}.jpg", quality=90)


def _samples(images: Images) -> Samples:
    return Samples("made-up", "train", images, np.zeros(len(images), np.int32), ("a",), [])


def _ours(images: Images, recipe: Recipe, workers: int) -> Callable[[], None]:
    """Return a pass over the data of kdcache; its processes stay from one pass to the next."""
    loader = Loader(View(_samples(images), [*recipe.ours, *END]), workers)
    cuts = [range(start, min(start + _BATCH, len(images))) for start in range(0, len(images), _BATCH)]
    view = 0

    def run() -> None:
        nonlocal view
        view += 1
        for _ in loader.batches(cuts, view):
            pass

    return run


def _plain(dataset: Dataset[Any], workers: int) -> Callable[[], None]:
    """Return a pass over a plain DataLoader, with processes that stay."""
    loader = DataLoader(dataset, _BATCH, shuffle=True, num_workers=workers, persistent_workers=workers > 0)

    def run() -> None:
        for _ in loader:
            pass

    return run


@contextmanager
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def main() -> None:
    """Print the table."""
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--folder", type=Path, help="folder for temporary files")
    arguments.add_argument("--rounds", type=int, default=5)
    arguments.add_argument("--workers", type=int, nargs="+", default=[0, 2], help="numbers of loading processes")
    arguments.add_argument(
        "--quick", action="store_true", help="small sizes; the results do not compare with the bounds"
    )
    asked = arguments.parse_args()
    small, large, rounds = (256, 16, 1) if asked.quick else (4096, 256, asked.rounds)
    table = []
    with tempfile.TemporaryDirectory(dir=asked.folder) as name, _one_thread():
        folder = Path(name)
        pixels = made_up(small, 32, 32)
        save(pixels, folder / "32")
        save(made_up(large, 376, 504), folder / "224")
        for workers in asked.workers:
            for recipe in ("crop, flip", "as it is"):
                table.append(_arrays(pixels, recipe, workers, rounds))
                table.append(_files(folder / "32", recipe, workers, rounds))
            for recipe in ("resized crop, flip", "resize, center"):
                table.append(_files(folder / "224", recipe, workers, rounds))
    output.table(
        f"microseconds per image: {small:,} images of 32 pixels, {large:,} files of 376 x 504",
        ["work", "workers", "kdcache", "v2", "v1", "per v2", "per v1", "images/s"],
        table,
    )


def _arrays(pixels: torch.Tensor, name: str, workers: int, rounds: int) -> list[str]:
    recipe = _RECIPES[name]
    channels_last = pixels.permute(0, 2, 3, 1).contiguous().numpy()
    works = {
        "kdcache": _ours(ArrayImages(pixels), recipe, workers),
        "v2": _plain(_Pictures(channels_last, v2.Compose([*recipe.v2, *_END_V2])), workers),
        "v1": _plain(_Pictures(channels_last, v1.Compose([*recipe.v1, *_END_V1])), workers),
    }
    return _row(f"memory, {name}", workers, len(pixels), in_turn(works, rounds))


def _files(folder: Path, name: str, workers: int, rounds: int) -> list[str]:
    recipe = _RECIPES[name]
    paths = sorted(map(str, folder.glob("*/*.jpg")))
    works = {
        "kdcache": _ours(FileImages(paths), recipe, workers),
        "v2": _plain(ImageFolder(folder, v2.Compose([*recipe.v2, *_END_V2])), workers),
        "v1": _plain(ImageFolder(folder, v1.Compose([*recipe.v1, *_END_V1])), workers),
    }
    return _row(f"{folder.name} JPEG, {name}", workers, len(paths), in_turn(works, rounds))


def _row(name: str, workers: int, count: int, seconds: dict[str, float]) -> list[str]:
    each = {loop: value / count * 1e6 for loop, value in seconds.items()}
    ours = each["kdcache"]
    return [
        f"{name}, {workers} workers",
        str(workers),
        *(f"{each[loop]:.1f}" for loop in ("kdcache", "v2", "v1")),
        f"{ours / each['v2']:.2f}",
        f"{ours / each['v1']:.2f}",
        f"{1e6 / ours:,.0f}",
    ]


if __name__ == "__main__":
    main()

"""A data set that gives other items each time is refused before the pass; one that does not is not."""

# ruff: noqa: S311  # what users draw their augmentations from

from __future__ import annotations

import functools
import io
import itertools
import random
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner, Result
from PIL import Image
from torch.utils.data import Dataset, Subset
from torchvision import datasets as tv
from torchvision.transforms import v2

from kdcache import CachedDataset, dump_teacher, wrap
from kdcache.cli import main
from kdcache.config.transform import Transform
from kdcache.data.repeatable import find_random_item
from kdcache.data.samples import Samples
from kdcache.errors import UsageError

COUNT = 40


class Items(Dataset[Any]):
    """Images that a function makes of fixed ones."""

    def __init__(
        self, change: Callable[[torch.Tensor, int], Any], label: Callable[[int], int] = lambda i: i % 2
    ) -> None:
        self.images = torch.randint(0, 256, (COUNT, 3, 8, 8), generator=torch.Generator().manual_seed(0)).byte()
        self.change, self.label = change, label

    def __len__(self) -> int:
        return COUNT

    def __getitem__(self, index: int) -> tuple[Any, int]:
        return self.change(self.images[index].clone(), index), self.label(index)


def recompressed(image: torch.Tensor, _index: int) -> Image.Image:
    buffer = io.BytesIO()
    Image.fromarray(image.permute(1, 2, 0).numpy()).save(buffer, "JPEG", quality=int(torch.randint(20, 95, ())))
    return Image.open(buffer).convert("RGB")


_own = random.Random(0)
_numpy = np.random.default_rng()
_calls = itertools.count()

RANDOM: dict[str, Callable[[torch.Tensor, int], Any]] = {
    "torch noise": lambda x, _: x + torch.randint(0, 9, x.shape, dtype=torch.uint8),
    "python's random": lambda x, _: x.flip(2) if random.random() < 0.5 else x,
    "numpy's random": lambda x, _: torch.from_numpy(np.roll(x.numpy(), np.random.randint(8), 2)),
    "numpy's own generator": lambda x, _: x + int(_numpy.integers(9)),
    "a generator with a seed that goes on": lambda x, _: x + _own.randrange(9),
    "time": lambda x, _: x + time.time_ns() // 1000 % 251,
    "the number of calls": lambda x, _: x + next(_calls) % 251,
    "jpeg quality": recompressed,
    "a rare step": lambda x, _: x.flip(1) if random.random() < 0.2 else x,
    "torchvision": lambda x, _: v2.RandomCrop(8, padding=2)(x),
}

FIXED: dict[str, Callable[[torch.Tensor, int], Any]] = {
    "nothing": lambda x, _: x,
    "a fixed transform": lambda x, _: v2.CenterCrop(6)(x),
    "seeded by the index": lambda x, i: x + (i * 7919) % 9,
    "the global seed set by the index": lambda x, i: [torch.manual_seed(i), x + torch.randint(9, (1,)).byte()][1],
}


class Mean(torch.nn.Module):
    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return images.float().mean((2, 3))[:, :2]


SCALED: Transform = [{"ToImage": {}}, {"ToDtype": {"dtype": "float32", "scale": True}}]


@pytest.mark.parametrize("case", RANDOM)
def test_a_data_set_that_augments_is_refused_before_the_pass(case: str, tmp_path: Path) -> None:
    out = tmp_path / "c.kdcache"
    with pytest.raises(UsageError, match=r"item \d+ of dataset/train is another image each time") as caught:
        dump_teacher(Mean(), Items(RANDOM[case]), out, transform=SCALED)
    assert "move the random steps out of the data set into `transform`" in caught.value.fix
    assert not out.exists()


def test_random_labels_are_refused(tmp_path: Path) -> None:
    items = Items(FIXED["nothing"], lambda _: random.randrange(2))
    with pytest.raises(UsageError, match="has another label each time"):
        dump_teacher(Mean(), items, tmp_path / "c.kdcache", transform=SCALED)


@pytest.mark.parametrize("case", FIXED)
def test_a_fixed_data_set_passes_and_the_generators_of_the_caller_stay(case: str, tmp_path: Path) -> None:
    samples = wrap(Items(FIXED[case]), 2)
    random.seed(3), np.random.seed(3), torch.manual_seed(3)
    expected = random.random(), np.random.random(), float(torch.rand(()))
    random.seed(3), np.random.seed(3), torch.manual_seed(3)
    assert find_random_item(samples) is None
    assert (random.random(), np.random.random(), float(torch.rand(()))) == expected
    cache = dump_teacher(Mean(), samples, tmp_path / "c.kdcache", transform=SCALED)
    assert len(CachedDataset(Items(FIXED[case]), cache)) == COUNT


def test_few_items_are_read_however_many_there_are() -> None:
    read: list[int] = []

    def count(image: torch.Tensor, index: int) -> torch.Tensor:
        read.append(index)
        return image

    samples = wrap(Subset(Items(count), [i % COUNT for i in range(4000)]), 2)
    read.clear()
    assert find_random_item(samples) is None
    assert len(read) <= 64


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    for index in range(12):
        path = tmp_path / "photos" / "train" / f"class{index % 2}" / f"{index}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.random.default_rng(index).integers(0, 256, (10, 10, 3), np.uint8)).save(path)
    return tmp_path


def test_an_image_folder_with_a_random_crop_names_its_transform(photos: Path) -> None:
    steps = v2.Compose([v2.RandomCrop(6), v2.ToImage(), v2.ToDtype(torch.float32, scale=True)])
    data = tv.ImageFolder(str(photos / "photos" / "train"), steps)
    with pytest.raises(UsageError, match=r"\(its transform: RandomCrop, ToImage, ToDtype\)"):
        dump_teacher(Mean(), data, photos / "c.kdcache")
    fixed = tv.ImageFolder(str(photos / "photos" / "train"), v2.Compose([v2.CenterCrop(6), *steps.transforms[1:]]))
    cache = dump_teacher(Mean(), fixed, photos / "c.kdcache")
    with pytest.raises(UsageError, match="another image each time"):
        CachedDataset(data, cache)


PIPELINE = """
dataset: {{name: '{0}/data.py:{1}', root: {0}/photos/train, validation_fraction: 0, test_fraction: 0}}
transform: [ToImage: {{}}, ToDtype: {{dtype: float32, scale: true}}]
teacher: {{model: 'small:cnn', train: {{epochs: 1}}}}
student: {{model: 'small:cnn', train: {{epochs: 1}}}}
"""
CODE = """
import torch
from torch.utils.data import random_split
from torchvision.datasets import ImageFolder
from torchvision.transforms import v2

def fixed(split, root):
    return ImageFolder(root) if split == "train" else None

def augmented(split, root):
    return ImageFolder(root, v2.RandomHorizontalFlip()) if split == "train" else None

def drawn(split, root):
    part = random_split(ImageFolder(root), [8, 4])[0]
    part.classes = part.dataset.classes
    return part if split == "train" else None

class Pairs(list):
    classes = ["class0", "class1"]

def noise(split, root):
    images = ImageFolder(root)
    noise = torch.randint(0, 256, (len(images), 3, 4, 4), dtype=torch.uint8)
    return Pairs((noise[i], images[i][1]) for i in range(len(images))) if split == "train" else None
"""


def kdcache(*words: object) -> Result:
    return CliRunner().invoke(main, [*map(str, words), "--device", "cpu"])


@pytest.fixture
def files(photos: Path) -> Path:
    (photos / "data.py").write_text(CODE)
    for name in ("fixed", "augmented", "drawn", "noise"):
        (photos / f"{name}.yaml").write_text(PIPELINE.format(photos, name))
    trained = kdcache("train-teacher", photos / "fixed.yaml", "-o", photos / "teacher")
    assert trained.exit_code == 0, trained.output
    return photos


@pytest.mark.parametrize("command", ["doctor", "dump-teacher", "--dry-run"])
@pytest.mark.parametrize(
    ("name", "what"),
    [
        ("augmented", "another image each time it is read"),
        ("drawn", "another one when the data set is loaded again"),
        ("noise", "another one when the data set is loaded again"),
    ],
)
def test_a_data_set_from_a_file_is_examined_by_every_command(name: str, what: str, command: str, files: Path) -> None:
    weights = ("--set", f"teacher.weights={files}/teacher/model.safetensors")
    out = files if command == "doctor" else files / "c.kdcache"
    words = ["doctor"] if command == "doctor" else ["dump-teacher", *["--dry-run"] * (command == "--dry-run")]
    done = kdcache(words[0], files / f"{name}.yaml", "-o", out, *words[1:], *weights)
    assert done.exit_code == 2, done.output
    assert what in done.stderr
    assert not (files / "c.kdcache").exists()


def test_training_reports_it_and_a_cache_of_it_is_refused_by_cause(files: Path) -> None:
    trained = kdcache("train-teacher", files / "augmented.yaml", "-o", files / "teacher2")
    assert trained.exit_code == 0, trained.output
    assert "another image each time it is read" in trained.stderr
    weights = ("--set", f"teacher.weights={files}/teacher/model.safetensors")
    dumped = kdcache("dump-teacher", files / "fixed.yaml", "-o", files / "c.kdcache", *weights)
    assert dumped.exit_code == 0, dumped.output
    for options in ((), ("--align",)):
        done = kdcache(
            "train-student", files / "augmented.yaml", "--cache", files / "c.kdcache", "-o", files / "r", *options
        )
        assert done.exit_code == 2, done.output
        assert "another image each time it is read" in done.stderr
    done = kdcache("train-student", files / "fixed.yaml", "--cache", files / "c.kdcache", "-o", files / "s")
    assert done.exit_code == 0, done.output


def test_keys_of_an_earlier_reading_are_compared() -> None:
    samples: Samples = wrap(Items(FIXED["nothing"]), 2)
    keys = samples.keys()
    assert find_random_item(samples, keys) is None
    found = functools.partial(find_random_item, samples)(keys + np.uint64(1))
    assert found is not None
    assert "is another image than when it was first read" in found[0]

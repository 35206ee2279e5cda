"""Images of wrapped data sets in whatever memory they are."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers.tiny import TinyTeacher
from torch.utils.data import Dataset

from kdcache import dump_teacher, wrap
from kdcache.config.cache import CacheSpec
from kdcache.errors import UsageError

BASE = (np.arange(6 * 4 * 4).reshape(6, 4, 4, 1) % 64 / 8).astype(np.float32)
"""Numbers that are exact in each type."""


class Items(Dataset[Any]):
    def __init__(self, image: Callable[[int], object]) -> None:
        self.image = image

    def __len__(self) -> int:
        return len(BASE)

    def __getitem__(self, index: int) -> tuple[object, int]:
        return self.image(index), index % 3


def tensor(index: int) -> torch.Tensor:
    return torch.from_numpy(BASE[index]).permute(2, 0, 1)


SAME: dict[str, Callable[[int], object]] = {
    "negative strides": lambda index: np.ascontiguousarray(BASE[index][::-1, ::-1])[::-1, ::-1],
    "big-endian": lambda index: BASE[index].astype(">f4"),
    "big-endian, backwards": lambda index: BASE[index].astype(">f4")[:, ::-1][:, ::-1],
    "Fortran order": lambda index: np.asfortranarray(BASE[index]),
    "read only": lambda index: np.broadcast_to(BASE[index], BASE[index].shape),
    "gradient": lambda index: tensor(index).clone().requires_grad_(),
    "bfloat16": lambda index: tensor(index).bfloat16(),
    "without channels": lambda index: BASE[index][:, :, 0],
}


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("kind", SAME)
def test_the_same_values_are_the_same_samples(kind: str, tmp_path: Path) -> None:
    plain, other = wrap(Items(lambda index: BASE[index]), 3), wrap(Items(SAME[kind]), 3)
    assert np.array_equal(plain.keys(), other.keys())
    assert all(torch.equal(torch.as_tensor(other.images.picture(i)), tensor(i)) for i in range(len(BASE)))


def test_a_memory_map_is_wrapped(tmp_path: Path) -> None:
    mapped = np.memmap(tmp_path / "pixels", np.float32, "w+", shape=BASE.shape)
    mapped[:] = BASE
    mapped.flush()
    mapped = np.memmap(tmp_path / "pixels", np.float32, "r", shape=BASE.shape)
    assert np.array_equal(wrap(Items(lambda i: mapped[i]), 3).keys(), wrap(Items(lambda i: BASE[i]), 3).keys())


@pytest.mark.parametrize("kind", ["gradient", "bfloat16", "big-endian", "negative strides"])
def test_they_are_dumped(kind: str, tmp_path: Path) -> None:
    spec = CacheSpec(pilot_rows=4)
    caches = [
        dump_teacher(TinyTeacher(3), wrap(Items(image), 3), tmp_path / f"{index}", spec=spec)
        for index, image in enumerate((lambda i: BASE[i], SAME[kind]))
    ]
    ids = torch.arange(len(BASE))
    assert torch.equal(caches[0].teacher()(ids), caches[1].teacher()(ids))


@pytest.mark.parametrize("kind", ["object", "longdouble", "list", "text", "none"])
def test_what_is_not_an_image_is_refused_by_item(kind: str) -> None:
    images: dict[str, Callable[[int], object]] = {
        "object": lambda index: BASE[index].astype(object),
        "longdouble": lambda index: BASE[index].astype(np.longdouble),
        "list": lambda index: BASE[index].tolist(),
        "text": lambda index: "image.png",
        "none": lambda index: None,
    }
    with pytest.raises(UsageError, match="item 0 of the data set has an image of"):
        wrap(Items(images[kind]), 3).keys()

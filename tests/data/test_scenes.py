"""The street scenes that kdcache draws: the same on every machine, with all classes in every split."""

from __future__ import annotations

import hashlib

import numpy as np
import pytest
import torch

from kdcache import KdcacheError, Samples, load_split
from kdcache.data.samples import Split
from kdcache.data.scenes import CLASSES, COUNTS, HEIGHT, WIDTH, draw_scene

SPLITS: tuple[Split, ...] = ("train", "validation", "test")


def maps_of(samples: Samples) -> torch.Tensor:
    assert samples.maps is not None
    return torch.stack([samples.maps.label_map(index) for index in range(len(samples))])


@pytest.mark.parametrize("split", SPLITS)
def test_every_split_has_every_class_and_ignored_pixels(split: Split) -> None:
    samples = load_split("scenes", split)
    assert len(samples) == COUNTS[split]
    assert samples.class_names == CLASSES
    maps = maps_of(samples)
    assert maps.shape == (len(samples), HEIGHT, WIDTH)
    counts = torch.bincount(maps.flatten() + 1, minlength=1 + len(CLASSES)) / maps.numel()
    assert len(counts) == 1 + len(CLASSES)
    assert counts.min() > 0.005 and counts.max() < 0.5
    assert samples.images.shape() == (3, HEIGHT, WIDTH)


def test_the_scenes_are_the_same_on_every_machine() -> None:
    """The digest was computed once; caches of these scenes are recognized by their content."""
    sha = hashlib.sha256()
    for seed in (0, 1, 239, 10_000, 20_119):
        scene = draw_scene(seed)
        assert scene.image.dtype == np.uint8 and scene.classes.dtype == np.int64
        sha.update(scene.image.tobytes() + scene.classes.astype("<i8").tobytes())
    assert sha.hexdigest() == "57ab621356159ca68fae494d654e3698eaa9f70f9356daf9bfff24dd9a0ff28f"


def test_no_scene_is_in_two_splits() -> None:
    keys = np.concatenate([load_split("scenes", split).keys() for split in SPLITS])
    assert len(np.unique(keys)) == sum(COUNTS.values())


def test_the_default_transform_has_the_mean_and_deviation_of_the_pixels() -> None:
    samples = load_split("scenes", "train")
    pixels = torch.stack([torch.as_tensor(samples.images.picture(index)) for index in range(len(samples))]) / 255.0
    (normalize,) = (step["Normalize"] for step in samples.transform if "Normalize" in step)
    assert torch.allclose(torch.tensor(normalize["mean"]), pixels.mean(dim=(0, 2, 3)), atol=0.01)
    assert torch.allclose(torch.tensor(normalize["std"]), pixels.std(dim=(0, 2, 3)), atol=0.01)


def test_scenes_have_no_folder() -> None:
    with pytest.raises(KdcacheError, match="scenes comes with kdcache and has no root"):
        load_split("scenes", "train", root="data/scenes")

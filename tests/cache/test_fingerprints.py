"""What is kept of the pixels that a teacher saw: checksums of them by struct and zlib, means of them by NumPy."""

from __future__ import annotations

import math
import struct
import zlib
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import pytest
import torch
from helpers.processes import exit_code, in_a_process
from helpers.tiny import FLIP, TinyTeacher, tiny_samples
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from kdcache import Cache, Samples, dump_teacher, open_cache
from kdcache.cache.format.fingerprints import Inputs, inputs_of
from kdcache.cache.format.sharding import choose_sharding
from kdcache.cache.format.zarr_store import read_inputs
from kdcache.config.cache import CacheSpec
from kdcache.config.transform import Transform
from kdcache.data.images import ArrayImages
from kdcache.data.views import View

SPEC = CacheSpec(top_k="all", seed=5, shard_rows=48, batch_size=7)
"""Of 100 samples: shards of 48, 48 and 4 rows, of which each third image leaves a fingerprint."""

AUGMENT: Transform = [
    {"RandomCrop": {"size": 8, "padding": 2}},
    {"RandomHorizontalFlip": {}},
    {"ToDtype": {"dtype": "float32", "scale": True}},
    {"Normalize": {"mean": [0.5, 0.4, 0.3], "std": [0.2, 0.3, 0.4]}},
]


def samples_of(pixels: Tensor) -> Samples:
    return Samples("pixels", "train", ArrayImages(pixels), np.zeros(len(pixels), np.int32), ("a", "b"), [])


def colored(count: int) -> Samples:
    generator = torch.Generator().manual_seed(0)
    return samples_of(torch.randint(0, 256, (count, 3, 8, 8), dtype=torch.uint8, generator=generator))


def linear(channels: int, height: int, width: int) -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(channels * height * width, 2))


def crc_of(image: Tensor) -> int:
    """Of its pixels, one after the other, each of four bytes, the lowest first."""
    return zlib.crc32(struct.pack(f"<{image.numel()}f", *image.flatten().tolist()))


def means_of(image: Tensor) -> npt.NDArray[np.float64]:
    """Of two rows of four parts, [8]; a part holds every pixel that lies in it, be it by its edge."""
    _, height, width = image.shape
    pixels = image.double().numpy() * np.arange(1, len(image) + 1)[:, None, None]
    return np.array(
        [
            pixels[
                :,
                math.floor(row * height / 2) : math.ceil((row + 1) * height / 2),
                math.floor(column * width / 4) : math.ceil((column + 1) * width / 4),
            ].mean()
            for row in range(2)
            for column in range(4)
        ]
    )


def assert_sketches(found: npt.NDArray[np.float32], means: npt.NDArray[np.float64]) -> None:
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, means, rtol=2**-23, atol=1e-9)


# What lies in a cache.


class Made(NamedTuple):
    """A cache, what it was made of, and what its teacher was shown, [V, N, channels, H, W]."""

    cache: Cache
    samples: Samples
    shown: Tensor

    def inputs(self, view: int) -> Inputs:
        return read_inputs(self.cache.path, self.cache.manifest.plan, view)


def make(
    folder: Path, samples: Samples, teacher: nn.Module, transform: Transform | None = None, spec: CacheSpec = SPEC
) -> Made:
    seen: list[Tensor] = []
    teacher.register_forward_pre_hook(lambda _, given: seen.append(given[0].clone()))
    cache = dump_teacher(teacher, samples, folder / "c.kdcache", transform=transform, spec=spec)
    shown = torch.cat(seen)[-spec.views * len(samples) :]  # what comes before is a trial
    return Made(cache, samples, shown.reshape(spec.views, -1, *shown.shape[1:]))


TWO_VIEWS = SPEC.model_copy(update={"views": 2})


@pytest.fixture(scope="module")
def two_views(tmp_path_factory: pytest.TempPathFactory) -> Made:
    return make(tmp_path_factory.mktemp("two"), tiny_samples(100), TinyTeacher(), FLIP, TWO_VIEWS)


@pytest.fixture(scope="module", params=["one view", "two views", "two views in color"])
def made(request: pytest.FixtureRequest, two_views: Made, tmp_path_factory: pytest.TempPathFactory) -> Made:
    if request.param == "one view":
        return make(tmp_path_factory.mktemp("one"), tiny_samples(100), TinyTeacher())
    if request.param == "two views":
        return two_views
    return make(tmp_path_factory.mktemp("color"), colored(100), linear(3, 8, 8), AUGMENT, TWO_VIEWS)


def test_fingerprints_are_of_the_pixels_that_the_teacher_saw_and_the_view_gives(made: Made) -> None:
    plan = made.cache.manifest.plan
    ids = range(0, 100, plan.shape.fingerprint_stride)
    assert len(ids) == 34
    different = set()
    for view in range(plan.views.count):
        replayed = View(made.samples, plan.views.transform, plan.views.seed, view)
        images = torch.cat([replayed[index][0] for index in ids])
        assert torch.equal(images, made.shown[view, list(ids)])
        found = made.inputs(view)
        assert found.fingerprints.dtype == np.uint32
        assert found.fingerprints.tolist() == [crc_of(image) for image in images]
        different.add(found.fingerprints.tobytes())
    assert len(different) == plan.views.count


def test_sketches_are_means_over_two_rows_of_four_parts(made: Made) -> None:
    for view, shown in enumerate(made.shown):
        _, channels, height, width = shown.shape
        weights = np.arange(1, channels + 1)[:, None, None]
        parts = (shown[::3].double().numpy() * weights).reshape(34, channels, 2, height // 2, 4, width // 4)
        assert_sketches(made.inputs(view).sketches, parts.mean(axis=(1, 3, 5)).reshape(34, 8))


def test_batches_change_nothing(two_views: Made, tmp_path: Path) -> None:
    files = two_views.cache.manifest.files
    assert sum("/fingerprints/c/" in name for name in files) == 2 * 3
    for batch_size in (1, 1000):
        spec = TWO_VIEWS.model_copy(update={"batch_size": batch_size})
        other = make(tmp_path / str(batch_size), tiny_samples(100), TinyTeacher(), FLIP, spec)
        assert other.cache.manifest.files == files


def dump_two_views(out: Path, workers: int) -> None:
    spec = TWO_VIEWS.model_copy(update={"num_workers": workers})
    dump_teacher(TinyTeacher(), tiny_samples(100), out, transform=FLIP, spec=spec)


def test_workers_change_nothing(two_views: Made, tmp_path: Path) -> None:
    out = tmp_path / "shared.kdcache"
    # In a process of its own, which has no threads yet when DataLoader forks it.
    assert exit_code(in_a_process(dump_two_views, out, 2)) == 0
    shared = open_cache(out)
    assert shared.manifest.digest == two_views.cache.manifest.digest
    for view in range(2):
        found = read_inputs(out, shared.manifest.plan, view)
        assert found.fingerprints.tolist() == [crc_of(image) for image in two_views.shown[view, ::3]]


TINY: dict[str, tuple[list[list[list[float]]], list[float]]] = {
    "one pixel": ([[[0.5]]], [0.5] * 8),
    "one pixel in color": ([[[0.0]], [[0.25]], [[0.5]]], [2.0 / 3] * 8),
    "two by three": ([[[0, 1, 2], [4, 6, 8]]], [0, 0.5, 1.5, 2, 4, 5, 7, 8]),
    "one row": ([[[1, 3, 5, 7]]], [1, 3, 5, 7, 1, 3, 5, 7]),
}


@pytest.mark.parametrize("size", TINY)
def test_tiny_images_have_both(size: str, tmp_path: Path) -> None:
    image, sketch = TINY[size]
    pixels = torch.tensor(image, dtype=torch.float32) + torch.arange(3).reshape(3, 1, 1, 1)
    made = make(tmp_path, samples_of(pixels), linear(*pixels.shape[1:]))
    found = made.inputs(0)
    assert found.fingerprints.tolist() == [crc_of(one) for one in pixels]
    channels = pixels.shape[1]
    more = np.arange(3)[:, None] * (channels + 1) / 2  # by which the channels of each image are brighter, weighed
    np.testing.assert_allclose(found.sketches, np.array(sketch) + more, rtol=1e-6)


# Of images.


@settings(deadline=None, max_examples=60)
@given(
    shape=st.tuples(st.integers(0, 5), st.integers(1, 4), st.integers(1, 9), st.integers(1, 9)),
    seed=st.integers(0, 2**32 - 1),
)
def test_an_image_leaves_the_same_in_any_company_and_any_place_in_memory(
    shape: tuple[int, int, int, int], seed: int
) -> None:
    images = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    found = inputs_of(images)
    assert [(array.dtype.name, *array.shape) for array in found] == [
        ("uint32", len(images)),
        ("float32", len(images), 8),
    ]
    elsewhere = inputs_of(images.permute(2, 3, 1, 0).contiguous().permute(3, 2, 0, 1))
    for position, image in enumerate(images):
        alone = inputs_of(image[None])
        assert found.fingerprints[position] == alone.fingerprints[0] == elsewhere.fingerprints[position]
        assert found.fingerprints[position] == crc_of(image)
        np.testing.assert_array_equal(found.sketches[position], alone.sketches[0])
        np.testing.assert_array_equal(found.sketches[position], elsewhere.sketches[position])
        assert_sketches(found.sketches[position], means_of(image))


def test_a_mirrored_image_has_a_mirrored_sketch() -> None:
    image = torch.arange(3 * 4 * 8).reshape(1, 3, 4, 8) / 8
    straight, mirrored, upside_down = (inputs_of(one) for one in (image, image.flip(3), image.flip(2)))
    grid = straight.sketches.reshape(2, 4)
    assert len(set(grid.flat)) == 8
    np.testing.assert_array_equal(mirrored.sketches.reshape(2, 4), grid[:, ::-1])
    np.testing.assert_array_equal(upside_down.sketches.reshape(2, 4), grid[::-1])
    assert len({straight.fingerprints[0], mirrored.fingerprints[0], upside_down.fingerprints[0]}) == 3


def test_channels_that_have_changed_places_have_another_sketch() -> None:
    image = torch.rand(1, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    assert np.abs(inputs_of(image).sketches - inputs_of(image[:, [2, 1, 0]]).sketches).min() > 1e-3


def test_the_last_bit_of_any_pixel_changes_the_fingerprint_and_hardly_the_sketch() -> None:
    image = torch.rand(2, 4, 4, generator=torch.Generator().manual_seed(0))
    changed = image.repeat(32, 1, 1, 1)
    changed.view(torch.int32).flatten(1)[range(32), range(32)] ^= 1
    found, before = inputs_of(changed), inputs_of(image[None])
    assert len({before.fingerprints[0], *found.fingerprints}) == 33
    np.testing.assert_allclose(found.sketches, np.repeat(before.sketches, 32, axis=0), rtol=0, atol=2**-23)


# Which images.


@settings(deadline=None, max_examples=300)
@given(
    samples=st.integers(1, 2_000_000),
    row_bytes=st.integers(1, 2**18),
    shard_rows=st.none() | st.integers(1, 200_000),
)
@example(samples=1, row_bytes=32, shard_rows=None)
@example(samples=31, row_bytes=32, shard_rows=1000)
@example(samples=1_281_167, row_bytes=32, shard_rows=None)
@example(samples=5000, row_bytes=32, shard_rows=1031)
def test_the_stride_is_the_largest_that_leaves_a_shard_sixteen(
    samples: int, row_bytes: int, shard_rows: int | None
) -> None:
    shape = choose_sharding(samples, row_bytes, shard_rows)
    filled = min(shape.shard_rows, samples)
    strides = np.arange(1, shape.shard_rows + 1)
    strides = strides[shape.shard_rows % strides == 0]
    assert shape.fingerprint_stride == strides[filled // strides >= min(16, filled)].max()

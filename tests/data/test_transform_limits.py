"""What a transform may ask for: a hostile cache fails early and in little memory, and none of those in use does."""

from __future__ import annotations

import math
import resource
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.corruption import dump, forge, setting
from helpers.paths import ROOT
from helpers.processes import exit_code, in_a_process
from helpers.tiny import tiny_samples

from kdcache import open_cache
from kdcache.config.loader import load_pipeline
from kdcache.config.transform import Transform
from kdcache.data import transform_limits
from kdcache.data.datasets import photograph_transform
from kdcache.data.mixing import split_mixing
from kdcache.data.replay import replay
from kdcache.data.transforms import build_transform
from kdcache.data.views import View
from kdcache.errors import UsageError

PIPELINES = sorted((ROOT / "pipelines").glob("*.yaml"))

GROWING: list[tuple[str, dict[str, Any]]] = [
    ("Pad", {"padding": 5}),
    ("Pad", {"padding": [2, 7]}),
    ("Pad", {"padding": [1, 2, 3, 4]}),
    ("RandomCrop", {"size": 30, "pad_if_needed": True}),
    ("RandomCrop", {"size": [20, 31], "padding": 13}),
    ("CenterCrop", {"size": [40, 31]}),
    ("RandomResizedCrop", {"size": 50}),
    ("Resize", {"size": 20}),
    ("Resize", {"size": [20]}),
    ("Resize", {"size": [27, 33]}),
    ("Resize", {"size": 20, "max_size": 25}),
    ("Resize", {"size": None, "max_size": 50}),
    ("RandomResize", {"min_size": 3, "max_size": 40}),
    ("RandomShortestSize", {"min_size": [3, 30], "max_size": 44}),
    ("RandomShortestSize", {"min_size": 30}),
    ("ScaleJitter", {"target_size": [30, 40], "scale_range": [1.0, 2.0]}),
    ("ScaleJitter", {"target_size": [30, 40]}),
    ("RandomZoomOut", {"p": 1.0}),
    ("RandomZoomOut", {"side_range": [1, 7], "p": 1.0}),
    ("RandomRotation", {"degrees": 90, "expand": True}),
    ("Normalize", {"mean": [0.0] * 9, "std": [1.0] * 9}),
]


@pytest.mark.parametrize(("name", "arguments"), GROWING)
def test_the_predicted_size_is_an_upper_bound_of_the_actual_size(
    name: str, arguments: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    step = build_transform([{name: arguments}])
    for shape in ((1, 10, 23), (1, 23, 10), (1, 8, 8)):
        image = torch.rand(shape)
        outcomes = [step(image).shape for _ in range(100)]
        made = max(max(channels, 4) * height * width for channels, height, width in outcomes)
        assert made > 4 * image.numel()
        with monkeypatch.context() as patch, pytest.raises(UsageError, match=f"{name} returns images of up to"):
            patch.setattr(transform_limits, "MAX_IMAGE_VALUES", made - 1)
            build_transform([{name: arguments}])(image)


def test_an_image_may_keep_its_size(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transform_limits, "MAX_IMAGE_VALUES", 100)
    crop: Transform = [{"RandomHorizontalFlip": {}}, {"RandomCrop": {"size": 5}}]
    assert build_transform(crop)(torch.rand(3, 20, 20)).shape == (3, 5, 5)
    with pytest.raises(UsageError, match=r"RandomCrop returns images of up to 3 x 21 x 21 values, more than 4 x 25"):
        build_transform([{"RandomCrop": {"size": 21, "pad_if_needed": True}}])(torch.rand(3, 20, 20))


@pytest.mark.parametrize("transform", [[{"Resize": {"size": 6}}], [{"RandomCrop": {"size": 4, "padding": 1}}]])
def test_a_batch_above_the_limit_is_refused(transform: Transform, monkeypatch: pytest.MonkeyPatch) -> None:
    values = build_transform(transform)(tiny_samples(1).images.picture(0)).numel()
    monkeypatch.setattr(transform_limits, "MAX_BATCH_VALUES", 8 * values)
    view = View(tiny_samples(12), transform)
    assert len(view.__getitems__(range(8)).images) == 8
    with pytest.raises(UsageError, match=f"a batch of 9 images of {values} values has more than"):
        view.__getitems__(range(9))


HOSTILE: dict[str, Transform] = {
    "resize": [{"Resize": {"size": 30_000}}],
    "resize to a rectangle": [{"Resize": {"size": [60_000, 20_000]}}],
    "resize by the longer side": [{"Resize": {"size": None, "max_size": 30_000}}],
    "resize a strip": [{"CenterCrop": {"size": [1, 9_000]}}, {"Resize": {"size": 9_000}}],
    "beyond a float": [{"Resize": {"size": 10**400}}],
    "pad": [{"Pad": {"padding": 100_000}}],
    "pad often": [{"RandomHorizontalFlip": {"p": 0.5}}] + [{"Pad": {"padding": 2_000}}] * 60,
    "crop, padded": [{"RandomCrop": {"size": 4, "padding": [20_000]}}],
    "crop, padded where needed": [{"RandomCrop": {"size": 30_000, "pad_if_needed": True}}],
    "crop": [{"CenterCrop": {"size": 30_000}}],
    "crop and resize": [{"RandomResizedCrop": {"size": 30_000}}],
    "random resize": [{"RandomResize": {"min_size": 29_999, "max_size": 30_000}}],
    "random shortest": [{"RandomShortestSize": {"min_size": [30_000]}}],
    "jitter": [{"ScaleJitter": {"target_size": [1_000, 1_000], "scale_range": [99.0, 100.0]}}],
    "zoom out": [{"RandomZoomOut": {"side_range": [30_000, 30_000], "p": 1.0}}],
    "zoom out often": [{"RandomZoomOut": {"side_range": [4, 4], "p": 1.0}}] * 30,
    "channels": [{"Resize": {"size": 1_000}}, {"Normalize": {"mean": [0.0] * 9_999, "std": [1.0] * 9_999}}],
    "rotate": [{"Pad": {"padding": 3_500}}, {"RandomRotation": {"degrees": [45, 45], "expand": True}}],
    "inside another": [{"RandomApply": {"transforms": [{"Compose": {"transforms": [{"Pad": {"padding": 10**6}}]}}]}}],
    "one of several": [{"RandomChoice": {"transforms": [{"Pad": {"padding": 10**6}}] * 3}}],
    "blur": [{"GaussianBlur": {"kernel_size": 99_999}}],
    "blur along": [{"GaussianBlur": {"kernel_size": [3, 99_999_999]}}],
    "elastic": [{"ElasticTransform": {"sigma": 5_000.0}}],
    "mixtures": [{"AugMix": {"mixture_width": 10**9}}],
    "chains": [{"AugMix": {"chain_depth": 10**9}}],
    "operations": [{"RandAugment": {"num_ops": 10**9}}],
    "bins": [{"TrivialAugmentWide": {"num_magnitude_bins": 10**10}}],
    "steps": [{"Identity": {}}] * 65,
    "steps inside others": [{"Compose": {"transforms": [{"Identity": {}}] * 9}}] * 9,
}  # fmt: skip


def replay_hostile(folder: Path) -> None:
    """Each one, in half a gigabyte more than the process has."""
    samples = tiny_samples(12)
    cache = dump(folder / "c.kdcache").path
    replay(open_cache(cache), samples)
    here = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (here + 2**29, resource.RLIM_INFINITY))
    for name, transform in HOSTILE.items():
        forge(cache, setting(transform, "plan", "views", "transform"))
        with pytest.raises(UsageError, match="this transform exceeds a limit"):
            replay(open_cache(cache), samples)
            pytest.fail(name)


def test_an_excessive_transform_of_a_cache_is_refused_in_little_memory(tmp_path: Path) -> None:
    process = in_a_process(replay_hostile, tmp_path)
    assert exit_code(process) == 0


def test_nan_does_not_hide_other_numbers() -> None:
    with pytest.raises(UsageError, match="this transform exceeds a limit"):
        build_transform([{"RandomResizedCrop": {"antialias": math.nan, "size": 9_000}}])(torch.rand(3, 4, 4))


@pytest.mark.parametrize("depth", [60, 70, 400])
def test_nested_steps_are_counted(depth: int) -> None:
    transform: Transform = [{"Identity": {}}]
    for _ in range(depth - 1):
        transform = [{"Compose": {"transforms": transform}}]
    if depth <= transform_limits.MAX_STEPS:
        assert View(tiny_samples(3), transform)[0].images.shape == (1, 1, 4, 4)
        return
    with pytest.raises(UsageError, match="this transform exceeds a limit"):
        View(tiny_samples(3), transform)


@pytest.mark.parametrize("path", PIPELINES, ids=lambda path: path.stem)
def test_the_transforms_of_the_recipes_are_within_the_limits(path: Path) -> None:
    pipeline = load_pipeline(path)
    said = [one for one in (pipeline.transform, pipeline.eval_transform) if one is not None]
    for transform in said or [photograph_transform()]:
        images = build_transform(split_mixing(transform)[0])(torch.zeros(3, 500, 375, dtype=torch.uint8))
        assert 512 * images.numel() < transform_limits.MAX_BATCH_VALUES

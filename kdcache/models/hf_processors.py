"""Convert image processors of transformers to transforms, and compare the two on images."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from PIL import Image

from kdcache.config.transform import Transform
from kdcache.data.transforms import build_transform
from kdcache.errors import KdcacheError, UsageError

_INTERPOLATIONS = {0: "nearest", 1: "lanczos", 2: "bilinear", 3: "bicubic", 4: "box", 5: "hamming"}
"""torchvision's names of Pillow's interpolation modes."""

_COMPARED = ((300, 400), (257, 199), (96, 96))
"""Heights and widths of the images on which a transform is compared with its processor."""

_MEAN_ERROR, _LARGEST_ERROR = 0.5, 4.0
"""Largest differences, in levels of 8-bit images: Pillow and torch round resized pixels differently."""


def transform_of(processor: Any, settings: dict[str, Any], folder: str) -> Transform:
    """Return the transform with the same outputs as a processor.

    Args:
        processor: called as transformers calls it.
        settings: its `to_dict()`.
        folder: of the processor, for the error.

    Raises:
        UsageError: if torchvision's transforms cannot express it.
    """
    reasons = []
    for transform in _candidates(settings):
        reason = _difference(transform, processor, settings)
        if reason is None:
            return transform
        reasons.append(reason)
    raise UsageError(
        f"{type(processor).__name__} of {folder} cannot be expressed by transforms of torchvision: "
        f"{reasons[0] if reasons else 'its settings are not known'}",
        "set `transform` to that of the teacher's images",
    )


def _candidates(settings: dict[str, Any]) -> Iterator[Transform]:
    """Yield transforms that the settings of a processor may stand for: some processors resize in their own way."""
    interpolation = _INTERPOLATIONS.get(int(settings.get("resample") or 0), "bilinear")
    crop = settings.get("crop_size") or {}
    crops: Transform = []
    if settings.get("do_center_crop") and {"height", "width"} <= crop.keys():
        crops = [{"CenterCrop": {"size": [crop["height"], crop["width"]]}}]
    for size, own_crop in _sizes(settings):
        resize: Transform = [{"Resize": {"size": size, "interpolation": interpolation}}] if size else []
        cut = crops if own_crop is None else [{"CenterCrop": {"size": own_crop}}]
        values = _values(settings)
        yield [{"ToImage": {}}, *resize, *cut, *values]
        yield [*resize, *cut, {"ToImage": {}}, *values]


def _sizes(settings: dict[str, Any]) -> Iterator[tuple[list[int] | None, list[int] | None]]:
    """Yield the sizes to resize to and to crop to; None for the crop of the settings."""
    size = settings.get("size") or {}
    if not settings.get("do_resize"):
        yield None, None
    elif {"height", "width"} <= size.keys():
        yield [size["height"], size["width"]], None
    elif "shortest_edge" in size:
        side = int(size["shortest_edge"])
        if share := settings.get("crop_pct"):
            yield [int(side / share)], [side, side]  # ConvNext, small
            yield [side, side], None  # ConvNext, large
            yield [int(side / share)], None  # PoolFormer
        yield [side], None
        yield [int(256 / 224 * side)], None  # LeViT


def _values(settings: dict[str, Any]) -> Transform:
    """Return the steps that convert pixels to floats: scaling and normalization in one."""
    # ToDtype divides pixels by 255; all further steps are (x - mean) / std of the result.
    factor = 255 * settings.get("rescale_factor", 1 / 255) if settings.get("do_rescale") else 255.0
    offset = 1.0 if settings.get("rescale_offset") else 0.0
    mean, std = [0.0] * 3, [1.0] * 3
    if settings.get("do_normalize"):
        mean, std = list(settings["image_mean"]), list(settings["image_std"])
    means = [(value + offset) / factor for value in mean]
    # EfficientNet with `include_top` divides by the deviations once more.
    stds = [value ** (2 if settings.get("include_top") else 1) / factor for value in std]
    steps: Transform = [{"ToDtype": {"dtype": "float32", "scale": True}}]
    if any(means) or any(abs(value - 1) > 1e-9 for value in stds):
        steps.append({"Normalize": {"mean": means, "std": stds}})
    return steps


def _difference(transform: Transform, processor: Any, settings: dict[str, Any]) -> str | None:
    """Return how a transform differs from the processor on some images; None if it does not."""
    level = max(1.0, *(1 / value for value in settings.get("image_std") or [1.0])) / 255
    for height, width in _COMPARED:
        image = _image(height, width)
        try:
            wanted = torch.as_tensor(np.asarray(processor(images=image, return_tensors="np")["pixel_values"][0]))
            made = build_transform(transform)(image)
        except (KdcacheError, RuntimeError, ValueError, TypeError, KeyError) as error:
            return f"{type(error).__name__}: {error}"
        if made.shape != wanted.shape:
            return f"images {list(wanted.shape)}, and {list(made.shape)} from the transform"
        errors = (made - wanted).abs() / level
        if errors.mean() > _MEAN_ERROR or errors.max() > _LARGEST_ERROR:
            return f"pixels {errors.mean():.1f} levels from those of the transform"
    return None


def _image(height: int, width: int) -> Image.Image:
    """Return an image of smooth colors with some noise."""
    rows, columns = np.mgrid[0:height, 0:width]
    waves = [np.sin(rows / 17 + channel) * np.cos(columns / 23 - channel) for channel in range(3)]
    noise = np.random.default_rng(0).normal(size=(height, width, 3))
    return Image.fromarray((127 + 90 * np.stack(waves, axis=2) + 10 * noise).clip(0, 255).astype(np.uint8))

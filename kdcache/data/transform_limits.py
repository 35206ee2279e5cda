"""Limits on the memory and time of a transform, since the transform of a downloaded cache is replayed on this machine.

They hold for all transforms, also those of the user's own pipeline, so that every cache can be replayed.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from itertools import islice
from typing import Any

from PIL import Image
from torch import Tensor

from kdcache.errors import UsageError

MAX_IMAGE_VALUES = 2**28
"""Values of an image: 4 channels of 8192 x 8192 pixels. Fewer channels are counted as 4."""

CHANNELS = 4

MAX_BATCH_VALUES = 2**31
"""Values of all images of a batch."""

MAX_STEPS = 64
"""Steps of a transform, with those inside other steps; also the repetitions of one step."""

MAX_KERNEL_SIZE = 255
"""Pixels of a side of a convolution kernel."""

_MAX_REMEMBERED = 4096
"""Sizes of images that a step remembers as checked."""

_REPEATS = ("chain_depth", "mixture_width", "num_ops", "trials")
_INFINITE = 2.0**53
_KERNEL_OF_SIGMA = 8
"""Ratio of the kernel size of ElasticTransform to its sigma."""

_ZOOM_OUT = (1.0, 4.0)
_JITTER = (0.1, 2.0)
"""Defaults of torchvision for `side_range` of RandomZoomOut and `scale_range` of ScaleJitter."""


@dataclass(frozen=True)
class SizeLimitedStep:
    """A step of a transform that checks the size of its result before it computes it.

    Attributes:
        step: the step of torchvision.
        name: name of the step.
        arguments: arguments of the step, as given in the transform.
    """

    step: Callable[..., Any]
    name: str
    arguments: Mapping[str, Any]

    def __post_init__(self) -> None:
        kernel = 0.0
        if self.name == "GaussianBlur":
            kernel = _largest(self.arguments.get("kernel_size"))
        if self.name == "ElasticTransform":
            kernel = _KERNEL_OF_SIGMA * _largest(self.arguments.get("sigma"))
        if kernel > MAX_KERNEL_SIZE:
            raise _refused(f"{self.name} has a kernel of {kernel:,.0f} pixels, more than {MAX_KERNEL_SIZE}")
        for key in _REPEATS:
            if _largest(self.arguments.get(key)) > MAX_STEPS:
                raise _refused(f"{self.name} has {key} {self.arguments[key]}, more than {MAX_STEPS}")

    def __call__(self, *images: Any) -> Any:
        """Apply the step to an image or a batch; a step that mixes images also takes a partner and a share.

        Raises:
            UsageError: if the result could be too large.
            TypeError: if the previous step did not return one image, but for instance five crops.
        """
        self.check(images[0])
        return self.step(*images)

    def check(self, picture: Any) -> int:
        """Check the size of the step's result for an image or a batch, and return the values of an image.

        Raises the errors of a call.
        """
        if isinstance(picture, Image.Image):
            batch, channels, height, width = 1, len(picture.getbands()), picture.height, picture.width
        elif isinstance(picture, Tensor):
            batch = math.prod(picture.shape[:-3])
            channels, height, width = picture.shape[-3:]
        else:
            raise TypeError(f"{self.name} is given a {type(picture).__name__}, not one image")
        given = (batch, channels, height, width)
        if (known := self._within_limits.get(given)) is not None:
            return known
        shape = self._largest_shape(channels, height, width)
        if _count_values(*shape) > max(_count_values(channels, height, width), MAX_IMAGE_VALUES):
            sides = " x ".join(f"{side:,.0f}" for side in shape)
            limit = f"{CHANNELS} x {MAX_IMAGE_VALUES // CHANNELS:,}"
            raise _refused(f"{self.name} returns images of up to {sides} values, more than {limit}")
        values = math.ceil(math.prod(shape))
        check_batch(values, batch)
        if len(self._within_limits) < _MAX_REMEMBERED:
            self._within_limits[given] = values
        return values

    # Cached: they are used for each of millions of images.

    @cached_property
    def _within_limits(self) -> dict[tuple[int, int, int, int], int]:
        """Sizes (batch, channels, H, W) of images that were checked, and the values of an image of the result."""
        return {}

    @cached_property
    def _size(self) -> list[float]:
        return [*_numbers(self.arguments.get("size"))]

    @cached_property
    def _largest_numbers(self) -> dict[str, float]:
        return {key: _largest(value) for key, value in self.arguments.items()}

    @cached_property
    def _n_means(self) -> int:
        return max(len([*_numbers(self.arguments.get(key))]) for key in ("mean", "std"))

    def _largest_shape(self, channels: int, height: int, width: int) -> tuple[float, float, float]:
        """Return the largest (channels, H, W) that the step allocates, for intermediate results as well."""
        size, largest, scale, side = self._size, self._largest_numbers, 1.0, 0.0
        match self.name:
            case "Pad" | "RandomCrop":
                margin, side = 2 * largest.get("padding", 0.0), max(size, default=0.0)
                return channels, max(height + margin, side), max(width + margin, side)
            case "Resize" if len(size) == 2:
                return channels, size[0], size[1]
            case "Resize" | "RandomResize" | "RandomShortestSize":
                scale = self._largest_scale(size, largest, height, width)
            case "RandomZoomOut":
                scale = _largest(self.arguments.get("side_range", _ZOOM_OUT))
            case "ScaleJitter":
                side = _largest(self.arguments.get("scale_range", _JITTER)) * largest.get("target_size", 0.0)
            case "RandomRotation" if self.arguments.get("expand"):
                side = math.hypot(height, width) + 2  # its corners are rounded outward
            case "Normalize":
                # One channel is broadcast to as many as there are means.
                channels = max(channels, self._n_means)
            case "ElasticTransform":
                pass  # its alpha is not a size
            case _:
                # In a step that is not known here, also one of a future torchvision, any number may be a side.
                side = max(largest.values(), default=0.0)
        return channels, max(scale * height, side), max(scale * width, side)

    def _largest_scale(self, size: list[float], largest: Mapping[str, float], height: int, width: int) -> float:
        """Return the largest factor by which a step that keeps the aspect ratio enlarges an image."""
        shorter, longer = sorted((max(height, 1), max(width, 1)))
        limit = largest.get("max_size", 0.0)
        if self.name == "RandomResize":
            return limit / shorter
        target = size[0] if size else largest.get("min_size", 0.0)
        scales = [target / shorter] * bool(target) + [limit / longer] * bool(limit)
        return min(scales, default=1.0)


def _count_values(channels: float, height: float, width: float) -> float:
    return max(channels, CHANNELS) * height * width


def check_batch(values: float, count: int) -> None:
    """Check that `count` images of `values` values each are within the limit of a batch.

    Raises:
        UsageError: if they exceed it.
    """
    if count > 1 and count * values > MAX_BATCH_VALUES:
        raise UsageError(
            f"a batch of {count} images of {values:,.0f} values has more than {MAX_BATCH_VALUES:,}",
            "lower batch_size, or reduce the size of the images in `transform`",
        )


def check_steps(names: Iterator[str]) -> None:
    """Check that a transform does not have too many steps, including those inside others.

    Raises:
        UsageError: if it has more than `MAX_STEPS`.
    """
    if len([*islice(names, MAX_STEPS + 1)]) > MAX_STEPS:
        raise _refused(f"it has more than {MAX_STEPS} steps")


def _refused(what: str) -> UsageError:
    return UsageError(
        f"this transform exceeds a limit: {what}",
        "reduce it in `transform`; do not use a downloaded cache with such a transform (docs/FORMAT.md, 6.2)",
    )


def _numbers(value: Any) -> Iterator[float]:
    """Yield the absolute values of all numbers in an argument; NaN as the largest, as no limit holds for it."""
    if isinstance(value, int | float) and not isinstance(value, bool):
        yield min(_INFINITE, abs(value))  # in this order: NaN is not below anything
    elif isinstance(value, list | tuple):
        for inner in value:
            yield from _numbers(inner)


def _largest(value: Any) -> float:
    return max(_numbers(value), default=0.0)

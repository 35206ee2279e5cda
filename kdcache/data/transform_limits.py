"""How much a transform may ask for: one that a cache names is replayed on other people's machines.

The limits hold for every transform, a pipeline's own too, so that every cache can be replayed.
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

MOST_VALUES = 2**28
"""Of an image: four channels of 8192 by 8192; one of fewer channels is counted as if it had four."""

CHANNELS = 4

MOST_IN_A_BATCH = 2**31

MOST_STEPS = 64
"""Those inside other steps too; and how often a step may repeat what it does."""

MOST_OF_A_KERNEL = 255

_REPEATS = ("chain_depth", "mixture_width", "num_ops", "trials")
_AS_GOOD_AS_INFINITE = 2.0**53
_KERNEL_OF_SIGMA = 8
"""ElasticTransform's kernel is so many times as wide as its sigma."""

_ZOOM_OUT = (1.0, 4.0)
_JITTER = (0.1, 2.0)
"""What torchvision takes for `side_range` and `scale_range` where nothing is said."""


@dataclass(frozen=True)
class Bounded:
    """A step of a transform that looks at the size of an image before it makes another one of it.

    Attributes:
        step: what does the work.
        name: of it.
        arguments: that it was built with, as they stand in the transform.
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
        if kernel > MOST_OF_A_KERNEL:
            raise _refused(f"{self.name} has a kernel of {kernel:,.0f} pixels; {MOST_OF_A_KERNEL} are the most")
        for key in _REPEATS:
            if _largest(self.arguments.get(key)) > MOST_STEPS:
                raise _refused(f"{self.name} has {key} {self.arguments[key]}; {MOST_STEPS} is the most")

    def __call__(self, *images: Any) -> Any:
        """Apply the step to an image or a batch; one that chooses among mixings also takes a partner and a share.

        Raises:
            UsageError: if it would make too large an image.
            TypeError: if the step before it has made something else of an image, such as five crops.
        """
        picture = images[0]
        if isinstance(picture, Image.Image):
            batch, channels, height, width = 1, len(picture.getbands()), picture.height, picture.width
        elif isinstance(picture, Tensor):
            batch = math.prod(picture.shape[:-3])
            channels, height, width = picture.shape[-3:]
        else:
            raise TypeError(f"{self.name} is given a {type(picture).__name__}, not one image")
        made = self._made(channels, height, width)
        if _counted(*made) > max(_counted(channels, height, width), MOST_VALUES):
            sides = " x ".join(f"{side:,.0f}" for side in made)
            most = f"{CHANNELS} x {MOST_VALUES // CHANNELS:,}"
            raise _refused(f"{self.name} makes up to {sides} values of an image; {most} are the most")
        check_batch(math.prod(made), batch)
        return self.step(*images)

    # Read once, and not for each of millions of images.

    @cached_property
    def _size(self) -> list[float]:
        return [*_numbers(self.arguments.get("size"))]

    @cached_property
    def _most(self) -> dict[str, float]:
        return {key: _largest(value) for key, value in self.arguments.items()}

    @cached_property
    def _means(self) -> int:
        return max(len([*_numbers(self.arguments.get(key))]) for key in ("mean", "std"))

    def _made(self, channels: int, height: int, width: int) -> tuple[float, float, float]:
        """[channels, H, W] at most, while the step is at work or when it is done."""
        size, largest, scale, side = self._size, self._most, 1.0, 0.0
        match self.name:
            case "Pad" | "RandomCrop":
                around, side = 2 * largest.get("padding", 0.0), max(size, default=0.0)
                return channels, max(height + around, side), max(width + around, side)
            case "Resize" if len(size) == 2:
                return channels, size[0], size[1]
            case "Resize" | "RandomResize" | "RandomShortestSize":
                scale = self._enlarged(size, largest, height, width)
            case "RandomZoomOut":
                scale = _largest(self.arguments.get("side_range", _ZOOM_OUT))
            case "ScaleJitter":
                side = _largest(self.arguments.get("scale_range", _JITTER)) * largest.get("target_size", 0.0)
            case "RandomRotation" if self.arguments.get("expand"):
                side = math.hypot(height, width) + 2  # its corners are rounded outward
            case "Normalize":
                # Of one channel it makes as many as there are means.
                channels = max(channels, self._means)
            case "ElasticTransform":
                pass  # its alpha is not a size
            case _:
                # Whatever it does, and whatever torchvision may yet get: a number may be a side.
                side = max(largest.values(), default=0.0)
        return channels, max(scale * height, side), max(scale * width, side)

    def _enlarged(self, size: list[float], largest: Mapping[str, float], height: int, width: int) -> float:
        """How many times larger at most a step makes an image that keeps the shape of it."""
        shorter, longer = sorted((max(height, 1), max(width, 1)))
        most = largest.get("max_size", 0.0)
        if self.name == "RandomResize":
            return most / shorter
        wanted = size[0] if size else largest.get("min_size", 0.0)
        scales = [wanted / shorter] * bool(wanted) + [most / longer] * bool(most)
        return min(scales, default=1.0)


def _counted(channels: float, height: float, width: float) -> float:
    return max(channels, CHANNELS) * height * width


def check_batch(values: float, count: int) -> None:
    """Check that so many images of so many values may be held at once.

    Raises:
        UsageError: if they are too many.
    """
    if count > 1 and count * values > MOST_IN_A_BATCH:
        raise UsageError(
            f"a batch of {count} images of {values:,.0f} values has more than {MOST_IN_A_BATCH:,}",
            "set a smaller batch_size, or take smaller images with `transform`",
        )


def check_steps(names: Iterator[str]) -> None:
    """Check that a transform does not have too many steps, including those inside others.

    Raises:
        UsageError: if it has.
    """
    if len([*islice(names, MOST_STEPS + 1)]) > MOST_STEPS:
        raise _refused(f"it has more than {MOST_STEPS} steps")


def _refused(what: str) -> UsageError:
    return UsageError(
        f"this transform asks for too much: {what}",
        "take less in `transform`; if a cache from elsewhere has this transform, do not use it (docs/FORMAT.md, 6.2)",
    )


def _numbers(value: Any) -> Iterator[float]:
    """Yield the absolute values of all numbers in an argument; NaN as the largest, as no limit holds for it."""
    if isinstance(value, int | float) and not isinstance(value, bool):
        yield min(_AS_GOOD_AS_INFINITE, abs(value))  # in this order: NaN is not below anything
    elif isinstance(value, list | tuple):
        for inner in value:
            yield from _numbers(inner)


def _largest(value: Any) -> float:
    return max(_numbers(value), default=0.0)

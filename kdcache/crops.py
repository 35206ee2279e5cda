"""Views whose crops were drawn elsewhere, and written down: boxes and flips are data of the cache, not of a seed.

A transform that begins with

    - RecordedCrop: {size: 224, interpolation: bilinear, unit: fraction}

takes the box of (sample, view) from the cache's array `crops`, five numbers: top, left, height, width and flip. They
are fractions of the image's height and width, or whole pixels. Where it begins with `DrawnElsewhere`, nobody here can
draw what the teacher saw: rows can be read, and no image is shown.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple

import numpy as np
import numpy.typing as npt
from PIL import Image
from torch import Tensor

from kdcache.errors import UsageError
from kdcache.limits import CHANNELS, MOST_VALUES

Step = dict[str, dict[str, Any]]
Crops = Callable[[int], npt.NDArray[np.float32]]
"""The boxes of all samples in a view, [N, 5]."""

CROP, ELSEWHERE = "RecordedCrop", "DrawnElsewhere"
BOX = 5
"""Numbers of a box: top, left, height, width, and 1 where the crop is then flipped from left to right, else 0."""

UNITS = ("fraction", "pixels")
_INTERPOLATIONS = ("nearest", "bilinear", "bicubic")
_BEYOND = 2**-10
"""By how much rounded fractions, in float16 at the worst, may add up to more than a whole side."""

_LARGEST = 2**24
"""Pixels of a side, up to which float32 has every whole number."""


class PixelBox(NamedTuple):
    """Whole pixels of an image."""

    top: int
    left: int
    height: int
    width: int


class RecordedCrop:
    """A crop whose box is given, brought to one size, and flipped where the box says so.

    Args:
        size: of what comes out: [height, width], or both.
        interpolation: of torchvision's `resized_crop`, antialiased.
        unit: of the boxes.

    Raises:
        ValueError: for any other argument.
    """

    def __init__(
        self,
        size: int | Sequence[int],
        interpolation: str = "bilinear",
        unit: Literal["fraction", "pixels"] = "fraction",
    ) -> None:
        sides = [size, size] if isinstance(size, int) else [*size]
        if len(sides) != 2 or not all(type(side) is int and side > 0 for side in sides):
            raise ValueError(f"size {size!r} is neither a number of pixels nor [height, width]")
        if CHANNELS * sides[0] * sides[1] > MOST_VALUES:
            raise ValueError(f"size {size!r} is of more than {MOST_VALUES // CHANNELS:,} pixels")
        if unit not in UNITS or interpolation not in _INTERPOLATIONS:
            raise ValueError(f"{unit!r} is no unit of {UNITS}, or {interpolation!r} none of {_INTERPOLATIONS}")
        self.size, self.interpolation, self.unit = sides, interpolation, unit

    def __call__(self, picture: Tensor | Image.Image, box: npt.NDArray[np.float32]) -> Any:
        """The crop of a picture.

        Args:
            picture: [channels, H, W], or a PIL image.
            box: [5], as `BOX` says.

        Raises:
            ValueError: if the box does not lie inside the picture.
        """
        from torchvision.transforms.v2 import InterpolationMode, functional  # noqa: PLC0415  # a second of imports

        within = pixels_of(box, self.unit, *sides_of(picture))
        cut = functional.resized_crop(picture, *within, self.size, InterpolationMode(self.interpolation), True)
        return functional.horizontal_flip(cut) if box[4] else cut


def sides_of(picture: Tensor | Image.Image) -> tuple[int, int]:
    """(height, width)."""
    if isinstance(picture, Image.Image):
        return picture.height, picture.width
    height, width = picture.shape[-2:]
    return height, width


def pixels_of(box: npt.NDArray[np.float32], unit: str, height: int, width: int) -> PixelBox:
    """The pixels that a box stands for: its edges, each rounded, as Pillow rounds those of a crop.

    Fractions that were rounded themselves may reach beyond the last pixel, and end there.

    Raises:
        ValueError: if none are left, or pixels lie outside of the image.
    """
    top, left, tall, wide = (float(number) for number in box[:4])
    if unit == "fraction":
        top, left, tall, wide = top * height, left * width, tall * height, wide * width
    first, begin, last, end = round(top), round(left), round(top + tall), round(left + wide)
    if unit == "fraction":
        last, end = min(last, height), min(end, width)
    if not (0 <= first < last <= height and 0 <= begin < end <= width):
        raise ValueError(f"the box {[float(number) for number in box[:4]]} ({unit}) is not inside {height} x {width}")
    return PixelBox(first, begin, last - first, end - begin)


def wrong_boxes(boxes: npt.NDArray[np.float32], unit: str) -> npt.NDArray[np.bool_]:
    """Which of the boxes [..., 5] cannot be boxes of any image, [...]."""
    with np.errstate(invalid="ignore"):
        corner, sides, flip = boxes[..., :2], boxes[..., 2:4], boxes[..., 4]
        right: npt.NDArray[np.bool_] = np.isfinite(boxes).all(axis=-1) & ((flip == 0) | (flip == 1))
        right &= (corner >= 0).all(axis=-1) & (sides > 0).all(axis=-1)
        if unit == "fraction":
            right &= (corner + sides <= 1 + _BEYOND).all(axis=-1)
        else:
            right &= ((np.floor(boxes) == boxes) & (boxes <= _LARGEST)).all(axis=-1)
        return np.logical_not(right)


def recorded(transform: Sequence[Step]) -> Literal["crops", "seeds"] | None:
    """What a cache of this transform keeps of each view of a sample, beside its row."""
    alone = transform and isinstance(transform[0], dict) and len(transform[0]) == 1
    first = next(iter(transform[0])) if alone else None
    return "crops" if first == CROP else "seeds" if first == ELSEWHERE else None


def split_recorded(transform: list[Step]) -> tuple[RecordedCrop | None, list[Step]]:
    """The recorded crop at the beginning of a transform, if there is one, and the other steps.

    Raises:
        UsageError: if its arguments cannot be, or the images were drawn elsewhere.
    """
    kind = recorded(transform)
    rest = transform if kind is None else transform[1:]
    if kind is None:
        return None, rest
    if kind == "seeds":
        raise UsageError(
            f"what this teacher saw was drawn by code that kdcache has not got: {transform[0]}",
            "use its rows in your own loop, with the images as that code draws them: open_cache(CACHE).teacher()",
        )
    try:
        return RecordedCrop(**transform[0][CROP]), rest
    except (TypeError, ValueError) as error:
        raise UsageError(
            f"transform {CROP}: {error}", "write it as - RecordedCrop: {size: 224, interpolation: bilinear, unit: ...}"
        ) from None


def unit_of(transform: Sequence[Step]) -> str:
    """The unit of the boxes of a transform that begins with a recorded crop."""
    return str(transform[0][CROP].get("unit", UNITS[0]))

"""Views with recorded crops: boxes and flips are stored in the cache, instead of drawn from a seed.

A transform that begins with

    - RecordedCrop: {size: 224, interpolation: bilinear, unit: fraction}

takes the box of (sample, view) from the cache's array `crops`, five numbers: top, left, height, width and flip. They
are fractions of the image's height and width, or whole pixels. If it begins with `DrawnElsewhere`, the
views were drawn by other code: the logits can be read, and the images cannot be replayed.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import numpy as np
import numpy.typing as npt
from PIL import Image
from torch import Tensor

from kdcache.cache.format.recorded_views import CROP, UNITS, Step, recorded
from kdcache.data.transform_limits import CHANNELS, MOST_VALUES
from kdcache.errors import UsageError

_INTERPOLATIONS = ("nearest", "bilinear", "bicubic")


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
        """Return the crop of a picture.

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
    """Return (height, width)."""
    if isinstance(picture, Image.Image):
        return picture.height, picture.width
    height, width = picture.shape[-2:]
    return height, width


def pixels_of(box: npt.NDArray[np.float32], unit: str, height: int, width: int) -> PixelBox:
    """Return the pixels of a box: its edges, each rounded, as Pillow rounds those of a crop.

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


def split_recorded(transform: list[Step]) -> tuple[RecordedCrop | None, list[Step]]:
    """Return the recorded crop at the beginning of a transform, if there is one, and the other steps.

    Raises:
        UsageError: if its arguments are invalid, or the views were drawn by other code.
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

"""Views with recorded crops: boxes and flips are stored in the cache, instead of drawn from a seed.

A transform that begins with

    - RecordedCrop: {size: 224, interpolation: bilinear, unit: fraction}

takes the box of (sample, view) from the cache's array `crops`, five numbers: top, left, height, width and flip. They
are fractions of the image's height and width, or whole pixels. If it begins with `DrawnElsewhere`, other code drew the
views: the logits can be read, but the images cannot be replayed.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import numpy as np
import numpy.typing as npt
from PIL import Image
from torch import Tensor

from kdcache.cache.format.recorded_views import CROP, UNITS, Step, recorded
from kdcache.data.transform_limits import CHANNELS, MAX_IMAGE_VALUES
from kdcache.errors import UsageError

_INTERPOLATIONS = ("nearest", "bilinear", "bicubic")


class PixelBox(NamedTuple):
    """A box in whole pixels of an image."""

    top: int
    left: int
    height: int
    width: int


class RecordedCrop:
    """A crop with a given box, resized to a fixed size, and flipped horizontally if the box's flip is 1.

    Args:
        size: size of the result in pixels: [height, width], or one number for both.
        interpolation: mode of torchvision's `resized_crop`, which is antialiased: nearest, bilinear or bicubic.
        unit: unit of the boxes.

    Raises:
        ValueError: if an argument has another value.
    """

    def __init__(
        self,
        size: int | Sequence[int],
        interpolation: str = "bilinear",
        unit: Literal["fraction", "pixels"] = "fraction",
    ) -> None:
        sides = [size, size] if isinstance(size, int) else [*size]
        if len(sides) != 2 or not all(type(side) is int and side > 0 for side in sides):
            raise ValueError(f"size must be a number of pixels or [height, width], not {size!r}")
        if CHANNELS * sides[0] * sides[1] > MAX_IMAGE_VALUES:
            raise ValueError(f"size {size!r} has more than {MAX_IMAGE_VALUES // CHANNELS:,} pixels")
        if unit not in UNITS:
            raise ValueError(f"unit must be one of {', '.join(UNITS)}, not {unit!r}")
        if interpolation not in _INTERPOLATIONS:
            raise ValueError(f"interpolation must be one of {', '.join(_INTERPOLATIONS)}, not {interpolation!r}")
        self.size, self.interpolation, self.unit = sides, interpolation, unit

    def __call__(self, picture: Tensor | Image.Image, box: npt.NDArray[np.float32]) -> Any:
        """Return the crop of an image.

        Args:
            picture: [channels, H, W], or a PIL image.
            box: [5]: top, left, height, width, flip; see `BOX`.

        Raises:
            ValueError: if the box is not inside the image.
        """
        from torchvision.transforms.v2 import InterpolationMode, functional  # noqa: PLC0415  # a second of imports

        pixel_box = pixels_of(box, self.unit, *sides_of(picture))
        crop = functional.resized_crop(picture, *pixel_box, self.size, InterpolationMode(self.interpolation), True)
        return functional.horizontal_flip(crop) if box[4] else crop


def sides_of(picture: Tensor | Image.Image) -> tuple[int, int]:
    """Return (height, width) of an image."""
    if isinstance(picture, Image.Image):
        return picture.height, picture.width
    height, width = picture.shape[-2:]
    return height, width


def pixels_of(box: npt.NDArray[np.float32], unit: str, height: int, width: int) -> PixelBox:
    """Return a box in whole pixels: each edge is rounded, as Pillow rounds the edges of a crop.

    Stored fractions are rounded numbers: a box that extends beyond the last pixel is cut off there.

    Raises:
        ValueError: if no pixel remains, or the box is not inside the image.
    """
    top, left, box_height, box_width = (float(value) for value in box[:4])
    if unit == "fraction":
        top, left, box_height, box_width = top * height, left * width, box_height * height, box_width * width
    y0, x0, y1, x1 = round(top), round(left), round(top + box_height), round(left + box_width)
    if unit == "fraction":
        y1, x1 = min(y1, height), min(x1, width)
    if not (0 <= y0 < y1 <= height and 0 <= x0 < x1 <= width):
        raise ValueError(f"the box {[float(value) for value in box[:4]]} ({unit}) is not inside {height} x {width}")
    return PixelBox(y0, x0, y1 - y0, x1 - x0)


def split_recorded(transform: list[Step]) -> tuple[RecordedCrop | None, list[Step]]:
    """Return the recorded crop that a transform begins with, or None, and the other steps.

    Raises:
        UsageError: if its arguments are invalid, or code outside of kdcache drew the views.
    """
    kind = recorded(transform)
    rest = transform if kind is None else transform[1:]
    if kind is None:
        return None, rest
    if kind == "seeds":
        raise UsageError(
            f"the views of this cache were drawn by code outside of kdcache, and cannot be replayed: {transform[0]}",
            "use open_cache(CACHE).teacher() in your own training loop, with the images that this code draws",
        )
    try:
        return RecordedCrop(**transform[0][CROP]), rest
    except (TypeError, ValueError) as error:
        raise UsageError(
            f"transform {CROP}: {error}", "write it as - RecordedCrop: {size: 224, interpolation: bilinear, unit: ...}"
        ) from None

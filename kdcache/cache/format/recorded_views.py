"""What a cache keeps of views that other code drew: boxes of crops, or seeds (docs/FORMAT.md, section 2)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

Step = dict[str, dict[str, Any]]

Crops = Callable[[int], npt.NDArray[np.float32]]
"""The boxes of all samples in a view, [N, 5]."""

CROP, ELSEWHERE = "RecordedCrop", "DrawnElsewhere"

BOX = 5
"""Numbers of a box: top, left, height, width, and 1 where the crop is then flipped from left to right, else 0."""

UNITS = ("fraction", "pixels")

_BEYOND = 2**-10
"""By how much rounded fractions, in float16 at the worst, may add up to more than a whole side."""

_LARGEST = 2**24
"""Pixels of a side, up to which float32 has every whole number."""


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


def unit_of(transform: Sequence[Step]) -> str:
    """The unit of the boxes of a transform that begins with a recorded crop."""
    return str(transform[0][CROP].get("unit", UNITS[0]))

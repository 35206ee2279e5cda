"""Validate recorded views, whose boxes or seeds other code drew and the cache stores (docs/FORMAT.md, section 6.2)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

Step = dict[str, dict[str, Any]]

Crops = Callable[[int], npt.NDArray[np.float32]]
"""Function from the index of a view to the boxes of all samples, [N, 5]."""

CROP, ELSEWHERE = "RecordedCrop", "DrawnElsewhere"

BOX = 5
"""Numbers per box: top, left, height, width, and 1 for a horizontal flip after the crop, else 0 (section 6.2)."""

UNITS = ("fraction", "pixels")

_ROUNDING = 2**-10
"""Fraction of a side by which rounded boxes, at worst in float16, may exceed the image (section 6.2)."""

_MAX_PIXELS = 2**24
"""Pixels per side at most: float32 represents every integer up to here (section 6.2)."""


def wrong_boxes(boxes: npt.NDArray[np.float32], unit: str) -> npt.NDArray[np.bool_]:
    """Return which of the boxes [..., 5] are invalid for every image, [...] bool."""
    with np.errstate(invalid="ignore"):
        corner, sides, flip = boxes[..., :2], boxes[..., 2:4], boxes[..., 4]
        valid: npt.NDArray[np.bool_] = np.isfinite(boxes).all(axis=-1) & ((flip == 0) | (flip == 1))
        valid &= (corner >= 0).all(axis=-1) & (sides > 0).all(axis=-1)
        if unit == "fraction":
            valid &= (corner + sides <= 1 + _ROUNDING).all(axis=-1)
        else:
            valid &= ((np.floor(boxes) == boxes) & (boxes <= _MAX_PIXELS)).all(axis=-1)
        return np.logical_not(valid)


def recorded(transform: Sequence[Step]) -> Literal["crops", "seeds"] | None:
    """Return what a cache of this transform stores per view of a sample, beside its row: boxes, seeds or nothing."""
    is_step = transform and isinstance(transform[0], dict) and len(transform[0]) == 1
    first = next(iter(transform[0])) if is_step else None
    return "crops" if first == CROP else "seeds" if first == ELSEWHERE else None


def unit_of(transform: Sequence[Step]) -> str:
    """Return the unit of the boxes of a transform that begins with a recorded crop."""
    return str(transform[0][CROP].get("unit", UNITS[0]))

"""A transform as data: a list of steps, each a name with its arguments."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

Transform = list[dict[str, dict[str, Any]]]

EXIF_TRANSPOSE = "ExifTranspose"
"""The step that turns an image as its EXIF orientation says; without it, the orientation is ignored."""


def step_names(steps: Any) -> Iterator[str]:
    """Yield the names of all steps of a transform, including those inside other steps."""
    for step in steps if isinstance(steps, list) else []:
        for name, arguments in step.items() if isinstance(step, dict) else []:
            yield name
            yield from step_names(arguments.get("transforms") if isinstance(arguments, dict) else None)

"""Images in memory that several processes share."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from kdcache.samples import ArrayImages


@dataclass(frozen=True)
class MappedImages(ArrayImages):
    """Images in a file of the bare pixels that is mapped into memory: processes that map it share what it takes."""

    path: Path

    def __reduce__(self) -> Any:
        return _map, (self.path, self.pixels.shape, self.pixels.dtype)


def map_images(images: ArrayImages, path: Path) -> MappedImages:
    """Images in memory, written to a file and mapped from there."""
    images.pixels.contiguous().numpy().tofile(path)
    return _map(path, images.pixels.shape, images.pixels.dtype)


def _map(path: Path, shape: Sequence[int], dtype: torch.dtype) -> MappedImages:
    pixels = torch.from_file(str(path), shared=False, size=math.prod(shape), dtype=dtype)
    return MappedImages(pixels.view(*shape), path)

"""Fingerprint the pixels that a teacher saw, so that other pixels for a student are detected before training.

A fingerprint is exact. Where it differs, a sketch of the image distinguishes harmless rounding differences of another
library or processor from a different image (docs/FORMAT.md, section 6.3).
"""

from __future__ import annotations

import hashlib
import zlib
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.nn.functional import adaptive_avg_pool2d

SKETCH_PARTS = 8
"""Numbers per sketch (docs/FORMAT.md, section 6.3)."""

_GRID = (2, 4)
"""Rows and columns of cells over which a sketch averages (docs/FORMAT.md, section 6.3)."""


class Inputs(NamedTuple):
    """Fingerprints and sketches of M images.

    Attributes:
        fingerprints: [M] uint32, CRC-32 (that of zlib) of the pixels [channels, H, W], float32, little-endian.
        sketches: [M, 8] float32, means over 2 x 4 cells of the image and over channels weighted by 1, 2, 3, ..., so
            that exchanged channels change the sketch.
    """

    fingerprints: npt.NDArray[np.uint32]
    sketches: npt.NDArray[np.float32]

    def at(self, which: slice | npt.NDArray[np.int64]) -> Inputs:
        """Return a subset."""
        return Inputs(self.fingerprints[which], self.sketches[which])

    @staticmethod
    def concatenate(parts: list[Inputs]) -> Inputs:
        """Concatenate parts in order."""
        return Inputs(*(np.concatenate(values) for values in zip(*parts, strict=True)))


def inputs_of(images: Tensor) -> Inputs:
    """Return the fingerprints of images [M, channels, H, W] float32, as a network gets them."""
    pixels = images.contiguous().numpy().astype("<f4", copy=False)
    weights = torch.arange(1, images.shape[1] + 1, dtype=torch.float64).reshape(1, -1, 1, 1)
    weighted = (images.double() * weights).mean(dim=1, keepdim=True)
    parts = adaptive_avg_pool2d(weighted, _GRID) if len(images) else weighted
    return Inputs(
        np.array([zlib.crc32(image.tobytes()) for image in pixels], np.uint32),
        parts.reshape(len(images), SKETCH_PARTS).float().numpy(),
    )


def digest_of(keys: npt.NDArray[np.uint64], labels: npt.NDArray[np.int32]) -> str:
    """Return the digest of a dataset: sha256 over its content keys, then its labels, little-endian, in order."""
    sha = hashlib.sha256(keys.astype("<u8").tobytes())
    sha.update(labels.astype("<i4").tobytes())
    return f"sha256:{sha.hexdigest()}"

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
from torch.nn.functional import adaptive_avg_pool1d, adaptive_avg_pool2d

SKETCH_PARTS = 8
"""Numbers per sketch (docs/FORMAT.md, section 6.3)."""

_GRID = (2, 4)
"""Rows and columns of cells over which a sketch averages (docs/FORMAT.md, section 6.3)."""


_PERIOD = 7
"""The weights of a tensor's values in a sketch are 1 to 7, again and again (docs/FORMAT.md, section 6.3)."""


class Inputs(NamedTuple):
    """Fingerprints and sketches of M images.

    Attributes:
        fingerprints: [M] uint32, CRC-32 (that of zlib) of the pixels [channels, H, W], float32, little-endian; of
            integers int64.
        sketches: [M, 8] float32, means over 2 x 4 cells of the image and over channels weighted by 1, 2, 3, ..., so
            that exchanged channels change the sketch. Of other tensors, means over 8 ranges of their values weighted by
            their positions; of integers, which are never rounded, a hash.
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
    """Return the fingerprints of images [M, channels, H, W] float32, or tensors [M, ...], as a network gets them."""
    if not images.is_floating_point():
        return _inputs_of_integers(images)
    pixels = images.contiguous().numpy().astype("<f4", copy=False)
    if images.ndim != 4:
        return Inputs(_fingerprints(pixels), _flat_sketches(images))
    weights = torch.arange(1, images.shape[1] + 1, dtype=torch.float64).reshape(1, -1, 1, 1)
    weighted = (images.double() * weights).mean(dim=1, keepdim=True)
    parts = adaptive_avg_pool2d(weighted, _GRID) if len(images) else weighted
    return Inputs(
        _fingerprints(pixels),
        parts.reshape(len(images), SKETCH_PARTS).float().numpy(),
    )


def _fingerprints(arrays: npt.NDArray[np.generic]) -> npt.NDArray[np.uint32]:
    return np.array([zlib.crc32(array.tobytes()) for array in arrays], np.uint32)


def _flat_sketches(tensors: Tensor) -> npt.NDArray[np.float32]:
    """Return the sketches of tensors [M, ...], [M, 8]."""
    if not len(tensors):
        return np.empty((0, SKETCH_PARTS), np.float32)
    flat = tensors.reshape(len(tensors), -1).double()
    weights = torch.arange(flat.shape[1], dtype=torch.float64) % _PERIOD + 1
    sketches: npt.NDArray[np.float32] = adaptive_avg_pool1d(flat * weights, SKETCH_PARTS).float().numpy()
    return sketches


def _inputs_of_integers(tensors: Tensor) -> Inputs:
    """Return the fingerprints of integers [M, ...], such as token ids."""
    arrays = tensors.contiguous().numpy().astype("<i8", copy=False)
    hashes = [hashlib.blake2b(array.tobytes(), digest_size=4 * SKETCH_PARTS).digest() for array in arrays]
    parts = np.frombuffer(b"".join(hashes), "<u4").reshape(len(arrays), SKETCH_PARTS)
    return Inputs(_fingerprints(arrays), (parts / 2**32).astype(np.float32))


def digest_of(keys: npt.NDArray[np.uint64], labels: npt.NDArray[np.int32]) -> str:
    """Return the digest of a dataset: sha256 over its content keys, then its labels, little-endian, in order."""
    sha = hashlib.sha256(keys.astype("<u8").tobytes())
    sha.update(labels.astype("<i4").tobytes())
    return f"sha256:{sha.hexdigest()}"

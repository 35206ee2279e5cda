"""Encode maps [B, C, h, w] as rows and decode them, in plain torch, on any device (docs/FORMAT.md, section 13).

Neighboring places of a map say nearly the same, so that the numbers of each class, rounded to multiples of one step,
are stored as a plane of differences: of a number to its left neighbor, and of that difference to the one above. The
differences are small integers, and most are the same few, which is what the compressor of the store is good at. They
are taken modulo the size of their type, in which sums along both axes undo them exactly, whatever the differences are.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from kdcache.cache.format.grid_encoding import GridEncoding
from kdcache.cache.format.named_tensors import NamedTensors
from kdcache.cache.format.vector_rows import VectorBasis

_DTYPES = {"int8": torch.int8, "int16": torch.int16, "float16": torch.float16, "float32": torch.float32}


@dataclass(frozen=True)
class GridRows(NamedTensors):
    """Encoded maps of B samples.

    Attributes:
        values: [B, W, h, w] int8, int16, float16 or float32, as `GridEncoding` says.
    """

    values: Tensor


def encode_grids(maps: Tensor, encoding: GridEncoding, basis: VectorBasis | None = None) -> GridRows:
    """Return the rows of maps.

    Args:
        maps: [B, C, h, w] float32, finite.
        encoding: of the rows.
        basis: of the codec klt, on the same device; None for another codec.
    """
    numbers = maps.float()
    if not encoding.level:
        numbers = numbers - numbers.mean(dim=1, keepdim=True)
    dtype = _DTYPES[encoding.dtype]
    if encoding.step is None:
        return GridRows(numbers.to(dtype))
    if encoding.codec == "klt":
        numbers = coordinates_of(numbers, basis)
    rounded = (numbers / encoding.step).round_()
    largest = torch.iinfo(dtype).max
    return GridRows(differences_of(rounded.clamp_(-largest, largest).to(dtype)))


def decode_grids(rows: GridRows, encoding: GridEncoding, basis: VectorBasis | None = None) -> Tensor:
    """Return the maps [B, C, h, w] float32 of rows.

    Args:
        rows: of B maps.
        encoding: of the rows.
        basis: of the codec klt, on the same device; None for another codec.
    """
    if encoding.step is None:
        return _normalized(rows.values.float(), encoding)
    numbers = sums_of(rows.values).float()
    if encoding.codec == "klt":
        # Scaled axes in place of scaled coordinates, of which there are many more.
        axes = _required(basis)
        decoded = torch.matmul(axes.axes.T * encoding.step, numbers.flatten(2))
        return _normalized(decoded.add_(axes.mean[:, None]).view(len(numbers), *encoding.shape), encoding)
    return _normalized(numbers.mul_(encoding.step), encoding)


def coordinates_of(numbers: Tensor, basis: VectorBasis | None) -> Tensor:
    """Return the principal coordinates [B, R, h, w] of the places of maps [B, C, h, w]."""
    axes = _required(basis)
    flat = torch.matmul(axes.axes, (numbers - axes.mean[:, None, None]).flatten(2))
    return flat.view(len(numbers), -1, *numbers.shape[2:])


def differences_of(numbers: Tensor) -> Tensor:
    """Return planes [..., h, w] of integers as differences to the left and upper neighbors, modulo their type.

    Those of two bytes are folded (0, -1, 1, -2 become 0, 1, 2, 3), so that the upper byte of small ones is 0.
    """
    along = numbers.clone()
    along[..., 1:] -= numbers[..., :-1]
    both = along.clone()
    both[..., 1:, :] -= along[..., :-1, :]
    return both if numbers.dtype == torch.int8 else (both << 1) ^ (both >> 15)


def sums_of(differences: Tensor) -> Tensor:
    """Return the planes [..., h, w] of integers of `differences_of`."""
    if differences.dtype == torch.int8:
        along = differences.cumsum(-1, dtype=differences.dtype)
    else:
        # In place: of large planes most of the time is that of new memory.
        signs = (differences & 1).neg_()
        along = (differences >> 1).bitwise_and_(0x7FFF).bitwise_xor_(signs).cumsum_(-1)
    if along.device.type != "cpu":
        return along.cumsum_(-2)
    # On a CPU adding whole lines takes half the time of a cumulative sum across them.
    for above, line in itertools.pairwise(along.unbind(-2)):
        line.add_(above)
    return along


def _normalized(maps: Tensor, encoding: GridEncoding) -> Tensor:
    return functional.normalize(maps, dim=1) if encoding.normalized else maps


def _required(basis: VectorBasis | None) -> VectorBasis:
    if basis is None:
        raise ValueError("the codec klt needs the basis of its axes")
    return basis

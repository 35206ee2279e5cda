"""Encode vectors [B, D] as rows and decode them, in plain torch, on any device (docs/FORMAT.md, section 11).

The codec klt (Karhunen-Loeve transform) stores the coordinates of a vector in the principal axes of the teacher's
vectors, rounded to multiples of one step that all axes share. Axes of little variance round to 0, and the compressor of
the store takes next to nothing for them: at a given squared error this is the smallest transform code of a Gaussian.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from kdcache.cache.format.output_records import VectorEncoding
from kdcache.cache.format.vector_rows import VectorBasis, VectorRows

_DTYPES = {"int8": torch.int8, "int16": torch.int16, "float16": torch.float16, "float32": torch.float32}

_LEVELS = 127
"""Largest magnitude of a number of the codec int8."""


def encode_vectors(vectors: Tensor, encoding: VectorEncoding, basis: VectorBasis | None = None) -> VectorRows:
    """Return the rows of vectors.

    Args:
        vectors: [B, D] float32, finite.
        encoding: of the rows.
        basis: of the codec klt, on the same device; None for another codec.
    """
    dtype = _DTYPES[encoding.dtype]
    if encoding.step is not None:
        # A row of a constant matrix product may differ in its last bit between batch sizes, which the plan fixes.
        return VectorRows(_rounded(_coordinates(vectors, basis) / encoding.step, dtype))
    if encoding.codec == "int8":
        scale = vectors.abs().amax(dim=1) / _LEVELS
        scale = torch.where(scale > 0, scale, 1.0)
        return VectorRows(_rounded(vectors / scale.unsqueeze(1), dtype), scale)
    return VectorRows(vectors.to(dtype))


def decode_vectors(rows: VectorRows, encoding: VectorEncoding, basis: VectorBasis | None = None) -> Tensor:
    """Return the vectors [B, D] float32 of rows.

    Args:
        rows: of B vectors.
        encoding: of the rows.
        basis: of the codec klt, on the same device; None for another codec.
    """
    vectors = rows.values.float()
    if encoding.step is not None:
        axes = _required(basis)
        vectors = torch.addmm(axes.mean, vectors, axes.axes, alpha=encoding.step)
    if rows.scale is not None:
        vectors = vectors * rows.scale.unsqueeze(1)
    return functional.normalize(vectors, dim=1) if encoding.normalized else vectors


def fit_basis(vectors: Tensor) -> tuple[VectorBasis, Tensor]:
    """Fit the principal axes of vectors, in float64.

    Args:
        vectors: [P, D] float32, of a pilot, on any device.

    Returns:
        (basis of min(P, D) axes by decreasing variance, on the CPU; standard deviation along each axis, [R] float64).
        The largest component of each axis is positive, so that the signs do not depend on the library.
    """
    wide = vectors.double().cpu()
    mean = wide.mean(dim=0)
    _, singular, axes = torch.linalg.svd(wide - mean, full_matrices=False)
    largest = axes.gather(1, axes.abs().argmax(dim=1, keepdim=True))
    axes = axes * torch.where(largest < 0, -1.0, 1.0)
    return VectorBasis(axes.float(), mean.float()), singular / max(len(vectors) - 1, 1) ** 0.5


def _coordinates(vectors: Tensor, basis: VectorBasis | None) -> Tensor:
    """Return the coordinates [B, R] of vectors [B, D] in the axes of a basis."""
    axes = _required(basis)
    return (vectors.float() - axes.mean) @ axes.axes.T


def _required(basis: VectorBasis | None) -> VectorBasis:
    if basis is None:
        raise ValueError("the codec klt needs the basis of its axes")
    return basis


def _rounded(numbers: Tensor, dtype: torch.dtype) -> Tensor:
    """Round to the nearest integers of a type, ties to even; symmetric, so that -128 is not used."""
    largest = torch.iinfo(dtype).max
    return numbers.round().clamp(-largest, largest).to(dtype)

"""Encoded vectors and scores: what a row of an output of kind `vector` or `score` holds."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol, Self, TypeVar

import torch
from torch import Tensor

from kdcache.cache.format.named_tensors import NamedTensors


class EncodedRows(Protocol):
    """Encoded rows of any kind: named tensors whose first dimension is the sample."""

    def __len__(self) -> int: ...

    def arrays(self) -> dict[str, Tensor]:
        """Return the tensors by name, without those that the encoding does not have."""

    def to(self, device: torch.device | str) -> Self:
        """Return the rows on another device."""

    def __getitem__(self, which: Tensor | slice) -> Self: ...

    @classmethod
    def of(cls, arrays: Mapping[str, Tensor]) -> Self:
        """Return the rows of a mapping as `arrays()` returns it."""

    @classmethod
    def concatenate(cls, parts: list[Self]) -> Self:
        """Concatenate parts in order."""


R = TypeVar("R", bound=EncodedRows)


@dataclass(frozen=True)
class VectorRows(NamedTensors):
    """Encoded vectors [D], or scores [K], of B samples.

    Attributes:
        values: [B, R] int8 or int16 (klt), [B, D] int8, float16 or float32, as `VectorEncoding` says.
        scale: [B] float32, the unit of `values` of the codec int8; else None.
    """

    values: Tensor
    scale: Tensor | None = None


@dataclass(frozen=True)
class VectorBasis:
    """The principal axes of a teacher's vectors, for the codec klt.

    Attributes:
        axes: [R, D] float32, orthonormal rows.
        mean: [D] float32.
    """

    axes: Tensor
    mean: Tensor

    def to(self, device: torch.device | str) -> VectorBasis:
        """Return the basis on another device."""
        return VectorBasis(self.axes.to(device), self.mean.to(device))

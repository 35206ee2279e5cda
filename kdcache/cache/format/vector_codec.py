"""Encode vectors [B, D] as rows and decode them, in plain torch, on any device (docs/FORMAT.md, section 11)."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional

from kdcache.cache.format.output_records import VectorEncoding
from kdcache.cache.format.vector_rows import VectorBasis, VectorRows


def decode_vectors(rows: VectorRows, encoding: VectorEncoding, basis: VectorBasis | None) -> Tensor:
    """Return the vectors [B, D] float32 of rows."""
    vectors = rows.values.float()
    if basis is not None and encoding.step is not None:
        vectors = (vectors * encoding.step) @ basis.axes + basis.mean
    if rows.scale is not None:
        vectors = vectors * rows.scale.unsqueeze(1)
    return functional.normalize(vectors, dim=1) if encoding.normalized else vectors

"""Encode and decode any output of a teacher.

Class logits by `codec.py`, vectors and scores by `vector_codec.py`, maps by `grid_codec.py`.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from kdcache.cache.format.array_specs import AnyEncoding
from kdcache.cache.format.codec import Rows, decode, encode_finite
from kdcache.cache.format.encoding import Encoding
from kdcache.cache.format.grid_codec import GridRows, decode_grids, encode_grids
from kdcache.cache.format.grid_encoding import GridEncoding
from kdcache.cache.format.output_records import VectorEncoding
from kdcache.cache.format.tail_basis import TailBasis
from kdcache.cache.format.token_encoding import TokenEncoding
from kdcache.cache.format.token_rows import TokenRows
from kdcache.cache.format.vector_codec import decode_vectors, encode_vectors
from kdcache.cache.format.vector_rows import EncodedRows, VectorBasis, VectorRows

Basis = TailBasis | VectorBasis | None
"""Basis of an output; None if its encoding has none."""


def kind_of_rows(encoding: AnyEncoding) -> type[Any]:
    """Return the type of the rows of an encoding."""
    kinds: dict[type[Any], type[Any]] = {
        VectorEncoding: VectorRows,
        TokenEncoding: TokenRows,
        GridEncoding: GridRows,
    }
    return kinds.get(type(encoding), Rows)


def encode_output(values: Tensor, labels: Tensor, encoding: AnyEncoding, basis: Basis) -> EncodedRows:
    """Return the rows of an output.

    Args:
        values: [B, D] float32, or maps [B, C, h, w], finite.
        labels: [B] int64, classes of this output, -1 for no label; used for classes at one place alone.
        encoding: of the rows.
        basis: of the encoding, on the same device.
    """
    if isinstance(encoding, GridEncoding):
        return encode_grids(values, encoding, basis if isinstance(basis, VectorBasis) else None)
    if isinstance(encoding, VectorEncoding):
        return encode_vectors(values, encoding, basis if isinstance(basis, VectorBasis) else None)
    if not isinstance(encoding, Encoding):
        raise TypeError("rows of tokens are encoded by `token_codec`")
    return encode_finite(values, labels, encoding, basis if isinstance(basis, TailBasis) else None)


def decode_output(rows: EncodedRows, labels: Tensor, encoding: AnyEncoding, basis: Basis) -> Tensor:
    """Return an output [B, D] or [B, C, h, w] float32 from its rows; `labels` [B] int64 are those of encoding."""
    if isinstance(rows, GridRows) and isinstance(encoding, GridEncoding):
        return decode_grids(rows, encoding, basis if isinstance(basis, VectorBasis) else None)
    if isinstance(rows, VectorRows) and isinstance(encoding, VectorEncoding):
        return decode_vectors(rows, encoding, basis if isinstance(basis, VectorBasis) else None)
    if isinstance(rows, Rows) and isinstance(encoding, Encoding):
        return decode(rows, labels, encoding, basis if isinstance(basis, TailBasis) else None)
    raise TypeError(f"{type(rows).__name__} are not rows of a {type(encoding).__name__}")

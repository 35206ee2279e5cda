"""Choose how the rows of a view are divided into shards and chunks, and which images get a fingerprint."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from kdcache.cache.format.array_specs import raw_bytes
from kdcache.cache.format.encoding import Encoding
from kdcache.cache.format.grid_encoding import GridEncoding
from kdcache.cache.format.output_records import OutputRecord
from kdcache.cache.format.schema import LARGEST_CHUNK, Sharding

_FINGERPRINTS = 16
"""Fingerprints per shard at least, where a divisor allows it; the writer's choice (docs/FORMAT.md, section 6.3)."""

_MAX_BYTES = 2**30
"""Bytes of log-probabilities and other outputs per chunk, and per chosen shard, at most: a shard is held in memory
before it is written, and blosc does not accept chunks of 2 GiB (docs/FORMAT.md, section 3)."""

_MAP_CHUNK_BYTES, _MAP_SHARD_BYTES = 2**22, 2**28
"""Bytes per chunk and per chosen shard of a cache with maps, unless one row has more: some images are read without
decompressing hundreds of others, which compresses no better, as blosc divides a chunk into blocks of a MiB anyway."""

_MIN_SHARDS, _MIN_SHARD_ROWS, _MAX_SHARD_ROWS = 8, 1024, 131_072
"""Shards per view, and rows per shard, that are chosen by default; the writer's choice (docs/FORMAT.md, section 3)."""

_ROW_MULTIPLE = 64
"""Rows per shard are a multiple of it: with few divisors, every row would get a fingerprint."""


def choose_sharding(samples: int, row_bytes: int, shard_rows: int | None = None, *, has_maps: bool = False) -> Sharding:
    """Choose rows per shard and per chunk for N samples.

    There are at least eight shards if the dataset is large enough, so that a kill loses little work and several ranks
    have some; shards have at most 131,072 rows and chunks 16,384, so that a partial read reads little more.

    Args:
        samples: N.
        row_bytes: see `bytes_per_shard_row`.
        shard_rows: requested rows per shard; None to choose them.
        has_maps: whether some of the outputs are maps, of which a few rows are a chunk.
    """
    fitting = max((_MAP_SHARD_BYTES if has_maps else _MAX_BYTES) // row_bytes, 1)
    chunk_rows = min(LARGEST_CHUNK, fitting)
    if has_maps:
        # Powers of two divide the rows of a shard, which are a multiple of one.
        fitting, chunk_rows = (
            1 << max(most // row_bytes, 1).bit_length() - 1 for most in (_MAP_SHARD_BYTES, _MAP_CHUNK_BYTES)
        )
        chunk_rows = min(LARGEST_CHUNK, chunk_rows)
    if shard_rows is None:
        shard_rows = min(_rounded_up(max(-(-samples // _MIN_SHARDS), _MIN_SHARD_ROWS)), _MAX_SHARD_ROWS, fitting)
    if shard_rows > chunk_rows:
        shard_rows = -(-shard_rows // chunk_rows) * chunk_rows
    else:
        chunk_rows = shard_rows
    return Sharding(shard_rows=shard_rows, chunk_rows=chunk_rows, fingerprint_stride=_stride(shard_rows, samples))


def sharding_of(
    samples: int,
    encoding: Encoding | None,
    outputs: Mapping[str, OutputRecord] | None = None,
    shard_rows: int | None = None,
) -> Sharding:
    """Choose rows per shard and per chunk for the outputs of N samples; see `choose_sharding`."""
    has_maps = any(isinstance(output.encoding, GridEncoding) for output in (outputs or {}).values())
    return choose_sharding(samples, bytes_per_shard_row(encoding, outputs), shard_rows, has_maps=has_maps)


def bytes_per_shard_row(encoding: Encoding | None, outputs: Mapping[str, OutputRecord] | None = None) -> int:
    """Return the bytes per row of the log-probabilities, if class logits are kept, and of all other outputs."""
    of_logits = 0 if encoding is None else encoding.top_k * np.dtype(encoding.dtype).itemsize
    return of_logits + sum(raw_bytes(output.encoding) for output in (outputs or {}).values())


def _rounded_up(rows: int) -> int:
    return -(-rows // _ROW_MULTIPLE) * _ROW_MULTIPLE


def _stride(shard_rows: int, samples: int) -> int:
    """Return the largest divisor of `shard_rows` that gives a shard, or a smaller dataset, 16 fingerprints."""
    filled = min(shard_rows, samples)
    largest = max(filled // _FINGERPRINTS, 1)
    return next(stride for stride in range(largest, 0, -1) if shard_rows % stride == 0)

"""How the rows of a view are cut into shards and chunks, and which of their images leave a fingerprint."""

from __future__ import annotations

from kdcache.cache.format.schema import LARGEST_CHUNK, Sharding

_FINGERPRINTS = 16


def choose_sharding(samples: int, row_bytes: int, shard_rows: int | None = None) -> Sharding:
    """Rows of a shard and of a chunk for N samples whose log-probabilities take `row_bytes` each.

    Eight shards or more where the set is large enough, so that little is lost to a kill and several ranks have work; at
    most 131,072 rows a shard and 16,384 a chunk, so that a reader of a part need not read much more; and about a
    gibibyte, as a shard is held in memory before it is written, and blosc takes no chunk of two.
    """
    fitting = max(2**30 // row_bytes, 1)
    chunk_rows = min(LARGEST_CHUNK, fitting)
    if shard_rows is None:
        shard_rows = min(_rounded(max(-(-samples // 8), 1024)), 131_072, fitting)
    if shard_rows > chunk_rows:
        shard_rows = -(-shard_rows // chunk_rows) * chunk_rows
    else:
        chunk_rows = shard_rows
    return Sharding(shard_rows=shard_rows, chunk_rows=chunk_rows, fingerprint_stride=_stride(shard_rows, samples))


def _rounded(rows: int) -> int:
    """Up to a multiple of 64: a number with few divisors would leave every row a fingerprint."""
    return -(-rows // 64) * 64


def _stride(shard_rows: int, samples: int) -> int:
    """The largest divisor of a shard that leaves it, or a set that does not fill one, sixteen fingerprints."""
    filled = min(shard_rows, samples)
    largest = max(filled // _FINGERPRINTS, 1)
    return next(stride for stride in range(largest, 0, -1) if shard_rows % stride == 0)

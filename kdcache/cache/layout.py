"""Rows in a Zarr v3 store: arrays, shards, codecs. The only module that knows zarr.

Only codecs of the Zarr v3 core, so that TensorStore and zarrs read what is written here. Every chunk ends in a crc32c;
every array writes its chunks even where they hold nothing but the fill value, or a shard of zeros would be no file.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import zarr
from zarr.codecs import BloscCodec, Crc32cCodec, TransposeCodec, ZstdCodec

from kdcache.cache.codec import Rows, index_dtype
from kdcache.cache.schema import Encoding, Plan, Shape
from kdcache.errors import CorruptError

STORE = "data.zarr"
_ROW_ARRAYS = ("log_probs", "indices", "logsumexp", "statistics")
_CONFIG: Any = {"write_empty_chunks": True}


def choose_shape(samples: int, shard_rows: int | None = None) -> Shape:
    """Rows of a shard and of a chunk for N samples.

    Eight shards or more where the set is large enough, so that little is lost to a kill and several ranks have work; at
    most 131,072 rows a shard and 16,384 a chunk, so that a reader of a part need not read much more.
    """
    if shard_rows is None:
        shard_rows = min(max(-(-samples // 8), 1024), 131_072)
    if shard_rows > 16_384:
        return Shape(shard_rows=-(-shard_rows // 16_384) * 16_384, chunk_rows=16_384)
    return Shape(shard_rows=shard_rows, chunk_rows=shard_rows)


def create_store(cache: Path, plan: Plan, labels: npt.NDArray[np.int32], keys: npt.NDArray[np.uint64]) -> None:
    """Make the store of a new cache: the arrays of rows, still empty, and the labels and sample keys, whole."""
    group = zarr.create_group(cache / STORE, zarr_format=3)
    views, samples = plan.views.count, plan.dataset.samples
    rows, chunk = plan.shape.shard_rows, plan.shape.chunk_rows
    for name, (width, dtype, compressor, filters) in _row_arrays(plan.encoding).items():
        group.create_array(
            name,
            shape=(views, samples, *width),
            dtype=dtype,
            chunks=(1, chunk, *width),
            shards=(1, rows, *width),
            filters=filters,
            compressors=[compressor, Crc32cCodec()],
            fill_value=0,
            config=_CONFIG,
            dimension_names=("view", "sample", *("column" for _ in width)),
            attributes={"columns": list(plan.encoding.statistics)} if name == "statistics" else {},
        )
    for name, values in (("labels", labels.astype("<i4")), ("sample_keys", keys.astype("<u8"))):
        array = group.create_array(
            name,
            shape=values.shape,
            dtype=values.dtype,
            chunks=(chunk,),
            shards=(rows,),
            compressors=[ZstdCodec(level=3), Crc32cCodec()],
            fill_value=0,
            config=_CONFIG,
            dimension_names=("sample",),
        )
        array[:] = values


def _row_arrays(encoding: Encoding) -> dict[str, tuple[tuple[int, ...], str, Any, Any]]:
    """Of each array: shape of a row, type, compressor, filters."""
    shuffled = BloscCodec(cname="zstd", clevel=5, shuffle="shuffle")
    bits = BloscCodec(cname="zstd", clevel=5, shuffle="bitshuffle")
    index_type = "uint8" if encoding.num_classes <= 2**8 else "uint16" if encoding.num_classes <= 2**16 else "uint32"
    columns_first = [TransposeCodec(order=(0, 2, 1))]
    arrays: dict[str, tuple[tuple[int, ...], str, Any, Any]] = {
        "log_probs": ((encoding.top_k,), encoding.dtype, shuffled, None),
        "logsumexp": ((), "float32", bits, None),
        "statistics": ((len(encoding.statistics),), "float16", bits, columns_first),
    }
    if not encoding.dense:
        arrays["indices"] = ((encoding.top_k,), index_type, bits, None)
    return arrays


def write_shard(cache: Path, plan: Plan, view: int, shard: int, rows: Rows) -> None:
    """Write all arrays of one shard. Whatever an interrupted run left there must have been deleted."""
    ids = plan.shard_ids(shard)
    group = zarr.open_group(cache / STORE, mode="r+")
    for name, tensor in rows.arrays().items():
        array = _array(group, name).with_config(_CONFIG)
        array[view, ids.start : ids.stop] = tensor.cpu().contiguous().numpy().astype(array.dtype, copy=False)


def shard_files(encoding: Encoding, view: int, shard: int) -> dict[str, str]:
    """Path of each array's file of one shard, relative to the cache."""
    return {
        name: f"{STORE}/{name}/c/{view}/{shard}" + "/0" * len(width)
        for name, (width, *_) in _row_arrays(encoding).items()
    }


def common_files(cache: Path) -> list[str]:
    """The files of the store that belong to no shard of rows, relative to the cache: metadata, labels, sample keys."""
    paths: Iterable[Path] = (cache / STORE).rglob("*")
    row_chunks = tuple(f"{STORE}/{name}/c/" for name in _ROW_ARRAYS)
    names = (path.relative_to(cache).as_posix() for path in paths if path.is_file() and path.suffix != ".partial")
    return sorted(name for name in names if not name.startswith(row_chunks))


def read_rows(cache: Path, plan: Plan, view: int, ids: range) -> Rows:
    """The rows of a run of sample ids in one view; whole shards are read fastest."""
    group = _open(cache)
    parts: dict[str, torch.Tensor] = {}
    for name, (width, dtype, *_) in _row_arrays(plan.encoding).items():
        array = _array(group, name)
        expected = (plan.views.count, plan.dataset.samples, *width)
        if array.shape != expected or array.dtype != np.dtype(dtype):
            raise CorruptError(
                f"the array {name} of {cache} is {array.dtype} {list(array.shape)}, its manifest says "
                f"{dtype} {list(expected)}",
                "get the cache again from where it was made",
            )
        values = np.asarray(array[view, ids.start : ids.stop])
        if name == "indices":
            if values.max(initial=0) >= plan.encoding.num_classes:
                raise CorruptError(f"{cache} holds a class index of {values.max()}", "get the cache again")
            values = values.astype(torch.empty(0, dtype=index_dtype(plan.encoding.num_classes)).numpy().dtype)
        parts[name] = torch.from_numpy(np.ascontiguousarray(values))
    return Rows.of(parts)


def read_samples(cache: Path) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.uint64]]:
    """(labels [N] int32, sample keys [N] uint64)."""
    group = _open(cache)
    return np.asarray(_array(group, "labels")[:]), np.asarray(_array(group, "sample_keys")[:])


def _open(cache: Path) -> zarr.Group:
    try:
        return zarr.open_group(cache / STORE, mode="r")
    except (OSError, ValueError, KeyError) as error:
        raise CorruptError(f"the store of {cache} cannot be opened: {error}", "get the cache again") from None


def _array(group: zarr.Group, name: str) -> zarr.Array[Any]:
    found = group.get(name)
    if not isinstance(found, zarr.Array):
        raise CorruptError(f"the store {group.store_path} has no array {name}", "get the cache again")
    return found

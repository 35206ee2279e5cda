"""Rows in a Zarr v3 store: arrays, shards, codecs. The only module that knows zarr.

Only codecs of the Zarr v3 core, so that TensorStore and zarrs read what is written here. Every chunk ends in a crc32c;
every array writes its chunks even where they hold nothing but the fill value, or a shard of zeros would be no file.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
import zarr
from zarr.codecs import BloscCodec, Crc32cCodec, TransposeCodec, ZstdCodec

from kdcache.cache.basis import TailBasis
from kdcache.cache.codec import Rows, index_dtype
from kdcache.cache.schema import LARGEST_CHUNK, Encoding, Plan, Shape, commit_file
from kdcache.errors import CorruptError

STORE = "data.zarr"
_CONFIG: Any = {"write_empty_chunks": True}
_AGAIN = "get the cache again from where it was made, or delete it and dump the teacher again"


def choose_shape(samples: int, row_bytes: int, shard_rows: int | None = None) -> Shape:
    """Rows of a shard and of a chunk for N samples whose log-probabilities take `row_bytes` each.

    Eight shards or more where the set is large enough, so that little is lost to a kill and several ranks have work; at
    most 131,072 rows a shard and 16,384 a chunk, so that a reader of a part need not read much more; and about a
    gibibyte, as a shard is held in memory before it is written, and blosc takes no chunk of two.
    """
    fitting = max(2**30 // row_bytes, 1)
    chunk_rows = min(LARGEST_CHUNK, fitting)
    if shard_rows is None:
        shard_rows = min(max(-(-samples // 8), 1024), 131_072, fitting)
    if shard_rows > chunk_rows:
        return Shape(shard_rows=-(-shard_rows // chunk_rows) * chunk_rows, chunk_rows=chunk_rows)
    return Shape(shard_rows=shard_rows, chunk_rows=shard_rows)


class _Array(NamedTuple):
    """How an array lies in the store; `chunks` lie in `shards`, which are its files."""

    shape: tuple[int, ...]
    chunks: tuple[int, ...]
    shards: tuple[int, ...]
    dtype: str
    names: tuple[str, ...]
    compressor: Any
    filters: Any = None


def _row_parts(encoding: Encoding) -> dict[str, tuple[tuple[int, ...], str, Any, Any]]:
    """Of each array that holds rows: shape of a row, type, compressor, filters."""
    shuffled = BloscCodec(cname="zstd", clevel=5, shuffle="shuffle")
    bits = BloscCodec(cname="zstd", clevel=5, shuffle="bitshuffle")
    index_type = "uint8" if encoding.num_classes <= 2**8 else "uint16" if encoding.num_classes <= 2**16 else "uint32"
    columns_first = [TransposeCodec(order=(0, 2, 1))]
    parts: dict[str, tuple[tuple[int, ...], str, Any, Any]] = {
        "log_probs": ((encoding.top_k,), encoding.dtype, shuffled, None),
        "indices": ((encoding.top_k,), index_type, bits, None),
        "logsumexp": ((), "float32", bits, None),
        "statistics": ((len(encoding.statistics),), "float16", bits, columns_first),
    }
    if encoding.dense:
        del parts["indices"]
    if encoding.rank:
        parts["tail"] = ((encoding.rank,), "int8", ZstdCodec(level=5), columns_first)
    return parts


def _row_arrays(plan: Plan) -> dict[str, _Array]:
    """The arrays that hold rows, [V, N, ...]."""
    return {
        name: _Array(
            shape=(plan.views.count, plan.dataset.samples, *width),
            chunks=(1, plan.shape.chunk_rows, *width),
            shards=(1, plan.shape.shard_rows, *width),
            dtype=dtype,
            names=("view", "sample", *("column" for _ in width)),
            compressor=compressor,
            filters=filters,
        )
        for name, (width, dtype, compressor, filters) in _row_parts(plan.encoding).items()
    }


def _basis_arrays(plan: Plan) -> dict[str, _Array]:
    """The arrays of the tail's basis, each whole in one chunk."""
    rank, classes = plan.encoding.rank, plan.encoding.num_classes
    if not rank:
        return {}
    shapes = {
        "tail_basis": ((rank, classes), "float16", ("component", "class")),
        "tail_mean": ((classes,), "float32", ("class",)),
        "tail_scale": ((rank,), "float32", ("component",)),
    }
    return {
        name: _Array(shape=shape, chunks=shape, shards=shape, dtype=dtype, names=names, compressor=ZstdCodec(level=3))
        for name, (shape, dtype, names) in shapes.items()
    }


def _sample_arrays(plan: Plan) -> dict[str, _Array]:
    """The arrays that hold one value a sample, [N]."""
    return {
        name: _Array(
            shape=(plan.dataset.samples,),
            chunks=(plan.shape.chunk_rows,),
            shards=(plan.shape.shard_rows,),
            dtype=dtype,
            names=("sample",),
            compressor=ZstdCodec(level=3),
        )
        for name, dtype in (("labels", "int32"), ("sample_keys", "uint64"))
    }


def create_store(
    cache: Path,
    plan: Plan,
    labels: npt.NDArray[np.int32],
    keys: npt.NDArray[np.uint64],
    basis: TailBasis | None = None,
) -> None:
    """Make the store of a new cache: the arrays of rows, still empty, and labels, sample keys and basis, whole."""
    group = zarr.create_group(cache / STORE, zarr_format=3)
    for name, array in (_row_arrays(plan) | _whole_arrays(plan)).items():
        group.create_array(
            name,
            shape=array.shape,
            dtype=array.dtype,
            chunks=array.chunks,
            shards=array.shards,
            filters=array.filters,
            compressors=[array.compressor, Crc32cCodec()],
            fill_value=0,
            dimension_names=array.names,
            attributes={"columns": list(plan.encoding.statistics)} if name == "statistics" else {},
        )
    whole: dict[str, npt.NDArray[Any]] = {"labels": labels, "sample_keys": keys}
    if basis is not None:
        whole |= {"tail_basis": basis.basis.numpy(), "tail_mean": basis.mean.numpy(), "tail_scale": basis.scale.numpy()}
    for name, expected in _whole_arrays(plan).items():
        _array(group, name, expected).with_config(_CONFIG)[...] = whole[name]


def _whole_arrays(plan: Plan) -> dict[str, _Array]:
    """The arrays that are written when the store is made."""
    return _sample_arrays(plan) | _basis_arrays(plan)


def bytes_per_row(encoding: Encoding, rows: Rows) -> float:
    """What rows take in a store, compressed, measured on these rows."""
    stored: dict[str, Any] = {}
    group = zarr.create_group(zarr.storage.MemoryStore(stored), zarr_format=3)
    for name, tensor in rows.arrays().items():
        width, dtype, compressor, filters = _row_parts(encoding)[name]
        shape = (1, len(rows), *width)
        array = group.create_array(
            name, shape=shape, dtype=dtype, chunks=shape, filters=filters, compressors=[compressor, Crc32cCodec()]
        )
        array[0] = tensor.cpu().numpy().astype(dtype, copy=False)
    return sum(len(value) for key, value in stored.items() if not key.endswith(".json")) / len(rows)


def write_shard(cache: Path, plan: Plan, view: int, shard: int, rows: Rows) -> None:
    """Write all arrays of one shard. Whatever an interrupted run left there must have been deleted."""
    ids = plan.shard_ids(shard)
    group = zarr.open_group(cache / STORE, mode="r+", zarr_format=3)
    expected = _row_arrays(plan)
    for name, tensor in rows.arrays().items():
        array = _array(group, name, expected[name]).with_config(_CONFIG)
        array[view, ids.start : ids.stop] = tensor.cpu().contiguous().numpy().astype(array.dtype, copy=False)


def shard_files(plan: Plan, view: int, shard: int) -> list[str]:
    """The files of one shard of rows, relative to the cache."""
    return [
        f"{STORE}/{name}/c/{view}/{shard}" + "/0" * (len(array.shape) - 2) for name, array in _row_arrays(plan).items()
    ]


def common_files(plan: Plan) -> Iterator[str]:
    """The files of the store that belong to no shard of rows, relative to the cache: metadata and whole arrays."""
    yield f"{STORE}/zarr.json"
    for name in _row_arrays(plan) | _whole_arrays(plan):
        yield f"{STORE}/{name}/zarr.json"
    for name, array in _basis_arrays(plan).items():
        yield f"{STORE}/{name}/c" + "/0" * len(array.shape)
    for name in _sample_arrays(plan):
        for shard in range(plan.shards):
            yield f"{STORE}/{name}/c/{shard}"


def check_listed(cache: Path, plan: Plan, sizes: dict[str, int]) -> None:
    """That a manifest lists every file of its plan and no other, none too small for the rows it is said to hold.

    What is not listed would not be checked, and zarr would read it as zeros. A shard ends in 16 bytes a chunk, so
    that after this no declared size is larger than the files allow.

    Raises:
        CorruptError: which names the first such file.
    """
    smallest = 16 * (plan.shape.shard_rows // plan.shape.chunk_rows)
    expected = 0
    for name, least in _all_files(plan, smallest):
        if sizes.get(name, -1) < least:
            state = f"is too small, {sizes[name]} bytes" if name in sizes else "is not in its manifest"
            raise CorruptError(f"{cache} is damaged: {name} {state}", _AGAIN)
        expected += 1
    if len(sizes) != expected:
        raise CorruptError(f"{cache} is damaged: its manifest lists {len(sizes)} files, a cache has {expected}", _AGAIN)


def _all_files(plan: Plan, smallest: int) -> Iterator[tuple[str, int]]:
    """Every file of a complete cache but its manifest, and the bytes that it has at least."""
    for name in common_files(plan):
        yield name, 0 if name.endswith(".json") else smallest
    for view in range(plan.views.count):
        for shard in range(plan.shards):
            yield commit_file(view, shard), 0
            for name in shard_files(plan, view, shard):
                yield name, smallest


def read_rows(cache: Path, plan: Plan, view: int, ids: range) -> Rows:
    """The rows of a run of sample ids in one view; whole shards are read fastest."""
    group = _open(cache)
    parts: dict[str, torch.Tensor] = {}
    for name, expected in _row_arrays(plan).items():
        values = _read(group, name, expected, (view, slice(ids.start, ids.stop)))
        if name == "indices":
            if values.max(initial=0) >= plan.encoding.num_classes:
                raise CorruptError(f"{cache} holds a class index of {values.max()}", _AGAIN)
            values = values.astype(torch.empty(0, dtype=index_dtype(plan.encoding.num_classes)).numpy().dtype)
        parts[name] = torch.from_numpy(np.ascontiguousarray(values))
    return Rows.of(parts)


def read_samples(cache: Path, plan: Plan) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.uint64]]:
    """(labels [N] int32, sample keys [N] uint64)."""
    group = _open(cache)
    labels, keys = (_read(group, name, expected, slice(None)) for name, expected in _sample_arrays(plan).items())
    return labels, keys


def read_basis(cache: Path, plan: Plan) -> TailBasis | None:
    """The basis of the teacher's tail; None where the encoding has none."""
    if not plan.encoding.rank:
        return None
    group = _open(cache)
    arrays = {name: _read(group, name, expected, ...) for name, expected in _basis_arrays(plan).items()}
    if not all(np.isfinite(array).all() for array in arrays.values()) or (arrays["tail_scale"] <= 0).any():
        raise CorruptError(f"the tail basis of {cache} holds NaN, infinities or a scale that is not positive", _AGAIN)
    return TailBasis(*(torch.from_numpy(arrays[name]) for name in ("tail_basis", "tail_mean", "tail_scale")))


# What zarr raises at metadata or chunks that are not well.
_UNREADABLE = (OSError, ValueError, KeyError, TypeError, IndexError, RuntimeError, NotImplementedError)


def _open(cache: Path) -> zarr.Group:
    try:
        return zarr.open_group(cache / STORE, mode="r", zarr_format=3)
    except _UNREADABLE as error:
        raise CorruptError(f"the store of {cache} cannot be opened: {error}", _AGAIN) from None


def _read(group: zarr.Group, name: str, expected: _Array, where: Any) -> npt.NDArray[Any]:
    array = _array(group, name, expected)
    try:
        return np.asarray(array[where])
    except _UNREADABLE as error:
        raise CorruptError(f"{array.store_path} cannot be read: {error}", _AGAIN) from None


def _array(group: zarr.Group, name: str, expected: _Array) -> zarr.Array[Any]:
    """An array of the store, if it lies there as the plan has it: read in another way, its files would be zeros."""
    try:
        found = group.get(name)
    except _UNREADABLE as error:
        raise CorruptError(f"{group.store_path}/{name} cannot be opened: {error}", _AGAIN) from None
    if not isinstance(found, zarr.Array):
        raise CorruptError(f"the store {group.store_path} has no array {name}", _AGAIN)
    have = (found.dtype.name, found.shape, found.chunks, found.shards)
    want = (expected.dtype, expected.shape, expected.chunks, expected.shards)
    if have != want:
        raise CorruptError(
            f"the array {found.store_path} is {_described(*have)}; the plan says {_described(*want)}", _AGAIN
        )
    first = (0,) * len(expected.shape)
    if found.metadata.encode_chunk_key(first) != "/".join(("c", *map(str, first))):
        raise CorruptError(f"the chunks of {found.store_path} have other names than those of a cache", _AGAIN)
    return found


def _described(dtype: str, shape: object, chunks: object, shards: object) -> str:
    return f"{dtype} {shape} in chunks {chunks} and shards {shards}"

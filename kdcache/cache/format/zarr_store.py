"""Rows in a Zarr v3 store: arrays, shards, codecs. The only module that knows zarr.

Only codecs of the Zarr v3 core, so that TensorStore and zarrs read what is written here. Every chunk ends in a crc32c;
every array writes its chunks even where they hold nothing but the fill value, or a shard of zeros would be no file.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import zarr
from zarr.codecs import BloscCodec, Crc32cCodec, ShardingCodec, ZstdCodec
from zarr.core.buffer import Buffer

from kdcache.cache.format.array_specs import (
    AGAIN,
    STORE,
    Array,
    basis_arrays,
    check_codecs,
    check_common,
    check_shard,
    input_arrays,
    recorded_arrays,
    row_arrays,
    row_parts,
    sample_arrays,
    shard_arrays,
    whole_arrays,
)
from kdcache.cache.format.codec import Rows, index_dtype
from kdcache.cache.format.fingerprints import Inputs
from kdcache.cache.format.recorded_views import unit_of, wrong_boxes
from kdcache.cache.format.schema import Encoding, FileRecord, Plan
from kdcache.cache.format.tail_basis import TailBasis
from kdcache.errors import CorruptError

_LARGEST_BLOCK = 2**20
_CONFIG: Any = {"write_empty_chunks": True}


def _compressors(typesize: int | None) -> list[Any]:
    if typesize is None:
        return [ZstdCodec(level=3), Crc32cCodec()]
    blosc = BloscCodec(cname="zstd", clevel=5, shuffle="shuffle", typesize=typesize, blocksize=_LARGEST_BLOCK)
    return [blosc, Crc32cCodec()]


def create_store(
    cache: Path,
    plan: Plan,
    labels: npt.NDArray[np.int32],
    keys: npt.NDArray[np.uint64],
    basis: TailBasis | None = None,
) -> None:
    """Make the store of a new cache: the arrays of rows, still empty, and labels, sample keys and basis, whole."""
    group = zarr.create_group(cache / STORE, zarr_format=3)
    for name, array in (shard_arrays(plan) | whole_arrays(plan)).items():
        group.create_array(
            name,
            shape=array.shape,
            dtype=array.dtype,
            chunks=array.chunks,
            shards=array.shards,
            compressors=_compressors(array.typesize),
            fill_value=0,
            dimension_names=array.names,
            attributes={"columns": list(array.columns)} if array.columns else {},
        )
    whole: dict[str, npt.NDArray[Any]] = {"labels": labels, "sample_keys": keys}
    if basis is not None:
        whole |= {"tail_basis": basis.basis.numpy(), "tail_mean": basis.mean.numpy(), "tail_scale": basis.scale.numpy()}
    for name, expected in whole_arrays(plan).items():
        _array(group, name, expected).with_config(_CONFIG)[...] = whole[name]


def bytes_per_row(encoding: Encoding, rows: Rows) -> float:
    """What rows take in a store, compressed, measured on these rows."""
    stored: dict[str, Any] = {}
    group = zarr.create_group(zarr.storage.MemoryStore(stored), zarr_format=3)
    for name, tensor in rows.arrays().items():
        part = row_parts(encoding)[name]
        shape = (1, len(rows), *part.width)
        array = group.create_array(
            name, shape=shape, dtype=part.dtype, chunks=shape, compressors=_compressors(part.typesize)
        )
        array[0] = tensor.cpu().numpy().astype(part.dtype, copy=False)
    return sum(len(value) for key, value in stored.items() if not key.endswith(".json")) / len(rows)


def write_shard(
    cache: Path,
    plan: Plan,
    view: int,
    shard: int,
    rows: Rows,
    inputs: Inputs,
    recorded: npt.NDArray[Any] | None = None,
) -> dict[str, FileRecord]:
    """Write all arrays of one shard, and return its files with the size and sha256 of what was written.

    Files that an interrupted run left there must have been deleted.
    """
    if (recorded is None) == bool(recorded_arrays(plan)):
        raise ValueError("what the views were drawn from is kept exactly where a plan has an array for it")
    ids = plan.shard_ids(shard)
    store = _HashingStore(cache / STORE)
    group = zarr.open_group(store, mode="r+", zarr_format=3)
    expected = shard_arrays(plan)
    of_rows = {name: tensor.cpu().contiguous().numpy() for name, tensor in rows.arrays().items()}
    for name, values in (of_rows | dict.fromkeys(recorded_arrays(plan), recorded)).items():
        array = _array(group, name, expected[name]).with_config(_CONFIG)
        array[view, ids.start : ids.stop] = np.asarray(values).astype(array.dtype, copy=False)
    start = ids.start // plan.shape.fingerprint_stride
    for name, values in inputs._asdict().items():
        array = _array(group, name, expected[name]).with_config(_CONFIG)
        array[view, start : start + len(values)] = values
    return {f"{STORE}/{key}": record for key, record in store.records.items()}


class _HashingStore(zarr.storage.LocalStore):
    """A folder whose files are hashed when they are written, so that they need not be read again.

    Attributes:
        records: path within the folder -> size and sha256 of the bytes that were last written.
    """

    def __init__(self, root: Path | str, *, read_only: bool = False) -> None:
        super().__init__(root, read_only=read_only)
        self.records: dict[str, FileRecord] = {}

    async def set(self, key: str, value: Buffer) -> None:
        """Write a file."""
        await super().set(key, value)
        data = memoryview(value.as_buffer_like())
        self.records[key] = FileRecord(size=data.nbytes, sha256=hashlib.sha256(data).hexdigest())


class RowReader:
    """The rows of a cache, its arrays opened once.

    Args:
        cache: its folder.
        plan: of the cache.

    Raises:
        CorruptError: here and when it reads, if the store is not as the plan has it.
    """

    def __init__(self, cache: Path, plan: Plan) -> None:
        self._cache, self._plan = cache, plan
        arrays = row_arrays(plan)
        group = _open(cache, arrays)
        self._arrays = {name: _array(group, name, expected) for name, expected in arrays.items()}

    def read(self, view: int, ids: range) -> Rows:
        """The rows of a run of sample ids in one view; whole chunks and shards are read fastest."""
        rows = self._plan.shape.shard_rows
        for shard in range(ids.start // rows, -(-ids.stop // rows)):
            check_shard(self._cache, self._plan, view, shard)
        parts: dict[str, torch.Tensor] = {}
        for name, array in self._arrays.items():
            values = _values(array, (view, slice(ids.start, ids.stop)))
            if name == "indices":
                out = (values >= self._plan.encoding.num_classes).any(axis=1)
                if out.any():
                    where = f"view {view}, sample {ids.start + int(out.argmax())}"
                    raise CorruptError(f"{self._cache} holds a class index of {values.max()}: {where}", AGAIN)
                values = values.astype(torch.empty(0, dtype=index_dtype(self._plan.encoding.num_classes)).numpy().dtype)
            parts[name] = torch.from_numpy(np.ascontiguousarray(values))
        return Rows.of(parts)


def read_rows(cache: Path, plan: Plan, view: int, ids: range) -> Rows:
    """The rows of a run of sample ids in one view."""
    return RowReader(cache, plan).read(view, ids)


def read_recorded(cache: Path, plan: Plan, view: int, ids: range | None = None) -> npt.NDArray[Any]:
    """What a view of some samples, or of all, was drawn from: boxes [B, 5] float32, or seeds [B] int32.

    Raises:
        CorruptError: if a box cannot be one, or the store is not as the plan has it.
    """
    ((name, expected),) = recorded_arrays(plan).items()
    ids = range(plan.dataset.samples) if ids is None else ids
    rows = plan.shape.shard_rows
    for shard in range(ids.start // rows, -(-ids.stop // rows)):
        check_shard(cache, plan, view, shard)
    group = _open(cache, {name: expected})
    values = _read(group, name, expected, (view, slice(ids.start, ids.stop)))
    if name == "crops" and (wrong := wrong_boxes(values, unit_of(plan.views.transform))).any():
        where = f"view {view}, sample {ids.start + int(wrong.argmax())}"
        raise CorruptError(f"{cache} holds the box {values[wrong.argmax()].tolist()}, which is none: {where}", AGAIN)
    return values


@dataclass(frozen=True)
class StoredCrops:
    """The boxes of a cache, by view; may be sent to another process."""

    cache: Path
    plan: Plan

    def __call__(self, view: int) -> npt.NDArray[np.float32]:
        """[N, 5]."""
        return read_recorded(self.cache, self.plan, view)


def read_inputs(cache: Path, plan: Plan, view: int) -> Inputs:
    """The fingerprints of one view; number j is of sample j * `fingerprint_stride`."""
    arrays = input_arrays(plan)
    for shard in range(plan.shards):
        check_shard(cache, plan, view, shard)
    group = _open(cache, arrays)
    return Inputs(*(_read(group, name, expected, (view,)) for name, expected in arrays.items()))


def read_samples(cache: Path, plan: Plan) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.uint64]]:
    """(labels [N] int32, sample keys [N] uint64)."""
    check_common(cache, plan)
    arrays = sample_arrays(plan)
    group = _open(cache, arrays)
    labels, keys = (_read(group, name, expected, slice(None)) for name, expected in arrays.items())
    out = (labels < -1) | (labels >= plan.encoding.num_classes)
    if out.any():
        raise CorruptError(f"{cache} has the label {labels[out.argmax()]} for sample {out.argmax()}", AGAIN)
    return labels, keys


def read_basis(cache: Path, plan: Plan) -> TailBasis | None:
    """The basis of the teacher's tail; None where the encoding has none."""
    if not plan.encoding.rank:
        return None
    check_common(cache, plan)
    expected = basis_arrays(plan)
    group = _open(cache, expected)
    arrays = {name: _read(group, name, array, ...) for name, array in expected.items()}
    if not all(np.isfinite(array).all() for array in arrays.values()) or (arrays["tail_scale"] <= 0).any():
        raise CorruptError(f"the tail basis of {cache} holds NaN, infinities or a scale that is not positive", AGAIN)
    return TailBasis(*(torch.from_numpy(arrays[name]) for name in ("tail_basis", "tail_mean", "tail_scale")))


# What zarr raises at metadata or chunks that are not well.
_UNREADABLE = (OSError, ValueError, KeyError, TypeError, IndexError, RuntimeError, NotImplementedError)


def _open(cache: Path, arrays: Mapping[str, Array]) -> zarr.Group:
    """The store of a cache, of which these arrays are to be read."""
    check_codecs(cache, arrays)
    try:
        # What a group may say of its arrays all together is not what they say themselves.
        return zarr.open_group(cache / STORE, mode="r", zarr_format=3, use_consolidated=False)
    except _UNREADABLE as error:
        raise CorruptError(f"the store of {cache} cannot be opened: {error}", AGAIN) from None


def _read(group: zarr.Group, name: str, expected: Array, where: Any) -> npt.NDArray[Any]:
    return _values(_array(group, name, expected), where)


def _values(array: zarr.Array[Any], where: Any) -> npt.NDArray[Any]:
    try:
        return np.asarray(array[where])
    except _UNREADABLE as error:
        raise CorruptError(f"{array.store_path} cannot be read: {error}", AGAIN) from None


def _array(group: zarr.Group, name: str, expected: Array) -> zarr.Array[Any]:
    """An array of the store, if it lies there as the plan has it: read in another way, its files would be zeros."""
    try:
        found = group.get(name)
    except _UNREADABLE as error:
        raise CorruptError(f"{group.store_path}/{name} cannot be opened: {error}", AGAIN) from None
    if not isinstance(found, zarr.Array):
        raise CorruptError(f"the store {group.store_path} has no array {name}", AGAIN)
    have = (found.dtype.name, found.shape, found.chunks, found.shards)
    want = (expected.dtype, expected.shape, expected.chunks, expected.shards)
    if have != want:
        raise CorruptError(
            f"the array {found.store_path} is {_described(*have)}; the plan says {_described(*want)}", AGAIN
        )
    if expected.columns and found.attrs.get("columns") != list(expected.columns):
        raise CorruptError(f"the columns of {found.store_path} are not those of the format", AGAIN)
    codecs: tuple[object, ...] = getattr(found.metadata, "codecs", ())
    if not (len(codecs) == 1 and isinstance(codecs[0], ShardingCodec) and codecs[0].index_location.value == "end"):
        raise CorruptError(f"the shards of {found.store_path} do not end in their index", AGAIN)
    first = (0,) * len(expected.shape)
    if found.metadata.encode_chunk_key(first) != "/".join(("c", *map(str, first))):
        raise CorruptError(f"the chunks of {found.store_path} have other names than those of a cache", AGAIN)
    return found


def _described(dtype: str, shape: object, chunks: object, shards: object) -> str:
    return f"{dtype} {shape} in chunks {chunks} and shards {shards}"

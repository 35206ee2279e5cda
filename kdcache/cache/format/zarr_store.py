"""Read and write the Zarr v3 store of a cache. The only module that imports zarr.

Only codecs of the Zarr v3 core are used, so that TensorStore and zarrs read the store. Every chunk ends with a crc32c.
Chunks that hold only the fill value are written too, since a shard of zeros would otherwise have no file.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Generic

import numpy as np
import numpy.typing as npt
import torch
import zarr
from zarr.codecs import BloscCodec, Crc32cCodec, ShardingCodec, ZstdCodec
from zarr.core.buffer import Buffer

from kdcache.cache.format.array_specs import (
    STORE,
    AnyEncoding,
    Array,
    classes_of,
    common_arrays,
    input_arrays,
    output_encoding,
    path_in_store,
    recorded_arrays,
    row_arrays,
    row_names,
    row_parts,
    sample_arrays,
    shard_arrays,
)
from kdcache.cache.format.codec import Rows, index_dtype
from kdcache.cache.format.fingerprints import Inputs
from kdcache.cache.format.output_codec import kind_of_rows
from kdcache.cache.format.output_records import DEFAULT_OUTPUT, TOKENS
from kdcache.cache.format.recorded_views import unit_of, wrong_boxes
from kdcache.cache.format.row_axes import axis_of, contiguous, sample_axis
from kdcache.cache.format.schema import FileRecord, Plan
from kdcache.cache.format.store_files import check_codecs, check_common, check_shard
from kdcache.cache.format.token_rows import IDS, SequenceTokens
from kdcache.cache.format.vector_rows import EncodedRows, R
from kdcache.cache.format.verified_files import AGAIN
from kdcache.errors import CorruptError

_MAX_BLOSC_BLOCK = 2**20
"""Bytes per block of a blosc chunk; the writer's choice (docs/FORMAT.md, section 3)."""

_CONFIG: Any = {"write_empty_chunks": True}


def _compressors(typesize: int | None, level: int) -> list[Any]:
    if typesize is None:
        return [ZstdCodec(level=3), Crc32cCodec()]
    blosc = BloscCodec(cname="zstd", clevel=level, shuffle="shuffle", typesize=typesize, blocksize=_MAX_BLOSC_BLOCK)
    return [blosc, Crc32cCodec()]


def create_store(
    cache: Path,
    plan: Plan,
    labels: npt.NDArray[np.int32],
    keys: npt.NDArray[np.uint64],
    others: Mapping[str, npt.NDArray[Any]],
) -> None:
    """Create the store of a new cache: empty arrays of rows, and complete common arrays.

    Args:
        cache: folder of the cache.
        plan: its plan.
        labels: [N] int32.
        keys: [N] uint64.
        others: bases of all outputs (`stored_bases.py`), and what sequences have, by path in the store.
    """
    group = _create_arrays(cache / STORE, plan)
    values: dict[str, Any] = {"labels": labels, "sample_keys": keys, **others}
    for name, expected in common_arrays(plan).items():
        _array(group, name, expected).with_config(_CONFIG)[...] = values[name]


def metadata_bytes(plan: Plan) -> int:
    """Return the size of the metadata of a new store."""
    stored: dict[str, Any] = {}
    _create_arrays(zarr.storage.MemoryStore(stored), plan)
    return sum(len(value) for value in stored.values())


def _create_arrays(store: Any, plan: Plan) -> zarr.Group:
    """Create a group with all arrays of a plan, without values, in a folder or a store."""
    group = zarr.create_group(store, zarr_format=3)
    for name, array in (shard_arrays(plan) | common_arrays(plan)).items():
        group.create_array(
            name,
            shape=array.shape,
            dtype=array.dtype,
            chunks=array.chunks,
            shards=array.shards,
            compressors=_compressors(array.typesize, array.level),
            fill_value=0,
            dimension_names=array.names,
            attributes={"columns": list(array.columns)} if array.columns else {},
        )
    return group


def bytes_per_row(encoding: AnyEncoding, rows: EncodedRows) -> float:
    """Return the compressed bytes per row in a store, measured on these rows."""
    stored: dict[str, Any] = {}
    group = zarr.create_group(zarr.storage.MemoryStore(stored), zarr_format=3)
    for name, tensor in rows.arrays().items():
        part = row_parts(encoding)[name]
        shape = (1, len(rows), *part.width)
        array = group.create_array(
            name, shape=shape, dtype=part.dtype, chunks=shape, compressors=_compressors(part.typesize, part.level)
        )
        array[0] = tensor.cpu().numpy().astype(part.dtype, copy=False)
    return sum(len(value) for key, value in stored.items() if not key.endswith(".json")) / len(rows)


def write_shard(
    cache: Path,
    plan: Plan,
    view: int,
    shard: int,
    rows: Mapping[str, EncodedRows],
    inputs: Inputs | None,
    recorded: npt.NDArray[Any] | None = None,
) -> dict[str, FileRecord]:
    """Write all arrays of one shard, and return its files with the size and sha256 of what was written.

    Files that an interrupted run left there must have been deleted. `rows` are by name of the output, or `TOKENS`.
    """
    if sorted(rows) != sorted(row_names(plan)):
        raise ValueError(f"the plan has the outputs {row_names(plan)}, and rows of {sorted(rows)} were passed")
    if (recorded is None) == bool(recorded_arrays(plan)):
        raise ValueError("recorded boxes or seeds must be passed exactly if the plan has an array for them")
    store = _HashingStore(cache / STORE)
    group = zarr.open_group(store, mode="r+", zarr_format=3)
    expected = shard_arrays(plan)

    def write(name: str, values: npt.NDArray[Any], start: int) -> None:
        array = _array(group, name, expected[name]).with_config(_CONFIG)
        array[view, start : start + len(values)] = values.astype(array.dtype, copy=False)

    for output in row_names(plan):
        axis = axis_of(plan, output)
        if len(rows[output]) != axis.rows_of(shard):
            raise ValueError(f"shard {shard} has {axis.rows_of(shard)} rows of {output}, not {len(rows[output])}")
        for part, tensor in rows[output].arrays().items():
            write(path_in_store(output, part), tensor.cpu().contiguous().numpy(), shard * axis.shard)
    for name in recorded_arrays(plan):
        write(name, np.asarray(recorded), shard * sample_axis(plan).shard)
    if inputs is not None:
        for name, values in inputs._asdict().items():
            write(name, values, plan.shard_ids(shard).start // plan.shape.fingerprint_stride)
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


class RowReader(Generic[R]):
    """A reader of the rows of one output, or of tokens, that opens the arrays once; `output_reader` makes one.

    Args:
        cache: folder of the cache.
        plan: its plan.
        output: name of the output.
        kind: type of its rows.

    Raises:
        CorruptError: on construction and on reading, if the store does not match the plan.
    """

    def __init__(self, cache: Path, plan: Plan, output: str, kind: type[R]) -> None:
        self._cache, self._plan, self._kind = cache, plan, kind
        self._axis, self._classes = axis_of(plan, output), classes_of(plan, output)
        arrays = {path_in_store(output, part): array for part, array in row_arrays(plan, output).items()}
        group = _open(cache, arrays)
        self._arrays = {name.rpartition("/")[2]: _array(group, name, expected) for name, expected in arrays.items()}

    def read(self, view: int, ids: range) -> R:
        """Read consecutive rows of a view, by ids of samples, or numbers of rows or tokens of sequences.

        Aligning them with chunks or shards is fastest.
        """
        pieces = [*self._axis.pieces(ids)]
        for shard, _ in pieces:
            check_shard(self._cache, self._plan, view, shard)
        runs = contiguous(where for _, where in pieces)
        parts = [self._read(view, run) for run in runs or [range(0)]]
        return parts[0] if len(parts) == 1 else self._kind.concatenate(parts)

    def _read(self, view: int, where: range) -> R:
        """Read a part of the axis without gaps."""
        parts: dict[str, torch.Tensor] = {}
        for name, array in self._arrays.items():
            values = _values(array, (view, slice(where.start, where.stop)))
            if name in IDS:
                out_of_range = (values >= self._classes).any(axis=tuple(range(1, values.ndim)))
                if out_of_range.any():
                    at = f"view {view}, {self._axis.name} {where.start + int(out_of_range.argmax())}"
                    raise CorruptError(f"{self._cache} holds a class index of {values.max()}: {at}", AGAIN)
                values = values.astype(torch.empty(0, dtype=index_dtype(self._classes)).numpy().dtype)
            parts[name] = torch.from_numpy(np.ascontiguousarray(values))
        return self._kind.of(parts)


def row_reader(cache: Path, plan: Plan) -> RowReader[Rows]:
    """Return a reader of the class logits."""
    return RowReader(cache, plan, DEFAULT_OUTPUT, Rows)


def output_reader(cache: Path, plan: Plan, output: str) -> RowReader[Any]:
    """Return a reader of any output, or of `TOKENS`."""
    kind = SequenceTokens if output == TOKENS else kind_of_rows(output_encoding(plan, output))
    return RowReader(cache, plan, output, kind)


def read_rows(cache: Path, plan: Plan, view: int, ids: range) -> Rows:
    """Read the class logits' rows of consecutive sample ids in one view."""
    return row_reader(cache, plan).read(view, ids)


def read_recorded(cache: Path, plan: Plan, view: int, ids: range | None = None) -> npt.NDArray[Any]:
    """Read the recorded boxes [B, 5] float32, or seeds [B] int32, of a view, for some sample ids or for all.

    Raises:
        CorruptError: if a box is invalid, or the store does not match the plan.
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
        raise CorruptError(f"{cache} holds the invalid box {values[wrong.argmax()].tolist()}: {where}", AGAIN)
    return values


def read_inputs(cache: Path, plan: Plan, view: int) -> Inputs:
    """Read the fingerprints of one view; fingerprint j is of sample j * `fingerprint_stride`."""
    arrays = input_arrays(plan)
    for shard in range(plan.shards):
        check_shard(cache, plan, view, shard)
    group = _open(cache, arrays)
    return Inputs(*(_read(group, name, expected, (view,)) for name, expected in arrays.items()))


def read_samples(cache: Path, plan: Plan) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.uint64]]:
    """Read (labels [N] int32, sample keys [N] uint64)."""
    check_common(cache, plan)
    expected = {name: sample_arrays(plan)[name] for name in ("labels", "sample_keys")}
    labels, keys = read_arrays(cache, expected).values()
    wrong = (labels < -1) | (labels >= len(plan.dataset.class_names))
    if wrong.any():
        raise CorruptError(f"{cache} has the label {labels[wrong.argmax()]} for sample {wrong.argmax()}", AGAIN)
    return labels, keys


def read_arrays(cache: Path, arrays: Mapping[str, Array]) -> dict[str, npt.NDArray[Any]]:
    """Read whole arrays that were written when the store was created.

    Raises:
        CorruptError: if the store does not match the plan.
    """
    group = _open(cache, arrays)
    return {name: _read(group, name, array, ...) for name, array in arrays.items()}


# Exceptions that zarr raises for damaged metadata or chunks.
_UNREADABLE = (OSError, ValueError, LookupError, TypeError, AttributeError, ArithmeticError, RuntimeError, MemoryError)


def _open(cache: Path, arrays: Mapping[str, Array]) -> zarr.Group:
    """Open the store of a cache to read some arrays, whose codecs are checked first."""
    check_codecs(cache, arrays)
    try:
        # Consolidated metadata of the group could differ from the metadata that was checked.
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
    """Return an array of the store after checking its layout: with another layout, zarr would read zeros.

    Raises:
        CorruptError: if it is missing or differs from the plan.
    """
    try:
        array = group.get(name)
    except _UNREADABLE as error:
        raise CorruptError(f"{group.store_path}/{name} cannot be opened: {error}", AGAIN) from None
    if not isinstance(array, zarr.Array):
        raise CorruptError(f"the store {group.store_path} has no array {name}", AGAIN)
    actual = (array.dtype.name, array.shape, array.chunks, array.shards)
    planned = (expected.dtype, expected.shape, expected.chunks, expected.shards)
    if actual != planned:
        raise CorruptError(
            f"the array {array.store_path} is {_describe(*actual)}; the plan has {_describe(*planned)}", AGAIN
        )
    if expected.columns and array.attrs.get("columns") != list(expected.columns):
        raise CorruptError(f"the columns of {array.store_path} are not those of the format", AGAIN)
    codecs: tuple[object, ...] = getattr(array.metadata, "codecs", ())
    if not (len(codecs) == 1 and isinstance(codecs[0], ShardingCodec) and codecs[0].index_location.value == "end"):
        raise CorruptError(f"the shards of {array.store_path} do not end with their index", AGAIN)
    first = (0,) * len(expected.shape)
    if array.metadata.encode_chunk_key(first) != "/".join(("c", *map(str, first))):
        raise CorruptError(f"the chunk files of {array.store_path} have other names than those of the format", AGAIN)
    return array


def _describe(dtype: str, shape: object, chunks: object, shards: object) -> str:
    return f"{dtype} {shape} in chunks {chunks} and shards {shards}"

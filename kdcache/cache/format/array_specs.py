"""Specify the arrays and files of a cache from its plan alone: names, shapes, types, chunks, compression.

Of the files themselves only the chunk index at the end of a shard is read here, since zarr would read missing chunks as
zeros. docs/FORMAT.md describes the arrays in section 3 and the files in section 2.4.
"""

from __future__ import annotations

import math
import os
import struct
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np

from kdcache.cache.format.chunk_headers import codecs_of, stated_size
from kdcache.cache.format.encoding import Encoding
from kdcache.cache.format.fingerprints import SKETCH_PARTS
from kdcache.cache.format.recorded_views import BOX, recorded
from kdcache.cache.format.schema import Plan, commit_file
from kdcache.cache.format.verified_files import AGAIN, check_before_reading
from kdcache.errors import CorruptError

STORE = "data.zarr"
"""Folder of the Zarr store in a cache (docs/FORMAT.md, section 1)."""

_MAX_TYPESIZE = 255
"""Bytes per element that blosc can shuffle, at most (docs/FORMAT.md, section 3)."""

_INDEX_ENTRY = struct.Struct("<QQ")
"""Entry of a shard's chunk index: offset and size in bytes (docs/FORMAT.md, section 10.1)."""

_CHECKSUM_BYTES = 4
"""Bytes of the crc32c after a chunk and after a shard's chunk index (docs/FORMAT.md, section 3)."""

_COMPRESSOR_OVERHEAD = 2**10
"""Bytes by which a compressed chunk may exceed twice its uncompressed size (docs/FORMAT.md, section 8)."""

_MAX_JSON_BYTES = 2**20
"""Bytes of a zarr.json or commit marker at most (docs/FORMAT.md, section 8)."""

_NO_CHUNK = 2**64 - 1
"""Offset and size that mark a chunk as missing in a shard's index (docs/FORMAT.md, section 10.1)."""

_INPUT_ARRAYS = ("fingerprints", "sketches")


class Array(NamedTuple):
    """Storage layout of an array.

    Attributes:
        shape: extent per dimension.
        chunks: extent of a chunk, the unit of compression.
        shards: extent of a shard, which is one file of chunks.
        dtype: name of the data type.
        names: names of the dimensions.
        typesize: bytes per element that blosc shuffles before it compresses with zstd; None for plain zstd.
        columns: names of the columns, stored as an attribute; None without.
    """

    shape: tuple[int, ...]
    chunks: tuple[int, ...]
    shards: tuple[int, ...]
    dtype: str
    names: tuple[str, ...]
    typesize: int | None = None
    columns: tuple[str, ...] | None = None


class Part(NamedTuple):
    """What one array holds of a row: shape `width` and data type."""

    width: tuple[int, ...]
    dtype: str

    @property
    def typesize(self) -> int:
        """Return bytes per element for blosc's shuffle: a number, or a whole row of single bytes.

        Storing columns first, by a transposition, compresses no better than this and is many times slower to read.
        """
        size, row = np.dtype(self.dtype).itemsize, math.prod(self.width)
        return size if size > 1 or row > _MAX_TYPESIZE else row


def row_parts(encoding: Encoding) -> dict[str, Part]:
    """Return the arrays that hold rows, by name."""
    index_type = "uint8" if encoding.num_classes <= 2**8 else "uint16" if encoding.num_classes <= 2**16 else "uint32"
    parts = {
        "log_probs": Part((encoding.top_k,), encoding.dtype),
        "indices": Part((encoding.top_k,), index_type),
        "logsumexp": Part((), "float32"),
        "statistics": Part((len(encoding.statistics),), "float16"),
        "tail": Part((encoding.rank,), "int8"),
    }
    if encoding.dense:
        del parts["indices"]
    if not encoding.rank:
        del parts["tail"]
    return parts


def raw_bytes(encoding: Encoding) -> int:
    """Return bytes per row before compression."""
    return sum(math.prod(part.width) * np.dtype(part.dtype).itemsize for part in row_parts(encoding).values())


def row_arrays(plan: Plan) -> dict[str, Array]:
    """Return the layout of the arrays that hold rows, [V, N, ...]."""
    return {
        name: _of_rows(plan, part, plan.encoding.statistics if name == "statistics" else None)
        for name, part in row_parts(plan.encoding).items()
    }


def _of_rows(plan: Plan, part: Part, columns: tuple[str, ...] | None = None) -> Array:
    """Return the layout of an array with one entry per view and sample, [V, N, ...]."""
    return Array(
        shape=(plan.views.count, plan.dataset.samples, *part.width),
        chunks=(1, plan.shape.chunk_rows, *part.width),
        shards=(1, plan.shape.shard_rows, *part.width),
        dtype=part.dtype,
        names=("view", "sample", *("column" for _ in part.width)),
        typesize=part.typesize,
        columns=columns,
    )


def recorded_arrays(plan: Plan) -> dict[str, Array]:
    """Return the array of recorded boxes or seeds, for views that do not follow from (seed, sample, view)."""
    parts = {"crops": Part((BOX,), "float32"), "seeds": Part((), "int32")}
    return {name: _of_rows(plan, part) for name, part in parts.items() if name == recorded(plan.views.transform)}


def input_arrays(plan: Plan) -> dict[str, Array]:
    """Return the layout of the arrays of fingerprints, [V, M, ...]: one chunk per shard of rows."""
    stride = plan.shape.fingerprint_stride
    count, per_shard = -(-plan.dataset.samples // stride), plan.shape.shard_rows // stride
    return {
        name: Array(
            shape=(plan.views.count, count, *width),
            chunks=(1, per_shard, *width),
            shards=(1, per_shard, *width),
            dtype=dtype,
            names=("view", "fingerprint", *("part" for _ in width)),
        )
        for name, width, dtype in (("fingerprints", (), "uint32"), ("sketches", (SKETCH_PARTS,), "float32"))
    }


def shard_arrays(plan: Plan) -> dict[str, Array]:
    """Return the layout of the arrays that are written shard by shard."""
    return row_arrays(plan) | input_arrays(plan) | recorded_arrays(plan)


def basis_arrays(plan: Plan) -> dict[str, Array]:
    """Return the layout of the arrays of the tail's basis, one chunk each."""
    rank, classes = plan.encoding.rank, plan.encoding.num_classes
    if not rank:
        return {}
    shapes = {
        "tail_basis": ((rank, classes), "float16", ("component", "class")),
        "tail_mean": ((classes,), "float32", ("class",)),
        "tail_scale": ((rank,), "float32", ("component",)),
    }
    return {
        name: Array(shape=shape, chunks=shape, shards=shape, dtype=dtype, names=names)
        for name, (shape, dtype, names) in shapes.items()
    }


def sample_arrays(plan: Plan) -> dict[str, Array]:
    """Return the layout of the arrays with one value per sample, [N]."""
    return {
        name: Array(
            shape=(plan.dataset.samples,),
            chunks=(plan.shape.chunk_rows,),
            shards=(plan.shape.shard_rows,),
            dtype=dtype,
            names=("sample",),
        )
        for name, dtype in (("labels", "int32"), ("sample_keys", "uint64"))
    }


def common_arrays(plan: Plan) -> dict[str, Array]:
    """Return the layout of the arrays that are written when the store is created."""
    return sample_arrays(plan) | basis_arrays(plan)


def shard_file(name: str, array: Array, view: int, shard: int) -> str:
    """Return the file of one array of a shard, relative to the cache."""
    return f"{STORE}/{name}/c/{view}/{shard}" + "/0" * (len(array.shape) - 2)


def shard_files(plan: Plan, view: int, shard: int) -> list[str]:
    """Return the files of one shard of rows, relative to the cache."""
    return [shard_file(name, array, view, shard) for name, array in shard_arrays(plan).items()]


def common_files(plan: Plan) -> Iterator[str]:
    """Yield the files that belong to no shard of rows, relative to the cache: metadata, sample and basis arrays."""
    yield f"{STORE}/zarr.json"
    for name in shard_arrays(plan) | common_arrays(plan):
        yield f"{STORE}/{name}/zarr.json"
    for name, array in basis_arrays(plan).items():
        yield _basis_file(name, array)
    for name in sample_arrays(plan):
        for shard in range(plan.shards):
            yield f"{STORE}/{name}/c/{shard}"


def check_listed(cache: Path | str, plan: Plan, sizes: dict[str, int]) -> None:
    """Check that a manifest lists exactly the files of its plan, each with a size that is possible for its content.

    A file that is not listed would not be checked, and zarr would read it as zeros. Since a shard has an index of 16
    bytes per chunk, a plan cannot declare more chunks than its files have bytes for; and no file can be larger than
    needed to fill a disk.

    Raises:
        CorruptError: with the first wrong file.
    """
    expected = 0
    for name, least, most in _all_files(plan):
        if not least <= sizes.get(name, -1) <= most:
            problem = "is not in its manifest"
            if name in sizes:
                problem = f"is too {'small' if sizes[name] < least else 'large'}, {sizes[name]} bytes"
            raise CorruptError(f"{cache} is damaged: {name} {problem}", AGAIN)
        expected += 1
    if len(sizes) != expected:
        raise CorruptError(f"{cache} is damaged: its manifest lists {len(sizes)} files, its plan has {expected}", AGAIN)


def _all_files(plan: Plan) -> Iterator[tuple[str, int, int]]:
    """Yield every file of a complete cache but its manifest, with its minimum and maximum size in bytes."""
    arrays = shard_arrays(plan) | common_arrays(plan)
    largest = {name: _max_shard_bytes(array) for name, array in arrays.items()}
    smallest = _INDEX_ENTRY.size * (plan.shape.shard_rows // plan.shape.chunk_rows)
    for name in common_files(plan):
        if name.endswith(".json"):
            yield name, 0, _MAX_JSON_BYTES
        else:
            yield name, _INDEX_ENTRY.size, largest[name.split("/")[1]]
    for view in range(plan.views.count):
        for shard in range(plan.shards):
            yield commit_file(view, shard), 0, _MAX_JSON_BYTES
            for name in shard_files(plan, view, shard):
                array_name = name.split("/")[1]
                yield name, _INDEX_ENTRY.size if array_name in _INPUT_ARRAYS else smallest, largest[array_name]


def _max_shard_bytes(array: Array) -> int:
    """Return the maximum size of a shard file in bytes; compressors hardly enlarge incompressible data."""
    chunks = math.prod(array.shards) // math.prod(array.chunks)
    return chunks * (2 * chunk_bytes(array) + _COMPRESSOR_OVERHEAD)


def chunk_bytes(array: Array) -> int:
    """Return bytes per chunk before compression."""
    return math.prod(array.chunks) * np.dtype(array.dtype).itemsize


def check_codecs(cache: Path, arrays: Mapping[str, Array]) -> None:
    """Check that arrays use exactly the codecs of the format.

    Raises:
        CorruptError: with the first array that does not.
    """
    for name, array in arrays.items():
        path = cache / STORE / name / "zarr.json"
        expected = ["bytes", "blosc" if array.typesize else "zstd", "crc32c"]
        actual = codecs_of(path.read_bytes()) if path.is_file() else None
        if actual != (["sharding_indexed"], expected, ["bytes", "crc32c"]):
            raise CorruptError(f"{path} has other codecs than those of the format: {actual}", AGAIN)


def check_chunks(path: Path, array: Array, needed: int) -> None:
    """Check that the first `needed` chunks of a shard exist and decompress to their size in the plan.

    A shard ends with (offset, size) of each chunk and a checksum. zarr would read a chunk that is marked as missing as
    zeros, which no digest detects if the cache was published so. Decompressors trust the size that a chunk states.

    Raises:
        CorruptError: with the file and the chunk.
    """
    index = _INDEX_ENTRY.size * (math.prod(array.shards) // math.prod(array.chunks)) + _CHECKSUM_BYTES
    if not path.is_file() or path.stat().st_size < index:
        raise CorruptError(f"{path} is missing, or too small for a shard", AGAIN)
    room = data = path.stat().st_size - index
    with path.open("rb") as file:
        file.seek(-index, os.SEEK_END)
        for chunk, (offset, size) in enumerate(_INDEX_ENTRY.iter_unpack(file.read(_INDEX_ENTRY.size * needed))):
            if _NO_CHUNK in (offset, size) or not size:
                raise CorruptError(f"chunk {chunk} of {path} is missing", AGAIN)
            if size > room or offset > data - size:  # chunks do not overlap
                raise CorruptError(f"chunk {chunk} of {path} exceeds the file", AGAIN)
            room -= size
            if stated_size(file, offset, size - _CHECKSUM_BYTES, array.typesize is not None) != chunk_bytes(array):
                raise CorruptError(
                    f"chunk {chunk} of {path} does not state that it unpacks to {chunk_bytes(array)} bytes", AGAIN
                )


def check_shard(cache: Path, plan: Plan, view: int, shard: int) -> None:
    """Check that every chunk of a shard of rows exists, and first that its files are as they were written.

    Raises:
        CorruptError: with the first missing chunk, or the first file that differs.
    """
    check_before_reading(cache, shard_files(plan, view, shard))
    for name, array in (row_arrays(plan) | recorded_arrays(plan)).items():
        check_chunks(cache / shard_file(name, array, view, shard), array, _used_chunks(plan, shard))
    for name, array in input_arrays(plan).items():
        check_chunks(cache / shard_file(name, array, view, shard), array, 1)


def check_common(cache: Path, plan: Plan) -> None:
    """Check that every chunk of labels, sample keys and basis exists.

    Raises:
        CorruptError: with the first missing chunk.
    """
    for name, array in basis_arrays(plan).items():
        check_chunks(cache / _basis_file(name, array), array, 1)
    for name, array in sample_arrays(plan).items():
        for shard in range(plan.shards):
            check_chunks(cache / f"{STORE}/{name}/c/{shard}", array, _used_chunks(plan, shard))


def _used_chunks(plan: Plan, shard: int) -> int:
    """Return the number of chunks of a shard that hold samples."""
    return -(-len(plan.shard_ids(shard)) // plan.shape.chunk_rows)


def _basis_file(name: str, array: Array) -> str:
    return f"{STORE}/{name}/c" + "/0" * len(array.shape)

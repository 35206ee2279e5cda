"""Specify the files of a cache from its plan, and check that its shards hold every chunk (docs/FORMAT.md, section 2.4).

Of the files themselves only the chunk index at the end of a shard is read here, since zarr would read missing chunks as
zeros.
"""

from __future__ import annotations

import math
import os
import struct
from collections.abc import Iterator, Mapping
from pathlib import Path

from kdcache.cache.format.array_specs import (
    STORE,
    Array,
    chunk_bytes,
    common_arrays,
    input_arrays,
    path_in_store,
    recorded_arrays,
    row_arrays,
    row_names,
    sample_arrays,
    shard_arrays,
    whole_arrays,
)
from kdcache.cache.format.chunk_headers import codecs_of, stated_size
from kdcache.cache.format.row_axes import Axis, axis_of, sample_axis
from kdcache.cache.format.schema import Plan, commit_file
from kdcache.cache.format.verified_files import AGAIN, check_before_reading
from kdcache.errors import CorruptError

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


def shard_file(name: str, array: Array, view: int, shard: int) -> str:
    """Return the file of one array of a shard, relative to the cache."""
    return f"{STORE}/{name}/c/{view}/{shard}" + "/0" * (len(array.shape) - 2)


def shard_files(plan: Plan, view: int, shard: int) -> list[str]:
    """Return the files of one shard of rows, relative to the cache."""
    return [shard_file(name, array, view, shard) for name, array in shard_arrays(plan).items()]


def common_files(plan: Plan) -> Iterator[str]:
    """Yield the files of no shard of rows, relative to the cache: metadata, arrays of samples, and whole arrays."""
    for group in _groups(plan):
        yield f"{STORE}/{group}zarr.json"
    for name in shard_arrays(plan) | common_arrays(plan):
        yield f"{STORE}/{name}/zarr.json"
    for name, array in whole_arrays(plan).items():
        yield _only_file(name, array)
    for name in sample_arrays(plan):
        for shard in range(plan.shards):
            yield f"{STORE}/{name}/c/{shard}"


def _groups(plan: Plan) -> list[str]:
    """Return the Zarr groups of the store, as beginnings of the names of what is in them."""
    outputs = [f"outputs/{name}/" for name in plan.named_outputs]
    return ["", *(["outputs/", *outputs] if outputs else [])]


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
    smallest = {name: _INDEX_ENTRY.size * _chunks(array) for name, array in arrays.items()}
    for name in common_files(plan):
        if name.endswith(".json"):
            yield name, 0, _MAX_JSON_BYTES
        else:
            yield name, _INDEX_ENTRY.size, largest[_array_of(name)]
    for view in range(plan.views.count):
        for shard in range(plan.shards):
            yield commit_file(view, shard), 0, _MAX_JSON_BYTES
            for name in shard_files(plan, view, shard):
                array_name = _array_of(name)
                yield name, smallest[array_name], largest[array_name]


def _array_of(file: str) -> str:
    """Return the array that a file of chunks belongs to."""
    return file.removeprefix(f"{STORE}/").rsplit("/c/", 1)[0]


def _max_shard_bytes(array: Array) -> int:
    """Return the maximum size of a shard file in bytes; compressors hardly enlarge incompressible data."""
    return _chunks(array) * (2 * chunk_bytes(array) + _COMPRESSOR_OVERHEAD)


def _chunks(array: Array) -> int:
    """Return the number of chunks per shard."""
    return math.prod(array.shards) // math.prod(array.chunks)


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
    index = _INDEX_ENTRY.size * _chunks(array) + _CHECKSUM_BYTES
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
    for output in row_names(plan):
        used = _used_chunks(axis_of(plan, output), shard)
        for part, array in row_arrays(plan, output).items():
            check_chunks(cache / shard_file(path_in_store(output, part), array, view, shard), array, used)
    for name, array in recorded_arrays(plan).items():
        check_chunks(cache / shard_file(name, array, view, shard), array, _used_chunks(sample_axis(plan), shard))
    for name, array in input_arrays(plan).items():
        check_chunks(cache / shard_file(name, array, view, shard), array, 1)


def check_common(cache: Path, plan: Plan) -> None:
    """Check that every chunk of labels, sample keys, bases and vocabulary exists.

    Raises:
        CorruptError: with the first missing chunk.
    """
    for name, array in whole_arrays(plan).items():
        check_chunks(cache / _only_file(name, array), array, 1)
    for name, array in sample_arrays(plan).items():
        for shard in range(plan.shards):
            check_chunks(cache / f"{STORE}/{name}/c/{shard}", array, _used_chunks(sample_axis(plan), shard))


def _used_chunks(axis: Axis, shard: int) -> int:
    """Return the number of chunks of a shard that hold rows."""
    return -(-axis.rows_of(shard) // axis.chunk)


def _only_file(name: str, array: Array) -> str:
    return f"{STORE}/{name}/c" + "/0" * len(array.shape)

"""Which arrays and files a cache has, from its plan alone: names, shapes, types, chunks, compression.

Nothing is opened here but the index at the end of a shard, whose gaps a reader would take for zeros.
"""

from __future__ import annotations

import math
import os
import struct
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np

from kdcache.cache.format.chunk_headers import codecs_of, unpacked
from kdcache.cache.format.fingerprints import SKETCH_PARTS
from kdcache.cache.format.recorded_views import BOX, recorded
from kdcache.cache.format.schema import Encoding, Plan, commit_file
from kdcache.errors import CorruptError

STORE = "data.zarr"
AGAIN = "get the cache again from where it was made, or delete it and dump the teacher again"
_LARGEST_TYPESIZE = 255
_ENTRY = struct.Struct("<QQ")
_CHECKSUM = 4
_SLACK = 2**10
_LARGEST_JSON = 2**20
_MISSING = 2**64 - 1
_INPUTS = ("fingerprints", "sketches")


class Array(NamedTuple):
    """How an array lies in the store; `chunks` lie in `shards`, which are its files.

    A chunk is compressed with zstd; where there is a `typesize`, by blosc, after a shuffle of elements of that size.
    Where there are `columns`, they are named in the attributes.
    """

    shape: tuple[int, ...]
    chunks: tuple[int, ...]
    shards: tuple[int, ...]
    dtype: str
    names: tuple[str, ...]
    typesize: int | None = None
    columns: tuple[str, ...] | None = None


class Part(NamedTuple):
    """An array of rows: the shape of a row in it, and the type."""

    width: tuple[int, ...]
    dtype: str

    @property
    def typesize(self) -> int:
        """What is shuffled, to bring bytes of the same meaning together: a number, or a row of bytes.

        Columns first, with a transposition, is no smaller than this, and many times slower to read.
        """
        size, row = np.dtype(self.dtype).itemsize, math.prod(self.width)
        return size if size > 1 or row > _LARGEST_TYPESIZE else row


def row_parts(encoding: Encoding) -> dict[str, Part]:
    """The arrays that hold rows."""
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
    """Bytes of a row before compression."""
    return sum(math.prod(part.width) * np.dtype(part.dtype).itemsize for part in row_parts(encoding).values())


def row_arrays(plan: Plan) -> dict[str, Array]:
    """The arrays that hold rows, [V, N, ...]."""
    return {
        name: _of_rows(plan, part, plan.encoding.statistics if name == "statistics" else None)
        for name, part in row_parts(plan.encoding).items()
    }


def _of_rows(plan: Plan, part: Part, columns: tuple[str, ...] | None = None) -> Array:
    """An array with something of each row, [V, N, ...]."""
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
    """The array that says what each view was drawn from, where (seed, sample, view) does not: boxes, or seeds."""
    parts = {"crops": Part((BOX,), "float32"), "seeds": Part((), "int32")}
    return {name: _of_rows(plan, part) for name, part in parts.items() if name == recorded(plan.views.transform)}


def input_arrays(plan: Plan) -> dict[str, Array]:
    """The arrays of fingerprints, [V, M, ...]: one chunk a shard of rows."""
    stride = plan.shape.fingerprint_stride
    count, of_shard = -(-plan.dataset.samples // stride), plan.shape.shard_rows // stride
    return {
        name: Array(
            shape=(plan.views.count, count, *width),
            chunks=(1, of_shard, *width),
            shards=(1, of_shard, *width),
            dtype=dtype,
            names=("view", "fingerprint", *("part" for _ in width)),
        )
        for name, width, dtype in (("fingerprints", (), "uint32"), ("sketches", (SKETCH_PARTS,), "float32"))
    }


def shard_arrays(plan: Plan) -> dict[str, Array]:
    """The arrays that are written a shard at a time."""
    return row_arrays(plan) | input_arrays(plan) | recorded_arrays(plan)


def basis_arrays(plan: Plan) -> dict[str, Array]:
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
        name: Array(shape=shape, chunks=shape, shards=shape, dtype=dtype, names=names)
        for name, (shape, dtype, names) in shapes.items()
    }


def sample_arrays(plan: Plan) -> dict[str, Array]:
    """The arrays that hold one value a sample, [N]."""
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


def whole_arrays(plan: Plan) -> dict[str, Array]:
    """The arrays that are written when the store is made."""
    return sample_arrays(plan) | basis_arrays(plan)


def shard_file(name: str, array: Array, view: int, shard: int) -> str:
    """The file of one array of a shard, relative to the cache."""
    return f"{STORE}/{name}/c/{view}/{shard}" + "/0" * (len(array.shape) - 2)


def shard_files(plan: Plan, view: int, shard: int) -> list[str]:
    """The files of one shard of rows, relative to the cache."""
    return [shard_file(name, array, view, shard) for name, array in shard_arrays(plan).items()]


def common_files(plan: Plan) -> Iterator[str]:
    """The files of the store that belong to no shard of rows, relative to the cache: metadata and whole arrays."""
    yield f"{STORE}/zarr.json"
    for name in shard_arrays(plan) | whole_arrays(plan):
        yield f"{STORE}/{name}/zarr.json"
    for name, array in basis_arrays(plan).items():
        yield _whole_file(name, array)
    for name in sample_arrays(plan):
        for shard in range(plan.shards):
            yield f"{STORE}/{name}/c/{shard}"


def check_listed(cache: Path | str, plan: Plan, sizes: dict[str, int]) -> None:
    """That a manifest lists every file of its plan and no other, none too small or too large for what it must hold.

    What is not listed would not be checked, and zarr would read it as zeros. A shard ends in 16 bytes a chunk, so
    that after this no declared size is larger than the files allow; and no file fills a disk for nothing.

    Raises:
        CorruptError: which names the first such file.
    """
    expected = 0
    for name, least, most in _all_files(plan):
        if not least <= sizes.get(name, -1) <= most:
            state = "is not in its manifest"
            if name in sizes:
                state = f"is too {'small' if sizes[name] < least else 'large'}, {sizes[name]} bytes"
            raise CorruptError(f"{cache} is damaged: {name} {state}", AGAIN)
        expected += 1
    if len(sizes) != expected:
        raise CorruptError(f"{cache} is damaged: its manifest lists {len(sizes)} files, a cache has {expected}", AGAIN)


def _all_files(plan: Plan) -> Iterator[tuple[str, int, int]]:
    """Every file of a complete cache but its manifest, and the bytes that it has at least and at most."""
    arrays = shard_arrays(plan) | whole_arrays(plan)
    most = {name: _largest(array) for name, array in arrays.items()}
    smallest = _ENTRY.size * (plan.shape.shard_rows // plan.shape.chunk_rows)
    for name in common_files(plan):
        yield (name, 0, _LARGEST_JSON) if name.endswith(".json") else (name, _ENTRY.size, most[name.split("/")[1]])
    for view in range(plan.views.count):
        for shard in range(plan.shards):
            yield commit_file(view, shard), 0, _LARGEST_JSON
            for name in shard_files(plan, view, shard):
                of = name.split("/")[1]
                yield name, _ENTRY.size if of in _INPUTS else smallest, most[of]


def _largest(array: Array) -> int:
    """Bytes of a shard, its index included: what a compressor cannot make smaller, it makes hardly larger."""
    chunks = math.prod(array.shards) // math.prod(array.chunks)
    return chunks * (2 * chunk_bytes(array) + _SLACK)


def chunk_bytes(array: Array) -> int:
    """Bytes of a chunk before compression."""
    return math.prod(array.chunks) * np.dtype(array.dtype).itemsize


def check_codecs(cache: Path, arrays: Mapping[str, Array]) -> None:
    """That arrays are packed with the codecs of the format, and no others.

    Raises:
        CorruptError: which names the first that is not.
    """
    for name, array in arrays.items():
        path = cache / STORE / name / "zarr.json"
        expected = ["bytes", "blosc" if array.typesize else "zstd", "crc32c"]
        found = codecs_of(path.read_bytes()) if path.is_file() else None
        if found != (["sharding_indexed"], expected, ["bytes", "crc32c"]):
            raise CorruptError(f"{path} is packed with other codecs than those of the format: {found}", AGAIN)


def check_whole(path: Path, array: Array, needed: int) -> None:
    """That the first `needed` chunks of a shard are there, and are not larger than they should be when unpacked.

    A shard ends in (offset, size) of each chunk and a checksum; a chunk that is marked as missing there would be read
    as zeros, and no digest can tell, if it was made so. A chunk says itself what it unpacks to, and is believed.

    Raises:
        CorruptError: which names the file and the chunk.
    """
    index = _ENTRY.size * (math.prod(array.shards) // math.prod(array.chunks)) + _CHECKSUM
    if not path.is_file() or path.stat().st_size < index:
        raise CorruptError(f"{path} is missing, or too small to be a shard", AGAIN)
    room = path.stat().st_size - index
    with path.open("rb") as opened:
        opened.seek(-index, os.SEEK_END)
        for chunk, (offset, size) in enumerate(_ENTRY.iter_unpack(opened.read(_ENTRY.size * needed))):
            if _MISSING in (offset, size) or not size:
                raise CorruptError(f"chunk {chunk} of {path} is missing", AGAIN)
            if size > room:  # no two of them are in the same place
                raise CorruptError(f"chunk {chunk} of {path} is said to lie outside of it", AGAIN)
            room -= size
            if unpacked(opened, offset, size - _CHECKSUM, array.typesize is not None) != chunk_bytes(array):
                raise CorruptError(
                    f"chunk {chunk} of {path} does not say that it unpacks to {chunk_bytes(array)} bytes", AGAIN
                )


def check_shard(cache: Path, plan: Plan, view: int, shard: int) -> None:
    """That every chunk of a shard of rows is there.

    Raises:
        CorruptError: which names the first that is not.
    """
    for name, array in (row_arrays(plan) | recorded_arrays(plan)).items():
        check_whole(cache / shard_file(name, array, view, shard), array, _needed(plan, shard))
    for name, array in input_arrays(plan).items():
        check_whole(cache / shard_file(name, array, view, shard), array, 1)


def check_common(cache: Path, plan: Plan) -> None:
    """That every chunk of labels, sample keys and basis is there.

    Raises:
        CorruptError: which names the first that is not.
    """
    for name, array in basis_arrays(plan).items():
        check_whole(cache / _whole_file(name, array), array, 1)
    for name, array in sample_arrays(plan).items():
        for shard in range(plan.shards):
            check_whole(cache / f"{STORE}/{name}/c/{shard}", array, _needed(plan, shard))


def _needed(plan: Plan, shard: int) -> int:
    """How many chunks of a shard hold samples."""
    return -(-len(plan.shard_ids(shard)) // plan.shape.chunk_rows)


def _whole_file(name: str, array: Array) -> str:
    return f"{STORE}/{name}/c" + "/0" * len(array.shape)

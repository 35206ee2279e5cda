"""Which arrays and files a cache has, from its plan alone: names, shapes, types, chunks, compression.

Nothing is opened here but the index at the end of a shard, whose gaps a reader would take for zeros.
"""

from __future__ import annotations

import math
import os
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np

from kdcache.cache.schema import Encoding, Plan, commit_file
from kdcache.errors import CorruptError
from kdcache.fingerprints import SKETCH_PARTS

STORE = "data.zarr"
AGAIN = "get the cache again from where it was made, or delete it and dump the teacher again"
_LARGEST_TYPESIZE = 255
_ENTRY = struct.Struct("<QQ")
_CHECKSUM = 4
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
        name: Array(
            shape=(plan.views.count, plan.dataset.samples, *part.width),
            chunks=(1, plan.shape.chunk_rows, *part.width),
            shards=(1, plan.shape.shard_rows, *part.width),
            dtype=part.dtype,
            names=("view", "sample", *("column" for _ in part.width)),
            typesize=part.typesize,
            columns=plan.encoding.statistics if name == "statistics" else None,
        )
        for name, part in row_parts(plan.encoding).items()
    }


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
    return row_arrays(plan) | input_arrays(plan)


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


def check_listed(cache: Path, plan: Plan, sizes: dict[str, int]) -> None:
    """That a manifest lists every file of its plan and no other, none too small for the rows it is said to hold.

    What is not listed would not be checked, and zarr would read it as zeros. A shard ends in 16 bytes a chunk, so
    that after this no declared size is larger than the files allow.

    Raises:
        CorruptError: which names the first such file.
    """
    expected = 0
    for name, least in _all_files(plan):
        if sizes.get(name, -1) < least:
            state = f"is too small, {sizes[name]} bytes" if name in sizes else "is not in its manifest"
            raise CorruptError(f"{cache} is damaged: {name} {state}", AGAIN)
        expected += 1
    if len(sizes) != expected:
        raise CorruptError(f"{cache} is damaged: its manifest lists {len(sizes)} files, a cache has {expected}", AGAIN)


def _all_files(plan: Plan) -> Iterator[tuple[str, int]]:
    """Every file of a complete cache but its manifest, and the bytes that it has at least."""
    smallest = _ENTRY.size * (plan.shape.shard_rows // plan.shape.chunk_rows)
    for name in common_files(plan):
        yield name, 0 if name.endswith(".json") else _ENTRY.size
    for view in range(plan.views.count):
        for shard in range(plan.shards):
            yield commit_file(view, shard), 0
            for name in shard_files(plan, view, shard):
                yield name, _ENTRY.size if name.split("/")[1] in _INPUTS else smallest


def check_whole(path: Path, chunks: int, needed: int) -> None:
    """That the first `needed` of the `chunks` chunks of a shard are there.

    A shard ends in (offset, size) of each chunk and a checksum; a chunk that is marked as missing there would be read
    as zeros, and no digest can tell, if it was made so.

    Raises:
        CorruptError: which names the file and the chunk.
    """
    index = _ENTRY.size * chunks + _CHECKSUM
    if not path.is_file() or path.stat().st_size < index:
        raise CorruptError(f"{path} is missing, or too small to be a shard", AGAIN)
    with path.open("rb") as opened:
        opened.seek(-index, os.SEEK_END)
        entries = _ENTRY.iter_unpack(opened.read(_ENTRY.size * needed))
    for chunk, entry in enumerate(entries):
        if _MISSING in entry or not entry[1]:
            raise CorruptError(f"chunk {chunk} of {path} is missing", AGAIN)


def check_shard(cache: Path, plan: Plan, view: int, shard: int) -> None:
    """That every chunk of a shard of rows is there.

    Raises:
        CorruptError: which names the first that is not.
    """
    for name, array in row_arrays(plan).items():
        check_whole(cache / shard_file(name, array, view, shard), *_chunks(plan, shard))
    for name, array in input_arrays(plan).items():
        check_whole(cache / shard_file(name, array, view, shard), 1, 1)


def check_common(cache: Path, plan: Plan) -> None:
    """That every chunk of labels, sample keys and basis is there.

    Raises:
        CorruptError: which names the first that is not.
    """
    for name, array in basis_arrays(plan).items():
        check_whole(cache / _whole_file(name, array), 1, 1)
    for name in sample_arrays(plan):
        for shard in range(plan.shards):
            check_whole(cache / f"{STORE}/{name}/c/{shard}", *_chunks(plan, shard))


def _chunks(plan: Plan, shard: int) -> tuple[int, int]:
    """How many chunks a shard has room for, and how many hold samples."""
    size = plan.shape.chunk_rows
    return plan.shape.shard_rows // size, -(-len(plan.shard_ids(shard)) // size)


def _whole_file(name: str, array: Array) -> str:
    return f"{STORE}/{name}/c" + "/0" * len(array.shape)

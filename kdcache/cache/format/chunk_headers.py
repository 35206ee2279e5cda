"""How chunks are packed, and what they unpack to: looked at before any library is let loose on them.

A few bytes can be made to fill any memory, and a codec's name to load any that is installed.
"""

from __future__ import annotations

import json
import struct
from typing import BinaryIO

_BLOSC_HEADER = struct.Struct("<4B3I")
_ZSTD_MAGIC = 0xFD2FB528
_SINGLE_SEGMENT, _CHECKSUM, _DICTIONARY = 1 << 5, 1 << 2, 3
_RLE, _RESERVED = 1, 3


def codecs_of(metadata: bytes) -> tuple[list[str], list[str], list[str]] | None:
    """Names of the codecs of an array's zarr.json: its own, those of a chunk, those of an index; None without them."""
    try:
        own = json.loads(metadata)["codecs"]
        inner = own[0]["configuration"]
        outer, chunk, index = (
            [codec["name"] for codec in some] for some in (own, inner["codecs"], inner["index_codecs"])
        )
    except (ValueError, LookupError, TypeError, RecursionError):
        return None
    return outer, chunk, index


def unpacked(file: BinaryIO, offset: int, size: int, blosc: bool) -> int | None:
    """Bytes that a chunk states, and cannot exceed, when it is decompressed; None where it states nothing or lies.

    The place in `file` where it is read is left as it was.

    Args:
        file: that the chunk is in.
        offset: where it begins.
        size: of what the compressor wrote.
        blosc: whether that is blosc; zstd if not.
    """
    here = file.tell()
    try:
        file.seek(offset)
        return _of_blosc(file.read(_BLOSC_HEADER.size), size) if blosc else _of_zstd(file, offset, size)
    except struct.error:
        return None
    finally:
        file.seek(here)


def _of_blosc(header: bytes, size: int) -> int | None:
    *_, unpacked_size, _, packed_size = _BLOSC_HEADER.unpack(header)
    return int(unpacked_size) if packed_size == size else None


def _of_zstd(file: BinaryIO, offset: int, size: int) -> int | None:
    """Of one frame (RFC 8878), which must be all that there is: a library unpacks as many as follow one another."""
    magic, descriptor = struct.unpack("<IB", file.read(5))
    single, dictionary = descriptor & _SINGLE_SEGMENT, descriptor & _DICTIONARY
    if magic != _ZSTD_MAGIC or dictionary:
        return None
    width = {0: 1 if single else 0, 1: 2, 2: 4, 3: 8}[descriptor >> 6]
    if not single:
        file.read(1)  # of the window
    stated = int.from_bytes(file.read(width), "little") + (256 if width == 2 else 0)
    last = False
    while not last:
        (low, high) = struct.unpack("<HB", file.read(3))
        block = low | high << 16
        last, kind, length = bool(block & 1), block >> 1 & 3, block >> 3
        if kind == _RESERVED:
            return None
        file.seek(1 if kind == _RLE else length, 1)
    if descriptor & _CHECKSUM:
        file.seek(4, 1)
    return stated if width and file.tell() == offset + size else None

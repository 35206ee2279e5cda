"""Read an array's codecs and the headers of its chunks before any library decompresses them.

A few malicious bytes could otherwise decompress to more than fits the memory, or name any installed codec.
"""

from __future__ import annotations

import json
import struct
from typing import BinaryIO

_BLOSC_HEADER = struct.Struct("<4B3I")
"""Header of a Blosc chunk: four bytes, then uncompressed, block and compressed size (docs/FORMAT.md, section 10.1)."""

_ZSTD_MAGIC = 0xFD2FB528
"""First four bytes of a zstd frame, little-endian (RFC 8878, section 3.1.1; docs/FORMAT.md, section 10.2)."""

_SINGLE_SEGMENT_FLAG, _CHECKSUM_FLAG, _DICTIONARY_ID_FLAG = 1 << 5, 1 << 2, 3
"""Bits of a zstd frame header descriptor (RFC 8878, section 3.1.1.1.1; docs/FORMAT.md, section 10.2)."""

_RLE_BLOCK, _RESERVED_BLOCK = 1, 3
"""Types of a zstd block (RFC 8878, section 3.1.1.2.2; docs/FORMAT.md, section 10.2)."""


def codecs_of(metadata: bytes) -> tuple[list[str], list[str], list[str]] | None:
    """Return the codec names in an array's zarr.json: of the array, its chunks, its shard index; None if malformed."""
    try:
        array_codecs = json.loads(metadata)["codecs"]
        sharding = array_codecs[0]["configuration"]
        array, chunk, index = (
            [codec["name"] for codec in codecs]
            for codecs in (array_codecs, sharding["codecs"], sharding["index_codecs"])
        )
    except (ValueError, LookupError, TypeError, RecursionError):
        return None
    return array, chunk, index


def stated_size(file: BinaryIO, offset: int, size: int, blosc: bool) -> int | None:
    """Return the decompressed size in bytes that a chunk states and cannot exceed; None if its header is inconsistent.

    The position of `file` is restored.

    Args:
        file: file with the chunk.
        offset: position of the chunk in bytes.
        size: bytes of the compressed chunk, without its checksum.
        blosc: whether the compressor is blosc; else zstd.
    """
    position = file.tell()
    try:
        file.seek(offset)
        return _blosc_size(file.read(_BLOSC_HEADER.size), size) if blosc else _zstd_size(file, offset, size)
    except struct.error:
        return None
    finally:
        file.seek(position)


def _blosc_size(header: bytes, size: int) -> int | None:
    *_, unpacked_size, _, packed_size = _BLOSC_HEADER.unpack(header)
    return int(unpacked_size) if packed_size == size else None


def _zstd_size(file: BinaryIO, offset: int, size: int) -> int | None:
    """Return the content size stated by a zstd frame; None unless this one frame is the whole chunk."""
    magic, descriptor = struct.unpack("<IB", file.read(5))
    single, dictionary = descriptor & _SINGLE_SEGMENT_FLAG, descriptor & _DICTIONARY_ID_FLAG
    if magic != _ZSTD_MAGIC or dictionary:
        return None
    width = {0: 1 if single else 0, 1: 2, 2: 4, 3: 8}[descriptor >> 6]
    if not single:
        file.read(1)  # window descriptor
    stated = int.from_bytes(file.read(width), "little") + (256 if width == 2 else 0)
    last = False
    while not last:
        (low, high) = struct.unpack("<HB", file.read(3))
        block = low | high << 16
        last, kind, length = bool(block & 1), block >> 1 & 3, block >> 3
        if kind == _RESERVED_BLOCK:
            return None
        file.seek(1 if kind == _RLE_BLOCK else length, 1)
    if descriptor & _CHECKSUM_FLAG:
        file.seek(4, 1)
    return stated if width and file.tell() == offset + size else None

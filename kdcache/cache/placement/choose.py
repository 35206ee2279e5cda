"""Choose where the rows of a cache are held on this machine.

device   encoded, in the memory of the GPU that the student is trained on: gathered and decoded there
host     encoded, in the memory of the machine
mmap     encoded, in a memory-mapped file of fixed-width records on the local disk
stream   not held: read from the store block by block, in a block-shuffled order
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args

import torch

from kdcache.cache.format import zarr_store
from kdcache.cache.format.output_records import DEFAULT_OUTPUT
from kdcache.cache.format.row_axes import Axis, axis_of
from kdcache.cache.format.schema import Manifest
from kdcache.cache.format.vector_rows import EncodedRows
from kdcache.cache.format.verified_files import check_before_reading
from kdcache.cache.placement.mmap import MappedRows, Records, record_files
from kdcache.cache.placement.prefetch import RowsInMemory, RowSource
from kdcache.cache.placement.stream import StreamedRows
from kdcache.errors import UsageError
from kdcache.runtime.resources import free_disk, free_memory, home

Placement = Literal["device", "host", "mmap", "stream"]
PLACEMENTS: tuple[Placement, ...] = get_args(Placement)

_OF_DEVICE, _OF_HOST, _OF_DISK = 0.25, 0.5, 0.9
"""Fractions of the free memory or disk space that a cache may take: the student needs the rest."""

_MIXED_BYTES = 2**26
"""Bytes of the blocks of a stream that are shuffled together; with prefetching about three times this is in memory."""

_BLOCK_BYTES = 2**22
"""Smallest size in bytes of a block of a stream: reading one takes milliseconds, however small it is."""

_READ_BYTES = 2**23
"""Bytes of rows that are read at once when records are written."""


class PlacedRows(NamedTuple):
    """A source of rows and where they are held.

    Attributes:
        source: returns the rows.
        placement: where they are held.
        why: the reason in a few words, with the sizes that decided.
    """

    source: RowSource[Any]
    placement: Placement
    why: str


def place_rows(
    cache: Path,
    manifest: Manifest,
    device: torch.device | str,
    requested: Placement | Literal["auto"],
    views: Sequence[int],
    output: str = DEFAULT_OUTPUT,
) -> PlacedRows:
    """Load the rows of an output in some views with the requested placement; `auto` uses the first one that they fit.

    The tokens of sequences are loaded as the output `TOKENS`.

    Raises:
        UsageError: if the placement is unknown.
        IncompleteError: if the record files of the placement mmap do not fit on the disk.
        CorruptError: if the store differs from what was written.
    """
    plan = manifest.plan
    reader = zarr_store.output_reader(cache, plan, output)
    records = Records(reader.read(views[0], range(1)))
    folder = _records_of(manifest, output)
    axis = axis_of(plan, output)
    size = records.width * axis.rows * len(views)
    placement, why = (requested, "as requested") if requested != "auto" else _best(size, folder, device)
    if placement not in PLACEMENTS:
        raise UsageError(f"unknown placement {placement!r}", f"use one of auto, {', '.join(PLACEMENTS)}")
    if placement == "stream":
        block = axis.chunk * max(_BLOCK_BYTES // (records.width * axis.chunk), 1)
        return PlacedRows(
            StreamedRows(cache, plan, block, max(_MIXED_BYTES // (records.width * block), 1), output), placement, why
        )
    if placement == "mmap":
        return PlacedRows(_mapped(cache, axis, reader, records, folder, views), placement, why)
    check_before_reading(cache)  # in parallel, which reading is not
    all_ids = range(axis.rows)
    target = device if placement == "device" else "cpu"
    return PlacedRows(RowsInMemory({view: reader.read(view, all_ids).to(target) for view in views}), placement, why)


def _best(size: int, folder: Path, device: torch.device | str) -> tuple[Placement, str]:
    if torch.device(device).type != "cpu":
        free = free_memory(device)
        if size <= _OF_DEVICE * free:
            return "device", f"{_mb(size)} of {_mb(free)} free on it"
    free = free_memory()
    if size <= _OF_HOST * free:
        return "host", f"{_mb(size)} of {_mb(free)} free"
    disk = free_disk(folder)
    # Record files of an earlier run need no more disk space; otherwise the next run might get another placement.
    if size - sum(file.stat().st_size for file in folder.glob("*.records")) <= _OF_DISK * disk:
        return "mmap", f"{_mb(size)} exceed half of {_mb(free)} free memory"
    return "stream", f"{_mb(size)} exceed half of {_mb(free)} free memory and 90% of {_mb(disk)} free disk in {home()}"


def _mb(size: int) -> str:
    return f"{size / 1e6:,.1f} MB"


def _records_of(manifest: Manifest, output: str) -> Path:
    folder = home() / "records" / manifest.digest.removeprefix("sha256:")
    return folder if output == DEFAULT_OUTPUT else folder / output


def _mapped(
    cache: Path,
    axis: Axis,
    reader: zarr_store.RowReader[Any],
    records: Records[Any],
    folder: Path,
    views: Sequence[int],
) -> MappedRows[Any]:
    """Return rows in record files, which are written if they are not there."""
    rows = axis.chunk * max(_READ_BYTES // (records.width * axis.chunk), 1)

    def read(view: int) -> Iterator[EncodedRows]:
        check_before_reading(cache)  # in parallel, which reading is not
        for start in range(0, axis.rows, rows):
            yield reader.read(view, range(start, min(start + rows, axis.rows)))

    return MappedRows(record_files(folder, views, records.width * axis.rows, read), records, axis.rows)

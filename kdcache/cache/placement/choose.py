"""Where the rows of a cache are best held on this machine.

device   encoded, in the memory of the GPU that the student learns on: gathered and decoded there
host     encoded, in the memory of the machine
mmap     in a file of fixed-width records on the local disk, mapped into memory
stream   nowhere: read from the store block by block, in a block-shuffled order
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Literal, NamedTuple, get_args

import torch

from kdcache.cache.format import zarr_store
from kdcache.cache.format.codec import Rows
from kdcache.cache.format.schema import Manifest
from kdcache.cache.placement.mmap import Mapped, Records, record_files
from kdcache.cache.placement.prefetch import Memory, Place
from kdcache.cache.placement.stream import Streamed
from kdcache.errors import UsageError
from kdcache.runtime.resources import free_disk, free_memory, home

Placement = Literal["device", "host", "mmap", "stream"]
PLACEMENTS: tuple[Placement, ...] = get_args(Placement)

_OF_DEVICE, _OF_HOST, _OF_DISK = 0.25, 0.5, 0.9
"""Shares of what is free that a cache may take: the student needs the rest."""

_STREAMED = 2**26
"""Bytes of blocks that are mixed in a stream; with the next ones, and what is gathered ahead, some three times this."""

_BLOCK = 2**22
"""Bytes of a block of a stream, where a chunk is no larger: to read one takes milliseconds, however little it holds."""

_READ = 2**23
"""Bytes of rows that are read at once to be written as records."""


class PlacedRows(NamedTuple):
    """Rows in their place.

    Attributes:
        place: that answers for them.
        placement: which kind it is.
        why: in a few words, with the sizes that decided.
    """

    place: Place
    placement: Placement
    why: str


def place_rows(
    cache: Path,
    manifest: Manifest,
    device: torch.device | str,
    asked: Placement | Literal["auto"],
    views: Sequence[int],
) -> PlacedRows:
    """Bring the rows of some views of a cache to where they are asked for, or to the best place that they fit.

    Raises:
        UsageError: for a placement that is not known.
        IncompleteError: if the records that were asked for do not fit on the disk.
        CorruptError: if the store is not as it was written.
    """
    plan = manifest.plan
    records = Records(zarr_store.read_rows(cache, plan, views[0], range(1)))
    size = records.width * plan.dataset.samples * len(views)
    placement, why = (asked, "as asked") if asked != "auto" else _best(size, _records_of(manifest), device)
    if placement not in PLACEMENTS:
        raise UsageError(f"there is no placement {placement!r}", f"take one of auto, {', '.join(PLACEMENTS)}")
    if placement == "stream":
        block = plan.shape.chunk_rows * max(_BLOCK // (records.width * plan.shape.chunk_rows), 1)
        return PlacedRows(Streamed(cache, plan, block, max(_STREAMED // (records.width * block), 1)), placement, why)
    if placement == "mmap":
        return PlacedRows(_mapped(cache, manifest, records, views), placement, why)
    everything = range(plan.dataset.samples)
    reader = zarr_store.RowReader(cache, plan)
    where = device if placement == "device" else "cpu"
    return PlacedRows(Memory({view: reader.read(view, everything).to(where) for view in views}), placement, why)


def _best(size: int, folder: Path, device: torch.device | str) -> tuple[Placement, str]:
    if torch.device(device).type != "cpu":
        free = free_memory(device)
        if size <= _OF_DEVICE * free:
            return "device", f"{_mb(size)} of {_mb(free)} free there"
    free = free_memory()
    if size <= _OF_HOST * free:
        return "host", f"{_mb(size)} of {_mb(free)} free"
    disk = free_disk(folder)
    # Records that an earlier run has left take no more room; without them the next run might be placed otherwise.
    if size - sum(file.stat().st_size for file in folder.glob("*.records")) <= _OF_DISK * disk:
        return "mmap", f"{_mb(size)} are too much for the {_mb(free)} of memory that are free"
    return "stream", f"{_mb(size)} are too much for {_mb(free)} of memory and {_mb(disk)} of disk in {home()}"


def _mb(size: int) -> str:
    return f"{size / 1e6:,.1f} MB"


def _records_of(manifest: Manifest) -> Path:
    return home() / "records" / manifest.digest.removeprefix("sha256:")


def _mapped(cache: Path, manifest: Manifest, records: Records, views: Sequence[int]) -> Mapped:
    plan = manifest.plan
    reader = zarr_store.RowReader(cache, plan)
    rows = plan.shape.chunk_rows * max(_READ // (records.width * plan.shape.chunk_rows), 1)

    def read(view: int) -> Iterator[Rows]:
        for start in range(0, plan.dataset.samples, rows):
            yield reader.read(view, range(start, min(start + rows, plan.dataset.samples)))

    size = records.width * plan.dataset.samples
    return Mapped(record_files(_records_of(manifest), views, size, read), records, plan.dataset.samples)

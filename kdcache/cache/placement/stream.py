"""Read rows from the store block by block, for a cache that is larger than memory and than the free disk space.

A block is a run of chunks of the store. In a block-shuffled order (blocks in random order, the rows of a few blocks
shuffled together) each block is read once per epoch. Any other order works too but is slow: a batch then reads many
blocks.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Generic

import torch
from torch import Tensor

from kdcache.cache.format import zarr_store
from kdcache.cache.format.output_records import DEFAULT_OUTPUT
from kdcache.cache.format.row_axes import axis_of
from kdcache.cache.format.schema import Plan
from kdcache.cache.format.vector_rows import R
from kdcache.cache.format.verified_files import check_when_read, files_when_read
from kdcache.cache.placement.prefetch import Prefetcher, gather

_WINDOWS = 4
"""Number of prefetch windows that the rows of the mixed blocks are divided into."""


class StreamedRows(Generic[R]):
    """Rows that are read from the store when they are needed.

    Args:
        cache: folder of the cache.
        plan: of the cache.
        size: number of rows per block.
        mixed: number of blocks whose rows are shuffled together; twice as many are held in memory, for batches that
            span two groups of blocks.
        output: name of the output.
    """

    def __init__(self, cache: Path, plan: Plan, size: int, mixed: int, output: str = DEFAULT_OUTPUT) -> None:
        self._cache, self._plan, self._size, self._mixed, self._output = cache, plan, size, mixed, output
        self._open()

    def _open(self) -> None:
        """Open the store, with an empty table of blocks."""
        self._process = os.getpid()
        self._reader: zarr_store.RowReader[R] = zarr_store.output_reader(self._cache, self._plan, self._output)
        self._rows = axis_of(self._plan, self._output).rows
        self._count = -(-self._rows // self._size)
        self._max_blocks = min(2 * self._mixed, self._count * self._plan.views.count)
        # Blocks are held in slots of one table: a batch is gathered from all of them at once.
        none = self._reader.read(0, range(0))
        self._table = type(none).of(
            {
                name: torch.empty(self._max_blocks * self._size, *values.shape[1:], dtype=values.dtype)
                for name, values in none.arrays().items()
            }
        )
        self._slots: dict[tuple[int, int], int] = {}
        self._lock = threading.Lock()
        self._prefetcher: Prefetcher[R] = Prefetcher(self._fetch, max(self._mixed * self._size // _WINDOWS, 1))

    def __getstate__(self) -> dict[str, Any]:
        state = {name: vars(self)[name] for name in ("_cache", "_plan", "_size", "_mixed", "_output")}
        return state | {"files": files_when_read(self._cache)}

    def __setstate__(self, state: dict[str, Any]) -> None:
        if (files := state.pop("files")) is not None:
            check_when_read(files)
        vars(self).update(state)
        self._open()

    def rows(self, ids: Tensor, view: int) -> R:
        """Return the rows of samples `ids` [B] int64 in a view."""
        return self._prefetcher.rows(ids.cpu(), view)

    def prefetch(self, batches: Iterable[Tensor], view: int) -> None:
        """Read these batches of ids [B] int64 ahead, in this order."""
        self._prefetcher.prefetch(batches, view)

    def order(self, generator: torch.Generator) -> Tensor:
        """Return a block-shuffled order of all ids, [N] int64: random blocks, shuffled within each group of them."""
        parts = []
        for mixed in torch.split(torch.randperm(self._count, generator=generator), self._mixed):
            ids = torch.cat([torch.arange(ids.start, ids.stop) for ids in map(self._ids, mixed.tolist())])
            parts.append(ids[torch.randperm(len(ids), generator=generator)])
        return torch.cat(parts)

    def _ids(self, block: int) -> range:
        return range(block * self._size, min((block + 1) * self._size, self._rows))

    def _fetch(self, ids: Tensor, view: int) -> R:
        if self._process != os.getpid():
            self._open()  # in a forked worker: the lock may have been held at the time of the fork
        blocks = ids // self._size
        parts, order = [], []
        with self._lock:
            for some in torch.split(torch.unique(blocks), self._max_blocks):
                slots = self._load(view, some)[blocks]
                which = (slots >= 0).nonzero().squeeze(1)
                parts.append(gather(self._table, slots[which] * self._size + ids[which] % self._size))
                order.append(which)
        return parts[0] if len(parts) == 1 else gather(type(parts[0]).concatenate(parts), torch.cat(order).argsort())

    def _load(self, view: int, blocks: Tensor) -> Tensor:
        """Load blocks, at most as many as there are slots, and return the slot of each block, -1 for others."""
        slots = torch.full((self._count,), -1)
        wanted = {(view, block): block for block in blocks.tolist()}
        leaving = iter([key for key in self._slots if key not in wanted])
        for key, block in wanted.items():
            if key not in self._slots:
                rows = self._reader.read(view, self._ids(block))
                full = len(self._slots) == self._max_blocks
                slot = self._slots.pop(next(leaving)) if full else len(self._slots)
                for name, values in self._table.arrays().items():
                    values[slot * self._size : slot * self._size + len(rows)] = rows.arrays()[name]
                self._slots[key] = slot
            slots[block] = self._slots[key]
        return slots

"""Rows read from the store block by block, for a cache that is larger than memory and than the free disk.

Blocks are runs of chunks of the store. In a block-shuffled order (blocks drawn at random, the rows of a few of them
mixed) each is read once an epoch. Any other order is answered too, and slowly: a batch then reads many blocks.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kdcache.cache.format import zarr_store
from kdcache.cache.format.codec import Rows
from kdcache.cache.format.schema import Plan
from kdcache.cache.placement.prefetch import Ahead, gather

_WINDOWS = 4
"""Fetches ahead that the rows of mixed blocks are gathered in."""


class Streamed:
    """Rows of a cache, read when they are needed.

    Args:
        cache: its folder.
        plan: of the cache.
        size: rows of a block.
        mixed: how many blocks are; twice as many are kept in memory, for batches that begin in some and end in others.
    """

    def __init__(self, cache: Path, plan: Plan, size: int, mixed: int) -> None:
        self._cache, self._plan, self._size, self._mixed = cache, plan, size, mixed
        self._open()

    def _open(self) -> None:
        self._process = os.getpid()
        self._reader = zarr_store.RowReader(self._cache, self._plan)
        self._count = -(-self._plan.dataset.samples // self._size)
        self._most = min(2 * self._mixed, self._count * self._plan.views.count)
        # Kept blocks lie in slots of one table: a batch is gathered from all of them at once.
        self._table = Rows.of(
            {
                name: torch.empty(self._most * self._size, *none.shape[1:], dtype=none.dtype)
                for name, none in self._reader.read(0, range(0)).arrays().items()
            }
        )
        self._slots: dict[tuple[int, int], int] = {}
        self._lock = threading.Lock()
        self._ahead = Ahead(self._fetch, max(self._mixed * self._size // _WINDOWS, 1))

    def __getstate__(self) -> dict[str, Any]:
        return {name: vars(self)[name] for name in ("_cache", "_plan", "_size", "_mixed")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self._open()

    def rows(self, ids: Tensor, view: int) -> Rows:
        """The rows of samples `ids` [B] int64 in a view."""
        return self._ahead.rows(ids.cpu(), view)

    def expect(self, batches: Iterable[Tensor], view: int) -> None:
        """Read these batches of ids ahead, in this order."""
        self._ahead.expect(batches, view)

    def order(self, generator: torch.Generator) -> Tensor:
        """A block-shuffled order of all ids, [N] int64: within so many blocks it is random, and so are the blocks."""
        parts = []
        for mixed in torch.split(torch.randperm(self._count, generator=generator), self._mixed):
            ids = torch.cat([torch.arange(ids.start, ids.stop) for ids in map(self._ids, mixed.tolist())])
            parts.append(ids[torch.randperm(len(ids), generator=generator)])
        return torch.cat(parts)

    def _ids(self, block: int) -> range:
        return range(block * self._size, min((block + 1) * self._size, self._plan.dataset.samples))

    def _fetch(self, ids: Tensor, view: int) -> Rows:
        if self._process != os.getpid():
            self._open()  # a forked worker: the lock may have been taken when it was made
        blocks = ids // self._size
        parts, order = [], []
        with self._lock:
            for some in torch.split(torch.unique(blocks), self._most):
                slots = self._bring(view, some)[blocks]
                which = (slots >= 0).nonzero().squeeze(1)
                parts.append(gather(self._table, slots[which] * self._size + ids[which] % self._size))
                order.append(which)
        return parts[0] if len(parts) == 1 else gather(Rows.concatenate(parts), torch.cat(order).argsort())

    def _bring(self, view: int, blocks: Tensor) -> Tensor:
        """The slots of these blocks, at most as many as are kept, by number of the block; -1 for all others."""
        slots = torch.full((self._count,), -1)
        wanted = {(view, block): block for block in blocks.tolist()}
        leaving = iter([key for key in self._slots if key not in wanted])
        for key, block in wanted.items():
            if key not in self._slots:
                rows = self._reader.read(view, self._ids(block))
                full = len(self._slots) == self._most
                slot = self._slots.pop(next(leaving)) if full else len(self._slots)
                for name, values in self._table.arrays().items():
                    values[slot * self._size : slot * self._size + len(rows)] = rows.arrays()[name]
                self._slots[key] = slot
            slots[block] = self._slots[key]
        return slots

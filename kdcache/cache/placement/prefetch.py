"""Sources of encoded rows, and reading ahead.

Rows in memory are indexed. Rows on disk are fetched one window of batches at a time, in the order that was announced
with `prefetch`.
"""

from __future__ import annotations

import itertools
import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Generic, Protocol, TypeVar

import torch
from torch import Tensor

from kdcache.cache.format.vector_rows import EncodedRows, R

R_co = TypeVar("R_co", bound=EncodedRows, covariant=True)


def gather(rows: R, which: Tensor) -> R:
    """Return the rows at positions `which` [B] int64; several times faster than indexing, which takes masks as well."""
    return type(rows).of({name: values.index_select(0, which) for name, values in rows.arrays().items()})


class RowSource(Protocol[R_co]):
    """A source of encoded rows."""

    def rows(self, ids: Tensor, view: int) -> R_co:
        """Return the rows of samples `ids` [B] int64 in a view."""

    def prefetch(self, batches: Iterable[Tensor], view: int) -> None:
        """Announce the batches of ids [B] int64 that will be asked for, in this order."""

    def order(self, generator: torch.Generator) -> Tensor:
        """Return a random order of all ids, [N] int64, in which they can be read fast."""


class RowsInMemory(Generic[R]):
    """Rows in the memory of a device or of the host.

    Args:
        views: view index -> all rows of the view.
    """

    def __init__(self, views: Mapping[int, R]) -> None:
        self.views = views

    def rows(self, ids: Tensor, view: int) -> R:
        """Return the rows of samples `ids` [B] int64 in a view."""
        of_view = self.views[view]
        return gather(of_view, ids.to(next(iter(of_view.arrays().values())).device))

    def prefetch(self, batches: Iterable[Tensor], view: int) -> None:
        """Do nothing: all rows are in memory."""

    def order(self, generator: torch.Generator) -> Tensor:
        """Return a random order of all ids, [N] int64."""
        return torch.randperm(len(next(iter(self.views.values()))), generator=generator)


class Prefetcher(Generic[R]):
    """Fetches announced batches in a background thread before they are asked for.

    Announcements belong to the process that made them: in a forked worker there are none.

    Args:
        fetch: (ids [B] int64 on the CPU, view) -> rows; called in the background thread.
        window: number of rows per fetch; at most two fetches are pending.
    """

    def __init__(self, fetch: Callable[[Tensor, int], R], window: int) -> None:
        self._fetch, self._window = fetch, window
        self._reset()

    def _reset(self) -> None:
        self._process = os.getpid()
        self._pool: ThreadPoolExecutor | None = None
        self._announced: Iterator[list[Tensor]] = iter(())
        self._pending: deque[tuple[tuple[Tensor, ...], Future[R]]] = deque()
        self._ready: deque[tuple[Tensor, R]] = deque()
        self._view = 0

    def prefetch(self, batches: Iterable[Tensor], view: int) -> None:
        """Start to fetch these batches of ids of a view; earlier announcements are dropped."""
        pool = None
        if self._process == os.getpid():  # the lock of a future that was copied by a fork may never be released
            pool = self._pool
            for _, future in self._pending:
                future.cancel()
        self._reset()
        self._pool = pool or ThreadPoolExecutor(max_workers=1, thread_name_prefix="kdcache-prefetch")
        self._announced, self._view = self._windows(batches), view
        self._submit()
        self._submit()

    def _windows(self, batches: Iterable[Tensor]) -> Iterator[list[Tensor]]:
        window: list[Tensor] = []
        rows = 0
        for ids in batches:
            window.append(ids.cpu().long())
            rows += len(ids)
            if rows >= self._window:
                yield window
                window, rows = [], 0
        if window:
            yield window

    def _submit(self) -> None:
        window = next(self._announced, None)
        if window is not None and self._pool is not None:
            # A copy, for both the fetch and the comparison: the caller may overwrite its tensors.
            ids = torch.cat(window)
            batches = torch.split(ids, [len(batch) for batch in window])
            self._pending.append((batches, self._pool.submit(self._fetch, ids, self._view)))

    def rows(self, ids: Tensor, view: int) -> R:
        """Return the rows of samples `ids` [B] in a view: the prefetched ones if this is the next announced batch."""
        if view != self._view or self._process != os.getpid():
            return self._fetch(ids, view)
        if not self._ready and self._pending:
            window, future = self._pending.popleft()
            self._submit()
            rows = future.result()
            ends = list(itertools.accumulate(map(len, window)))
            self._ready.extend((batch, rows[end - len(batch) : end]) for batch, end in zip(window, ends, strict=True))
        if self._ready and torch.equal(self._ready[0][0], ids):
            return self._ready.popleft()[1]
        return self._fetch(ids, view)

"""Where encoded rows are held while students learn from them, and how they are gathered ahead of their use.

A place answers for ids of one view with encoded rows; what it costs is its own matter. Rows in memory are simply
indexed. Rows on disk are fetched a window of batches at a time, in the order that the trainer has announced.
"""

from __future__ import annotations

import itertools
import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Protocol

import torch
from torch import Tensor

from kdcache.cache.format.codec import Rows

Fetch = Callable[[Tensor, int], Rows]
"""(ids [B] int64 on the CPU, view) -> rows."""


def gather(rows: Rows, which: Tensor) -> Rows:
    """The rows at positions `which` [B] int64: several times quicker than the indexing that takes masks as well."""
    return Rows.of({name: values.index_select(0, which) for name, values in rows.arrays().items()})


class Place(Protocol):
    """Where rows are."""

    def rows(self, ids: Tensor, view: int) -> Rows:
        """The rows of samples `ids` [B] int64 in a view."""

    def expect(self, batches: Iterable[Tensor], view: int) -> None:
        """Be ready for these batches of ids, in this order."""

    def order(self, generator: torch.Generator) -> Tensor:
        """A random order of all ids, [N] int64, that this place serves quickly."""


class Memory:
    """Rows in the memory of a device, or of the host.

    Args:
        views: the rows of each view, by its number.
    """

    def __init__(self, views: Mapping[int, Rows]) -> None:
        self.views = views

    def rows(self, ids: Tensor, view: int) -> Rows:
        """The rows of samples `ids` [B] int64 in a view."""
        held = self.views[view]
        return gather(held, ids.to(held.logsumexp.device))

    def expect(self, batches: Iterable[Tensor], view: int) -> None:
        """Nothing need be made ready."""

    def order(self, generator: torch.Generator) -> Tensor:
        """A random order of all ids, [N] int64."""
        return torch.randperm(len(next(iter(self.views.values()))), generator=generator)


class Ahead:
    """Fetches the batches that were announced before they are asked for.

    Belongs to the process that announced them: in a worker that was forked it knows of none.

    Args:
        fetch: how rows are got; called in another thread.
        window: rows that are fetched at once; two windows are on their way at most.
    """

    def __init__(self, fetch: Fetch, window: int) -> None:
        self._fetch, self._window = fetch, window
        self._forget()

    def _forget(self) -> None:
        self._process = os.getpid()
        self._pool: ThreadPoolExecutor | None = None
        self._announced: Iterator[list[Tensor]] = iter(())
        self._coming: deque[tuple[tuple[Tensor, ...], Future[Rows]]] = deque()
        self._here: deque[tuple[Tensor, Rows]] = deque()
        self._view = 0

    def expect(self, batches: Iterable[Tensor], view: int) -> None:
        """Begin to fetch these batches of ids of a view; what was announced before is forgotten."""
        pool = None
        if self._process == os.getpid():  # a forked copy of a future may be locked for ever
            pool = self._pool
            for _, future in self._coming:
                future.cancel()
        self._forget()
        self._pool = pool or ThreadPoolExecutor(max_workers=1, thread_name_prefix="kdcache-ahead")
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
            # A copy, of which both the rows and the comparison are: the caller may use its tensors again.
            ids = torch.cat(window)
            batches = torch.split(ids, [len(batch) for batch in window])
            self._coming.append((batches, self._pool.submit(self._fetch, ids, self._view)))

    def rows(self, ids: Tensor, view: int) -> Rows:
        """The rows of samples `ids` in a view: those that lie ready, if it is their turn."""
        if view != self._view or self._process != os.getpid():
            return self._fetch(ids, view)
        if not self._here and self._coming:
            window, future = self._coming.popleft()
            self._submit()
            rows = future.result()
            ends = list(itertools.accumulate(map(len, window)))
            self._here.extend((batch, rows[end - len(batch) : end]) for batch, end in zip(window, ends, strict=True))
        if self._here and torch.equal(self._here[0][0], ids):
            return self._here.popleft()[1]
        return self._fetch(ids, view)

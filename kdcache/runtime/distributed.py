"""Ranks: processes that dump one teacher together, started by torchrun or `accelerate launch` on one or more machines.

They share a file system, and each writes its share of the shards, and then shards that slower ranks have not begun.
They communicate little: the first rank plans and creates the cache, broadcasts the plan, and seals the cache when all
ranks are done.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import TypeVar

from torch import distributed
from torch.distributed import PrefixStore, Store  # type: ignore[attr-defined]  # torch does not list them
from torch.distributed.rendezvous import rendezvous

from kdcache.errors import IncompleteError, KdcacheError
from kdcache.runtime.launched import agent_holds_store, n_processes

_START_TIMEOUT, _PASS_TIMEOUT = timedelta(minutes=30), timedelta(days=30)
"""How long ranks wait for one another to start, and to finish a pass of the teacher."""

T = TypeVar("T")


@dataclass(frozen=True)
class Ranks:
    """This process among the ranks that share the work.

    Attributes:
        rank: index of this process.
        count: number of ranks.
        group: process group of all ranks; None for a single process.
        store: of the ranks' rendezvous, in which they claim work; None if each does its own share only.
    """

    rank: int = 0
    count: int = 1
    group: distributed.ProcessGroup | None = None
    store: Store | None = None

    @property
    def is_first(self) -> bool:
        """Whether this rank creates and seals the cache."""
        return self.rank == 0

    def named(self) -> str:
        """Return `, rank R of N` for progress messages; an empty string for a single process."""
        return f", rank {self.rank} of {self.count}" if self.count > 1 else ""

    def share(self, work: Sequence[T]) -> list[T]:
        """Return the share of some work that this rank does."""
        return list(work[self.rank :: self.count])

    def claim(self, work: Sequence[T], name: str) -> Iterator[T]:
        """Yield the work that this rank does: its share, then what others have not begun.

        Each item is claimed as late as possible, and is yielded on one rank. The first item of a share always stays
        with its rank. Ranks that finish early begin at the end of the work, where the owners arrive last.

        Args:
            work: the same on all ranks.
            name: of this work; the ranks use it once.

        Raises:
            IncompleteError: if the store is gone, because the rank or the agent that held it has ended.
        """
        yield from self.share(work[: self.count])
        later = range(self.count, len(work))
        own = [index for index in later if index % self.count == self.rank]
        if self.store is None:
            yield from (work[index] for index in own)
            return
        of_others = [index for index in reversed(later) if index % self.count != self.rank]
        for index in (*own, *of_others):
            with _peer_errors():
                is_first = self.store.add(f"claims/{name}/{index}", 1) == 1
            if is_first:
                yield work[index]

    def tell(self, what: T | KdcacheError | None) -> T:
        """Broadcast a value from the first rank, and return it on all ranks.

        Raises:
            KdcacheError: if the value is an error.
            IncompleteError: if another rank has ended.
        """
        if self.count > 1:
            values = [what]
            with _peer_errors():
                distributed.broadcast_object_list(values, src=0, group=self.group)
            what = values[0]
        if isinstance(what, KdcacheError):
            raise what
        return what  # type: ignore[return-value]  # that of the first rank, which is a T

    def gather(self, value: T) -> list[T]:
        """Return the value of every rank, in order, on the first rank; an empty list on the others.

        Raises:
            IncompleteError: if another rank has ended.
        """
        if self.count == 1:
            return [value]
        values: list[T | None] | None = [None] * self.count if self.is_first else None
        with _peer_errors():
            distributed.gather_object(value, values, dst=0, group=self.group)
        return values or []  # type: ignore[return-value]  # all of them were replaced

    def wait(self) -> None:
        """Wait until all ranks call this.

        Raises:
            IncompleteError: if another rank has ended.
        """
        if self.count > 1:
            with _peer_errors():
                distributed.barrier(self.group)


@contextmanager
def _peer_errors() -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:
        raise IncompleteError(
            f"another rank has ended or did not start: {str(error).splitlines()[0]}",
            "read its output, then run the same command again, with any number of ranks: finished shards are kept",
        ) from error


def meet(timeout: timedelta) -> tuple[Store, int, int]:
    """Return the store in which ranks find one another, the index of this rank, and their number.

    If torchrun has restarted the ranks, an agent's store still has the addresses of those before: each attempt has keys
    of its own.
    """
    store, rank, count = next(rendezvous("env://", timeout=timeout))
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") if agent_holds_store() else "0"
    return PrefixStore(f"attempt {attempt}", store), rank, count


@contextmanager
def join_ranks() -> Iterator[Ranks]:
    """Join the ranks that torchrun or `accelerate launch` started, and yield them; a single process without these.

    Raises:
        IncompleteError: if one of them does not start.
    """
    if n_processes() == 1:
        yield Ranks()
        return
    with _peer_errors():
        store, rank, count = meet(_START_TIMEOUT)
        store.set_timeout(_START_TIMEOUT)
        distributed.init_process_group("gloo", store=store, rank=rank, world_size=count, timeout=_START_TIMEOUT)
    try:
        with _peer_errors():
            # Starting has a shorter timeout than working.
            group = distributed.new_group(timeout=_PASS_TIMEOUT, backend="gloo")
        yield Ranks(rank, count, group, store)  # type: ignore[arg-type]  # an int is returned to ranks outside the group
    finally:
        distributed.destroy_process_group()

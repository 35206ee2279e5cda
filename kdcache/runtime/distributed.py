"""Several processes that dump one teacher: started by torchrun or `accelerate launch`, on one machine or many.

They share a file system, and shards are dealt out among them. What they say to one another is little: the first one
plans and creates, tells the others what is to be done, and seals when all are through.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import TypeVar

from torch import distributed

from kdcache.errors import IncompleteError, KdcacheError

_LONGEST_START, _LONGEST_PASS = timedelta(minutes=30), timedelta(days=30)
T = TypeVar("T")


@dataclass(frozen=True)
class Ranks:
    """This process among those that share the work.

    Attributes:
        rank: its number.
        count: how many there are.
        group: all of them; None for one alone.
    """

    rank: int = 0
    count: int = 1
    group: distributed.ProcessGroup | None = None

    @property
    def is_first(self) -> bool:
        """Whether this is the one that creates and seals."""
        return self.rank == 0

    def named(self) -> str:
        """For progress: which one of how many; nothing for one alone."""
        return f", rank {self.rank} of {self.count}" if self.count > 1 else ""

    def share(self, work: Sequence[T]) -> list[T]:
        """What of some work is this one's to do."""
        return list(work[self.rank :: self.count])

    def tell(self, what: T | KdcacheError | None) -> T:
        """What the first one says, to all of them.

        Raises:
            KdcacheError: if that is what it says.
            IncompleteError: if another rank has ended.
        """
        if self.count > 1:
            said = [what]
            with _others():
                distributed.broadcast_object_list(said, src=0, group=self.group)
            what = said[0]
        if isinstance(what, KdcacheError):
            raise what
        return what  # type: ignore[return-value]  # only the first one's counts, and that is a T

    def gather(self, value: T) -> list[T]:
        """Return the value of every rank, in order, on the first rank; an empty list on the others.

        Raises:
            IncompleteError: if another rank has ended.
        """
        if self.count == 1:
            return [value]
        values: list[T | None] | None = [None] * self.count if self.is_first else None
        with _others():
            distributed.gather_object(value, values, dst=0, group=self.group)
        return values or []  # type: ignore[return-value]  # all of them were replaced

    def wait(self) -> None:
        """Until all of them are here.

        Raises:
            IncompleteError: if another rank has ended.
        """
        if self.count > 1:
            with _others():
                distributed.barrier(self.group)


def is_first() -> bool:
    """Whether this process is the first of those that torchrun or `accelerate launch` has started, or alone."""
    return os.environ.get("RANK", "0") == "0"


def n_processes() -> int:
    """Return how many processes torchrun or `accelerate launch` has started; 1 for one alone."""
    return int(os.environ.get("WORLD_SIZE", "1"))


@contextmanager
def _others() -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:
        raise IncompleteError(
            f"another rank has ended, or has not come: {str(error).splitlines()[0]}",
            "see what it says; then run the same command again, with any number of ranks: finished shards are kept",
        ) from error


@contextmanager
def join_ranks() -> Iterator[Ranks]:
    """The ranks that torchrun or `accelerate launch` has started; this process alone where there are none.

    Raises:
        IncompleteError: if one of them does not come.
    """
    count = int(os.environ.get("WORLD_SIZE", "1"))
    if count == 1:
        yield Ranks()
        return
    with _others():
        distributed.init_process_group("gloo", timeout=_LONGEST_START)
    try:
        with _others():
            # One that never came is not waited for as long as one that has work to do.
            group = distributed.new_group(timeout=_LONGEST_PASS, backend="gloo")
        yield Ranks(distributed.get_rank(), count, group)  # type: ignore[arg-type]  # a number is for those left out
    finally:
        distributed.destroy_process_group()

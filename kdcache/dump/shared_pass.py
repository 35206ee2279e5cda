"""What a pass has in common for teachers of images and of tokens: ranks that share it, and what an error leaves."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from torch import nn

from kdcache.cache.writer import CacheWriter
from kdcache.dump.job import pending_shards
from kdcache.errors import IncompleteError, InterruptedRun, KdcacheError, MismatchError
from kdcache.models import weights_digest
from kdcache.runtime.distributed import Ranks
from kdcache.runtime.progress import Task

SAME = "start every rank with the same command, the same files and the same versions"

_FILE_SYSTEM_DELAY = 120
"""Seconds within which files of other machines must appear on a shared file system."""


class OwnShare:
    """Progress of the rows of this rank's share; rows that it makes for slower ranks are not reported."""

    def __init__(self, task: Task, total: int) -> None:
        self._task, self._left = task, total

    def advance(self, amount: int = 1, note: str = "") -> None:
        """Report rows, up to the total."""
        reported = min(amount, self._left)
        if reported:
            self._left -= reported
            self._task.advance(reported, note)


def interrupted(interrupt: KeyboardInterrupt, out: Path) -> InterruptedRun:
    """Return the error of a dump that Ctrl-C stopped, which says what is kept of its cache."""
    kept = f"{out} keeps its finished shards" if out.exists() else "nothing was written"
    return InterruptedRun.of(interrupt, f"interrupted; {kept}", "run it again to resume")


def check_same_weights(network: nn.Module, writer: CacheWriter) -> None:
    """Check that the teacher of this rank has the weights of the first one's.

    Raises:
        MismatchError: if it does not.
    """
    if (digest := weights_digest(network)) != (of_first := writer.plan.teacher.weights_digest):
        raise MismatchError(f"this rank's teacher has the weights {digest}, that of the first rank {of_first}", SAME)


@contextmanager
def keeping_finished_shards(writer: CacheWriter, ranks: Ranks) -> Iterator[None]:
    """Say in an error what it leaves; a cache that this run created, without a finished shard, is deleted."""
    try:
        yield
    except IncompleteError:
        raise
    except KdcacheError as error:
        if writer.has_finished_shards:
            raise type(error)(
                error.what, f"{error.fix}; {writer.path} keeps its finished shards, and the same command resumes"
            ) from error
        if ranks.count == 1:
            writer.discard()
        raise


def wait_for_files(writer: CacheWriter, ranks: Ranks) -> None:
    """Wait until the commit markers of the other ranks are visible: a network file system may delay them."""
    deadline = time.monotonic() + (_FILE_SYSTEM_DELAY if ranks.count > 1 else 0)
    while pending_shards(writer) and time.monotonic() < deadline:
        time.sleep(1)

"""One run at a time writes a cache: its first process holds a lock on a file in the folder, which says who that is."""

from __future__ import annotations

import errno
import fcntl
import os
import socket
import time
from pathlib import Path

from kdcache.errors import UsageError

LOCK = "writer.lock"

_LONGEST_LOOK = 0.5
"""Seconds: somebody who only looks whether a lock is held holds it meanwhile."""

_held: dict[Path, int] = {}
"""The handles of this process, by cache."""


def hold(cache: Path, folder: Path) -> None:
    """Let no other process write a cache until `release`, or until this one ends.

    Args:
        cache: where it is, or is to be.
        folder: where its files are now.

    Raises:
        UsageError: if another process writes it; names that.
    """
    if _is_held_here(cache):
        return
    try:
        handle = os.open(folder / LOCK, os.O_RDWR | os.O_CREAT, 0o666)
    except FileNotFoundError:  # the folder is gone: its writer was faster
        raise _taken(cache, "another process") from None
    try:
        _lock(handle, cache)
        if os.fstat(handle).st_nlink == 0:
            raise UsageError(
                f"{cache} was written by another process, which has ended just now",
                "run the same command again: it ends at once if the cache is complete",
            )
        os.ftruncate(handle, 0)
        os.pwrite(handle, f"process {os.getpid()} on {socket.gethostname()}".encode(), 0)
    except BaseException:
        os.close(handle)
        raise
    _held[cache.absolute()] = handle


def release(cache: Path) -> None:
    """Let others write a cache, if this process held it."""
    if _is_held_here(cache):
        os.close(_held.pop(cache.absolute()))


def check_not_held(cache: Path) -> None:
    """That no other process is writing a cache.

    Raises:
        UsageError: if one is; names it.
    """
    if _is_held_here(cache):
        return
    try:
        handle = os.open(cache / LOCK, os.O_RDWR)
    except OSError:  # nobody has begun it, or it is not ours to write
        return
    try:
        _lock(handle, cache)
    finally:
        os.close(handle)


def _is_held_here(cache: Path) -> bool:
    return cache.absolute() in _held


def _let_go() -> None:
    """In a forked process: those that load images outlive a killed one by some seconds, and would hold its locks."""
    while _held:
        os.close(_held.popitem()[1])


os.register_at_fork(after_in_child=_let_go)


def _lock(handle: int, cache: Path) -> None:
    late = time.monotonic() + _LONGEST_LOOK
    while True:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno != errno.EWOULDBLOCK:
                return  # a file system without locks
            if time.monotonic() > late:
                raise _taken(cache, os.pread(handle, 200, 0).decode(errors="replace") or "another process") from None
            time.sleep(0.02)
        else:
            return


def _taken(cache: Path, who: str) -> UsageError:
    return UsageError(f"{cache} is being written by {who}", "wait until that has ended, or give another name with -o")

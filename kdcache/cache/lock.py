"""Lock a cache for writing: the first process of a run holds a lock on a file in the folder that names the process.

The lock is not filelock's, since it moves with the folder when that is renamed, and messages name its holder.
"""

from __future__ import annotations

import errno
import fcntl
import os
import socket
import time
from pathlib import Path

from kdcache.errors import UsageError

LOCK = "writer.lock"

_CHECK_TIMEOUT = 0.5
"""Seconds to wait for a process that only checks the lock, and holds it meanwhile."""

_held: dict[Path, int] = {}
"""Open file descriptors of the locks that this process holds, by cache."""


def hold(cache: Path, folder: Path) -> None:
    """Lock a cache until `release`, or until this process ends.

    Args:
        cache: final path of the cache.
        folder: folder that holds its files now.

    Raises:
        UsageError: if another process holds the lock; with the name of that process.
    """
    if _is_held_here(cache):
        return
    try:
        handle = os.open(folder / LOCK, os.O_RDWR | os.O_CREAT, 0o666)
    except FileNotFoundError:  # its writer has just renamed or deleted the folder
        raise _taken(cache, "another process") from None
    try:
        _lock(handle, cache)
        if os.fstat(handle).st_nlink == 0:
            raise _taken(cache, "another process")
        os.ftruncate(handle, 0)
        os.pwrite(handle, f"process {os.getpid()} on {socket.gethostname()}".encode(), 0)
    except BaseException:
        os.close(handle)
        raise
    _held[cache.absolute()] = handle


def release(cache: Path) -> None:
    """Release the lock of a cache, if this process holds it."""
    if _is_held_here(cache):
        os.close(_held.pop(cache.absolute()))


def check_not_held(cache: Path) -> None:
    """Check that no other process writes a cache.

    Raises:
        UsageError: if one does; with the name of that process.
    """
    if _is_held_here(cache):
        return
    try:
        handle = os.open(cache / LOCK, os.O_RDWR)
    except OSError:  # there is no such cache, or no permission to write it
        return
    try:
        _lock(handle, cache)
    finally:
        os.close(handle)


def _is_held_here(cache: Path) -> bool:
    return cache.absolute() in _held


def _close_inherited() -> None:
    """Close inherited locks in a forked process, since data loader workers outlive a killed parent by seconds."""
    while _held:
        os.close(_held.popitem()[1])


os.register_at_fork(after_in_child=_close_inherited)


def _lock(handle: int, cache: Path) -> None:
    """Lock an open file, waiting shortly for processes that only check it.

    Raises:
        UsageError: if another process holds the lock.
    """
    deadline = time.monotonic() + _CHECK_TIMEOUT
    while True:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno != errno.EWOULDBLOCK:
                return  # a file system without locks
            if time.monotonic() > deadline:
                raise _taken(cache, os.pread(handle, 200, 0).decode(errors="replace") or "another process") from None
            time.sleep(0.02)
        else:
            return


def _taken(cache: Path, holder: str) -> UsageError:
    return UsageError(
        f"{cache} is being written by {holder}", "wait until that process ends, or write to another folder"
    )

"""Lock a cache for writing: the first process of a run locks a file in the folder, which names that process."""

from __future__ import annotations

import errno
import fcntl
import os
import socket
import time
from pathlib import Path

from kdcache.errors import UsageError

LOCK = "writer.lock"

_CHECK_SECONDS = 0.5
"""Seconds to wait for a lock: a process that only checks whether it is held holds it for a moment."""

_held: dict[Path, int] = {}
"""Cache -> handle of its lock file, of the locks that this process holds."""


def hold(cache: Path, folder: Path) -> None:
    """Lock a cache for writing until `release`, or until this process ends.

    Args:
        cache: its final path.
        folder: where its files are now.

    Raises:
        UsageError: if another process writes it; names the process.
    """
    if _is_held_here(cache):
        return
    try:
        handle = os.open(folder / LOCK, os.O_RDWR | os.O_CREAT, 0o666)
    except FileNotFoundError:  # another process has renamed the folder
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
    """Unlock a cache, if this process holds its lock."""
    if _is_held_here(cache):
        os.close(_held.pop(cache.absolute()))


def check_not_held(cache: Path) -> None:
    """Check that no other process is writing a cache.

    Raises:
        UsageError: if one is; names the process.
    """
    if _is_held_here(cache):
        return
    try:
        handle = os.open(cache / LOCK, os.O_RDWR)
    except OSError:  # the cache does not exist, or is not writable
        return
    try:
        _lock(handle, cache)
    finally:
        os.close(handle)


def _is_held_here(cache: Path) -> bool:
    return cache.absolute() in _held


def _close_in_child() -> None:
    """Close the locks in a forked process: a worker may outlive a killed parent by seconds and hold its locks."""
    while _held:
        os.close(_held.popitem()[1])


os.register_at_fork(after_in_child=_close_in_child)


def _lock(handle: int, cache: Path) -> None:
    late = time.monotonic() + _CHECK_SECONDS
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
    return UsageError(f"{cache} is being written by {who}", "wait until that has ended, or use another name with -o")

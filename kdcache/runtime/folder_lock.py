"""A lock on a folder that one process at a time writes: the operating system releases it when the process ends."""

from __future__ import annotations

import errno
import fcntl
import os
import shlex
import socket
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from kdcache.errors import UsageError

_PATIENCE = 2.0
"""Seconds to wait for a holder that is about to end, such as the workers of a killed process."""

_handles: set[int] = set()
"""Open locks of this process."""


@contextmanager
def locked(folder: Path, patience: float = _PATIENCE) -> Iterator[None]:
    """Keep other processes from writing a folder, which need not exist.

    The lock is on a hidden file beside the folder, which names the holder; on a file system without locks, nothing is
    locked.

    Args:
        folder: to be written.
        patience: seconds to wait for another holder.

    Raises:
        UsageError: if another process holds the lock; it names that process.
    """
    path = lock_file(folder)
    path.parent.mkdir(parents=True, exist_ok=True)
    handle = _acquire(path, folder, patience)
    _handles.add(handle)
    try:
        os.ftruncate(handle, 0)
        os.pwrite(handle, _this_process().encode(errors="backslashreplace"), 0)
        yield
    finally:
        with suppress(OSError):
            path.unlink()
        _handles.discard(handle)
        os.close(handle)


def lock_file(folder: Path) -> Path:
    """Return the hidden file that names the process which is writing a folder, and is there as long as it is."""
    return folder.absolute().with_name(f".{folder.name}.lock")


def _acquire(path: Path, folder: Path, patience: float) -> int:
    """Open and lock a file that no holder has removed meanwhile, and return its descriptor."""
    deadline = time.monotonic() + patience
    while True:
        handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno != errno.EWOULDBLOCK:
                return handle
            holder = os.pread(handle, 500, 0).decode(errors="replace") or "another process"
            os.close(handle)
            if time.monotonic() > deadline:
                raise UsageError(
                    f"{folder} is being written by {holder}",
                    "wait until that process ends, or write to another folder with -o",
                ) from None
            time.sleep(0.02)
            continue
        with suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(handle), path.stat()):
                return handle
        os.close(handle)


def _this_process() -> str:
    command = shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]])
    return f"process {os.getpid()} on {socket.gethostname()} ({command[:300]})"


def _close_in_child() -> None:
    """Close inherited locks: forked loader workers outlive a killed process by some seconds, and would hold them."""
    while _handles:
        os.close(_handles.pop())


os.register_at_fork(after_in_child=_close_in_child)

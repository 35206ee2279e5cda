"""Scratch names next to an output: only what kdcache has made under such a name is deleted."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from kdcache.cache.preconditions import not_ours
from kdcache.errors import UsageError

MARKER = "kdcache-scratch"
"""Name of the file that marks a scratch folder as kdcache's; it is locked while the folder is in use."""

_DATA = "data"
_CONTENT = b"Temporary data of kdcache. It may be deleted if no kdcache process is running.\n"


@contextmanager
def scratch_file(folder: Path) -> Iterator[Path]:
    """Yield the path of a new file in a scratch folder; both are deleted at the end.

    What a killed process has left in the folder is deleted first.

    Raises:
        UsageError: if `folder` exists and was not made by kdcache, or is used by another process.
    """
    if os.path.lexists(folder):
        _check_ours(folder)
    folder.mkdir(parents=True, exist_ok=True)
    marker, data = folder / MARKER, folder / _DATA
    handle = os.open(marker, os.O_RDWR | os.O_CREAT, 0o666)
    try:
        _lock(handle, folder)
        os.pwrite(handle, _CONTENT, 0)
        data.unlink(missing_ok=True)
        try:
            yield data
        finally:
            data.unlink(missing_ok=True)
            marker.unlink(missing_ok=True)
            with suppress(OSError):  # something else has been put into it
                folder.rmdir()
    finally:
        os.close(handle)


def _check_ours(folder: Path) -> None:
    """Check that a folder is empty, or holds the marker and nothing else than a scratch file."""
    if folder.is_symlink() or not folder.is_dir():
        raise not_ours(folder)
    names = {path.name for path in folder.iterdir()}
    if not names:
        return
    if MARKER not in names or not names <= {MARKER, _DATA}:
        raise not_ours(folder)
    # A process may have been killed after it created the marker and before it wrote it.
    if (folder / MARKER).read_bytes() not in (b"", _CONTENT):
        raise not_ours(folder)


def _lock(handle: int, folder: Path) -> None:
    try:
        fcntl.lockf(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        raise _in_use(folder) from None
    if os.fstat(handle).st_nlink == 0:  # its process has deleted it meanwhile
        raise _in_use(folder)


def _in_use(folder: Path) -> UsageError:
    return UsageError(f"{folder} is used by another kdcache process", "wait for it, or give another name with -o")

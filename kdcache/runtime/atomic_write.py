"""Write files atomically: after a crash or on a full disk, a file is complete, as it was before, or absent."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

SUFFIX = ".partial"
"""Suffix of the temporary file or folder, which lies beside the final one and hence on the same file system."""


def temporary(path: Path) -> Path:
    """Return the path under which a file or folder is written before it is renamed to `path`."""
    return path.with_name(path.name + SUFFIX)


def write_file(path: Path, content: bytes | memoryview | str) -> Path:
    """Write a file atomically, a string as UTF-8 (bytes of a path that are not, as \\xff), and return its path.

    Raises:
        OSError: if it cannot be written; an earlier file of that name is then unchanged.
    """
    with open_atomic(path) as file:
        file.write(content.encode(errors="backslashreplace") if isinstance(content, str) else content)
    return path


@contextmanager
def open_atomic(path: Path, suffix: str = SUFFIX) -> Iterator[BinaryIO]:
    """Open a file for writing that replaces `path`, with its mode, when the block ends without an exception.

    Args:
        path: final path; its folder must exist.
        suffix: of the temporary file; must be unique where several processes write `path` without a lock.

    Yields:
        The temporary file, which may be seeked. It is removed if the block raises.

    Raises:
        OSError: if the file cannot be written; an earlier file of that name is then unchanged.
    """
    unfinished = path.with_name(path.name + suffix)
    try:
        with unfinished.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        if path.exists():
            shutil.copymode(path, unfinished)
        unfinished.replace(path)
    except BaseException:
        with suppress(OSError):
            unfinished.unlink()
        raise
    flush(path.parent)


def move_into_place(source: Path, path: Path) -> Path:
    """Rename a finished file or folder of the same file system to `path`, which names it only once it is on the disk.

    Raises:
        OSError: if it cannot be flushed or renamed.
    """
    if source.is_dir():
        for entry in source.rglob("*"):
            if not entry.is_symlink():
                flush(entry)
    flush(source)
    source.replace(path)
    flush(path.parent)
    return path


def flush(path: Path) -> None:
    """Flush a file's content, or a folder's list of names, to the disk (fsync)."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)

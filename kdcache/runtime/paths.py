"""Paths as users write them, in pipeline files, options and calls, and the rights to read and write there."""

from __future__ import annotations

import errno
import os
import re
from pathlib import Path

from kdcache.errors import UsageError

_VARIABLE = re.compile(r"\$(\w+|\{[^}]*\})")


def expand(given: str | Path) -> Path:
    """Return a path with `~`, `~user`, `$VAR` and `${VAR}` replaced; one that exists as it is written stays so.

    Raises:
        UsageError: if a variable in it is not set.
    """
    text = os.fspath(given)
    if os.path.lexists(text):
        return Path(text)
    expanded = os.path.expandvars(text)
    if (unset := _VARIABLE.search(expanded)) is not None:
        name = unset[1].strip("{}")
        raise UsageError(f"the variable {name} in the path {text} is not set", f"export {name}=..., or write the path")
    return Path(expanded).expanduser() if expanded.startswith("~") else Path(expanded)


READ_PERMISSION = "give this user the right to read them (chmod -R u+rX FOLDER, or chown), or run as their owner"
"""The fix for files and folders that may not be read."""


def existing(folder: Path) -> Path:
    """Return the folder, or its closest parent that exists."""
    while not folder.exists():
        folder = folder.parent
    return folder


def check_writable(path: Path) -> None:
    """Check that this user may create a file or folder at `path`.

    Raises:
        UsageError: if a folder on the way to it is a file, on a read-only file system, or not writable.
    """
    try:
        folder = existing(path.absolute().parent)
    except PermissionError as error:
        raise UsageError(f"no permission to look into the folder of {path}", fix_for(error)) from None
    if not folder.is_dir():
        raise UsageError(f"{folder} is a file, not a folder", "use another path with -o")
    if os.statvfs(folder).f_flag & os.ST_RDONLY:
        raise UsageError(f"{folder} is on a read-only file system", _READ_ONLY)
    if not os.access(folder, os.W_OK | os.X_OK):
        raise UsageError(f"no permission to write in the folder {folder}", _WRITE_PERMISSION.format(folder=folder))


_READ_ONLY = "use a path on another disk with -o, or mount it writable"
_WRITE_PERMISSION = (
    "use a folder that you can write to with -o, or give this user the right to write: chmod u+w {folder}"
)


def fix_for(error: OSError) -> str:
    """Return what to do about an error of the operating system that concerns a path."""
    path = None if error.filename is None else Path(os.fsdecode(error.filename))
    if error.errno == errno.EROFS:
        return _READ_ONLY
    if path is None:
        return "use a path that you can write to, with -o"
    if error.errno in (errno.EACCES, errno.EPERM):
        try:
            is_readable = os.access(path, os.R_OK | (os.X_OK if path.is_dir() else 0))
            exists = path.exists()
        except PermissionError:
            exists, is_readable = True, False
        if exists and not is_readable:
            return READ_PERMISSION
        return _WRITE_PERMISSION.format(folder=path if path.is_dir() else path.parent)
    if error.errno == errno.ENOENT and not path.parent.exists():
        return f"make the folder {path.parent}, or correct the path"
    return "use a path that you can write to, with -o"

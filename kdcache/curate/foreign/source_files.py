"""The files of an import: one, or those in a folder."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path

from kdcache.cache.format.verified_files import record_of
from kdcache.errors import UsageError


def files_of(source: Path, suffixes: Sequence[str]) -> list[Path]:
    """Return the files of a folder, or the one file, with one of some suffixes; all have the same.

    Raises:
        UsageError: if there are none, or some with each of two suffixes.
    """
    files = sorted(path for path in source.iterdir() if path.suffix in suffixes) if source.is_dir() else [source]
    found = {path.suffix for path in files}
    if len(found) != 1 or not found <= set(suffixes) or not files[0].is_file():
        raise UsageError(
            f"{source} is not a {' or '.join(suffixes)} file, or a folder of such files of one kind",
            "name the file, or its folder",
        )
    return files


def digest_of_files(files: Sequence[Path]) -> str:
    """Return the sha256 of some files: of their names and digests, one after the other."""
    listed = "".join(f"{path.name} {record_of(path).sha256}\n" for path in files)
    return hashlib.sha256(listed.encode()).hexdigest()

"""Whether a cache is what its manifest says."""

from __future__ import annotations

import hashlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from kdcache.cache.schema import FileRecord
from kdcache.errors import CorruptError


def record_of(path: Path) -> FileRecord:
    """Size and sha256 of a file."""
    with path.open("rb") as opened:
        sha = hashlib.file_digest(opened, "sha256").hexdigest()
        return FileRecord(size=opened.tell(), sha256=sha)


def check_files(cache: Path, expected: dict[str, FileRecord]) -> None:
    """That every file is there, with the size and the bytes that were written.

    zarr itself would read a missing or an empty chunk as zeros, without a word.

    Raises:
        CorruptError: which names the first file that differs, and how many do.
    """
    with ThreadPoolExecutor() as pool:
        problems = [found for found in pool.map(lambda item: _problem(cache, *item), expected.items()) if found]
    if problems:
        more = f" ({len(problems)} files of {len(expected)} are not as they were written)" if len(problems) > 1 else ""
        raise CorruptError(
            f"{cache} is damaged: {problems[0]}{more}",
            "get the cache again from where it was made, or delete it and dump the teacher again",
        )


def _problem(cache: Path, name: str, expected: FileRecord) -> str | None:
    path = cache / name
    if path.is_symlink() or not path.is_file():
        return f"{name} is missing or not a plain file"
    if path.stat().st_size != expected.size:
        return f"{name} has {path.stat().st_size} bytes, {expected.size} were written"
    if record_of(path).sha256 != expected.sha256:
        return f"{name} holds other bytes than were written"
    return None

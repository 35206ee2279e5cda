"""Check the files of a cache against their sha256: each before its first use, and once per machine.

A file that was checked is recognized by its identity: device, inode, size, and times of modification and change. A
file that was changed since, however, has another. What was checked is remembered in kdcache's own folder.

A small cache is checked when it is opened. The shards of a large one are checked when they are first read: every reader
of the store calls `check_before_reading`.
"""

from __future__ import annotations

import hashlib
import json
import os
import stat
import threading
import time
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

from kdcache.cache.format.schema import FileRecord
from kdcache.errors import CorruptError
from kdcache.runtime.atomic_write import open_atomic
from kdcache.runtime.progress import Progress, Silent
from kdcache.runtime.resources import home

AGAIN = "download the cache again, or delete it and dump the teacher again"
"""How to fix a damaged cache."""

_SETTLED_SECONDS = 2.0
"""A file is remembered if it was last changed so long before it was hashed: times of files may be that coarse."""

_SAVED_SECONDS = 5.0
"""What was checked while reading is written at most this often."""

Identity = tuple[int, int, int, int, int]
"""(device, inode, size, time of modification, time of change), times in nanoseconds."""


class Problem(NamedTuple):
    """A defect of a cache.

    Attributes:
        where: file, or view, shard and sample.
        what: what is wrong with it.
    """

    where: str
    what: str

    def __str__(self) -> str:
        return f"{self.where}: {self.what}"


def record_of(path: Path) -> FileRecord:
    """Return size and sha256 of a file."""
    with path.open("rb") as file:
        sha = hashlib.file_digest(file, "sha256").hexdigest()
        return FileRecord(size=file.tell(), sha256=sha)


def raise_first(cache: Path, problems: list[Problem], of: str) -> None:
    """Raise the first of some problems.

    Raises:
        CorruptError: with the first problem and their number, if there is any.
    """
    if problems:
        more = f" ({len(problems)} {of} differ from what was written)" if len(problems) > 1 else ""
        raise CorruptError(f"{cache} is damaged: {problems[0].where} {problems[0].what}{more}", AGAIN)


def damaged_files(cache: Path, expected: Mapping[str, FileRecord]) -> list[Problem]:
    """Return every file that is missing or differs from its record; all are hashed, in parallel."""
    with ThreadPoolExecutor() as pool:
        problems = pool.map(lambda item: _problem(cache, *item), expected.items())
    return [Problem(name, what) for name, what in zip(expected, problems, strict=True) if what]


def _problem(cache: Path, name: str, expected: FileRecord) -> str | None:
    """Return what is wrong with a file; None if it is as it was written."""
    if (what := _misfit(_status(f"{cache}/{name}"), expected)) is not None:
        return what
    if (sha256 := record_of(cache / name).sha256) != expected.sha256:
        return f"has the sha256 {sha256[:12]}..., {expected.sha256[:12]}... was written"
    return None


def _misfit(status: os.stat_result | None, expected: FileRecord) -> str | None:
    """Return what is wrong with a file, without reading it."""
    if status is None or not stat.S_ISREG(status.st_mode):
        return "is missing or not a plain file"
    if status.st_size != expected.size:
        return f"has {status.st_size} bytes, {expected.size} were written"
    return None


def _status(path: str) -> os.stat_result | None:
    """Return the status of a file, not followed if it is a link; None if there is none."""
    try:
        return os.lstat(path)
    except (OSError, ValueError):
        return None


def _identity(status: os.stat_result) -> Identity:
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns


class VerifiedFiles:
    """The files of an opened cache: those that were checked, and those that have to be, before they are used.

    It can be sent to another process, which then checks what it reads.

    Args:
        cache: folder of the cache.
        digest: its root digest, by which what was checked is remembered.
        expected: name -> size and sha256 of the files that may be read.
    """

    def __init__(self, cache: Path, digest: str, expected: Mapping[str, FileRecord]) -> None:
        self.cache, self._digest, self._expected = cache.absolute(), digest, dict(expected)
        self._open()

    def _open(self) -> None:
        self._lock, self._saved = threading.Lock(), time.monotonic()
        self._known = self._read()
        self._unchecked: set[str] = set()

    def __getstate__(self) -> dict[str, Any]:
        return {name: vars(self)[name] for name in ("cache", "_digest", "_expected", "_unchecked")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        unchecked = self._unchecked
        self._open()
        self._unchecked = unchecked

    def find_unchecked(self) -> list[Problem]:
        """Find the files that have to be hashed, without reading them, and return those that cannot be right."""
        problems, folder = [], str(self.cache)
        for name, record in self._expected.items():
            status = _status(f"{folder}/{name}")
            if (what := _misfit(status, record)) is not None:
                problems.append(Problem(name, what))
            elif status is None or self._known.get(name) != _identity(status):
                self._unchecked.add(name)
        return problems

    @property
    def unchecked_bytes(self) -> int:
        """Size of the files that have to be hashed."""
        return sum(self._expected[name].size for name in self._unchecked)

    def check(self, names: Iterable[str] | None = None, progress: Progress | None = None) -> None:
        """Hash those of some files, or of all, that were not checked.

        Raises:
            CorruptError: with the first file that differs from its record, and the number of such files.
        """
        wanted = [name for name in (self._expected if names is None else names) if name in self._unchecked]
        if not wanted:
            return
        began = time.time_ns()
        with (progress or Silent()).task(f"check {self.cache.name}", len(wanted), "files") as task:

            def check(name: str) -> Problem | None:
                status = _status(f"{self.cache}/{name}")
                what = _problem(self.cache, name, self._expected[name])
                with self._lock:
                    if what is None and status is not None:
                        self._unchecked.discard(name)
                        if status.st_ctime_ns < began - _SETTLED_SECONDS * 1e9:
                            self._known[name] = _identity(status)
                    task.advance(1)
                return Problem(name, what) if what is not None else None

            with ThreadPoolExecutor() as pool:
                problems = [found for found in pool.map(check, wanted) if found is not None]
        raise_first(self.cache, problems, f"files of {len(wanted)}")
        if names is None or time.monotonic() - self._saved > _SAVED_SECONDS:
            self._save()

    @property
    def _memory(self) -> Path:
        where = hashlib.sha256(os.fsencode(self.cache)).hexdigest()[:16]
        return home() / "verified" / f"{self._digest.removeprefix('sha256:')}-{where}.json"

    def _read(self) -> dict[str, Identity]:
        try:
            stored = json.loads(self._memory.read_text())
            return {str(name): (*map(int, identity),) for name, identity in stored.items()}  # type: ignore[misc]
        except (OSError, ValueError, AttributeError, TypeError):
            return {}  # nothing is remembered: it is checked again

    def _save(self) -> None:
        self._saved = time.monotonic()
        with self._lock:
            known = self._read() | self._known
        with suppress(OSError):  # a full disk, or a home that cannot be written: it is checked again next time
            self._memory.parent.mkdir(parents=True, exist_ok=True)
            with open_atomic(self._memory, f".{os.getpid()}-{threading.get_ident()}.partial") as file:
                file.write(json.dumps(known).encode())


_opened: dict[Path, VerifiedFiles] = {}


def check_when_read(files: VerifiedFiles) -> None:
    """Let the files that were not checked be checked when they are first read in this process."""
    _opened[files.cache] = files


def files_when_read(cache: Path) -> VerifiedFiles | None:
    """Return the files of a cache that are checked when they are read; None if there are none."""
    return _opened.get(cache.absolute())


def check_before_reading(cache: Path, names: Iterable[str] | None = None, progress: Progress | None = None) -> None:
    """Check those of some files of a cache, or of all, that were not checked when it was opened.

    Raises:
        CorruptError: if one differs from what was written.
    """
    if _opened and (files := files_when_read(cache)) is not None:
        files.check(names, progress)

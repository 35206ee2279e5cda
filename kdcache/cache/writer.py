"""Writing a cache, one shard transaction at a time.

Leftovers are deleted, all arrays of the shard are written and flushed to disk, and the commit marker is put in place
last. A cache without its manifest is unsealed; the same command goes on where the last marker stands.
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import numpy as np
import numpy.typing as npt

from kdcache.cache import layout
from kdcache.cache.codec import Rows
from kdcache.cache.schema import (
    MANIFEST,
    PLAN,
    Commit,
    FileRecord,
    Manifest,
    Plan,
    Record,
    Summary,
    canonical,
    read_commit,
    read_plan,
    seal,
)
from kdcache.cache.verify import check_files, record_of
from kdcache.errors import IncompleteError, MismatchError, UsageError


class CacheWriter:
    """A cache that is being written.

    Args:
        path: the `.kdcache` folder; made where it is not there, continued where it is unsealed.
        plan: what is to be written.
        labels: [N] int32.
        keys: [N] uint64, content keys.

    Raises:
        UsageError: if `path` is something else, or a sealed cache.
        MismatchError: if it is an unsealed cache that was begun with another plan; names what differs.
    """

    def __init__(self, path: Path, plan: Plan, labels: npt.NDArray[np.int32], keys: npt.NDArray[np.uint64]) -> None:
        self.path, self.plan = path, plan
        self.began = not path.exists()
        if self.began:
            self._create(labels, keys)
        else:
            self._go_on()

    def _create(self, labels: npt.NDArray[np.int32], keys: npt.NDArray[np.uint64]) -> None:
        # Made beside its place and renamed, so that a folder of that name is always a cache with its plan.
        unfinished = self.path.with_name(self.path.name + ".partial")
        shutil.rmtree(unfinished, ignore_errors=True)
        unfinished.mkdir(parents=True)
        layout.create_store(unfinished, self.plan, labels, keys)
        for name in layout.common_files(unfinished):
            _flush(unfinished / name)
        _put(unfinished / PLAN, self.plan)
        unfinished.rename(self.path)
        _flush(self.path.parent)

    def _go_on(self) -> None:
        if (self.path / MANIFEST).exists():
            raise UsageError(f"{self.path} is already a sealed cache", "give another name with -o, or delete it first")
        if not (self.path / PLAN).exists():
            raise UsageError(f"{self.path} exists and is not a cache", "give another name with -o")
        begun = read_plan(self.path / PLAN)
        differ = _differences(begun.model_dump(), self.plan.model_dump())
        if differ:
            raise MismatchError(
                "\n  ".join([f"{self.path} was begun with other settings (then, now):", *differ]),
                "set them as they were to go on, or delete the folder to begin anew",
            )

    def commit_path(self, view: int, shard: int) -> Path:
        """Where the marker of a shard lies."""
        return self.path / "commits" / str(view) / f"{shard}.json"

    def pending(self, view: int) -> list[int]:
        """The shards of a view that have no marker yet."""
        return [shard for shard in range(self.plan.shards) if not self.commit_path(view, shard).exists()]

    def write(self, view: int, shard: int, rows: Rows) -> None:
        """Write one shard, whole."""
        files = layout.shard_files(self.plan.encoding, view, shard)
        for name in files.values():
            leftover = self.path / name
            leftover.unlink(missing_ok=True)
            for orphan in leftover.parent.glob(f"{leftover.name}*.partial"):
                orphan.unlink()
        layout.write_shard(self.path, self.plan, view, shard, rows)
        records = {}
        for name in sorted(files.values()):
            _flush(self.path / name)
            records[name] = record_of(self.path / name)
        for folder in {(self.path / name).parent for name in files.values()}:
            _flush(folder)
        marker = self.commit_path(view, shard)
        marker.parent.mkdir(parents=True, exist_ok=True)
        _put(marker, Commit(files=records))

    def seal(self, summary: Summary) -> Manifest:
        """Check that everything is there, and put the manifest in place.

        Raises:
            IncompleteError: if a shard is missing.
            CorruptError: if a written file is no longer what it was.
        """
        missing = [(view, shard) for view in range(self.plan.views.count) for shard in self.pending(view)]
        if missing:
            raise IncompleteError(f"{len(missing)} shards of {self.path} are missing", "run the same command again")
        files: dict[str, FileRecord] = {}
        for view in range(self.plan.views.count):
            for shard in range(self.plan.shards):
                marker = self.commit_path(view, shard)
                files |= read_commit(marker).files
                files[marker.relative_to(self.path).as_posix()] = record_of(marker)
        check_files(self.path, files)
        files |= {name: record_of(self.path / name) for name in layout.common_files(self.path)}
        manifest = seal(self.plan, summary, files)
        _put(self.path / MANIFEST, manifest)
        (self.path / PLAN).unlink()
        return manifest

    def discard(self) -> None:
        """Delete what this run began: it cannot be gone on with."""
        if self.began:
            shutil.rmtree(self.path)


def _differences(then: object, now: object, name: str = "") -> list[str]:
    if isinstance(then, dict) and isinstance(now, dict):
        keys = dict.fromkeys([*then, *now])
        return [
            line
            for key in keys
            for line in _differences(then.get(key), now.get(key), f"{name}.{key}" if name else str(key))
        ]
    return [] if then == now else [f"{name}: {then}, {now}"]


def _put(path: Path, record: Record) -> None:
    """Write a record in one step: after a crash the file is whole, or not there."""
    unfinished = path.with_name(path.name + ".partial")
    with unfinished.open("wb") as opened:
        opened.write(canonical(record))
        opened.flush()
        os.fsync(opened.fileno())
    unfinished.replace(path)
    _flush(path.parent)


def _flush(path: Path) -> None:
    """Ask the system to bring a file, or a folder's list of names, to the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)

"""Writing a cache, one shard transaction at a time.

Leftovers are deleted, all arrays of the shard are written and flushed to disk, and the commit marker is put in place
last. A cache without its manifest is unsealed; the same command goes on where the last marker stands.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from kdcache.cache.format import array_specs, zarr_store
from kdcache.cache.format.codec import Rows
from kdcache.cache.format.fingerprints import Inputs
from kdcache.cache.format.integrity import check_files, record_of
from kdcache.cache.format.read_records import read_commit, read_plan
from kdcache.cache.format.schema import (
    MANIFEST,
    PLAN,
    Commit,
    FileRecord,
    Manifest,
    Plan,
    Record,
    Summary,
    canonical,
    commit_file,
    seal,
)
from kdcache.cache.format.tail_basis import TailBasis
from kdcache.cache.lock import LOCK, check_not_held, hold, release
from kdcache.errors import CorruptError, IncompleteError, MismatchError, UsageError
from kdcache.runtime.atomic_write import flush, temporary, write_file


def check_outside(path: Path) -> None:
    """That a path does not lie inside a cache, which is no place for anything else.

    Raises:
        UsageError: if it does.
    """
    inside = next((folder for folder in path.absolute().parents if (folder / array_specs.STORE).is_dir()), None)
    if inside is not None:
        raise UsageError(f"{path} lies inside the cache {inside}", "give a folder outside of it with -o")


def check_place(path: Path) -> None:
    """That a cache can be begun at `path`, or gone on with.

    Raises:
        UsageError: if it is something else, a sealed cache, inside of one, or if another process writes it.
    """
    if (path / MANIFEST).exists():
        raise UsageError(f"{path} is already a sealed cache", "give another name with -o, or delete it first")
    check_outside(path)
    if path.exists() and not (path / PLAN).exists():
        raise UsageError(f"{path} exists and is not a cache", "give another name with -o")
    check_not_held(path)


class CacheWriter:
    """A cache that is being written.

    Attributes:
        path: the `.kdcache` folder.
        plan: what is to be written.
        began: whether this run has made the folder.
    """

    def __init__(self, path: Path, plan: Plan) -> None:
        self.path, self.plan, self.began = path, plan, False

    @classmethod
    def begin(
        cls,
        path: Path,
        plan: Plan,
        labels: npt.NDArray[np.int32],
        keys: npt.NDArray[np.uint64],
        basis: TailBasis | None = None,
    ) -> CacheWriter:
        """Make a new cache, or go on with an unsealed one; no other process can, until it is sealed or `release`d.

        Args:
            path: the `.kdcache` folder.
            plan: what is to be written.
            labels: [N] int32.
            keys: [N] uint64, content keys.
            basis: of the teacher's tail, where the plan has one.

        Raises:
            UsageError: if `path` is something else, a sealed cache, or written by another process.
            MismatchError: if it is an unsealed cache that was begun with another plan; names what differs.
        """
        check_place(path)
        writer = cls(path, plan)
        writer.began = not path.exists()
        try:
            if writer.began:
                writer._create(labels, keys, basis)
            else:
                hold(path, path)
                if (path / MANIFEST).exists():  # another process has sealed it, and let go
                    (path / LOCK).unlink(missing_ok=True)
                check_place(path)
                check_begun_alike(path, read_plan(path / PLAN), plan)
                writer._mend(labels, keys, basis)
        except BaseException:
            release(path)
            raise
        return writer

    @classmethod
    def join(cls, path: Path) -> CacheWriter:
        """Help with a cache that another process of the same run has begun, and holds."""
        return cls(path, read_plan(path / PLAN))

    def _create(self, labels: npt.NDArray[np.int32], keys: npt.NDArray[np.uint64], basis: TailBasis | None) -> None:
        # Made beside its place and renamed, so that a folder of that name is always a cache with its plan.
        _make_folder(self.path.parent)
        folder = temporary(self.path)
        folder.mkdir(exist_ok=True)
        hold(self.path, folder)
        with _unfinished(folder):
            self._create_store(folder, labels, keys, basis)
            write_file(folder / PLAN, canonical(self.plan))
            if self.path.exists():
                raise UsageError(
                    f"{self.path} was begun by another process just now",
                    "run the same command again, or give another name with -o",
                )
            folder.rename(self.path)
        flush(self.path.parent)

    def _create_store(
        self, folder: Path, labels: npt.NDArray[np.int32], keys: npt.NDArray[np.uint64], basis: TailBasis | None
    ) -> None:
        zarr_store.create_store(folder, self.plan, labels, keys, basis)
        for path in folder.rglob("*"):
            flush(path)

    def _mend(self, labels: npt.NDArray[np.int32], keys: npt.NDArray[np.uint64], basis: TailBasis | None) -> None:
        """Make good what was damaged since it was written, or it would be sealed, or never be."""
        with _unfinished(temporary(self.path / array_specs.STORE)) as folder:
            self._create_store(folder, labels, keys, basis)
            for name in array_specs.common_files(self.plan):
                _make_folder((self.path / name).parent)
                (folder / name).replace(self.path / name)
        for path in (self.path.parent, self.path, *self.path.rglob("*")):
            if path.is_dir():
                flush(path)  # the killed run may have had no time to
        for view in range(self.plan.views.count):
            for shard in range(self.plan.shards):
                if not self._is_whole(view, shard):
                    self.commit_path(view, shard).unlink(missing_ok=True)

    def _is_whole(self, view: int, shard: int) -> bool:
        try:
            files = read_commit(self.commit_path(view, shard)).files
            if sorted(files) != sorted(array_specs.shard_files(self.plan, view, shard)):
                return False
            check_files(self.path, files)
        except (FileNotFoundError, CorruptError):
            return False
        return True

    def commit_path(self, view: int, shard: int) -> Path:
        """Where the marker of a shard lies."""
        return self.path / commit_file(view, shard)

    def pending(self, view: int) -> list[int]:
        """The shards of a view that have no marker yet."""
        return [shard for shard in range(self.plan.shards) if not self.commit_path(view, shard).exists()]

    def write(
        self, view: int, shard: int, rows: Rows, inputs: Inputs, recorded: npt.NDArray[Any] | None = None
    ) -> None:
        """Write one shard, whole; `recorded` is what its views were drawn from, where the plan has an array of that."""
        files = self._cleared(view, shard)
        zarr_store.write_shard(self.path, self.plan, view, shard, rows, inputs, recorded)
        self._commit(view, shard, {name: record_of(self.path / name) for name in files})

    def adopt(self, view: int, shard: int, source: Path, records: dict[str, FileRecord]) -> None:
        """Take one shard, whole, from another cache: its files are linked, or copied where they cannot be.

        Args:
            view: which view.
            shard: which shard.
            source: folder of the other cache.
            records: of its files.
        """
        files = self._cleared(view, shard)
        for name in files:
            try:
                os.link(source / name, self.path / name)
            except OSError:  # another file system, or one without links
                shutil.copyfile(source / name, self.path / name)
        self._commit(view, shard, {name: records[name] for name in files})

    def _cleared(self, view: int, shard: int) -> list[str]:
        """The files of a shard, of which nothing is left that an interrupted run may have written."""
        files = sorted(array_specs.shard_files(self.plan, view, shard))
        for name in files:
            leftover = self.path / name
            _make_folder(leftover.parent)
            leftover.unlink(missing_ok=True)
            for orphan in leftover.parent.glob(f"{leftover.name}.*.partial"):
                orphan.unlink()
        return files

    def _commit(self, view: int, shard: int, records: dict[str, FileRecord]) -> None:
        for name in records:
            flush(self.path / name)
        for folder in sorted({(self.path / name).parent for name in records}):
            flush(folder)
        marker = self.commit_path(view, shard)
        _make_folder(marker.parent)
        write_file(marker, canonical(Commit(files=records)))

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
        files |= {name: record_of(self.path / name) for name in array_specs.common_files(self.plan)}
        manifest = seal(self.plan, summary, files)
        write_file(self.path / MANIFEST, canonical(manifest))
        (self.path / LOCK).unlink(missing_ok=True)
        (self.path / PLAN).unlink()
        release(self.path)
        return manifest

    def discard(self) -> None:
        """Delete what this run began: it cannot be gone on with."""
        if self.began:
            # Under another name first, so that a kill in the middle leaves nothing that looks like a cache.
            shutil.rmtree(self.path.rename(temporary(self.path)))
        release(self.path)


def check_begun_alike(path: Path, then: Record, now: Record, name: str = "") -> None:
    """That a cache was begun with what it is to be gone on with, or a sealed one extended.

    Args:
        path: of the cache.
        then: the plan, or the part of it called `name`, that it was begun with.
        now: the same of this run.
        name: of the part.

    Raises:
        MismatchError: with every setting that differs, then and now.
    """
    differ = [f"{key}: {old}, {new}" for key, old, new in differences(then.model_dump(), now.model_dump(), name)]
    if differ:
        raise MismatchError(
            "\n  ".join([f"{path} was begun with other settings (then, now):", *differ]),
            "set them as they were, or dump the teacher without --extend"
            if (path / MANIFEST).exists()
            else "set them as they were to go on, or delete the folder to begin anew",
        )


def differences(then: object, now: object, name: str = "") -> list[tuple[str, object, object]]:
    """What two nested dicts differ in: (key, then, now), the key with those above it."""
    if isinstance(then, dict) and isinstance(now, dict):
        keys = dict.fromkeys([*then, *now])
        return [
            found
            for key in keys
            for found in differences(then.get(key), now.get(key), f"{name}.{key}" if name else str(key))
        ]
    return [] if then == now else [(name, then, now)]


@contextmanager
def _unfinished(folder: Path) -> Iterator[Path]:
    """An empty folder to work in; what is left in it in the end is deleted, and so is what a killed run left."""
    folder.mkdir(exist_ok=True)
    try:
        for leftover in folder.iterdir():
            if leftover.is_dir():
                shutil.rmtree(leftover)
            elif leftover.name != LOCK:
                leftover.unlink()
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _make_folder(path: Path) -> None:
    """Make a folder and those above it, and bring their names to the disk."""
    if not path.is_dir():
        _make_folder(path.parent)
        path.mkdir(exist_ok=True)
        flush(path.parent)

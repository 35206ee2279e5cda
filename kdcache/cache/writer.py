"""Write a cache, one shard transaction at a time.

For each shard, leftovers are deleted, all arrays are written and flushed to disk, and the commit marker is put in place
last. A cache without a manifest is unsealed; the same command resumes it at the first shard without a marker.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator, Mapping, Set
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from kdcache.cache.changed_images import affected_shards, differs_in_images_alone
from kdcache.cache.format import array_specs, store_files, zarr_store
from kdcache.cache.format.fingerprints import Inputs
from kdcache.cache.format.integrity import check_files
from kdcache.cache.format.output_records import DEFAULT_OUTPUT
from kdcache.cache.format.read_records import read_commit, read_plan
from kdcache.cache.format.schema import (
    MANIFEST,
    PLAN,
    PROBES,
    Commit,
    FileRecord,
    Manifest,
    Plan,
    Summary,
    canonical,
    commit_file,
    seal,
)
from kdcache.cache.format.stored_bases import Bases, arrays_of
from kdcache.cache.format.vector_rows import EncodedRows
from kdcache.cache.format.verified_files import record_of
from kdcache.cache.lock import LOCK, hold, release
from kdcache.cache.preconditions import check_place, check_same_plan, created_meanwhile, sealed_meanwhile
from kdcache.errors import CorruptError, IncompleteError, counted
from kdcache.runtime.atomic_write import flush, temporary, write_file

Labels = npt.NDArray[np.int32]
Keys = npt.NDArray[np.uint64]

Arrays = Mapping[str, npt.NDArray[Any]]
"""Arrays by path in the store."""


class CacheWriter:
    """A cache that is being written.

    Attributes:
        path: the `.kdcache` folder.
        plan: of the cache.
        created: whether this run created the folder.
        remade: number of finished shards that were dropped because their images changed.
    """

    def __init__(self, path: Path, plan: Plan) -> None:
        self.path, self.plan, self.created, self.remade = path, plan, False, 0

    @classmethod
    def begin(
        cls,
        path: Path,
        plan: Plan,
        labels: Labels,
        keys: Keys,
        bases: Bases | None = None,
        fixed_images: Set[int] | None = None,
        probes: bytes | None = None,
        arrays: Arrays | None = None,
    ) -> CacheWriter:
        """Create a cache, or resume an unsealed one, and lock it until it is sealed or `release` is called.

        Args:
            path: the `.kdcache` folder.
            plan: of the cache.
            labels: [N] int32.
            keys: [N] uint64, content keys.
            bases: of the outputs whose encodings have one, by name of the output.
            fixed_images: if the cache is resumed with some other images, the shards of these are dropped; the samples
                with these ids must be the same, as all rows depend on them. None: no image may be another one.
            probes: contents of the file `PROBES` of a new cache; None for no such file.
            arrays: what sequences have beside labels and keys: counts and vocabulary, by path in the store.

        Raises:
            UsageError: if `path` is something else, a sealed cache, or being written by another process.
            MismatchError: if it is an unsealed cache with another plan; names what differs.
        """
        if (path / MANIFEST).exists():
            raise sealed_meanwhile(path)
        check_place(path)
        writer, others = cls(path, plan), {**arrays_of(bases or {}), **(arrays or {})}
        writer.created = not path.exists()
        try:
            if writer.created:
                writer._create(labels, keys, others, probes)
            else:
                hold(path, path)
                if (path / MANIFEST).exists():
                    (path / LOCK).unlink(missing_ok=True)
                    raise sealed_meanwhile(path)
                check_place(path)
                note = writer._drop_changed_images(labels, keys, fixed_images)
                check_same_plan(path, read_plan(path / PLAN), plan, note=note)
                writer._repair(labels, keys, others)
        except BaseException:
            release(path)
            raise
        return writer

    @classmethod
    def join(cls, path: Path) -> CacheWriter:
        """Return a writer of a cache that another process of the same run has created and locked."""
        return cls(path, read_plan(path / PLAN))

    def _create(self, labels: Labels, keys: Keys, others: Arrays, probes: bytes | None) -> None:
        """Create the folder, with store and plan, under a temporary name, and rename it.

        A folder with the final name is therefore always a cache with its plan.
        """
        _make_folder(self.path.parent)
        folder = temporary(self.path)
        folder.mkdir(exist_ok=True)
        hold(self.path, folder)
        try:
            with _work_folder(folder):
                self._create_store(folder, labels, keys, others)
                if probes is not None:
                    write_file(folder / PROBES, probes)
                write_file(folder / PLAN, canonical(self.plan))
                if self.path.exists():
                    raise created_meanwhile(self.path)
                folder.rename(self.path)
        except OSError:
            if self.path.exists():  # the other process renamed its folder between the check and the renaming
                raise created_meanwhile(self.path) from None
            raise
        flush(self.path.parent)

    def _create_store(self, folder: Path, labels: Labels, keys: Keys, others: Arrays) -> None:
        zarr_store.create_store(folder, self.plan, labels, keys, others)
        for path in folder.rglob("*"):
            flush(path)

    def _drop_changed_images(self, labels: Labels, keys: Keys, fixed: Set[int] | None) -> str:
        """Drop the finished shards whose images changed, and write the plan of the changed data set.

        Returns:
            Why this is not possible although nothing but images changed; "" otherwise.
        """
        before = read_plan(self.path / PLAN)
        if not differs_in_images_alone(before, self.plan):
            return ""
        try:
            affected = affected_shards(self.path, before, labels, keys, fixed)
        except ValueError as reason:
            return str(reason)
        finished = [which for which in self._shards() if self.commit_path(*which).exists()]
        dropped = [which for which in finished if which[1] in affected]
        if dropped and dropped == finished:
            return "images of every finished shard changed, so nothing could be kept"
        for marker in (self.commit_path(*which) for which in dropped):
            marker.unlink()
            flush(marker.parent)
        write_file(self.path / PLAN, canonical(self.plan))
        self.remade = len(dropped)
        return ""

    def _repair(self, labels: Labels, keys: Keys, others: Arrays) -> None:
        """Write the common files again, and drop the commit markers of shards that were damaged since."""
        with _work_folder(temporary(self.path / array_specs.STORE)) as folder:
            self._create_store(folder, labels, keys, others)
            for name in store_files.common_files(self.plan):
                _make_folder((self.path / name).parent)
                (folder / name).replace(self.path / name)
        for path in (self.path.parent, self.path, *self.path.rglob("*")):
            if path.is_dir():
                flush(path)  # the killed run may not have flushed it
        for view, shard in self._shards():
            if not self._is_intact(view, shard):
                self.commit_path(view, shard).unlink(missing_ok=True)

    def _shards(self) -> list[tuple[int, int]]:
        return [(view, shard) for view in range(self.plan.views.count) for shard in range(self.plan.shards)]

    def _is_intact(self, view: int, shard: int) -> bool:
        try:
            files = read_commit(self.commit_path(view, shard)).files
            if sorted(files) != sorted(store_files.shard_files(self.plan, view, shard)):
                return False
            check_files(self.path, files)
        except (FileNotFoundError, CorruptError):
            return False
        return True

    def commit_path(self, view: int, shard: int) -> Path:
        """Return the path of the commit marker of a shard."""
        return self.path / commit_file(view, shard)

    def pending(self, view: int) -> list[int]:
        """Return the shards of a view that have no commit marker yet."""
        return [shard for shard in range(self.plan.shards) if not self.commit_path(view, shard).exists()]

    def write(
        self,
        view: int,
        shard: int,
        rows: EncodedRows | None,
        inputs: Inputs | None,
        recorded: npt.NDArray[Any] | None = None,
        outputs: Mapping[str, EncodedRows] | None = None,
    ) -> None:
        """Write all rows of one shard, and commit it.

        Args:
            view: index of the view.
            shard: index of the shard.
            rows: all rows of the shard of the class logits; None if the plan has none.
            inputs: fingerprints of some of its images; None of sequences.
            recorded: what the view was drawn from, if the plan has an array for it.
            outputs: all rows of the shard of each other output, by name, and of sequences their `TOKENS`.
        """
        of_outputs = {**({} if rows is None else {DEFAULT_OUTPUT: rows}), **(outputs or {})}
        files = self._clear(view, shard)
        records = zarr_store.write_shard(self.path, self.plan, view, shard, of_outputs, inputs, recorded)
        self._commit(view, shard, {name: records[name] for name in files})

    def adopt(self, view: int, shard: int, source: Path, records: dict[str, FileRecord]) -> None:
        """Take one shard over from another cache: its files are hard-linked, or copied if that is not possible.

        Args:
            view: index of the view.
            shard: index of the shard.
            source: folder of the other cache.
            records: of the other cache's files.

        Raises:
            CorruptError: if a copy differs from the record.
        """
        files = self._clear(view, shard)
        copied: dict[str, FileRecord] = {}
        for name in files:
            try:
                os.link(source / name, self.path / name)
            except OSError:  # another file system, or one without hard links
                shutil.copyfile(source / name, self.path / name)
                copied[name] = records[name]
        check_files(self.path, copied)
        self._commit(view, shard, {name: records[name] for name in files})

    def _clear(self, view: int, shard: int) -> list[str]:
        """Delete what an interrupted run left of a shard, and return its file names."""
        files = sorted(store_files.shard_files(self.plan, view, shard))
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
        """Check that all files have the size that was written, and put the manifest in place.

        Shards are not read again: their hashes are those of the written bytes, and are checked when it is opened.

        Raises:
            IncompleteError: if a shard is missing.
            CorruptError: if a file is missing or has another size.
        """
        if missing := [which for which in self._shards() if not self.commit_path(*which).exists()]:
            raise IncompleteError(
                f"{counted(len(missing), 'shard')} missing in {self.path}", "run the same command again"
            )
        files: dict[str, FileRecord] = {}
        for marker in (self.commit_path(*which) for which in self._shards()):
            files |= read_commit(marker).files
            files[marker.relative_to(self.path).as_posix()] = record_of(marker)
        self._check_sizes(files)
        files |= {name: record_of(self.path / name) for name in store_files.common_files(self.plan)}
        manifest = seal(self.plan, summary, files)
        write_file(self.path / MANIFEST, canonical(manifest))
        for name in (PROBES, LOCK, PLAN):  # another process may have found the cache complete already
            (self.path / name).unlink(missing_ok=True)
        release(self.path)
        return manifest

    def _check_sizes(self, files: dict[str, FileRecord]) -> None:
        for name, record in files.items():
            path = self.path / name
            if path.is_symlink() or not path.is_file() or path.stat().st_size != record.size:
                raise CorruptError(
                    f"{self.path} is damaged: {name} is not a file of the {record.size} bytes that were written",
                    "run the same command again: damaged shards are made again",
                )

    @property
    def has_finished_shards(self) -> bool:
        """Whether any shard is committed."""
        return any(self.path.glob("commits/*/*.json"))

    def discard(self) -> None:
        """Delete the cache if this run created it."""
        if self.created:
            # Renamed first, so that a kill during the deletion leaves nothing that looks like a cache.
            shutil.rmtree(self.path.rename(temporary(self.path)))
        release(self.path)


@contextmanager
def _work_folder(folder: Path) -> Iterator[Path]:
    """Yield an empty folder, without what a killed run left in it, and delete it in the end unless it was renamed."""
    folder.mkdir(exist_ok=True)
    identity = folder.stat().st_ino
    try:
        for leftover in folder.iterdir():
            if leftover.is_dir():
                shutil.rmtree(leftover)
            elif leftover.name != LOCK:
                leftover.unlink()
        yield folder
    finally:
        # After the renaming, another process may already have made a folder with the same name.
        if folder.is_dir() and folder.stat().st_ino == identity:
            shutil.rmtree(folder, ignore_errors=True)


def _make_folder(path: Path) -> None:
    """Create a folder and its parents, and flush their names to disk."""
    if not path.is_dir():
        _make_folder(path.parent)
        path.mkdir(exist_ok=True)
        flush(path.parent)

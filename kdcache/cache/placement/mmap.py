"""Rows in a memory-mapped file of fixed-width records: reading any row touches one page or two.

The file is written once from the cache, to the folder of its root digest in kdcache's own folder, with its sha256
beside it, which is checked each time the file is opened.
"""

from __future__ import annotations

import hashlib
import mmap
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Generic

import torch
from filelock import FileLock
from torch import Tensor

from kdcache.cache.format.read_records import read_file_record
from kdcache.cache.format.schema import FileRecord, canonical
from kdcache.cache.format.vector_rows import R
from kdcache.cache.format.verified_files import record_of
from kdcache.cache.placement.prefetch import Prefetcher
from kdcache.errors import CorruptError, IncompleteError
from kdcache.runtime.atomic_write import open_atomic, write_file
from kdcache.runtime.resources import free_disk

_WINDOW = 2**24
"""Largest size in bytes of the rows that are prefetched at once."""
_WINDOW_ROWS = 16_384
_READERS = 8
_RESIDENT = 2**26
"""Bytes of pages that may be touched before they are released to the system."""


class Records(Generic[R]):
    """The layout of a record: the parts of a row one after the other, in the order of its `arrays()`.

    Args:
        example: any rows of the same encoding.

    Attributes:
        width: bytes per record.
    """

    def __init__(self, example: R) -> None:
        self._kind = type(example)
        self.parts = [
            (name, values.dtype, values.shape[1:], values.shape[1:].numel() * values.element_size())
            for name, values in example.arrays().items()
        ]
        self.width = sum(size for *_, size in self.parts)

    def join(self, rows: R) -> Tensor:
        """Return rows as records, [B, width] uint8."""
        count = len(rows)
        return torch.cat(
            [values.contiguous().reshape(count, -1).view(torch.uint8) for values in rows.arrays().values()], dim=1
        )

    def split(self, records: Tensor) -> R:
        """Return records [B, width] uint8 as rows."""
        arrays, start = {}, 0
        for name, dtype, shape, size in self.parts:
            # A copy even if the part is contiguous: numbers must be aligned to their size.
            part = records[:, start : start + size].clone(memory_format=torch.contiguous_format)
            arrays[name] = part.view(dtype).reshape(len(records), *shape)
            start += size
        return self._kind.of(arrays)


class MappedRows(Generic[R]):
    """Rows in memory-mapped record files, one file per view.

    Args:
        files: view index -> file.
        records: the layout of the records.
        samples: N, the number of records per file.
    """

    def __init__(self, files: Mapping[int, Path], records: Records[R], samples: int) -> None:
        self._files, self._records, self._samples = files, records, samples
        self._open()

    def _open(self) -> None:
        self._maps: dict[int, tuple[mmap.mmap, Tensor]] = {}
        self._touched = 0
        self._prefetcher = Prefetcher(self._fetch, max(min(_WINDOW // self._records.width, _WINDOW_ROWS), 1))

    def __getstate__(self) -> dict[str, Any]:
        return {name: vars(self)[name] for name in ("_files", "_records", "_samples")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self._open()

    def rows(self, ids: Tensor, view: int) -> R:
        """Return the rows of samples `ids` [B] int64 in a view."""
        return self._prefetcher.rows(ids.cpu(), view)

    def prefetch(self, batches: Iterable[Tensor], view: int) -> None:
        """Read these batches of ids [B] int64 ahead, in this order."""
        self._prefetcher.prefetch(batches, view)

    def order(self, generator: torch.Generator) -> Tensor:
        """Return a random order of all ids, [N] int64."""
        return torch.randperm(self._samples, generator=generator)

    def _fetch(self, ids: Tensor, view: int) -> R:
        table = self._map(view)
        if len(ids) < _READERS**2:
            records = table.index_select(0, ids)
        else:
            # Several threads fault pages in at the same time: a disk is fast only with a deep queue.
            ids, order = ids.sort()
            records = torch.empty(len(ids), self._records.width, dtype=torch.uint8)
            cuts = list(zip(ids.chunk(_READERS), order.chunk(_READERS), strict=True))
            with ThreadPoolExecutor(_READERS) as pool:
                list(pool.map(lambda cut: records.index_copy_(0, cut[1], table.index_select(0, cut[0])), cuts))
        self._release_pages(len(ids))
        return self._records.split(records)

    def _map(self, view: int) -> Tensor:
        """Return the records of a view, [N, width] uint8, mapped when they are first needed."""
        if view not in self._maps:
            size = self._samples * self._records.width
            try:
                with self._files[view].open("rb") as opened:
                    # Copy-on-write and never written to: torch requires writable memory.
                    mapped = mmap.mmap(opened.fileno(), size, access=mmap.ACCESS_COPY)
            except (OSError, ValueError) as error:  # removed or truncated since it was checked
                raise CorruptError(
                    f"{self._files[view]} cannot be mapped: {error}",
                    "open the cache's teacher again: damaged record files are written again",
                ) from None
            mapped.madvise(mmap.MADV_RANDOM)
            table = torch.frombuffer(mapped, dtype=torch.uint8).view(self._samples, self._records.width)
            self._maps[view] = mapped, table
        return self._maps[view][1]

    def _release_pages(self, rows: int) -> None:
        """Release the touched pages: they stay in the page cache but no longer count as this process's memory."""
        self._touched += rows * (mmap.PAGESIZE + self._records.width)
        if self._touched > _RESIDENT:
            self._touched = 0
            for mapped, _ in list(self._maps.values()):
                mapped.madvise(mmap.MADV_DONTNEED)


def record_files(folder: Path, views: Sequence[int], size: int, read: Callable[[int], Iterator[R]]) -> dict[int, Path]:
    """Return the record file of each view, view index -> path; files that are missing or damaged are written.

    Args:
        folder: of the cache's root digest.
        views: indices of the views.
        size: bytes per file.
        read: yields all rows of a view, in order, in parts.

    Raises:
        IncompleteError: if the files to be written do not fit on the disk.
    """
    files = {view: folder / f"view-{view}.records" for view in views}
    if all(map(_is_intact, files.values())):
        return files
    folder.mkdir(parents=True, exist_ok=True)
    # All processes of a run get here at the same time: one writes the files, the others wait for it.
    with FileLock(folder / "lock"):
        wanted = [view for view, file in files.items() if not _is_intact(file)]
        for leftover in (*folder.glob("*.partial"), *(files[view] for view in wanted)):
            leftover.unlink(missing_ok=True)
        if len(wanted) * size > (free := free_disk(folder)):
            raise IncompleteError(
                f"records of {len(wanted) * size / 1e6:,.1f} MB do not fit into the {free / 1e6:,.1f} MB that are free "
                f"in {folder}",
                "free disk space, set KDCACHE_HOME to another disk, or use the placement stream",
            )
        for view in wanted:
            _write(files[view], read(view))
    return files


def _is_intact(path: Path) -> bool:
    try:
        return read_file_record(path.with_suffix(".json")) == record_of(path)
    except (FileNotFoundError, CorruptError):
        return False


def _write(path: Path, parts: Iterator[R]) -> None:
    sha = hashlib.sha256()
    with open_atomic(path) as file:
        for rows in parts:
            content = Records(rows).join(rows).numpy().data
            sha.update(content)
            file.write(content)
        size = file.tell()
    write_file(path.with_suffix(".json"), canonical(FileRecord(size=size, sha256=sha.hexdigest())))

"""Rows in a file of fixed-width records, mapped into memory: any row is one page away, whatever the size of the cache.

The file is made once from the cache, in kdcache's own folder, under the root digest; beside it lies its sha256, which
is checked whenever it is opened.
"""

from __future__ import annotations

import hashlib
import mmap
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock
from torch import Tensor

from kdcache.cache.format.codec import Rows
from kdcache.cache.format.integrity import record_of
from kdcache.cache.format.read_records import read_file_record
from kdcache.cache.format.schema import FileRecord, canonical
from kdcache.cache.placement.prefetch import Ahead
from kdcache.errors import CorruptError, IncompleteError
from kdcache.runtime.atomic_write import open_atomic, write_file
from kdcache.runtime.resources import free_disk

_WINDOW = 2**24
"""Bytes of rows that are fetched ahead at once at most."""
_WINDOW_ROWS = 16_384
_READERS = 8
_RESIDENT = 2**26
"""Bytes of pages that may be touched before they are given back to the system."""


class Records:
    """How the parts of a row lie in a record: one after the other, in the order of `Rows.arrays`.

    Args:
        example: any rows of the same encoding.
    """

    def __init__(self, example: Rows) -> None:
        self.parts = [
            (name, values.dtype, values.shape[1:], values.shape[1:].numel() * values.element_size())
            for name, values in example.arrays().items()
        ]
        self.width = sum(size for *_, size in self.parts)

    def join(self, rows: Rows) -> Tensor:
        """Rows as records, [B, width] uint8."""
        count = len(rows)
        return torch.cat(
            [values.contiguous().reshape(count, -1).view(torch.uint8) for values in rows.arrays().values()], dim=1
        )

    def split(self, records: Tensor) -> Rows:
        """Records [B, width] uint8 as rows."""
        arrays, start = {}, 0
        for name, dtype, shape, size in self.parts:
            # A copy, even of what lies in one piece as it is: numbers are to begin at a multiple of their size.
            part = records[:, start : start + size].clone(memory_format=torch.contiguous_format)
            arrays[name] = part.view(dtype).reshape(len(records), *shape)
            start += size
        return Rows.of(arrays)


class Mapped:
    """Rows of record files, one a view.

    Args:
        files: one a view, by its number.
        records: how their rows lie in them.
        samples: N, rows of each.
    """

    def __init__(self, files: Mapping[int, Path], records: Records, samples: int) -> None:
        self._files, self._records, self._samples = files, records, samples
        self._open()

    def _open(self) -> None:
        self._maps: dict[int, tuple[mmap.mmap, Tensor]] = {}
        self._touched = 0
        self._ahead = Ahead(self._fetch, max(min(_WINDOW // self._records.width, _WINDOW_ROWS), 1))

    def __getstate__(self) -> dict[str, Any]:
        return {name: vars(self)[name] for name in ("_files", "_records", "_samples")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self._open()

    def rows(self, ids: Tensor, view: int) -> Rows:
        """The rows of samples `ids` [B] int64 in a view."""
        return self._ahead.rows(ids.cpu(), view)

    def expect(self, batches: Iterable[Tensor], view: int) -> None:
        """Read these batches of ids ahead, in this order."""
        self._ahead.expect(batches, view)

    def order(self, generator: torch.Generator) -> Tensor:
        """A random order of all ids, [N] int64."""
        return torch.randperm(self._samples, generator=generator)

    def _fetch(self, ids: Tensor, view: int) -> Rows:
        table = self._map(view)
        if len(ids) < _READERS**2:
            records = table.index_select(0, ids)
        else:
            # Many pages are asked for at once, each reader waiting for its own: a disk is quick only so.
            ids, order = ids.sort()
            records = torch.empty(len(ids), self._records.width, dtype=torch.uint8)
            cuts = list(zip(ids.chunk(_READERS), order.chunk(_READERS), strict=True))
            with ThreadPoolExecutor(_READERS) as pool:
                list(pool.map(lambda cut: records.index_copy_(0, cut[1], table.index_select(0, cut[0])), cuts))
        self._give_back(len(ids))
        return self._records.split(records)

    def _map(self, view: int) -> Tensor:
        if view not in self._maps:
            size = self._samples * self._records.width
            try:
                with self._files[view].open("rb") as opened:
                    # Private and never written to: torch wants memory that may be.
                    mapped = mmap.mmap(opened.fileno(), size, access=mmap.ACCESS_COPY)
            except (OSError, ValueError) as error:  # gone, or cut short, since it was checked
                raise CorruptError(
                    f"{self._files[view]} cannot be mapped: {error}",
                    "open the cache's teacher again: records that are not whole are made anew",
                ) from None
            mapped.madvise(mmap.MADV_RANDOM)
            table = torch.frombuffer(mapped, dtype=torch.uint8).view(self._samples, self._records.width)
            self._maps[view] = mapped, table
        return self._maps[view][1]

    def _give_back(self, rows: int) -> None:
        """Let go of the pages that were touched: they stay in the system's cache, and are not counted as ours."""
        self._touched += rows * (mmap.PAGESIZE + self._records.width)
        if self._touched > _RESIDENT:
            self._touched = 0
            for mapped, _ in list(self._maps.values()):
                mapped.madvise(mmap.MADV_DONTNEED)


def record_files(
    folder: Path, views: Sequence[int], size: int, read: Callable[[int], Iterator[Rows]]
) -> dict[int, Path]:
    """The record file of each view: the one that lies in `folder`, if it is whole, or a new one.

    Args:
        folder: of the cache's root digest.
        views: their numbers.
        size: bytes of a file.
        read: all rows of a view, in order, a part at a time.

    Raises:
        IncompleteError: if those that are to be made do not fit on the disk.
    """
    files = {view: folder / f"view-{view}.records" for view in views}
    if all(map(_is_whole, files.values())):
        return files
    folder.mkdir(parents=True, exist_ok=True)
    # The processes of a run come here together: one makes the files, the others wait, and find them whole.
    with FileLock(folder / "lock"):
        wanted = [view for view, file in files.items() if not _is_whole(file)]
        for leftover in (*folder.glob("*.partial"), *(files[view] for view in wanted)):
            leftover.unlink(missing_ok=True)
        if len(wanted) * size > (free := free_disk(folder)):
            raise IncompleteError(
                f"records of {len(wanted) * size / 1e6:,.1f} MB do not fit into the {free / 1e6:,.1f} MB that are free "
                f"in {folder}",
                "make room, set KDCACHE_HOME to another disk, or take the placement stream",
            )
        for view in wanted:
            _write(files[view], read(view))
    return files


def _is_whole(path: Path) -> bool:
    try:
        return read_file_record(path.with_suffix(".json")) == record_of(path)
    except (FileNotFoundError, CorruptError):
        return False


def _write(path: Path, parts: Iterator[Rows]) -> None:
    sha = hashlib.sha256()
    with open_atomic(path) as file:
        for rows in parts:
            content = Records(rows).join(rows).numpy().data
            sha.update(content)
            file.write(content)
        size = file.tell()
    write_file(path.with_suffix(".json"), canonical(FileRecord(size=size, sha256=sha.hexdigest())))

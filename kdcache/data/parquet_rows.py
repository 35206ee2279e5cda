"""Parquet files, read one row at a time by its number, and written: with pyarrow, which is loaded if installed."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from importlib import import_module
from pathlib import Path
from typing import IO, Any

import numpy as np
import numpy.typing as npt

from kdcache.errors import CorruptError, UsageError

_ROWS_AT_ONCE = 16
"""Rows that are decoded at once: one of 16,000 tokens may have megabytes."""

_OLDEST = 15
"""First major version that cannot be made to run code by a file (CVE-2023-47248)."""

_WRITE_AGAIN = "write or download the file again"


def library() -> Any:
    """Return pyarrow.

    Raises:
        UsageError: if it is not installed, or an unsafe version.
    """
    try:
        pyarrow = import_module("pyarrow")
        import_module("pyarrow.parquet")
    except ImportError:
        raise UsageError("parquet files need the library pyarrow", "pip install pyarrow") from None
    if int(pyarrow.__version__.partition(".")[0]) < _OLDEST:
        raise UsageError(
            f"pyarrow {pyarrow.__version__} may run code that is in a file", f"pip install 'pyarrow>={_OLDEST}'"
        )
    return pyarrow


class ParquetRows:
    """The rows of parquet files, in order. Rows that follow one another are read fast.

    Attributes:
        names: of the columns of the first file.

    Args:
        paths: the files.
        columns: that are read, where a file has them; None for all.

    Raises:
        UsageError: without pyarrow.
        CorruptError: if a file is truncated, or another one.
    """

    def __init__(self, paths: list[Path], columns: Sequence[str] | None = None) -> None:
        self._pyarrow, self._paths = library(), paths
        self._groups: list[tuple[int, int]] = []
        self._first = [0]
        self._columns = columns
        self.names: list[str] = self._open(paths[0]).schema_arrow.names
        for number, path in enumerate(paths):
            metadata = self._open(path).metadata
            for group in range(metadata.num_row_groups):
                self._groups.append((number, group))
                self._first.append(self._first[-1] + metadata.row_group(group).num_rows)
        self._rows: Iterator[dict[str, Any]] = iter(())
        self._next = -1

    def __len__(self) -> int:
        return self._first[-1]

    def name(self, index: int) -> str:
        """Return where a row is: its file, and its number in the file."""
        place = self._group_of(index)
        number = self._groups[place][0]
        first = next(start for start, group in zip(self._first, self._groups, strict=False) if group[0] == number)
        return f"{self._paths[number]}, row {index - first}"

    def __getitem__(self, index: int) -> dict[str, Any]:
        """Return a row: column -> scalar of pyarrow.

        Raises:
            CorruptError: if it cannot be read.
        """
        try:
            if index != self._next:
                place = self._group_of(index)
                self._rows, self._next = self._read(place), self._first[place]
            row = next(self._rows)
            while self._next < index:
                row, self._next = next(self._rows), self._next + 1
            self._next = index + 1
        except (self._pyarrow.ArrowException, OSError) as error:
            raise CorruptError(f"{self.name(index)} cannot be read: {error}", _WRITE_AGAIN) from None
        return row

    def array(self, row: dict[str, Any], column: str, index: int) -> npt.NDArray[Any]:
        """Return a column of a row, [L] or [L, W].

        Args:
            row: as it was returned.
            column: its name.
            index: number of the row, for errors.

        Raises:
            CorruptError: if it is not a list of numbers, or of lists of as many numbers each.
        """
        values, shape = row[column].values, list[int]()
        types = self._pyarrow.types
        lists = (types.is_list, types.is_large_list, types.is_fixed_size_list)
        while values is not None and any(is_kind(values.type) for is_kind in lists):
            lengths = values.value_lengths().drop_null()
            width = lengths[0].as_py() if len(lengths) else 0
            if len(lengths) != len(values) or (lengths.to_numpy() != width).any():
                raise CorruptError(f"{self.name(index)}: {column} has lists of different lengths", _WRITE_AGAIN)
            shape, values = [*shape, len(values)], values.flatten()
        if values is None or values.null_count or not types.is_primitive(values.type):
            raise CorruptError(f"{self.name(index)}: {column} does not hold numbers", _WRITE_AGAIN)
        found: npt.NDArray[Any] = values.to_numpy(zero_copy_only=False)
        return found.reshape(*shape, -1) if shape and shape[0] else found

    def _open(self, path: Path) -> Any:
        try:
            return self._pyarrow.parquet.ParquetFile(path)
        except (self._pyarrow.ArrowException, OSError) as error:
            raise CorruptError(f"{path} cannot be read as parquet: {error}", _WRITE_AGAIN) from None

    def _read(self, place: int) -> Iterator[dict[str, Any]]:
        """Yield the rows from a row group on."""
        for number, group in self._groups[place:]:
            file = self._open(self._paths[number])
            columns = self._columns and [name for name in self._columns if name in file.schema_arrow.names]
            for batch in file.iter_batches(_ROWS_AT_ONCE, row_groups=[group], columns=columns):
                for row in range(batch.num_rows):
                    yield {name: batch.column(name)[row] for name in batch.schema.names}

    def _group_of(self, index: int) -> int:
        return int(np.searchsorted(self._first, index, side="right")) - 1


class ParquetColumns:
    """Writes records to a parquet file.

    Args:
        file: open for writing.
        types: column -> name of the type of its numbers, and how deep they are in lists.

    Raises:
        UsageError: without pyarrow.
    """

    def __init__(self, file: IO[bytes], types: Mapping[str, tuple[str, int]]) -> None:
        self._pyarrow = library()
        fields = []
        for name, (of_numbers, depth) in types.items():
            kind = getattr(self._pyarrow, of_numbers)()
            for _ in range(depth):
                kind = self._pyarrow.list_(kind)
            fields.append((name, kind))
        self._schema = self._pyarrow.schema(fields)
        self._writer = self._pyarrow.parquet.ParquetWriter(file, self._schema, compression="zstd")

    def __call__(self, records: list[dict[str, Any]]) -> None:
        """Write records as a row group."""
        self._writer.write_table(self._pyarrow.Table.from_pylist(records, schema=self._schema))

    def close(self) -> None:
        """Write the index at the end of the file."""
        self._writer.close()

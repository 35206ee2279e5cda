"""Records of JSON lines files, read one at a time by their number."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from kdcache.errors import CorruptError

_BYTES_AT_ONCE = 2**24


class JsonLines:
    """The records of JSON lines files, in order; of each its position is in memory.

    Args:
        paths: the files.
    """

    def __init__(self, paths: list[Path]) -> None:
        self._paths = paths
        self._begins = [np.fromiter(_begins(path), np.int64) for path in paths]
        self._first = np.cumsum([0, *map(len, self._begins)])

    def __len__(self) -> int:
        return int(self._first[-1])

    def name(self, index: int) -> str:
        """Return where a record is: its file and line."""
        file, begin = self._place(index)
        line, left = 1, begin
        with self._paths[file].open("rb") as lines:
            while left and (block := lines.read(min(left, _BYTES_AT_ONCE))):
                line += block.count(b"\n")
                left -= len(block)
        return f"{self._paths[file]}, line {line}"

    def __getitem__(self, index: int) -> Any:
        """Return a record.

        Raises:
            CorruptError: if it is not JSON; names the line.
        """
        file, begin = self._place(index)
        with self._paths[file].open("rb") as lines:
            lines.seek(begin)
            line = lines.readline()
        return self._parsed(line, index)

    def __iter__(self) -> Iterator[Any]:
        """Yield the records in order, which is faster than one at a time.

        Raises:
            CorruptError: if one is not JSON; names the line.
        """
        index = 0
        for path, begins in zip(self._paths, self._begins, strict=True):
            with path.open("rb") as lines:
                for begin in begins.tolist():
                    lines.seek(begin)
                    yield self._parsed(lines.readline(), index)
                    index += 1

    def _parsed(self, line: bytes, index: int) -> Any:
        try:
            return json.loads(line)
        except (ValueError, RecursionError) as error:
            cut = "" if line.endswith(b"\n") else ": the file ends there, as if truncated"
            where = f"{error.msg} at character {error.pos + 1}" if isinstance(error, json.JSONDecodeError) else error
            raise CorruptError(
                f"{self.name(index)} is not JSON ({where}){cut}", "write the line again, or remove it"
            ) from None

    def _place(self, index: int) -> tuple[int, int]:
        """Return the number of the file of a record, and the byte where the record begins."""
        file = int(np.searchsorted(self._first, index, side="right")) - 1
        begins: npt.NDArray[np.int64] = self._begins[file]
        return file, int(begins[index - int(self._first[file])])


def _begins(path: Path) -> Iterator[int]:
    """Yield the byte where each line begins that is not blank."""
    begin, is_blank = 0, True
    with path.open("rb") as file:
        position = 0
        while block := file.read(_BYTES_AT_ONCE):
            start = 0
            while (end := block.find(b"\n", start)) >= 0:
                if not (is_blank and not block[start:end].strip()):
                    yield begin
                start, is_blank = end + 1, True
                begin = position + start
            is_blank = is_blank and not block[start:].strip()
            position += len(block)
    if not is_blank:
        yield begin

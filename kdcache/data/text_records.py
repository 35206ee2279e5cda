"""Records of files of text: JSON lines, parquet, plain text, folders of these, and folders of `datasets`."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any, Protocol

from kdcache.data.json_lines import JsonLines
from kdcache.data.parquet_rows import ParquetRows
from kdcache.errors import CorruptError, UsageError
from kdcache.runtime.paths import expand

_LINES, _PARQUET, _PLAIN = (".jsonl", ".ndjson"), (".parquet",), (".txt",)

_JSON = ".json"
"""Suffix of JSON lines too, where a user names the file; in a folder there may be other JSON files beside the texts."""

_SAVED = ("dataset_info.json", "dataset_dict.json")
"""Files of a folder that `datasets.save_to_disk` wrote."""

_LARGEST_TEXT = 2**27
"""Bytes of a plain text at most: a file is one text, and is tokenized as a whole."""

_USE = "name a .jsonl, .parquet or .txt file, a folder of such files, or a folder of datasets.save_to_disk"


class Records(Protocol):
    """Records in order."""

    def __len__(self) -> int: ...

    def __iter__(self) -> Iterator[Any]: ...

    def name(self, index: int) -> str:
        """Return where a record is, for an error."""


def read_records(root: str | Path) -> Records:
    """Return the records of a file or a folder, which are read one after the other.

    Args:
        root: a `.jsonl` file with a JSON object per line, a `.parquet` file, a `.txt` file, which is a single text, or
            a folder of these, also in folders inside it, in the order of their paths; or a folder that
            `datasets.save_to_disk` wrote.

    Raises:
        UsageError: if there are none, or a library that reads them is not installed.
        CorruptError: if a parquet file is damaged.
    """
    path = expand(root)
    if any((path / name).is_file() for name in _SAVED):
        return _SavedDataset(path)
    if path.is_dir():
        known = {*_LINES, *_PARQUET, *_PLAIN}
        files = sorted(file for file in path.rglob("*") if file.suffix.lower() in known and file.is_file())
        files = [file for file in files if not any(part.startswith(".") for part in file.relative_to(path).parts)]
        if not files:
            raise UsageError(f"the folder {path} has no files of text", _USE)
        return _Joined([_of_file(file) for file in files])
    if not path.is_file():
        raise UsageError(f"file not found: {path}", _USE)
    return _of_file(path)


def _of_file(path: Path) -> Records:
    """Return the records of a file."""
    suffix = path.suffix.lower()
    if suffix == _JSON:
        _check_lines(path)
    if suffix in (*_LINES, _JSON):
        return JsonLines([path])
    if suffix in _PARQUET:
        return _ParquetRecords(path)
    if suffix in _PLAIN:
        return _PlainText(path)
    raise UsageError(f"{path} is a {suffix or 'file without a suffix'}, which is not known", _USE)


def _check_lines(path: Path) -> None:
    """Check that a file is of JSON lines.

    Raises:
        UsageError: if it is a JSON list.
    """
    with path.open("rb") as file:
        if file.read(1) == b"[":
            raise UsageError(
                f"{path} is a JSON list, not one object per line", f"jq -c '.[]' {path} > {path.with_suffix('.jsonl')}"
            )


class _Joined:
    """The records of several files, one after the other."""

    def __init__(self, parts: Sequence[Records]) -> None:
        self._parts = parts

    def __len__(self) -> int:
        return sum(map(len, self._parts))

    def __iter__(self) -> Iterator[Any]:
        for part in self._parts:
            yield from part

    def name(self, index: int) -> str:
        """Return where a record is."""
        for part in self._parts:
            if index < len(part):
                return part.name(index)
            index -= len(part)
        raise IndexError(index)


class _ParquetRecords:
    """The rows of a parquet file, as plain values."""

    def __init__(self, path: Path) -> None:
        self._rows = ParquetRows([path])

    def __len__(self) -> int:
        return len(self._rows)

    def __iter__(self) -> Iterator[Any]:
        for index in range(len(self)):
            yield {name: value.as_py() for name, value in self._rows[index].items()}

    def name(self, index: int) -> str:
        """Return where a row is."""
        return self._rows.name(index)


class _PlainText:
    """A file that is a single text."""

    def __init__(self, path: Path) -> None:
        self._path = path
        if (size := path.stat().st_size) > _LARGEST_TEXT:
            raise UsageError(
                f"{path} is a single text of {size / 2**20:,.0f} MB, and texts are tokenized as a whole",
                'write its documents to a .jsonl file, one {"text": "..."} per line',
            )

    def __len__(self) -> int:
        return 1

    def __iter__(self) -> Iterator[Any]:
        try:
            yield {"text": self._path.read_text(encoding="utf-8")}
        except UnicodeDecodeError as error:
            raise CorruptError(f"{self._path} is not UTF-8 text: byte {error.start:,}", "convert it to UTF-8") from None

    def name(self, index: int) -> str:
        """Return where the text is."""
        return str(self._path)


class _SavedDataset:
    """A folder that `datasets.save_to_disk` wrote."""

    def __init__(self, path: Path) -> None:
        self._path = path
        try:
            datasets = import_module("datasets")
        except ImportError:
            raise UsageError(
                f"{path} was written by the library datasets, which is not installed",
                "pip install datasets, or write a file: dataset.to_json('data.jsonl')",
            ) from None
        try:
            self._rows = datasets.load_from_disk(str(path))
        except Exception as error:  # of many types, for damaged files
            raise CorruptError(f"{path} cannot be read: {error}", "save the data set again") from error
        if isinstance(self._rows, dict):
            raise UsageError(
                f"{path} has several splits: {', '.join(self._rows)}",
                f"name the folder of one of them: {path / next(iter(self._rows))}",
            )

    def __len__(self) -> int:
        return len(self._rows)

    def __iter__(self) -> Iterator[Any]:
        yield from self._rows

    def name(self, index: int) -> str:
        """Return where a row is."""
        return f"{self._path}, row {index}"

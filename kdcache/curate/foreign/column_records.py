"""Records with named columns of the most probable tokens, of JSON lines or parquet files."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from kdcache.data.json_lines import JsonLines
from kdcache.data.parquet_rows import ParquetRows
from kdcache.errors import CorruptError, UsageError, did_you_mean

Array = npt.NDArray[Any]

ROLES = ("ids", "top-ids", "logprobs", "logits", "logsumexp", "label-logprobs", "taught")
"""What a column may hold."""

_VALUES = ("logprobs", "logits")

_HOW = "write the record again, or remove it"


class ImpossibleRecord(Exception):
    """A record cannot be what its columns say; the message says where."""


class ColumnRecord(NamedTuple):
    """A sequence of L tokens and its n rows, in order of the taught positions.

    Attributes:
        ids: [L] int64.
        taught: [L] bool, never the last.
        tokens: [n, k] int64.
        values: [n, k] float64, log-probabilities or logits.
        logsumexp: [n] float64; None without that column.
        label_log_probs: [n] float64, of the next tokens; None without that column.
    """

    ids: Array
    taught: Array
    tokens: Array
    values: Array
    logsumexp: Array | None
    label_log_probs: Array | None


class ColumnRecords:
    """Records of files, by their number.

    Attributes:
        columns: what is in a column -> its name.
        values: "logprobs" or "logits".

    Args:
        files: JSON lines or parquet files, all of one kind.
        columns: with `ids`, `top-ids`, and `logprobs` or `logits`.

    Raises:
        UsageError: if the first record lacks a column; or without pyarrow for parquet.
        CorruptError: if a file is damaged.
    """

    def __init__(self, files: list[Path], columns: Mapping[str, str]) -> None:
        self.columns = dict(columns)
        self.values = next(role for role in _VALUES if role in columns)
        self._records: JsonLines | ParquetRows = (
            ParquetRows(files, tuple(columns.values())) if files[0].suffix == ".parquet" else JsonLines(files)
        )
        if not len(self._records):
            return
        names = self._records.names if isinstance(self._records, ParquetRows) else list(self._dictionary(0))
        for role, name in columns.items():
            if name not in names:
                raise UsageError(
                    f"{files[0]} has no column {name!r} for {role}{did_you_mean(name, names)}",
                    f"name one of its columns, {role}=NAME in --columns: {', '.join(names) or 'it has none'}",
                )

    def __len__(self) -> int:
        return len(self._records)

    def name(self, index: int) -> str:
        """Return where a record is."""
        return self._records.name(index)

    def width(self) -> int:
        """Return how many tokens each row of the first record has."""
        try:
            found = self._array(0, self._row(0), "top-ids")
        except ImpossibleRecord as error:
            raise CorruptError(f"{self.name(0)}: {error}", _HOW) from None
        return int(found.shape[1]) if found.ndim == 2 else 0

    def __getitem__(self, index: int) -> ColumnRecord:
        """Return a record.

        Raises:
            CorruptError: if it cannot be read.
            ImpossibleRecord: if its columns do not fit together.
        """
        row = self._row(index)
        ids = self._array(index, row, "ids")
        if ids.ndim != 1 or len(ids) < 2 or not np.issubdtype(ids.dtype, np.integer):
            raise ImpossibleRecord(f"{self.columns['ids']} is not a list of two or more integers")
        taught, given = np.arange(len(ids)) < len(ids) - 1, len(ids)
        if "taught" in self.columns:
            mask = self._array(index, row, "taught")
            if mask.shape != ids.shape:
                raise ImpossibleRecord(f"{len(ids)} tokens, and {self.columns['taught']} of {len(mask)}")
            given = int((mask != 0).sum())
            taught &= mask != 0
        if not taught.any():
            raise ImpossibleRecord("none of its positions is taught")
        parts = {}
        for role in ("top-ids", self.values, "logsumexp", "label-logprobs"):
            if role in self.columns:
                parts[role] = self._taught_rows(self._array(index, row, role), role, taught, given)
        tokens, values = parts["top-ids"], parts[self.values]
        for role, depth in {"top-ids": 2, self.values: 2, "logsumexp": 1, "label-logprobs": 1}.items():
            if role in parts and parts[role].ndim != depth:
                shape = "a list of numbers per row" if depth == 2 else "one number per row"
                raise ImpossibleRecord(f"{self.columns[role]} does not have {shape}")
        if tokens.shape != values.shape:
            raise ImpossibleRecord(
                f"{self.columns['top-ids']} has {tokens.shape[1]} tokens per row, and "
                f"{self.columns[self.values]} {values.shape[1]} values"
            )
        if not np.issubdtype(tokens.dtype, np.integer):
            raise ImpossibleRecord(f"{self.columns['top-ids']} does not hold integers")
        level, labels = (
            parts[role].astype(np.float64) if role in parts else None for role in ("logsumexp", "label-logprobs")
        )
        if level is not None and not np.isfinite(level).all():
            raise ImpossibleRecord(f"{self.columns['logsumexp']} holds NaN or infinite numbers")
        return ColumnRecord(
            ids.astype(np.int64), taught, tokens.astype(np.int64), values.astype(np.float64), level, labels
        )

    def _taught_rows(self, rows: Array, role: str, taught: Array, given: int) -> Array:
        """Return the rows of the taught positions, of those of all positions, of all but the last, or of the taught.

        Args:
            rows: as the file has them.
            role: of their column.
            taught: [L] bool, never the last.
            given: how many positions the file says are taught, which may include the last.
        """
        length = len(taught)
        if len(rows) in (length, length - 1):
            return rows[taught[: len(rows)]]
        if "taught" in self.columns and len(rows) in (int(taught.sum()), given):
            return rows[: int(taught.sum())]
        wanted = f"{length} or {length - 1}"
        if "taught" in self.columns:
            wanted += f", or {int(taught.sum())} for the taught positions"
        raise ImpossibleRecord(f"{self.columns[role]} has {len(rows)} rows for {length} tokens; {wanted} are expected")

    def _row(self, index: int) -> dict[str, Any]:
        return self._records[index] if isinstance(self._records, ParquetRows) else self._dictionary(index)

    def _dictionary(self, index: int) -> dict[str, Any]:
        found = self._records[index]
        if not isinstance(found, dict):
            raise CorruptError(f"{self.name(index)} is not a dictionary with columns", _HOW)
        return found

    def _array(self, index: int, row: dict[str, Any], role: str) -> Array:
        """Return a column of a record as numbers."""
        name = self.columns[role]
        if name not in row:
            raise ImpossibleRecord(f"it has no column {name!r}, which earlier records have")
        if isinstance(self._records, ParquetRows):
            return self._records.array(row, name, index)
        try:
            found = np.array(row[name])
        except ValueError:  # lists of different lengths
            raise ImpossibleRecord(f"{name} has lists of different lengths") from None
        if found.dtype.kind not in "biuf" or not found.ndim:
            raise ImpossibleRecord(f"{name} does not hold numbers")
        return found

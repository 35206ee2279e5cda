"""Export a cache of sequences as JSON lines or parquet, with a line or row per sequence.

| column | of a sequence of L tokens, n of which are taught |
|---|---|
| `input_ids` | [L], its tokens |
| `taught` | [L], whether the distribution of the token after each is there |
| `top_ids` | [n, k], the most probable tokens, in descending order |
| `top_logprobs` | [n, k], their log-probabilities at T = 1 |
| `temperatures` | [P], those at which the mass of all others is known |
| `tail_log_mass` | [n, P], its logarithm at each of them |

The shape of a `lowrank` tail and the level of the logits are left out.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any, NamedTuple

import torch
from torch import Tensor

from kdcache.cache.preconditions import check_outside
from kdcache.cache.reader import Cache
from kdcache.cache.sequences import CachedSequences
from kdcache.data.parquet_rows import ParquetColumns
from kdcache.errors import UsageError
from kdcache.runtime.atomic_write import open_atomic
from kdcache.runtime.progress import Progress, Silent

COLUMN_FILES = ("jsonl", "parquet")
"""Kinds of files; each is the suffix."""

_ROWS_AT_ONCE = 4096


class Exported(NamedTuple):
    """What was written.

    Attributes:
        sequences: number of them.
        rows: number of taught positions.
        top_k: tokens per row.
    """

    sequences: int
    rows: int
    top_k: int


def columns_of_cache(
    cache: Cache, kind: str, out: str | Path, *, top_k: int | None = None, progress: Progress | None = None
) -> Exported:
    """Write the tokens and rows of a cache of sequences to a file, which appears when it is complete.

    Args:
        cache: of sequences, whose rows have a head.
        kind: one of `COLUMN_FILES`.
        out: a new file.
        top_k: tokens per row; None for those of the cache.
        progress: progress reporter; silent if None.

    Raises:
        UsageError: if the cache is of something else, or has fewer tokens per row; if `out` exists, or is inside a
            cache; or without pyarrow for parquet.
    """
    out, teacher = Path(out), cache.sequences()
    check_outside(out)
    encoding = teacher.encoding
    if encoding.tail == "draws":
        raise UsageError(f"the rows of {cache.path} are draws, and have no most probable tokens", "read them in Python")
    if (top_k or 0) > encoding.top_k:
        raise UsageError(f"{cache.path} has {encoding.top_k} tokens per row, not {top_k}", "use fewer")
    if os.path.lexists(out):
        raise UsageError(f"{out} exists already", "give another name with -o")
    kept = top_k or encoding.top_k
    with (
        (progress or Silent()).task(f"writing {out.name}", len(teacher), "sequences") as task,
        open_atomic(out) as file,
    ):
        write = _JsonLines(file) if kind == "jsonl" else ParquetColumns(file, _types())
        for records in _records(teacher, kept):
            write(records)
            task.advance(len(records))
        write.close()
    return Exported(len(teacher), int(teacher.row_start[-1]), kept)


class _JsonLines:
    """Writes records as JSON lines."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file = file

    def __call__(self, records: list[dict[str, Any]]) -> None:
        for record in records:
            self._file.write(json.dumps(record, allow_nan=False).encode() + b"\n")

    def close(self) -> None:
        """End the file: nothing follows the last line."""


def _types() -> dict[str, tuple[str, int]]:
    """Return the type of the numbers of each column, and how deep they are in lists."""
    return {
        "input_ids": ("int32", 1),
        "taught": ("bool_", 1),
        "top_ids": ("int32", 2),
        "top_logprobs": ("float32", 2),
        "temperatures": ("float64", 1),
        "tail_log_mass": ("float32", 2),
    }


def _records(teacher: CachedSequences, top_k: int) -> Iterator[list[dict[str, Any]]]:
    """Yield records of some sequences that follow one another."""
    begin = 0
    while begin < len(teacher):
        limit = int(teacher.row_start[begin]) + _ROWS_AT_ONCE
        end = max(int(torch.searchsorted(teacher.row_start, limit, right=True)) - 1, begin + 1)
        batch = teacher(range(begin, end))
        targets = teacher.targets(batch.rows)
        head, masses = targets.log_probs, targets.tail_log_mass
        masses = _with_the_rest(head, masses, teacher.encoding.temperatures, top_k)
        is_taught = torch.zeros(len(batch.tokens), dtype=torch.bool)
        is_taught[batch.positions] = True
        records = []
        for index in range(end - begin):
            tokens, rows = (slice(*start[index : index + 2].tolist()) for start in (batch.token_start, batch.row_start))
            records.append(
                {
                    "input_ids": batch.tokens[tokens].tolist(),
                    "taught": is_taught[tokens].tolist(),
                    "top_ids": targets.indices[rows, :top_k].tolist(),
                    "top_logprobs": head[rows, :top_k].tolist(),
                    "temperatures": list(teacher.encoding.temperatures),
                    "tail_log_mass": masses[rows].tolist(),
                }
            )
        yield records
        begin = end


def _with_the_rest(head: Tensor, masses: Tensor, temperatures: tuple[float, ...], top_k: int) -> Tensor:
    """Return the masses of the tail with the tokens of the head that are left out, [n, P] (docs/FORMAT.md, 12.4).

    Args:
        head: [n, k], log-probabilities at T = 1.
        masses: [n, P], logarithms of the masses outside the head.
        temperatures: [P].
        top_k: tokens that are kept.
    """
    if top_k == head.shape[1]:
        return masses
    found = []
    for mass, temperature in zip(masses.double().unbind(dim=1), temperatures, strict=True):
        shares = (head.double() / temperature).log_softmax(dim=1)[:, top_k:].logsumexp(dim=1)
        of_head = torch.log(-torch.expm1(mass.clamp_max(-(2.0**-24))))
        found.append(torch.logaddexp(mass, of_head + shares))
    return torch.stack(found, dim=1).clamp_max(0).float()

"""Answers of vLLM and SGLang with the log-probabilities of their prompts, as a cache of sequences."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from kdcache.cache.format.token_top_k import TopK, defect_of
from kdcache.cache.reader import Cache
from kdcache.cache.token_spec import TokenCacheSpec
from kdcache.curate.foreign.answer_rows import ImpossibleRow, listed_tokens, rows_of
from kdcache.curate.foreign.answer_shapes import Entries, ShapeError, entries_of
from kdcache.curate.foreign.source_files import digest_of_files, files_of
from kdcache.curate.sequence_cache import Array, Origin, cache_of_sequences
from kdcache.data.json_lines import JsonLines
from kdcache.data.parquet_rows import ParquetRows
from kdcache.errors import CorruptError, UsageError
from kdcache.runtime.progress import Progress, Silent

_JSON, _PARQUET = ".jsonl", ".parquet"

_ROWS_TO_SEE = 512
"""Rows of the first answers that show how many tokens an engine listed."""

_TOLERANCE = 1e-3
"""By how much the mass of a row may be wrong."""

_HOW = (
    "request prompt_logprobs of vLLM with prompt_token_ids, temperature 1, logprobs_mode raw_logprobs and "
    "enable_prefix_caching=False, or of SGLang return_logprob, logprob_start_len 0 and top_logprobs_num"
)


class _Answer(NamedTuple):
    """A sequence, which of its positions are taught, and their rows."""

    ids: Array
    taught: Array
    rows: TopK


class EngineAnswers:
    """Answers in files; one is in memory.

    Attributes:
        k: tokens per row.

    Args:
        records: the answers.
        size: V.
        top_k: tokens per row; None for as many as the engine listed.

    Raises:
        KdcacheError: if there are none, or the first ones do not list so many tokens.
    """

    def __init__(self, records: JsonLines | ParquetRows, size: int, top_k: int | None) -> None:
        if not len(records):
            raise UsageError("the files hold no answers", _HOW)
        self._records, self._size = records, size
        self._last: tuple[int, _Answer] | None = None
        found, rows = size - 1, 0
        for index in range(len(records)):
            entries = self._entries(index)
            found, rows = min(found, listed_tokens(entries)), rows + len(entries.counts)
            if rows >= _ROWS_TO_SEE:
                break
        if found < 1 or (top_k or 0) > found:
            raise UsageError(
                f"{records.name(0)} lists the {found} most probable tokens of a position"
                + (f", and {top_k} are requested" if top_k else ""),
                f"use --top-k {found}" if found else _HOW,
            )
        self.k = top_k or found

    def __len__(self) -> int:
        return len(self._records)

    def tokens(self, index: int) -> tuple[Array, Array]:
        """Return the tokens of a prompt, and which of its positions are taught: those that an entry is of."""
        answer = self._answer(index)
        return answer.ids, answer.taught

    def top_k(self, index: int) -> TopK:
        """Return the rows of a prompt."""
        return self._answer(index).rows

    def _entries(self, index: int) -> Entries:
        try:
            record = self._records[index]
            if isinstance(self._records, ParquetRows):
                record = {name: value.as_py() for name, value in record.items()}
            return entries_of(record)
        except ShapeError as error:
            raise CorruptError(f"{self._records.name(index)}: {error}", _HOW) from None

    def _answer(self, index: int) -> _Answer:
        """Return an answer, which is kept for the next call.

        Raises:
            CorruptError: if it is impossible; names the token.
        """
        if self._last is not None and self._last[0] == index:
            return self._last[1]
        entries = self._entries(index)
        try:
            rows = rows_of(entries, self.k)
            labels = torch.from_numpy(entries.ids[entries.first :])
            if (defect := defect_of(rows, labels, self._size, _TOLERANCE)) is not None:
                raise ImpossibleRow(defect.row, defect.what)
        except ImpossibleRow as error:
            raise CorruptError(
                f"{self._records.name(index)}, token {entries.first + error.row}: {error}", _HOW
            ) from None
        position = np.arange(len(entries.ids))
        taught = (position >= entries.first - 1) & (position < len(entries.ids) - 1)
        answer = _Answer(entries.ids, taught, rows)
        self._last = (index, answer)
        return answer


def cache_of_answers(
    source: str | Path,
    out: str | Path,
    *,
    vocabulary_size: int,
    top_k: int | None = None,
    name: str | None = None,
    spec: TokenCacheSpec | None = None,
    progress: Progress | None = None,
) -> Cache:
    """Make a cache of sequences from answers of vLLM or SGLang with the log-probabilities of their prompts.

    Each prompt is a sequence, taught wherever the next token has log-probabilities. The rows are of T = 1: of other
    tokens than the top k only their mass at T = 1 is known. If interrupted, the same call resumes.

    Args:
        source: a JSON lines or parquet file of answers, one per line or row; or a folder of them.
        out: folder of the cache.
        vocabulary_size: V, the number of tokens of the tokenizer.
        top_k: tokens per row; None for as many as the engine listed.
        name: name of the teacher; None for the name of the file or folder.
        spec: how rows are stored, as a ghost; its `top_k` has no effect. The defaults if None.
        progress: progress reporter; silent if None.

    Raises:
        UsageError: if there are no answers, or `out` is something else.
        MismatchError: if `out` was started with other settings.
        CorruptError: if an answer is impossible, or of another shape; names the line.
    """
    source = Path(source)
    files = files_of(source, (_JSON, _PARQUET))
    answers = EngineAnswers(
        JsonLines(files) if files[0].suffix == _JSON else ParquetRows(files), vocabulary_size, top_k
    )
    precision = "by vLLM or SGLang, log-probabilities of the top k"
    origin = Origin.of_files(source, "vllm", digest_of_files(files), name, precision)
    spec = replace(spec or TokenCacheSpec(), top_k=answers.k)
    return cache_of_sequences(answers, out, origin, vocabulary_size, {}, spec, progress or Silent())

"""JSON lines or parquet files with columns of the most probable tokens, by their names, as a cache of sequences.

Of a sequence of L tokens a record has `ids` [L], and `top-ids` and `logprobs` or `logits` [L, k] or [L - 1, k]: row i
is of the token i + 1. With `taught` [L], such as a loss mask, the rows may also be those of the taught positions alone.

Log-probabilities are of T = 1 and of the whole vocabulary: what they leave is the mass of all other tokens. Logits
alone do not say it; with their `logsumexp` [L] over the vocabulary they do, and then the level is known too. At another
T nothing can be known. The log-probability of a next token outside the top k is in `label-logprobs` [L], or else taken
as an even share of the rest.

In this shape are data sets on the Hugging Face Hub (amitness/logits-*: `teacher_logits`, `teacher_indices`), and files
of NVIDIA's NeMo-Aligner (`topk_logits`, `topk_token_ids`, `log_sum_exp_logits`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from kdcache.cache.format.token_top_k import TopK, defect_of
from kdcache.cache.reader import Cache
from kdcache.cache.token_spec import TokenCacheSpec
from kdcache.curate.foreign.column_records import ROLES, ColumnRecords, ImpossibleRecord
from kdcache.curate.foreign.source_files import digest_of_files, files_of
from kdcache.curate.foreign.unstated_labels import label_log_probs
from kdcache.curate.sequence_cache import Array, Origin, cache_of_sequences
from kdcache.errors import CorruptError, MismatchError, UsageError, did_you_mean
from kdcache.runtime.progress import Progress, Silent

_TOLERANCE = {"logprobs": 0.01, "logits": 0.05}
"""By how much the mass of a row may be wrong: of values in half precision, whose errors grow with the values."""

_ROUNDING = 1e-5
"""By how much a log-probability may be above 0: the error of a float32 log-softmax."""

_ROWS_TO_SEE = 512
"""Rows of the first records that show whether the rows are of the next token."""

_CLEARLY_MORE = 0.25
"""Share of rows by which more have their own token than the next one, where rows are of their own."""

_HOW = "name other columns with --columns, or correct the record"


class _Sequence(NamedTuple):
    """A sequence, which of its positions are taught, and their rows."""

    ids: Array
    taught: Array
    rows: TopK


class ColumnSequences:
    """Sequences of records; one is in memory.

    Attributes:
        k: tokens per row.
        level_known: whether the records have the logsumexp of the logits.
        was_sorted: whether a row that was read is not in descending order.

    Args:
        records: with named columns.
        size: V.
        top_k: tokens per row; None for as many as the first record has.

    Raises:
        KdcacheError: if there are none, or the first ones are not rows of the next token.
    """

    def __init__(self, records: ColumnRecords, size: int, top_k: int | None) -> None:
        if not len(records):
            raise UsageError("the files hold no records", "name other files")
        self._records, self._size = records, size
        self.level_known = "logsumexp" in records.columns
        self.was_sorted = False
        self._last: tuple[int, _Sequence] | None = None
        listed = records.width()
        largest = min(listed, size - 1)
        if (top_k or 0) > largest:
            raise UsageError(f"{records.name(0)} has {listed} tokens per row, and {top_k} are requested", "use fewer")
        self.k = top_k or largest
        self._check_alignment()

    def __len__(self) -> int:
        return len(self._records)

    def tokens(self, index: int) -> tuple[Array, Array]:
        """Return the tokens of a sequence, and which of its positions are taught."""
        found = self._sequence(index)
        return found.ids, found.taught

    def top_k(self, index: int) -> TopK:
        """Return the rows of a sequence."""
        return self._sequence(index).rows

    def adds_up(self) -> bool:
        """Return whether the probabilities of the top k of the first record add up to 1, as if renormalized."""
        masses = self.top_k(0).log_probs.double().exp().sum(dim=1)
        return bool(len(masses)) and bool(((masses - 1).abs() < _ROUNDING).all())

    def _sequence(self, index: int) -> _Sequence:
        """Return a sequence, which is kept for the next call.

        Raises:
            CorruptError: if it is impossible; names the record and the row.
        """
        if self._last is not None and self._last[0] == index:
            return self._last[1]
        try:
            found = self._read(index)
        except ImpossibleRecord as error:
            raise CorruptError(f"{self._records.name(index)}: {error}", _HOW) from None
        self._last = (index, found)
        return found

    def _read(self, index: int) -> _Sequence:
        """Return a sequence of the files; raises ImpossibleRecord."""
        record = self._records[index]
        next_tokens = torch.from_numpy(record.ids[1:][record.taught[:-1]])
        tokens, log_probs, level = torch.from_numpy(record.tokens), torch.from_numpy(record.values), None
        tolerance = _TOLERANCE[self._records.values]
        if self._records.values == "logits":
            if (log_probs.isnan() | log_probs.isposinf()).any():
                raise ImpossibleRecord(f"{self._records.columns['logits']} holds NaN or infinite logits")
            if record.logsumexp is None:
                log_probs = log_probs.log_softmax(dim=1)
            else:
                level = torch.from_numpy(record.logsumexp)
                log_probs = log_probs - level.unsqueeze(1)
        if not bool((log_probs[:, 1:] <= log_probs[:, :-1]).all()):
            self.was_sorted = True
        order = log_probs.sort(dim=1, descending=True, stable=True)
        log_probs, tokens = order.values[:, : self.k], tokens.gather(1, order.indices)[:, : self.k]
        slack = _ROUNDING if self._records.values == "logprobs" else tolerance
        log_probs = torch.where(log_probs <= slack, log_probs.clamp_max(0), log_probs)
        mass = log_probs.exp().sum(dim=1)
        is_above = (mass > 1) & (mass <= 1 + tolerance)
        log_probs = torch.where(is_above.unsqueeze(1), log_probs - mass.log().unsqueeze(1), log_probs)
        stated = None if record.label_log_probs is None else torch.from_numpy(record.label_log_probs)
        labels = label_log_probs(tokens, log_probs, next_tokens, self._size, stated)
        rows = TopK(tokens, log_probs, labels, level)
        if (defect := defect_of(rows, next_tokens, self._size, tolerance)) is not None:
            position = int(np.flatnonzero(record.taught)[defect.row])
            raise ImpossibleRecord(f"position {position}: {defect.what}")
        return _Sequence(record.ids, record.taught, rows)

    def _check_alignment(self) -> None:
        """Check that rows are of the next token, and not of their own.

        Raises:
            MismatchError: if far more of the first rows have the token of their own position.
        """
        own = following = rows = 0
        for index in range(len(self)):
            found = self._sequence(index)
            positions = np.flatnonzero(found.taught)
            listed = found.rows.indices.numpy()
            own += int((listed == found.ids[positions][:, None]).any(axis=1).sum())
            following += int((listed == found.ids[positions + 1][:, None]).any(axis=1).sum())
            rows += len(positions)
            if rows >= _ROWS_TO_SEE:
                break
        if own - following > _CLEARLY_MORE * max(rows, 16):
            raise MismatchError(
                f"of the first {rows} rows {own} have the token of their own position, and {following} the one after "
                "it, as if row i were of the token i",
                "leave out the first row of each sequence, so that row i is of the token i + 1",
            )


def _checked(columns: Mapping[str, str], renormalize: bool) -> None:
    """Check which columns are named.

    Raises:
        UsageError: for an unknown role, or a combination that says too little.
    """
    if unknown := [role for role in columns if role not in ROLES]:
        raise UsageError(
            f"unknown column {unknown[0]!r}{did_you_mean(unknown[0], ROLES)}", f"name one of {', '.join(ROLES)}"
        )
    if "top-ids" not in columns:
        raise UsageError("the column of top-ids is not named", "add top-ids=NAME to --columns")
    if ("logprobs" in columns) == ("logits" in columns):
        raise UsageError("either logprobs or logits must be named", "add logprobs=NAME or logits=NAME to --columns")
    if "logits" not in columns and ("logsumexp" in columns or renormalize):
        raise UsageError("logsumexp and --renormalize are for logits", "remove it: log-probabilities are normalized")
    if "logsumexp" in columns and renormalize:
        raise UsageError("with logsumexp the mass of the other tokens is known", "remove --renormalize")
    if "logits" in columns and "logsumexp" not in columns and not renormalize:
        raise UsageError(
            "logits of the top k do not say how much probability the other tokens have",
            "add logsumexp=NAME to --columns; or pass --renormalize to take it as 0, and teach the top k alone",
        )


def cache_of_columns(
    source: str | Path,
    out: str | Path,
    *,
    columns: Mapping[str, str],
    vocabulary_size: int,
    renormalize: bool = False,
    top_k: int | None = None,
    name: str | None = None,
    spec: TokenCacheSpec | None = None,
    progress: Progress | None = None,
) -> Cache:
    """Make a cache of sequences from files with columns of the most probable tokens.

    The rows are of T = 1; see the head of this module. If interrupted, the same call resumes.

    Args:
        source: a JSON lines or parquet file, with a sequence per line or row; or a folder of them.
        out: folder of the cache.
        columns: what is in a column -> its name: `ids` (default input_ids), `top-ids`, `logprobs` or `logits`, and
            optionally `logsumexp`, `label-logprobs` and `taught`.
        vocabulary_size: V, the number of tokens of the tokenizer.
        renormalize: of logits without their logsumexp, take the mass outside of the top k as 0.
        top_k: tokens per row; None for as many as the files have.
        name: name of the teacher; None for the name of the file or folder.
        spec: how rows are stored, as a ghost; its `top_k` has no effect. The defaults if None.
        progress: progress reporter; silent if None.

    Raises:
        UsageError: if columns are missing or say too little, or without pyarrow for parquet.
        MismatchError: if rows are of another token than the next, or `out` was started with other settings.
        CorruptError: if a file is damaged, or a record impossible; names it.
    """
    source, progress = Path(source), progress or Silent()
    columns = {"ids": "input_ids", **columns}
    _checked(columns, renormalize)
    files = files_of(source, (".jsonl", ".parquet"))
    sequences = ColumnSequences(ColumnRecords(files, columns), vocabulary_size, top_k)
    if not renormalize and sequences.adds_up():
        progress.say(
            "note: the probabilities of the top k add up to 1, as if they were renormalized; the other tokens get none"
        )
    values = "logits" if "logits" in columns else "logprobs"
    origin = Origin.of_files(
        source,
        "columns",
        digest_of_files(files),
        name,
        f"given, {values} of the top k",
        columns=dict(columns),
        renormalized=renormalize,
        label_log_prob="given" if "label-logprobs" in columns else "an even share of the mass of the tail",
    )._replace(level_known=sequences.level_known)
    spec = replace(spec or TokenCacheSpec(), top_k=sequences.k)
    cache = cache_of_sequences(sequences, out, origin, vocabulary_size, {}, spec, progress)
    if sequences.was_sorted:
        progress.say("note: rows were not in descending order, and were sorted")
    return cache

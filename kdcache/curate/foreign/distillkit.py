"""Parquet files of DistillKit's `sample_logits_vllm.py`, and of its published data sets, as a cache of sequences.

A row has `input_ids` [L], and of the positions 0, 1, ... `compressed_logprobs` and `bytepacked_indices`, which
`distillkit_codec.py` decodes: of each position the most probable tokens that may follow. vLLM gives those of L - 1
positions; `pack_logits.py` cuts the last token off, so that there are L of both. It then joins several texts, each of
which the teacher saw alone, and numbers them in `attention_mask`: 1, 2, ..., 0 for padding. Each is a sequence here.

The sampler asks vLLM for raw log-probabilities, so what the top k leave is the mass of all others at T = 1, up to the
errors of the codec. The log-probability of a next token outside the top k is not stored: its row states an even share
of that mass.

Source: arcee-ai/DistillKit@a61c2e7, distillkit/sample_logits_vllm.py, sample_common.py and pack_logits.py.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from kdcache.cache.format.token_top_k import TopK, defect_of
from kdcache.cache.reader import Cache
from kdcache.cache.token_spec import TokenCacheSpec
from kdcache.curate.foreign.distillkit_codec import DistillKitCodec, read_codec
from kdcache.curate.foreign.source_files import digest_of_files, files_of
from kdcache.curate.foreign.unstated_labels import label_log_probs
from kdcache.curate.sequence_cache import Array, Origin, cache_of_sequences
from kdcache.data.parquet_rows import ParquetRows
from kdcache.errors import CorruptError, UsageError
from kdcache.runtime.progress import Progress, Silent

_TOKENS, _LOG_PROBS, _INDICES, _TEXTS = "input_ids", "compressed_logprobs", "bytepacked_indices", "attention_mask"

_CODEC_FILE = "compression_config.yaml"
"""Where the sampler writes the codec, in the folder of its parquet files."""

_TOLERANCE = 0.05
"""By how much the mass of a row may be wrong, of bfloat16 values and a polynomial; another codec's is further off."""

_HOW = "pass the codec that the file was written with, or download the file again"


class _Sequence(NamedTuple):
    """Where a sequence is: its row of the files, and its tokens there, from `begin` to before `end`."""

    row: int
    begin: int
    end: int


class _Decoded(NamedTuple):
    """A row of the files."""

    number: int
    ids: Array
    log_probs: npt.NDArray[np.uint8]
    tokens: npt.NDArray[np.uint8]


class DistillKitFiles:
    """Sequences of parquet files; one row of these is in memory.

    Attributes:
        left_out: texts of one token, which no token follows.

    Args:
        files: in order.
        codec: of the log-probabilities.
        size: V.
        k: tokens per row.

    Raises:
        UsageError: without pyarrow, or if the files have other columns.
        CorruptError: if a file is damaged.
    """

    def __init__(self, files: list[Path], codec: DistillKitCodec, size: int, k: int) -> None:
        self._codec, self._size, self._k = codec, size, k
        self._rows = ParquetRows(files, (_TOKENS, _LOG_PROBS, _INDICES))
        self._last: _Decoded | None = None
        if missing := [name for name in (_TOKENS, _LOG_PROBS, _INDICES) if name not in self._rows.names]:
            is_legacy = "packed_indices" in self._rows.names
            raise UsageError(
                f"{files[0]} lacks the columns {', '.join(missing)}, and has {', '.join(self._rows.names)}",
                "sample the teacher again: legacy_logit_compression stores logits less their mean, of which the "
                "probabilities are not known"
                if is_legacy
                else "pass files of DistillKit's sample_logits_vllm.py",
            )
        self._sequences, self.left_out = _texts(files)
        if not len(self._sequences):
            raise UsageError(f"{files[0]} holds no texts of two or more tokens", "pass files with such texts")

    def __len__(self) -> int:
        return len(self._sequences)

    def tokens(self, index: int) -> tuple[Array, Array]:
        """Return the tokens of a text, and which of its positions are taught: all but the last."""
        found = self._place(index)
        ids = self._row(found.row).ids[found.begin : found.end]
        return ids, np.arange(len(ids)) < len(ids) - 1

    def top_k(self, index: int) -> TopK:
        """Return the rows of a text.

        Raises:
            CorruptError: if they are impossible; names the position.
        """
        found = self._place(index)
        row, some = self._row(found.row), slice(found.begin, found.end - 1)
        tokens = self._codec.tokens(row.tokens[some])[:, : self._k]
        log_probs = _in_order(self._codec.log_probs(row.log_probs[some]).double(), self._codec.exact_k)[:, : self._k]
        # An approximation may exceed 0, or what all probabilities add up to, a little.
        log_probs = torch.where(log_probs <= _TOLERANCE, log_probs.clamp_max(0), log_probs)
        mass = log_probs.exp().sum(dim=1)
        is_above = (mass > 1) & (mass <= 1 + _TOLERANCE)
        log_probs = torch.where(is_above.unsqueeze(1), log_probs - mass.log().unsqueeze(1), log_probs)
        next_tokens = torch.from_numpy(row.ids[found.begin + 1 : found.end])
        rows = TopK(tokens, log_probs, label_log_probs(tokens, log_probs, next_tokens, self._size))
        if (defect := defect_of(rows, next_tokens, self._size, _TOLERANCE)) is not None:
            position = found.begin + defect.row
            exact = f"use --top-k {self._codec.sure}, whose log-probabilities are exact"
            raise CorruptError(
                f"{self._rows.name(found.row)}, position {position}: {defect.what}",
                exact if self._k > self._codec.sure else _HOW,
            )
        return rows

    def _place(self, index: int) -> _Sequence:
        return _Sequence(*(int(number) for number in self._sequences[index]))

    def _row(self, index: int) -> _Decoded:
        """Return a row of the files, which is kept for the next call.

        Raises:
            CorruptError: if its lists have other lengths than the codec and its tokens ask for.
        """
        if self._last is not None and self._last.number == index:
            return self._last
        row = self._rows[index]
        ids, log_probs, tokens = (self._rows.array(row, name, index) for name in (_TOKENS, _LOG_PROBS, _INDICES))
        where = self._rows.name(index)
        for name, found, width in (
            (_LOG_PROBS, log_probs, self._codec.log_prob_bytes),
            (_INDICES, tokens, self._codec.index_bytes),
        ):
            if found.ndim != 2 or found.shape[1] != width:
                has = found.shape[1] if found.ndim == 2 else 0
                raise CorruptError(
                    f"{where}: {name} has {has} bytes per position, and the codec makes {width}",
                    "pass the codec that the file was written with: --codec FILE",
                )
            if found.dtype != np.uint8 or len(found) not in (len(ids) - 1, len(ids)):
                raise CorruptError(f"{where}: {len(ids)} tokens and {len(found)} positions of {name}", _HOW)
        if len(log_probs) != len(tokens) or ids.ndim != 1 or not np.issubdtype(ids.dtype, np.integer):
            raise CorruptError(f"{where}: the columns are of different positions", _HOW)
        self._last = _Decoded(index, ids.astype(np.int64), log_probs, tokens)
        return self._last


def _in_order(log_probs: torch.Tensor, exact: int) -> torch.Tensor:
    """Return log-probabilities in descending order, that of the tokens, which approximations need not keep, [n, k].

    Args:
        log_probs: [n, k], the first of which are exact.
        exact: number of these.
    """
    known, others = log_probs[:, :exact], log_probs[:, exact:]
    if exact and others.shape[1]:
        others = others.minimum(known[:, -1:])
    return torch.cat([known, others.sort(dim=1, descending=True).values], dim=1)


def _texts(files: list[Path]) -> tuple[npt.NDArray[np.int64], int]:
    """Return the texts of two or more tokens in files, [N, 3]: row, begin and end; and the number of shorter ones."""
    rows = ParquetRows(files, (_TOKENS, _TEXTS))
    found, left_out = list[npt.NDArray[np.int64]](), 0
    for index in range(len(rows)):
        row = rows[index]
        length = len(rows.array(row, _TOKENS, index))
        numbers = rows.array(row, _TEXTS, index) if _TEXTS in row else np.ones(length, np.int64)
        if numbers.shape != (length,):
            raise CorruptError(f"{rows.name(index)}: {length} tokens and {len(numbers)} of {_TEXTS}", _HOW)
        begins = np.flatnonzero(np.append(True, numbers[1:] != numbers[:-1])) if length else np.zeros(0, int)
        ends = np.append(begins[1:], length)[: len(begins)]
        is_text = numbers[begins] != 0
        is_long = ends - begins > 1
        left_out += int((is_text & ~is_long).sum())
        kept = is_text & is_long
        found.append(np.stack([np.full(kept.sum(), index), begins[kept], ends[kept]], axis=1).astype(np.int64))
    return np.concatenate([np.zeros((0, 3), np.int64), *found]), left_out


def cache_of_distillkit(
    source: str | Path,
    out: str | Path,
    *,
    codec: str | Path | DistillKitCodec | None = None,
    vocabulary_size: int | None = None,
    top_k: int | None = None,
    name: str | None = None,
    spec: TokenCacheSpec | None = None,
    progress: Progress | None = None,
) -> Cache:
    """Make a cache of sequences from parquet files of DistillKit.

    The rows are of T = 1; see the head of this module. If interrupted, the same call resumes.

    Args:
        source: a parquet file, or a folder of them.
        out: folder of the cache.
        codec: that the files were written with, or a YAML file with it; None for `compression_config.yaml` beside them.
        vocabulary_size: V, the number of tokens of the tokenizer; None for `d` of the codec, which may be larger.
        top_k: tokens per row; None for as many as the files have, or as are exact if the others cannot be relied on.
        name: name of the teacher; None for the name of the file or folder.
        spec: how rows are stored, as a ghost; its `top_k` has no effect. The defaults if None.
        progress: progress reporter; silent if None.

    Raises:
        UsageError: without a codec, or pyarrow, or if the files are others.
        MismatchError: if `out` was started with other settings.
        CorruptError: if a file is damaged, or of another codec; names the row.
    """
    source, progress = Path(source), progress or Silent()
    files = files_of(source, (".parquet",))
    if not isinstance(codec, DistillKitCodec):
        codec = read_codec(Path(codec) if codec else files[0].parent / _CODEC_FILE)
    size = vocabulary_size or codec.d
    largest = min(codec.k, size - 1)
    if top_k is not None and top_k > largest:
        raise UsageError(f"the files have {largest} tokens per position, and {top_k} are requested", "use fewer")
    if top_k is None and codec.sure < largest:
        progress.say(
            f"kept: the {codec.sure} exact log-probabilities of {codec.k} per position; DistillKit fits these "
            f"polynomial_terms in float32, which cannot resolve them (to keep all: top_k {largest})"
        )
    k = top_k or min(codec.sure, largest)
    texts = DistillKitFiles(files, codec, size, k)
    if texts.left_out:
        progress.say(f"left out: texts of one token, which no token follows ({texts.left_out})")
    origin = Origin.of_files(
        source,
        "distillkit",
        digest_of_files(files),
        name,
        "by DistillKit's codec, log-probabilities of the top k",
        codec=codec.model_dump(mode="json"),
        label_log_prob="an even share of the mass of the tail, where the next token is there",
    )
    spec = replace(spec or TokenCacheSpec(), top_k=k)
    return cache_of_sequences(texts, out, origin, size, {}, spec, progress)

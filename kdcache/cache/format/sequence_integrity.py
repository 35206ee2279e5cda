"""Check that the rows and tokens of sequences hold possible values (docs/FORMAT.md, section 12.5)."""

from __future__ import annotations

import math
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from kdcache.cache.format import zarr_store
from kdcache.cache.format.output_records import TOKENS
from kdcache.cache.format.row_axes import axis_of
from kdcache.cache.format.schema import Plan
from kdcache.cache.format.stored_sequences import read_counts, sequence_key
from kdcache.cache.format.token_codec import mass_columns
from kdcache.cache.format.token_encoding import TokenEncoding
from kdcache.cache.format.token_rows import SequenceTokens, TokenRows
from kdcache.cache.format.verified_files import Problem

_LOWEST = torch.finfo(torch.float16).min

_BLOCK_ROWS = 2**16
"""Rows that are checked at once."""


def check_shard_of_sequences(cache: Path, plan: Plan, view: int, shard: int) -> list[Problem]:
    """Return the problems in the tokens and rows of one shard: per kind the first place, and how many there are.

    Raises:
        CorruptError: if they cannot be read.
    """
    ids = plan.shard_ids(shard)
    counts, row_counts = (of[ids.start : ids.stop].astype(np.int64) for of in read_counts(cache, plan))
    tokens = _of_shard(cache, plan, TOKENS, view, shard)
    where = f"view {view}, shard {shard}"
    keys = zarr_store.read_samples(cache, plan)[1][ids.start : ids.stop]
    problems = [
        Problem(
            f"{where}, sequence {ids.start + int(wrong.argmax())}", f"{what} ({wrong.sum()} sequences of the shard)"
        )
        for what, wrong in _sequence_checks(tokens, counts, row_counts, keys)
        if wrong.any()
    ]
    if problems:
        return problems
    positions = tokens.taught.nonzero().squeeze(1)
    next_tokens = tokens.tokens.long()[positions + 1]
    for output, record in plan.named_outputs.items():
        rows, found = _of_shard(cache, plan, output, view, shard), {}  # type: Any, dict[str, list[int]]
        for start in range(0, len(rows), _BLOCK_ROWS):
            some = slice(start, start + _BLOCK_ROWS)
            for what, wrong in token_row_checks(rows[some], next_tokens[some], record.token_encoding):
                if wrong.any():
                    found.setdefault(what, []).extend((wrong.nonzero().squeeze(1) + start).tolist())
        for what, which in found.items():
            sequence = int(np.searchsorted(np.cumsum(row_counts), which[0], side="right"))
            position = int(positions[which[0]]) - int(counts[:sequence].sum())
            first = f"output {output}, {where}, sequence {ids.start + sequence}, position {position}"
            problems.append(Problem(first, f"{what} ({len(which)} rows of the shard)"))
    return problems


def _of_shard(cache: Path, plan: Plan, output: str, view: int, shard: int) -> Any:
    """Return all rows of an output, or all tokens, of a shard."""
    axis = axis_of(plan, output)
    begin = sum(axis.rows_of(before) for before in range(shard))
    return zarr_store.output_reader(cache, plan, output).read(view, range(begin, begin + axis.rows_of(shard)))


def token_row_checks(rows: TokenRows, next_tokens: Tensor, encoding: TokenEncoding) -> Iterator[tuple[str, Tensor]]:
    """Yield each possible defect with a mask of the rows that have it, [n] bool.

    Args:
        rows: of n positions.
        next_tokens: [n] int64, the token that follows each.
        encoding: of the rows.
    """
    if encoding.tail == "draws":
        yield from _draw_checks(rows, encoding)
        return
    # float16 log-probabilities have a relative error up to 2^-11, so their sum up to 2^-11 of the entropy (<= log V).
    rounding = 2**-11 * (2 + math.log(encoding.num_classes))
    head, indices, statistics = rows.part("log_probs").float(), rows.part("indices").long(), rows.part("statistics")
    columns = dict(zip(encoding.statistics, statistics.float().unbind(dim=1), strict=True))
    if rows.logsumexp is not None:
        yield "the logsumexp is NaN or infinite", ~rows.logsumexp.isfinite()
    yield "a statistic is NaN or infinite", ~statistics.isfinite().all(dim=1)
    yield "a log-probability is NaN or infinite", ~head.isfinite().all(dim=1)
    yield "a log-probability is above 0", (head > 0).any(dim=1)
    yield "the log-probabilities are not in descending order", (head.diff(dim=1) > 0).any(dim=1)
    yield "a token occurs twice in the head", (indices.sort(dim=1).values.diff(dim=1) == 0).any(dim=1)
    label, at_label = columns["label_log_prob"], indices == next_tokens.unsqueeze(1)
    in_head, of_head = at_label.any(dim=1), torch.where(at_label, head, 0.0).sum(dim=1)
    yield "the log-probability of the next token is above 0", label > 0
    yield (
        "the next token has another log-probability than in the head",
        in_head & ((label - of_head.clamp_min(_LOWEST)).abs() > 2**-9 * of_head.abs() + 2**-20),
    )
    above = label > head[:, -1].clamp_min(_LOWEST) * (1 - 2**-10) + 2**-20
    yield "a next token outside the head is more probable than the last token of the head", ~in_head & above
    masses = [columns[name] for name in mass_columns(encoding).values()]
    sums = head.double().exp().sum(dim=1) + masses[0].double().exp()
    yield "head and tail do not add up to 1", (sums - 1).abs() > rounding
    for name, mass in zip(mass_columns(encoding).values(), masses, strict=True):
        yield f"{name} is above 0", mass > 0
    # The head has the largest probabilities, so that it loses mass as the temperature rises.
    for colder, warmer in pairwise(masses):
        yield (
            "the mass of the tail falls with the temperature",
            colder.exp() - warmer.exp() > rounding,
        )
    if "entropy" in columns:
        entropy = columns["entropy"]
        most = math.log(encoding.num_classes) + rounding
        yield "the entropy is not between 0 and log V", (entropy < 0) | (entropy > most * (1 + 2**-10))


def _draw_checks(rows: TokenRows, encoding: TokenEncoding) -> Iterator[tuple[str, Tensor]]:
    """Yield each possible defect of rows of draws."""
    counts, drawn = rows.part("counts").long(), rows.part("draws").long()
    yield "the draws are not as many as the encoding has", counts.sum(dim=1) != encoding.draws
    yield "a draw follows the last one", ((counts[:, :-1] == 0) & (counts[:, 1:] > 0)).any(dim=1)
    # Unused places ascend from the number of all tokens.
    known = torch.where(counts > 0, drawn, encoding.num_classes + torch.arange(encoding.draws))
    yield "the tokens that were drawn are not in ascending order", (known.diff(dim=1) <= 0).any(dim=1)
    yield "a place without a draw is not 0", ((counts == 0) & (drawn != 0)).any(dim=1)


def _sequence_checks(
    tokens: SequenceTokens,
    counts: npt.NDArray[np.int64],
    row_counts: npt.NDArray[np.int64],
    keys: npt.NDArray[np.uint64],
) -> Iterator[tuple[str, npt.NDArray[np.bool_]]]:
    """Yield each possible defect of S sequences, whose tokens follow one another, with a mask of those that have it.

    Args:
        tokens: of the sequences.
        counts: [S], their numbers of tokens.
        row_counts: [S], their numbers of rows.
        keys: [S], their keys.
    """
    if (counts < 2).any():
        yield "it has fewer than two tokens", counts < 2
        return
    ids, taught = tokens.tokens.numpy(), tokens.taught.numpy()
    ends = np.cumsum(counts)
    begins = ends - counts
    yield "`taught` is neither 0 nor 1", np.maximum.reduceat(taught, begins) > 1
    yield "the last token is taught, which no token follows", taught[ends - 1] != 0
    yield "its taught positions are not as many as its rows", np.add.reduceat(taught.astype(int), begins) != row_counts
    spans = [slice(*span) for span in zip(begins.tolist(), ends.tolist(), strict=True)]
    of_tokens = np.array([sequence_key(ids[span], taught[span]) for span in spans], np.uint64)
    yield "its key is not that of its tokens", of_tokens != keys

"""Rows of the entries of an engine's answer: the most probable tokens, in order, and the prompt's own token."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch

from kdcache.cache.format.token_top_k import TopK
from kdcache.curate.foreign.answer_shapes import Array, Entries

_ROUNDING = 1e-5
"""By how much a log-probability may be above 0: the error of a float32 log-softmax."""


class ImpossibleRow(Exception):
    """A row cannot be what the engine found.

    Args:
        row: its number.
        what: what is wrong with it.
    """

    def __init__(self, row: int, what: str) -> None:
        super().__init__(what)
        self.row = row


class _Sorted(NamedTuple):
    """Entries in order of row and descending log-probability, without tokens that are listed twice.

    Attributes:
        row: [m], row of each.
        place: [m], its place in the row, from 0.
        tokens, log_probs, ranks: [m].
        is_label: [m], whether it is the prompt's own token.
        counts: [n], tokens per row.
    """

    row: Array
    place: Array
    tokens: Array
    log_probs: Array
    ranks: Array
    is_label: Array
    counts: Array


def _sorted(entries: Entries) -> _Sorted:
    """Return entries in order.

    Of a token that `FlatLogprobs` lists twice, as the prompt's own and among the top k, the second one counts, as in a
    dictionary.
    """
    row = np.repeat(np.arange(len(entries.counts)), entries.counts)
    order = np.lexsort((np.arange(len(row)), entries.tokens, row))
    same = (np.diff(row[order]) == 0) & (np.diff(entries.tokens[order]) == 0)
    order = order[np.append(~same, True)]
    order = order[np.lexsort((entries.tokens[order], -entries.log_probs[order], row[order]))]
    counts = np.bincount(row[order], minlength=len(entries.counts))
    place = np.arange(len(order)) - np.repeat(np.cumsum(counts) - counts, counts)
    return _Sorted(
        row[order],
        place,
        entries.tokens[order],
        entries.log_probs[order],
        entries.ranks[order],
        entries.tokens[order] == entries.ids[entries.first :][row[order]],
        counts,
    )


def _possible(found: _Sorted, has_labels: bool) -> Array:
    """Return how many of the tokens of each row may be its most probable ones, [n].

    All may be, but for the prompt's own token if it is the last one, and its rank is beyond their number.
    """
    if has_labels:
        return found.counts
    last = found.place == found.counts[found.row] - 1
    is_beyond = found.is_label[last] & (found.ranks[last] > found.counts)
    counts: Array = np.where(is_beyond, found.counts - 1, found.counts)
    return counts


def _sure(found: _Sorted, has_labels: bool) -> Array:
    """Return how many of the tokens of each row are surely its most probable ones, [n].

    The prompt's own token is listed whatever its rank, and the rank of one that is the last need not be its own: older
    versions of vLLM give it the next one. It can be known from the other rows, as an engine lists as many for each.
    """
    counts = _possible(found, has_labels)
    if has_labels:
        return counts
    last = found.place == found.counts[found.row] - 1
    ends_with_label = found.is_label[last]
    listed = int(found.counts[~ends_with_label].max(initial=0))
    by_others = np.minimum(counts, listed or found.counts - 1)
    sure: Array = np.where(ends_with_label, by_others, counts)
    return sure


def listed_tokens(entries: Entries) -> int:
    """Return how many of the most probable tokens are listed for each position."""
    return int(_sure(_sorted(entries), entries.labels is not None).min())


def rows_of(entries: Entries, top_k: int) -> TopK:
    """Return the rows of entries, of the `top_k` most probable tokens.

    Raises:
        ImpossibleRow: if a row lists fewer, is not in the order of its ranks, or does not have the prompt's own token.
    """
    if (bad := ~(entries.log_probs <= _ROUNDING)).any():
        row = np.repeat(np.arange(len(entries.counts)), entries.counts)[int(bad.argmax())]
        value = entries.log_probs[int(bad.argmax())]
        raise ImpossibleRow(int(row), f"a log-probability is {'NaN' if np.isnan(value) else f'above 0: {value:g}'}")
    found = _sorted(entries)
    by_rank = np.lexsort((found.ranks, found.row))
    by_rank = by_rank[found.ranks[by_rank] > 0]
    rises = (np.diff(found.log_probs[by_rank]) > 0) & (np.diff(found.row[by_rank]) == 0)
    if rises.any():
        raise ImpossibleRow(
            int(found.row[by_rank][1:][int(rises.argmax())]), "the log-probabilities are not in the order of the ranks"
        )
    if (spread := found.counts - found.counts.min()).max() > (0 if entries.labels is not None else 1):
        raise ImpossibleRow(
            int(spread.argmax()), f"it lists {found.counts.max()} tokens, and another one {found.counts.min()}"
        )
    log_probs = np.minimum(found.log_probs, 0.0)
    if entries.labels is None:
        has_label = np.bincount(found.row[found.is_label], minlength=len(found.counts)) > 0
        if not has_label.all():
            raise ImpossibleRow(
                int((~has_label).argmax()),
                "its own log-probability is not there, as if the answer were to another prompt, or from a prefix cache",
            )
        labels = log_probs[found.is_label]
    else:
        labels = np.minimum(entries.labels, np.where(entries.labels > _ROUNDING, np.inf, 0.0))
    listed = _possible(found, entries.labels is not None)
    if (short := listed < top_k).any():
        least = int(listed.min())
        raise ImpossibleRow(
            int(short.argmax()), f"{least} of the most probable tokens are listed, and {top_k} in the first answers"
        )
    kept = found.place < top_k
    shape = (len(found.counts), top_k)
    return TopK(
        torch.from_numpy(found.tokens[kept].reshape(shape)),
        torch.from_numpy(log_probs[kept].reshape(shape)),
        torch.from_numpy(labels),
    )

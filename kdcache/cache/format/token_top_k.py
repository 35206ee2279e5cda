"""Encode rows of next-token distributions of which only the most probable tokens are known (docs/FORMAT.md, 12.3).

Engines return the log-probabilities of the top k tokens, and of the next one. At T = 1 the mass of all others is the
rest. At another T it is not known; neither is the level of the logits, but for sources that state their logsumexp.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from kdcache.cache.format.codec import index_dtype
from kdcache.cache.format.token_encoding import TokenEncoding
from kdcache.cache.format.token_rows import TokenRows

_DTYPES = {"float16": torch.float16, "float32": torch.float32}

_LOWEST = torch.finfo(torch.float16).min

_LEAST_REST = 2.0**-24
"""Mass of the tail at least: what a sum of float32 probabilities leaves open."""


class TopK(NamedTuple):
    """The most probable tokens of n rows.

    Attributes:
        indices: [n, k] int64, distinct tokens, in any order; equally probable ones stay in this order.
        log_probs: [n, k] floating point, their log-probabilities at T = 1.
        label_log_probs: [n], that of the next token, whatever its rank.
        logsumexp: [n], of the raw logits; None if their level is not known.
    """

    indices: Tensor
    log_probs: Tensor
    label_log_probs: Tensor
    logsumexp: Tensor | None = None


class RowDefect(NamedTuple):
    """A row that is impossible.

    Attributes:
        row: its number.
        what: what is wrong with it.
    """

    row: int
    what: str


def defect_of(rows: TopK, next_tokens: Tensor, size: int, tolerance: float) -> RowDefect | None:
    """Return the first impossible row, or None.

    Args:
        rows: n of them.
        next_tokens: [n] int64, the token that follows each.
        size: V.
        tolerance: by how much the mass of a row may be wrong.
    """
    log_probs = rows.log_probs.double()
    lowest = log_probs.amin(dim=1)
    masses = log_probs.exp().sum(dim=1)
    at_label = rows.indices == next_tokens.unsqueeze(1)
    others = size - rows.indices.shape[1]
    in_order = rows.indices.sort(dim=1).values
    label_in_head = torch.where(at_label, log_probs, 0.0).sum(dim=1)
    label = rows.label_log_probs.double()
    slack = label.abs() * 2**-10 + 1e-6
    checks = (
        ("a log-probability is NaN", log_probs.isnan().any(dim=1) | label.isnan()),
        ("a log-probability is above 0", (log_probs > 0).any(dim=1) | (label > 0)),
        (f"a token is outside of the vocabulary of {size:,}", (in_order[:, 0] < 0) | (in_order[:, -1] >= size)),
        ("a token is there twice", (in_order.diff(dim=1) == 0).any(dim=1)),
        ("the probabilities add up to more than 1", masses > 1 + tolerance),
        (
            "the probabilities of all tokens cannot add up to 1: the rest is more than the last of the top k for each",
            1 - masses - others * lowest.exp() > tolerance,
        ),
        (
            "the next token has two log-probabilities",
            at_label.any(dim=1) & ((label - label_in_head).abs() > slack),
        ),
        (
            "the next token is not in the top k, and more probable than the last of them",
            ~at_label.any(dim=1) & (label > lowest + slack),
        ),
    )
    for what, wrong in checks:
        if wrong.any():
            return RowDefect(int(wrong.int().argmax()), what)
    return None


def encode_top_k(rows: TopK, next_tokens: Tensor, encoding: TokenEncoding) -> TokenRows:
    """Encode rows of which the top k tokens are known.

    Args:
        rows: n of them, with at least k tokens each, and without a `defect_of`.
        next_tokens: [n] int64, the token that follows each.
        encoding: `ghost`, of T = 1; with the level if the rows have it.
    """
    values = rows.log_probs.sort(dim=1, descending=True, stable=True)
    head = values.values[:, : encoding.top_k].float()
    tokens = rows.indices.gather(1, values.indices[:, : encoding.top_k])
    others = math.log(encoding.num_classes - encoding.top_k)
    rest = (1 - head.double().exp().sum(dim=1)).clamp_min(_LEAST_REST).log()
    # Rounding errors of the head may leave more than the tokens outside of it can have.
    rest = rest.minimum((head[:, -1].double() + others).clamp_min(math.log(_LEAST_REST)))
    label = rows.label_log_probs.double()
    at_label = tokens == next_tokens.unsqueeze(1)
    label = torch.where(at_label.any(dim=1), torch.where(at_label, head, 0.0).sum(dim=1).double(), label)
    label = torch.where(at_label.any(dim=1), label, label.minimum(head[:, -1].double()))
    head = head.clamp(_LOWEST, 0.0)
    return TokenRows(
        head.to(_DTYPES[encoding.dtype]),
        tokens.to(index_dtype(encoding.num_classes)),
        None if rows.logsumexp is None or not encoding.level else rows.logsumexp.float(),
        torch.stack([label, rest], dim=1).clamp(_LOWEST, 0.0).half(),
    )

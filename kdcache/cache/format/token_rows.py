"""What a row of the next-token distribution holds, and the tokens of sequences (docs/FORMAT.md, section 12)."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from kdcache.cache.format.named_tensors import NamedTensors


@dataclass(frozen=True)
class TokenRows(NamedTensors):
    """Encoded distributions of the next token, of n taught positions.

    Attributes:
        log_probs: [n, k] float16 or float32, of the k most probable tokens at T = 1, descending.
        indices: [n, k] uint8, int16 or int32, these tokens.
        logsumexp: [n] float32, of the raw logits; None if the level is not known.
        statistics: [n, S] float16, columns named by `TokenEncoding.statistics`.
        tail: [n, R] int8, coordinates in the teacher's basis; None without a `lowrank` tail.
        draws: [n, m] of the type of `indices`, distinct tokens that were drawn; None except for draws.
        counts: [n, m] uint8, how often; 0 behind the last one.
    """

    log_probs: Tensor | None = None
    indices: Tensor | None = None
    logsumexp: Tensor | None = None
    statistics: Tensor | None = None
    tail: Tensor | None = None
    draws: Tensor | None = None
    counts: Tensor | None = None

    def part(self, name: str) -> Tensor:
        """Return a tensor that the encoding has."""
        value: Tensor | None = getattr(self, name)
        if value is None:
            raise TypeError(f"these rows have no {name}")
        return value


@dataclass(frozen=True)
class SequenceTokens(NamedTensors):
    """Tokens of sequences, one after the other.

    Attributes:
        tokens: [m] uint8, int16 or int32, ids of the vocabulary.
        taught: [m] uint8, 1 where the teacher's distribution of the next token is stored.
    """

    tokens: Tensor
    taught: Tensor


IDS = ("indices", "draws", "tokens")
"""Parts of rows that are classes, or ids of tokens, and so below the number of these."""

"""What a row of the next-token distribution holds, and the tokens of sequences (docs/FORMAT.md, section 12)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Self

import torch
from torch import Tensor


class _NamedTensors:
    """Tensors by name, whose first dimension is the row; those that the encoding does not have are None."""

    def arrays(self) -> dict[str, Tensor]:
        """Return the tensors by name, without those that the encoding does not have."""
        named = {field.name: getattr(self, field.name) for field in fields(self)}  # type: ignore[arg-type]
        return {name: value for name, value in named.items() if value is not None}

    def __len__(self) -> int:
        return len(next(iter(self.arrays().values())))

    def to(self, device: torch.device | str) -> Self:
        """Return the rows on another device."""
        return self.of({name: value.to(device) for name, value in self.arrays().items()})

    def __getitem__(self, which: Tensor | slice) -> Self:
        return self.of({name: value[which] for name, value in self.arrays().items()})

    @classmethod
    def of(cls, arrays: Mapping[str, Tensor]) -> Self:
        """Return the rows of a mapping as `arrays()` returns it."""
        return cls(**arrays)

    @classmethod
    def concatenate(cls, parts: list[Self]) -> Self:
        """Concatenate parts in order."""
        return cls.of({name: torch.cat([part.arrays()[name] for part in parts]) for name in parts[0].arrays()})


@dataclass(frozen=True)
class TokenRows(_NamedTensors):
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
class SequenceTokens(_NamedTensors):
    """Tokens of sequences, one after the other.

    Attributes:
        tokens: [m] uint8, int16 or int32, ids of the vocabulary.
        taught: [m] uint8, 1 where the teacher's distribution of the next token is stored.
    """

    tokens: Tensor
    taught: Tensor


IDS = ("indices", "draws", "tokens")
"""Parts of rows that are classes, or ids of tokens, and so below the number of these."""

"""Batches of token sequences: packed end to end, or one per row with padding, or cut to prefixes.

Positions and attention begin anew in each sequence, as they did for the teacher; a causal teacher says the same of a
prefix. So the taught positions of a batch have the same targets in whatever way the sequences are packed.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from kdcache.errors import UsageError


class TokenSequence(NamedTuple):
    """A sequence and its taught positions.

    Attributes:
        number: of the sequence in its cache, from 0.
        tokens: [L] integers.
        taught: [L] bool, positions with a row of the teacher, which is of their next token.
    """

    number: int
    tokens: Tensor
    taught: Tensor


class TokenBatch(NamedTuple):
    """Sequences as a network takes them, and their taught positions, in order of the sequences and positions.

    Attributes:
        input_ids: [R, T] int64.
        position_ids: [R, T] int64, from 0 in each sequence.
        attention_mask: [R, T] int64, 0 at padding; None for packed sequences, whose positions separate them.
        taught: [n] int64, the taught positions in the flattened [R * T].
        labels: [n] int64, their next tokens.
        rows: (number of the sequence, number of its taught positions that are here), which are its first rows.
    """

    input_ids: Tensor
    position_ids: Tensor
    attention_mask: Tensor | None
    taught: Tensor
    labels: Tensor
    rows: list[tuple[int, int]]

    def to(self, device: torch.device | str) -> TokenBatch:
        """Return the batch on another device."""
        ids, positions, mask, taught, labels, rows = self
        mask = None if mask is None else mask.to(device)
        return TokenBatch(ids.to(device), positions.to(device), mask, taught.to(device), labels.to(device), rows)

    def taught_of(self, hidden: Tensor) -> Tensor:
        """Return the hidden states of the taught positions, [R, T, d] -> [n, d]."""
        return hidden.flatten(0, 1)[self.taught]


def check_sequence(sequence: TokenSequence) -> None:
    """Check that a sequence can be trained on.

    Raises:
        UsageError: for tokens and taught positions of different lengths, or a taught last position.
    """
    tokens, taught = sequence.tokens, sequence.taught
    if tokens.ndim != 1 or tokens.shape != taught.shape or taught.dtype != torch.bool:
        raise UsageError(
            f"sequence {sequence.number} has tokens {list(tokens.shape)}, taught {taught.dtype} {list(taught.shape)}",
            "give tokens [L] and taught [L] bool, one for each token",
        )
    if len(taught) and bool(taught[-1]):
        raise UsageError(
            f"the last token of sequence {sequence.number} is taught, and nothing follows it",
            "mark the positions before the tokens to learn, not these tokens",
        )


def token_batch(sequences: Sequence[TokenSequence], max_length: int | None = None, packed: bool = True) -> TokenBatch:
    """Return a batch of sequences.

    Args:
        sequences: in the order of their rows.
        max_length: longer sequences are cut to a prefix of as many tokens, whose last is not taught, as the token after
            it is not in the prefix. None for whole sequences.
        packed: end to end in one row; or else one sequence per row, padded at the end.

    Raises:
        UsageError: for a sequence that cannot be trained on, or none at all.
    """
    if not sequences:
        raise UsageError("a batch has no sequences", "give at least one")
    for sequence in sequences:
        check_sequence(sequence)
    lengths = [min(len(each.tokens), max_length or len(each.tokens)) for each in sequences]
    width = sum(lengths) if packed else max(lengths)
    count = 1 if packed else len(sequences)
    ids, positions = torch.zeros(count, width, dtype=torch.int64), torch.zeros(count, width, dtype=torch.int64)
    mask = torch.zeros(count, width, dtype=torch.int64)
    taught, labels, rows = [], [], []
    start = 0
    for row, (sequence, length) in enumerate(zip(sequences, lengths, strict=True)):
        tokens = sequence.tokens.to(torch.int64)
        offset = start if packed else row * width
        for whole, values in ((ids, tokens[:length]), (positions, torch.arange(length)), (mask, torch.ones(length))):
            whole.view(-1)[offset : offset + length] = values
        here = sequence.taught[: length - 1].nonzero().squeeze(1)
        taught.append(here + offset)
        labels.append(tokens[here + 1])
        rows.append((sequence.number, len(here)))
        start += length
    return TokenBatch(ids, positions, None if packed else mask, torch.cat(taught), torch.cat(labels), rows)


def fill_batches(
    lengths: Iterable[int], batch_tokens: int, max_length: int | None = None, packed: bool = True
) -> Iterator[list[int]]:
    """Yield the indices of the sequences of each batch, in order, as many as have room.

    Args:
        lengths: of the sequences, in the order of the epoch.
        batch_tokens: tokens per batch at most, with padding. A sequence that is longer is a batch of its own.
        max_length: of the prefixes that are taken; None for whole sequences.
        packed: as for `token_batch`.
    """
    batch: list[int] = []
    total = widest = 0
    for index, whole in enumerate(lengths):
        length = min(whole, max_length or whole)
        after = total + length if packed else max(widest, length) * (len(batch) + 1)
        if batch and after > batch_tokens:
            yield batch
            batch, total, widest = [], 0, 0
        batch.append(index)
        total, widest = total + length, max(widest, length)
    if batch:
        yield batch

"""The teacher pass of a language model: one shard of sequences at a time."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from kdcache.cache.format.output_records import TOKENS
from kdcache.cache.format.schema import Plan
from kdcache.cache.format.stored_sequences import sequence_key
from kdcache.cache.format.tail_basis import TailBasis
from kdcache.cache.format.token_codec import encode_tokens
from kdcache.cache.format.token_draws import encode_draws
from kdcache.cache.format.token_encoding import TokenEncoding
from kdcache.cache.format.token_rows import SequenceTokens, TokenRows
from kdcache.cache.format.vector_rows import EncodedRows
from kdcache.cache.sequence_plan import OUTPUT, Sequences
from kdcache.data.packing import TokenSequence
from kdcache.dump.tokens.running import RunningLanguageModel, cut_batches, sequences_of
from kdcache.errors import CorruptError, MismatchError
from kdcache.runtime.progress import Task

Keys = npt.NDArray[np.uint64]

_CHECK = "check the teacher's weights and its precision (cache.precision)"

_NAMED = 3
"""Sequences of a batch that are named in an error."""


class Encoder:
    """Encodes hidden states, some rows of logits at a time.

    Args:
        teacher: its head gives the logits.
        encoding: of the rows.
        basis: of their tails, on the teacher's device; None without.
    """

    def __init__(self, teacher: RunningLanguageModel, encoding: TokenEncoding, basis: TailBasis | None) -> None:
        self._teacher, self._encoding, self._basis = teacher, encoding, basis

    @torch.no_grad()
    def __call__(self, sequences: Sequence[TokenSequence], hidden: Tensor, keys: Keys) -> list[TokenRows]:
        """Return the rows of each of some sequences, on the CPU.

        Args:
            sequences: in order.
            hidden: [n, d], of their taught positions, on the teacher's device.
            keys: of all sequences, which seed their draws.

        Raises:
            CorruptError: if a hidden state or a logit is NaN or infinite; names the sequence.
        """
        counts = [int(sequence.taught.sum()) for sequence in sequences]
        finite = hidden.isfinite().all(dim=1).cpu()
        for sequence, fine in zip(sequences, torch.split(finite, counts), strict=True):
            if not fine.all():
                at = int(sequence.taught.nonzero()[int((~fine).nonzero()[0])])
                raise CorruptError(
                    f"the teacher's hidden state of sequence {sequence.number}, token {at}, is NaN or infinite", _CHECK
                )
        next_tokens = torch.cat([next_tokens_of(sequence) for sequence in sequences]).to(hidden.device)
        try:
            if self._encoding.tail != "draws":
                rows = self.rows(hidden, next_tokens)
                ends = np.cumsum(counts).tolist()
                return [rows[end - count : end] for end, count in zip(ends, counts, strict=True)]
            return [
                self._drawn(of_sequence, int(keys[sequence.number]) >> 1)
                for sequence, of_sequence in zip(sequences, torch.split(hidden, counts), strict=True)
            ]
        except CorruptError as error:
            which = ", ".join(str(sequence.number) for sequence in sequences[:_NAMED])
            raise CorruptError(f"in the batch of sequences {which}, ...: {error.what}", _CHECK) from None

    @torch.no_grad()
    def rows(self, hidden: Tensor, next_tokens: Tensor) -> TokenRows:
        """Return the rows of some positions, on the CPU; all draws have one seed.

        Args:
            hidden: [n, d], on the teacher's device.
            next_tokens: [n] int64, on the teacher's device.
        """
        if self._encoding.tail == "draws":
            return self._drawn(hidden, 0)
        parts = []
        for start in range(0, len(hidden), self._teacher.rows_at_once):
            rows = slice(start, start + self._teacher.rows_at_once)
            logits = self._teacher.head.logits(hidden[rows])
            parts.append(encode_tokens(logits, next_tokens[rows], self._encoding, self._basis).to("cpu"))
        return TokenRows.concatenate(parts)

    def _drawn(self, hidden: Tensor, seed: int) -> TokenRows:
        generator = torch.Generator(hidden.device).manual_seed(seed)
        parts = []
        for some in torch.split(hidden, self._teacher.rows_at_once):
            parts.append(encode_draws(self._teacher.head.logits(some), self._encoding, generator).to("cpu"))
        return TokenRows.concatenate(parts)


def make_shard(
    teacher: RunningLanguageModel,
    source: Sequences,
    plan: Plan,
    basis: TailBasis | None,
    keys: Keys,
    shard: int,
    task: Task,
) -> dict[str, EncodedRows]:
    """Return the rows and the tokens of a shard.

    Batches are cut inside the shard, always in the same way, so that the rows do not depend on what was made before.

    Args:
        teacher: on its device.
        source: of all sequences.
        plan: of the cache; its batch size is in tokens.
        basis: of the tails, on the teacher's device; None without.
        keys: of all sequences.
        shard: index of the shard.
        task: progress of the rows.

    Raises:
        CorruptError: if a logit is NaN or infinite; names the sequence.
        MismatchError: if a sequence is another one than when the cache was begun.
    """
    encode = Encoder(teacher, plan.named_outputs[OUTPUT].token_encoding, basis)
    numbers = list(plan.shard_ids(shard))
    sequences = sequences_of(source, numbers)
    for sequence in sequences:
        if sequence_key(sequence.tokens.numpy(), sequence.taught.numpy()) != int(keys[sequence.number]):
            raise MismatchError(f"sequence {sequence.number} changed while it was read", "run the command again")
    rows: dict[int, TokenRows] = {}
    for batch in cut_batches(np.array([len(each.tokens) for each in sequences]), plan.batch_size):
        some = [sequences[index] for index in batch]
        hidden = teacher.hidden_states(some)
        for sequence, of_sequence in zip(some, encode(some, hidden, keys), strict=True):
            rows[sequence.number] = of_sequence
        task.advance(len(hidden))
    taught = torch.cat([sequence.taught for sequence in sequences])
    tokens = SequenceTokens(torch.cat([sequence.tokens for sequence in sequences]), taught.to(torch.uint8))
    return {OUTPUT: TokenRows.concatenate([rows[number] for number in numbers]), TOKENS: tokens}


def next_tokens_of(sequence: TokenSequence) -> Tensor:
    """Return the token after each taught position of a sequence, [n] int64."""
    return sequence.tokens[sequence.taught.nonzero().squeeze(1) + 1]

"""Run the teacher of sequences on a pilot, fit the basis of their tails, and measure what is stored."""

from __future__ import annotations

import time
from typing import NamedTuple

import torch
from torch import Tensor

from kdcache.cache.format.tail_basis import TailBasis
from kdcache.cache.format.token_encoding import TokenEncoding
from kdcache.cache.sequence_plan import CountedSequences, PilotRows, Sequences, check_rank, pilot_rows
from kdcache.cache.token_basis import fit_head_basis
from kdcache.cache.token_spec import TokenCacheSpec
from kdcache.dump.tokens.running import RunningLanguageModel, cut_batches, sequences_of
from kdcache.dump.tokens.token_pass import next_tokens_of
from kdcache.errors import CorruptError
from kdcache.runtime.progress import Progress


class TokenPilot(NamedTuple):
    """Hidden states of some taught positions, spread over the sequences.

    Attributes:
        hidden: [P, d] float32, on the teacher's device.
        next_tokens: [P] int64, on the same device.
        tokens_per_second: of the teacher's body.
    """

    hidden: Tensor
    next_tokens: Tensor
    tokens_per_second: float


def run_pilot(
    teacher: RunningLanguageModel,
    source: Sequences,
    counted: CountedSequences,
    wanted: int,
    batch_tokens: int,
    progress: Progress,
) -> TokenPilot:
    """Run the teacher on some sequences.

    Args:
        teacher: on its device.
        source: of the sequences.
        counted: their numbers of tokens and rows.
        wanted: number of rows.
        batch_tokens: tokens per batch.
        progress: progress reporter.

    Raises:
        CorruptError: if a hidden state is NaN or infinite; names the sequence.
    """
    chosen = pilot_rows(counted, wanted)
    lengths = counted.tokens[[each.sequence for each in chosen]]
    hidden: dict[int, Tensor] = {}
    next_tokens: dict[int, Tensor] = {}
    start = time.perf_counter()
    with progress.task("pilot", sum(len(each.numbers) for each in chosen), "rows") as task:
        for batch in cut_batches(lengths, batch_tokens):
            of_batch = [chosen[index] for index in batch]
            sequences = sequences_of(source, [each.sequence for each in of_batch])
            counts = [int(each.taught.sum()) for each in sequences]
            states = torch.split(teacher.hidden_states(sequences), counts)
            for each, sequence, of_sequence in zip(of_batch, sequences, states, strict=True):
                hidden[each.sequence] = _chosen(of_sequence, each)
                next_tokens[each.sequence] = _chosen(next_tokens_of(sequence), each)
                task.advance(len(each.numbers))
    order = [each.sequence for each in chosen]
    all_hidden = torch.cat([hidden[index] for index in order])
    seconds = time.perf_counter() - start
    found = torch.cat([next_tokens[index] for index in order]).to(all_hidden.device)
    return TokenPilot(all_hidden, found, int(lengths.sum()) / seconds)


def _chosen(rows: Tensor, pilot: PilotRows) -> Tensor:
    """Return the rows of a sequence that are in the pilot.

    Raises:
        CorruptError: if one is NaN or infinite.
    """
    some = rows[torch.from_numpy(pilot.numbers).to(rows.device)]
    if some.is_floating_point() and not some.isfinite().all():
        raise CorruptError(
            f"the teacher's hidden states of sequence {pilot.sequence} are NaN or infinite",
            "check the teacher's weights and its precision (cache.precision)",
        )
    return some


def fit_basis(
    teacher: RunningLanguageModel, pilot: TokenPilot, spec: TokenCacheSpec, encoding: TokenEncoding
) -> TailBasis | None:
    """Return the basis of the tails; None for an encoding without one.

    Raises:
        UsageError: if the pilot has fewer rows than the basis coordinates.
    """
    if not encoding.rank:
        return None
    check_rank(encoding.rank, len(pilot.hidden))
    with torch.no_grad():
        return fit_head_basis(pilot.hidden, teacher.head, encoding.top_k, encoding.rank, spec.step)

"""The batches of sequences of an epoch, and their division among processes and micro-batches."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast
from torch import Tensor

from kdcache.cache.sequences import CachedSequences, SequenceText
from kdcache.config.text import TokenTrainSpec
from kdcache.data.packing import TokenBatch, fill_batches
from kdcache.models.causal_lm import CausalLM

_SMALLEST, _PADDING = 1024, 0.2
"""Tokens of a padded micro-batch, from which on one begins anew that would have a larger share of padding than this."""

Micro = list[int]
"""The sequences of a micro-batch; empty for a process that has none of a step."""


class EpochPlan:
    """The steps of the epochs of a run.

    Args:
        sequences: of the cache.
        lengths: tokens of each.
        held: those that are held out.
        spec: packing, seed of the order.
    """

    def __init__(
        self, sequences: CachedSequences, lengths: Sequence[int], held: Sequence[int], spec: TokenTrainSpec
    ) -> None:
        self.sequences, self._lengths, self._spec = sequences, lengths, spec
        self._kept = torch.ones(len(lengths), dtype=torch.bool)
        self._kept[list(held)] = False

    def steps(self, epoch: int, accelerator: Accelerator) -> list[list[list[Micro]]]:
        """Return the steps of an epoch, counted from 1: of each the micro-batches of each process."""
        generator = torch.Generator().manual_seed(self._spec.seed_of_data * 1_000_003 + epoch)
        order = self.sequences.order(generator)
        ranks = accelerator.num_processes
        if ranks > 1:
            # Processes may hold the cache in different placements, which have different orders.
            order = broadcast(order.to(accelerator.device)).cpu()
        return cut_epoch(order[self._kept[order]].tolist(), self._lengths, self._spec, ranks)


def cut_epoch(
    order: Sequence[int], lengths: Sequence[int], spec: TokenTrainSpec, ranks: int
) -> list[list[list[Micro]]]:
    """Return the steps of an epoch: of each the micro-batches of each process.

    Args:
        order: the sequences of the epoch.
        lengths: tokens of each sequence of the cache.
        spec: tokens per step and per micro-batch, cutting and packing.
        ranks: number of processes.
    """
    cuts = fill_batches((lengths[index] for index in order), spec.batch_tokens, spec.max_length)
    return [
        [micro_batches(part, lengths, spec) for part in divided([order[index] for index in cut], lengths, spec, ranks)]
        for cut in cuts
    ]


def divided(which: Sequence[int], lengths: Sequence[int], spec: TokenTrainSpec, ranks: int) -> list[list[int]]:
    """Return the sequences of a step that each process gets: the longest first, each to the one with fewest tokens."""
    if ranks == 1:
        return [list(which)]
    parts: list[list[int]] = [[] for _ in range(ranks)]
    tokens = [0] * ranks
    for place in sorted(range(len(which)), key=lambda place: -_taken(which[place], lengths, spec)):
        rank = min(range(ranks), key=lambda rank: (tokens[rank], rank))
        parts[rank].append(place)
        tokens[rank] += _taken(which[place], lengths, spec)
    return [[which[place] for place in sorted(part)] for part in parts]


def micro_batches(which: Sequence[int], lengths: Sequence[int], spec: TokenTrainSpec) -> list[Micro]:
    """Return the sequences of a process, as they go through the network; at least one micro-batch.

    Packed sequences stay in order. Others are sorted by length, and divided so that little is padded.
    """
    if not which:
        return [[]]
    if spec.packed:
        sizes = [_taken(index, lengths, spec) for index in which]
        cuts = fill_batches(sizes, spec.micro_batch_tokens or sum(sizes))
        return [[which[index] for index in cut] for cut in cuts]
    found: list[Micro] = []
    size = width = total = 0
    for index in sorted(which, key=lambda index: -_taken(index, lengths, spec)):
        length, after = _taken(index, lengths, spec), size + width
        is_full = spec.micro_batch_tokens is not None and after > spec.micro_batch_tokens
        is_wasteful = size >= _SMALLEST and after - total - length > _PADDING * after
        if not found or is_full or is_wasteful:
            found.append([])
            size, width, total, after = 0, length, 0, length
        found[-1].append(index)
        size, total = after, total + length
    return found


def in_micro_batches(which: Sequence[int], lengths: Sequence[int], spec: TokenTrainSpec) -> list[Micro]:
    """Return the micro-batches of sequences that no step is taken on, as those of one process in training."""
    return [micro for step in cut_epoch(which, lengths, spec, 1) for part in step for micro in part]


def _taken(sequence: int, lengths: Sequence[int], spec: TokenTrainSpec) -> int:
    return min(lengths[sequence], spec.max_length or lengths[sequence])


def with_packing(spec: TokenTrainSpec, causal: CausalLM) -> TokenTrainSpec:
    """Return the training of a network with `packed` as true or false."""
    if spec.packed != "auto":
        return spec
    config = getattr(causal.network, "config", None)
    attention = str(getattr(config, "_attn_implementation", ""))
    return spec.model_copy(update={"packed": causal.packs and attention.startswith(("flash", "flex"))})


def as_token_batch(which: Sequence[int], text: SequenceText, packed: bool) -> TokenBatch:
    """Return sequences of a cache as a network takes them; see `token_batch`, which has the same result.

    Args:
        which: their numbers.
        text: their tokens.
        packed: end to end in one row; or else one sequence per row, padded at the end.
    """
    sizes = text.token_start.diff()
    row = torch.repeat_interleave(torch.arange(len(sizes)), sizes)
    position = torch.arange(len(text.tokens)) - text.token_start[:-1][row]
    rows = list(zip(which, text.row_start.diff().tolist(), strict=True))
    if packed:
        ids, positions, mask, place = text.tokens[None], position[None], None, None
    else:
        width = int(sizes.max())
        place = row * width + position
        shape = (len(sizes), width)
        ids, positions, mask = (
            torch.zeros(shape, dtype=torch.int64).view(-1).index_copy(0, place, values).view(shape)
            for values in (text.tokens, position, torch.ones_like(position))
        )
    taught = text.positions if place is None else place[text.positions]
    return TokenBatch(ids, positions, mask, taught, text.next_tokens, rows)


def no_sequences() -> TokenBatch:
    """Return the batch of a process that has no sequences of a step: one token, which is not taught."""
    none = torch.zeros(0, dtype=torch.int64)
    token = torch.zeros(1, 1, dtype=torch.int64)
    return TokenBatch(token, token.clone(), None, none, none.clone(), [])


def sequence_lengths(token_start: Tensor) -> list[int]:
    """Return the number of tokens of each sequence, from where each begins, [N + 1]."""
    lengths: list[int] = token_start.diff().tolist()
    return lengths

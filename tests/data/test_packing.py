"""Batches of token sequences: what is in them, and the same loss however they are shuffled, cut and packed."""

from __future__ import annotations

import itertools

import pytest
import torch
from helpers.language_models import rows_of, sequences, teacher_logits, tiny
from helpers.loss_cases import few
from helpers.token_targets import targets_of
from hypothesis import given
from hypothesis import strategies as st

import kdcache
from kdcache.data.packing import TokenSequence, fill_batches, token_batch
from kdcache.errors import UsageError

LENGTHS = st.lists(st.integers(1, 12), min_size=1, max_size=8)


@given(LENGTHS, st.integers(1, 14), st.booleans())
def test_a_batch_has_the_taught_positions_of_each_prefix_in_order(
    lengths: list[int], max_length: int, packed: bool
) -> None:
    given_sequences = sequences(lengths)
    batch = token_batch(given_sequences, max_length, packed)
    flat, positions = batch.input_ids.flatten(), batch.position_ids.flatten()
    expected = [
        (int(sequence.tokens[at]), at, int(sequence.tokens[at + 1]))
        for sequence in given_sequences
        for at in range(min(max_length, len(sequence.tokens)) - 1)
        if sequence.taught[at]
    ]
    found = zip(flat[batch.taught].tolist(), positions[batch.taught].tolist(), batch.labels.tolist(), strict=True)
    assert list(found) == expected
    assert batch.rows == [(each.number, int(each.taught[: max_length - 1].sum())) for each in given_sequences]
    if packed:
        assert batch.attention_mask is None
        assert (positions == 0).nonzero().flatten().tolist() == [
            sum(min(length, max_length) for length in lengths[:index]) for index in range(len(lengths))
        ]
    else:
        assert batch.attention_mask is not None
        assert batch.attention_mask.sum(dim=1).tolist() == [min(length, max_length) for length in lengths]


@given(LENGTHS, st.integers(1, 30), st.one_of(st.none(), st.integers(1, 14)), st.booleans())
def test_batches_are_filled_in_order_and_not_above_their_size(
    lengths: list[int], batch_tokens: int, max_length: int | None, packed: bool
) -> None:
    batches = list(fill_batches(lengths, batch_tokens, max_length, packed))
    assert [index for batch in batches for index in batch] == list(range(len(lengths)))
    kept = [min(length, max_length or length) for length in lengths]

    def size(batch: list[int]) -> int:
        chosen = [kept[index] for index in batch]
        return sum(chosen) if packed else max(chosen) * len(chosen)

    assert all(len(batch) == 1 or size(batch) <= batch_tokens for batch in batches)
    for batch, after in itertools.pairwise(batches):
        assert size([*batch, after[0]]) > batch_tokens


def test_sequences_that_cannot_be_trained_on_are_refused() -> None:
    tokens = torch.arange(4)
    with pytest.raises(UsageError, match="the last token of sequence 3 is taught"):
        token_batch([TokenSequence(3, tokens, torch.ones(4, dtype=torch.bool))])
    with pytest.raises(UsageError, match=r"sequence 0 has tokens \[4\], taught torch.bool \[3\]"):
        token_batch([TokenSequence(0, tokens, torch.zeros(3, dtype=torch.bool))])
    with pytest.raises(UsageError, match="has no sequences"):
        token_batch([])


STUDENT = tiny()
SEQUENCES = sequences([9, 4, 12, 2, 7, 6, 11, 1])
TARGETS = [targets_of(logits, 8) for logits in teacher_logits(SEQUENCES)]
MAX_LENGTH = 8
KD = kdcache.loss("kd", tau=2)


def step(order: list[int], sizes: list[int], packed: bool) -> tuple[float, torch.Tensor]:
    """The loss of a step of all sequences and its gradient, in micro-batches of the given sizes."""
    STUDENT.network.zero_grad()
    count = sum(int(each.taught[: MAX_LENGTH - 1].sum()) for each in SEQUENCES)
    total, start = 0.0, 0
    for size in [*sizes, len(order)]:
        chosen = order[start : start + size]
        start += size
        if not chosen:
            break
        batch = token_batch([SEQUENCES[number] for number in chosen], MAX_LENGTH, packed)
        targets = rows_of(TARGETS, batch.rows)
        parts = KD.of_tokens(STUDENT.hidden_states(batch), STUDENT.head, batch.labels, targets, count=count)
        torch.autograd.backward(parts.total)
        total += float(parts.total.detach())
    return total, torch.cat([each.grad.flatten() for each in STUDENT.network.parameters() if each.grad is not None])


@few
@given(st.permutations(range(len(SEQUENCES))), st.lists(st.integers(1, 4), max_size=8), st.booleans())
def test_the_loss_is_the_same_however_a_step_is_shuffled_cut_and_packed(
    order: list[int], sizes: list[int], packed: bool
) -> None:
    found, expected = step(order, sizes, packed), step(list(range(len(SEQUENCES))), [], packed=False)
    # Llama's normalizations are float32, also in float64.
    assert abs(found[0] - expected[0]) < 1e-6
    assert (found[1] - expected[1]).norm() < 1e-6 * expected[1].norm()

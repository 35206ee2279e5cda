"""Rows of a live teacher are its whole distribution: the loss is that of the dense computation in float64."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from helpers.language_models import VOCABULARY_SIZE, tiny
from helpers.language_training import cache_of, loss_of, taught
from torch.nn import functional as F

from kdcache.demo.live_teacher import with_live_teacher
from kdcache.losses.token_loss import token_loss
from kdcache.runtime.progress import Silent
from kdcache.train.tokens.inputs import TokenInputs, inputs_of_sequences
from kdcache.train.tokens.scoring import kl_sum

WHICH, LENGTHS = [2, 0, 5], [23, 6, 12]


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> TokenInputs:
    cache = cache_of(taught(), tmp_path_factory.mktemp("live") / "c.kdcache", top_k=4, rank=3, pilot_rows=50)
    return inputs_of_sequences(cache, device="cpu", progress=Silent())


@torch.no_grad()
def test_the_loss_is_that_of_all_probabilities(inputs: TokenInputs) -> None:
    teacher = tiny(seed=4)
    network = teacher.network.float()
    network.get_output_embeddings().weight.mul_(20)  # type: ignore[operator]  # a peaked distribution
    live = with_live_teacher(inputs, teacher)
    text = live.sequences.text(WHICH, LENGTHS)
    targets = live.sequences.targets(live.sequences.rows_of(WHICH, text))
    expected = []
    for index, length in zip(WHICH, LENGTHS, strict=True):
        ids, positions = live.sequences.tokens(index)
        logits = network(input_ids=ids[None, :length]).logits[0, :, :VOCABULARY_SIZE]
        expected.append(logits[:-1][positions[: length - 1]])
    p = torch.cat(expected).double().log_softmax(dim=1)
    student = torch.randn(len(p), VOCABULARY_SIZE, generator=torch.Generator().manual_seed(0))
    kl = F.kl_div(student.double().log_softmax(dim=1), p, log_target=True, reduction="sum")
    assert float(kl_sum(student, targets)) == pytest.approx(float(kl), rel=1e-5)
    parts = token_loss(student, text.next_tokens, targets, loss_of(name="kd"))
    labels = F.cross_entropy(student.double(), text.next_tokens)
    assert float(parts.total) == pytest.approx(float(0.9 * kl / len(p) + 0.1 * labels), rel=1e-5)


def test_its_runs_are_recorded_as_those_of_a_live_teacher(inputs: TokenInputs, tmp_path: Path) -> None:
    live = with_live_teacher(inputs, tiny(seed=4))
    assert live.record == {**inputs.record, "placement": ["live teacher"]}
    assert live.lengths == inputs.lengths

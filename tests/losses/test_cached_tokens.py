"""Students of the rows of a cache of sequences, against the usual loss on all logits of the teacher."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from helpers.language_models import VOCABULARY_SIZE, sequences, tiny
from torch import Tensor
from torch.nn import functional as F

import kdcache
from kdcache import CachedSequences

GIVEN = sequences([9, 30, 12, 2, 17, 26])
LOGITS = [
    2 * torch.randn(len(each.tokens), VOCABULARY_SIZE, generator=torch.Generator().manual_seed(each.number))
    for each in GIVEN
]
STUDENT = tiny()


def cached(folder: Path, **settings: object) -> CachedSequences:
    spec = kdcache.TokenCacheSpec(**{"top_k": 100, "tail": "ghost", **settings})  # type: ignore[arg-type]
    cache = kdcache.write_token_cache(
        [each.tokens.numpy() for each in GIVEN],
        LOGITS,
        folder / "c.kdcache",
        vocabulary=VOCABULARY_SIZE,
        taught=[each.taught.numpy() for each in GIVEN],
        spec=spec,
    )
    return cache.sequences()


def from_the_cache(
    teacher: CachedSequences, chosen: list[int], length: int | None, tau: float
) -> tuple[Tensor, Tensor]:
    """The KD loss and its gradient from rows of the cache, and the batch that a student sees from its tokens."""
    batch = kdcache.token_batch([kdcache.TokenSequence(i, *teacher.tokens(i)) for i in chosen], length)
    found = teacher(chosen, None if length is None else [length] * len(chosen))
    assert found.next_tokens.tolist() == batch.labels.tolist()
    assert found.row_start.diff().tolist() == [count for _, count in batch.rows]
    STUDENT.network.zero_grad()
    kd = kdcache.loss("kd", tau=tau, ce_weight=0.0, kd_weight=1.0)
    targets = teacher.targets(found.rows).to(dtype=torch.float64)
    total = kd.of_tokens(
        STUDENT.hidden_states(batch), STUDENT.head, batch.labels, targets, count=len(batch.labels)
    ).total
    torch.autograd.backward(total)
    return total.detach(), gradient()


def gradient() -> Tensor:
    return torch.cat([each.grad.flatten() for each in STUDENT.network.parameters() if each.grad is not None])


def usual(chosen: list[int], length: int | None, tau: float) -> tuple[Tensor, Tensor]:
    """The loop that a user would write: each sequence alone, KL of softened logits, mean over the taught positions."""
    STUDENT.network.zero_grad()
    sums, count = [], 0
    for number in chosen:
        tokens = GIVEN[number].tokens[:length]
        taught = GIVEN[number].taught[: len(tokens) - 1].nonzero().squeeze(1)
        student = STUDENT.network(input_ids=tokens[None]).logits[0, taught]
        log_q = (student / tau).log_softmax(dim=1)
        log_p = (LOGITS[number][taught].double() / tau).log_softmax(dim=1)
        sums.append(tau**2 * F.kl_div(log_q, log_p, log_target=True, reduction="sum"))
        count += len(taught)
    total = torch.stack(sums).sum() / count
    torch.autograd.backward(total)
    return total.detach(), gradient()


@pytest.mark.parametrize("length", [None, 10, 2])
@pytest.mark.parametrize("tau", [1.0, 2.0])
def test_a_student_learns_from_rows_as_from_the_teacher(length: int | None, tau: float, tmp_path: Path) -> None:
    """100 of 120 tokens leave a tail of 4% of the mass: what is stored, in half precision, is the rest of the error."""
    teacher, chosen = cached(tmp_path), [4, 1, 5]
    (loss, slope), (expected, of_teacher) = (
        from_the_cache(teacher, chosen, length, tau),
        usual(chosen, length, tau),
    )
    assert abs(loss - expected) < 0.01 * expected
    assert (slope - of_teacher).norm() < 0.03 * of_teacher.norm()


def test_a_shorter_head_is_worse_and_a_shape_mends_it(tmp_path: Path) -> None:
    errors = []
    shaped: dict[str, object] = {"tail": "lowrank", "rank": 50, "pilot_rows": 57, "step": 0.05}
    for number, more in enumerate(({}, shaped)):
        teacher = cached(tmp_path / str(number), top_k=16, **more)
        (_, slope), (_, of_teacher) = from_the_cache(teacher, [1, 5, 4], None, 2.0), usual([1, 5, 4], None, 2.0)
        errors.append(float((slope - of_teacher).norm() / of_teacher.norm()))
    assert errors[1] < errors[0] / 2

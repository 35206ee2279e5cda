"""Cross-entropy and KL from targets of tokens in one function: sums of their definitions, by autograd in float64."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from helpers.loss_cases import few, loss_of, with_gradient
from helpers.token_targets import language_logits, targets_of
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from kdcache.losses.fused_tokens import HardTarget, SoftTarget, plain_sum, token_sums
from kdcache.losses.token_loss import token_loss
from kdcache.losses.token_targets import TokenTargets, head_and_tail, scaled_logits

N, V, K = 7, 60, 5
LABELS = torch.tensor([3, 0, -1, 59, 12, -1, 3])
WEIGHT = torch.tensor([1.0, 0.0, 0.5, 2.0, 1.0, 0.25, 3.0], dtype=torch.float64)


def soft_target(targets: TokenTargets, tau: float) -> SoftTarget:
    """What `token_sums` takes of targets at a temperature."""
    stored = targets if targets.has_shape else None
    t = None if tau == 1 else torch.full((len(targets), 1), tau, dtype=torch.float64)
    return SoftTarget(targets.indices, *head_and_tail(targets, tau), stored, t)


def divergences(v: Tensor, targets: TokenTargets, tau: float) -> Tensor:
    """KL of each row from the decoded teacher, or over K + 1 classes, with what torch has."""
    log_q = (v / tau).log_softmax(dim=1)
    if targets.has_shape:
        log_p = scaled_logits(targets, tau).log_softmax(dim=1)
        return (log_p.exp() * (log_p - log_q)).sum(dim=1)
    head, tail = head_and_tail(targets, tau)
    outside = torch.ones_like(v).scatter(1, targets.indices, 0.0).bool()
    log_rest = torch.where(outside, log_q, -torch.inf).logsumexp(dim=1, keepdim=True)
    log_p, log_q = torch.cat([head, tail], dim=1), torch.cat([log_q.gather(1, targets.indices), log_rest], dim=1)
    return (log_p.exp() * (log_p - log_q)).sum(dim=1)


@few
@given(
    st.integers(0, 2**31),
    st.sampled_from([1.0, 4 / 3, 3.0]),
    st.sampled_from([0, 8]),
    st.sampled_from([0.3, 1.0, 5.0]),
)
def test_both_parts_and_their_gradient_are_those_of_autograd(seed: int, tau: float, rank: int, spread: float) -> None:
    targets = targets_of(language_logits(N, V, width=8, seed=seed), K, rank=rank)
    student = spread * language_logits(N, V, width=8, seed=seed + 1)
    soft, hard = soft_target(targets, tau), HardTarget(LABELS, 0.7)
    found = with_gradient(lambda v: token_sums(v, soft.temperature, soft, WEIGHT, hard).total, student)

    def defined(v: Tensor) -> Tensor:
        labeled = F.cross_entropy(v, LABELS, ignore_index=-1, reduction="sum")
        return 0.7 * labeled + (WEIGHT * divergences(v, targets, tau)).sum()

    torch.testing.assert_close(found, with_gradient(defined, student), rtol=1e-6, atol=1e-7)
    parts = token_sums(student, soft.temperature, soft, WEIGHT, hard)
    torch.testing.assert_close(parts.divergences, divergences(student, targets, tau), rtol=1e-6, atol=1e-7)
    each = F.cross_entropy(student, LABELS, ignore_index=-1, reduction="none")
    torch.testing.assert_close(parts.cross_entropies, each)


@pytest.mark.parametrize("rank", [0, 8])
@pytest.mark.parametrize("tau", [1.0, 2.0])
def test_first_and_second_derivatives(rank: int, tau: float) -> None:
    targets = targets_of(language_logits(N, V, width=8), K, rank=rank)
    student = language_logits(N, V, width=8, seed=1).requires_grad_()
    soft, hard = soft_target(targets, tau), HardTarget(LABELS, 0.7)

    def total(v: Tensor) -> Tensor:
        return token_sums(v, soft.temperature, soft, WEIGHT, hard).total

    torch.autograd.gradcheck(total, student, fast_mode=True)
    torch.autograd.gradgradcheck(total, student, fast_mode=True)
    plain = with_gradient(lambda v: plain_sum(v, soft.temperature, soft, WEIGHT), student)
    fused = with_gradient(lambda v: token_sums(v, soft.temperature, soft, WEIGHT).total, student)
    torch.testing.assert_close(fused, plain)


@pytest.mark.parametrize("tau", [1.0, 2.0])
def test_a_student_that_is_sure_of_the_head_keeps_a_gradient_on_the_tail_in_float32(tau: float) -> None:
    targets = targets_of(language_logits(N, V, width=8), K)
    sure = language_logits(N, V, width=8, seed=1).scatter_add(
        1, targets.indices, torch.full((N, K), 300.0, dtype=torch.float64)
    )
    soft, hard = soft_target(targets, tau), HardTarget(LABELS, 0.7)
    of_float = SoftTarget(soft.indices, soft.head.float(), soft.tail.float())
    t = None if tau == 1 else torch.full((N, 1), tau)
    value, slope = with_gradient(lambda v: token_sums(v, t, of_float, WEIGHT.float(), hard).total, sure.float())

    def defined(v: Tensor) -> Tensor:
        labeled = F.cross_entropy(v, LABELS, ignore_index=-1, reduction="sum")
        return 0.7 * labeled + (WEIGHT * divergences(v, targets, tau)).sum()

    expected, expected_slope = with_gradient(defined, sure)
    assert value == pytest.approx(float(expected), rel=1e-5)
    torch.testing.assert_close(slope.double(), expected_slope, rtol=1e-4, atol=1e-5)
    outside = torch.ones(N, V).scatter(1, targets.indices, 0.0).bool()
    assert (slope[WEIGHT > 0][outside[WEIGHT > 0]] < 0).all(), "the mass of the tail is asked for"


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("has_shape", [False, True])
@pytest.mark.parametrize("tau", [1.0, 2.0])
def test_a_teacher_that_is_sure_of_one_class(dtype: torch.dtype, has_shape: bool, tau: float) -> None:
    """Neither the rest of the head nor the tail have a probability above 0."""
    sure = targets_of(language_logits(N, V, width=8), K, rank=8).to(dtype=dtype)
    log_probs = torch.full_like(sure.log_probs, -torch.inf)
    log_probs[:, 0] = 0
    nothing = torch.full_like(sure.tail_log_mass, -torch.inf)
    targets = replace(sure, log_probs=log_probs, tail_log_mass=nothing)
    student = language_logits(N, V, width=8, seed=1).to(dtype)
    loss = loss_of("kd", tail="stored" if has_shape else "student", temperature={"kind": "constant", "tau": tau})
    loss = loss.model_copy(update={"ce_weight": 0.0, "kd_weight": 1.0})
    value, slope = with_gradient(lambda v: token_loss(v, LABELS, targets, loss).total, student)
    of_class = targets.indices[:, 0]
    expected = with_gradient(lambda v: tau**2 * F.cross_entropy(v / tau, of_class), student)
    torch.testing.assert_close((value, slope), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("tail", ["stored", "student"])
@pytest.mark.parametrize("ce_weight", [0.0, 0.3])
def test_the_reported_parts_add_up_to_the_loss(tail: str, ce_weight: float) -> None:
    targets = targets_of(language_logits(N, V, width=8), K, rank=8)
    student = language_logits(N, V, width=8, seed=1)
    options = {"temperature": {"kind": "constant", "tau": 2.0}, "warmup_epochs": 10, "tail": tail}
    loss = loss_of("kd", ce_weight=ce_weight, kd_weight=0.8, **options)
    parts = token_loss(student, LABELS, targets, loss, epoch=3)
    ce = F.cross_entropy(student, LABELS, ignore_index=-1)
    assert float(parts.cross_entropy) == pytest.approx(float(ce))
    assert float(parts.total) == pytest.approx(float(ce_weight * ce + 0.3 * parts.distillation))
    assert float(parts.student_temperature) == float(parts.teacher_temperature) == 2.0

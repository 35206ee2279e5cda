"""Losses of tokens beside public code, written as it is: the same numbers where it is right, or why it is not."""

from __future__ import annotations

import pytest
import torch
from helpers.loss_cases import loss_of, with_gradient
from helpers.token_targets import language_logits, targets_of
from torch import Tensor
from torch.nn import functional as F

from kdcache.losses import Loss
from kdcache.losses.chunked_head import chunked_loss
from kdcache.losses.lm_head import LMHead
from kdcache.losses.token_loss import token_loss
from kdcache.losses.token_targets import head_and_tail

N, V, K = 16, 400, 8
TEACHER, STUDENT = language_logits(N, V), language_logits(N, V, seed=1)
LABELS = torch.arange(N)
TARGETS = targets_of(TEACHER, K)


def kd_at(temperature: float, name: str = "kd") -> Loss:
    return loss_of(name, ce_weight=0.0, kd_weight=1.0, temperature={"kind": "constant", "tau": temperature})


def ours(temperature: float, name: str = "kd") -> tuple[Tensor, Tensor]:
    loss = kd_at(temperature, name)
    return with_gradient(lambda v: token_loss(v, LABELS, TARGETS, loss).total / temperature**2, STUDENT)


def trl(student: Tensor, teacher: Tensor, temperature: float, beta: float) -> Tensor:
    """TRL's server_distillation: a bucket for the tail of both, and the divergence of the buckets."""

    def with_tail(log_probs: Tensor) -> Tensor:
        head = log_probs.gather(1, TARGETS.indices)
        log_sum = torch.logsumexp(head, dim=-1).clamp(max=-1e-7)
        return torch.cat([head, torch.log(-torch.expm1(log_sum)).unsqueeze(-1)], dim=-1)

    q, p = (with_tail((z / temperature).log_softmax(dim=-1)) for z in (student, teacher))
    if beta == 0:
        return (p.exp() * (p - q)).sum(dim=-1).mean()
    if beta == 1:
        return (q.exp() * (q - p)).sum(dim=-1).mean()
    mixture = ((1 - beta) * q.exp() + beta * p.exp()).log()
    found = beta * (p.exp() * (p - mixture)).sum(-1) + (1 - beta) * (q.exp() * (q - mixture)).sum(-1)
    return found.mean()


@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize(("name", "beta"), [("kd", 0.0), ("rkl", 1.0), ("js", 0.5)])
def test_a_tail_of_the_students_shape_is_the_tail_bucket_of_trl(name: str, beta: float, temperature: float) -> None:
    # TRL has the teacher's probabilities at T from a server: this is its loss with the true mass.
    expected = with_gradient(lambda v: trl(v, TEACHER, temperature, beta), STUDENT)
    torch.testing.assert_close(ours(temperature, name), expected, rtol=1e-6, atol=1e-9)


def distillkit(student: Tensor, temperature: float) -> Tensor:
    """DistillKit's sparse_kl_div with SYMMETRIC_UNIFORM, from log-probabilities at T = 1."""
    values, alpha = TARGETS.log_probs, 1 / temperature
    leftover = (1.0 - values.exp().sum(dim=-1, keepdim=True)).clamp(0, 1)
    total = (alpha * values).exp().sum(dim=-1, keepdim=True) + leftover.pow(alpha)
    p = alpha * values - total.log()
    scaled = student / temperature
    q = scaled.gather(-1, TARGETS.indices) - scaled.logsumexp(dim=-1, keepdim=True)
    missing_p, missing_q = (torch.log(-torch.expm1(each.logsumexp(dim=-1).clamp(max=-1e-6))) for each in (p, q))
    return ((p.exp() * (p - q)).sum(dim=-1) + missing_p.exp() * (missing_p - missing_q)).mean()


def test_distillkit_has_the_same_loss_at_1_and_another_mass_at_2() -> None:
    torch.testing.assert_close(ours(1.0), with_gradient(lambda v: distillkit(v, 1.0), STUDENT), rtol=1e-6, atol=1e-9)
    exact = with_gradient(lambda v: trl(v, TEACHER, 2.0, 0.0), STUDENT)[1]
    theirs = with_gradient(lambda v: distillkit(v, 2.0), STUDENT)[1]
    assert (theirs - exact).norm() / exact.norm() > 0.5
    assert (ours(2.0)[1] - exact).norm() / exact.norm() < 1e-6
    leftover = (1 - TARGETS.log_probs.exp().sum(dim=1)).sqrt()
    mass = leftover / ((TARGETS.log_probs / 2).exp().sum(dim=1) + leftover)
    assert (mass < head_and_tail(TARGETS, 2.0)[1].exp().squeeze(1)).all(), "the tail is taken for a single class"


def test_renormalized_top_k_never_says_how_much_lies_outside() -> None:
    """MaxText since #4056, axolotl with kd_normalize_topk, ModelOpt and NeMo-RL renormalize both over the head."""

    def renormalized(v: Tensor) -> Tensor:
        q = v.gather(1, TARGETS.indices).log_softmax(dim=1)
        return F.kl_div(q, TARGETS.log_probs.log_softmax(dim=1), log_target=True, reduction="batchmean")

    gradient = with_gradient(renormalized, STUDENT)[1]
    outside = gradient.scatter(1, TARGETS.indices, 0.0)
    assert outside.abs().max() == 0
    dense = with_gradient(lambda v: F.kl_div(v.log_softmax(1), TEACHER.softmax(1), reduction="batchmean"), STUDENT)[1]
    assert (gradient - dense).norm() > 2 * (ours(1.0)[1] - dense).norm()


def test_a_chunked_head_has_the_loss_and_the_gradients_of_liger() -> None:
    """Liger's fused linear distillation in chunks with torch.func, for a teacher with all probabilities."""
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(N, 12, generator=generator, dtype=torch.float64)
    weight = torch.randn(V, 12, generator=generator, dtype=torch.float64)
    whole = targets_of(TEACHER, V)

    def of_chunk(states: Tensor, head: Tensor, teacher: Tensor) -> Tensor:
        q = (states @ head.T).log_softmax(dim=-1)
        return F.kl_div(q, teacher.log_softmax(dim=-1), reduction="sum", log_target=True) / N

    of_hidden, of_head = [], torch.zeros_like(weight)
    for states, teacher in zip(torch.split(hidden, 5), torch.split(TEACHER, 5), strict=True):
        one, other = torch.func.grad(of_chunk, argnums=(0, 1))(states, weight, teacher)
        of_hidden.append(one)
        of_head += other
    inputs = [hidden.requires_grad_(), weight.requires_grad_()]
    loss = kd_at(1.0)
    total = chunked_loss(hidden, LMHead(weight), LABELS, whole, loss, chunk=3).total
    found = torch.autograd.grad(total, inputs)
    torch.testing.assert_close(found, (torch.cat(of_hidden), of_head), rtol=1e-7, atol=1e-9)

"""The KL divergence of a student from targets of tokens, with gradients by hand.

Each function returns a sum over the rows, as `closed_form.weighted_kl` does. They take few passes over [n, V]: with a
shape one exponential of the teacher and one of the student, for a ghost two of the student. If a temperature carries a
gradient, the plain formulas are taken.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from kdcache.losses.closed_form import is_traced
from kdcache.losses.token_targets import CAP_ROUNDS, NEVER, TokenTargets, head_and_tail, tail_shape


def ghost_kl(
    student_logits: Tensor,
    student_temperature: Tensor,
    indices: Tensor,
    head: Tensor,
    tail: Tensor,
    weight: Tensor,
) -> Tensor:
    """Return sum_i w_i KL(p_i || q_i) over K + 1 classes, the last of them the tail, with q = softmax(v / T_stu).

        KL = sum_head p_j (log p_j - log q_j) + m (log m - log Q)    Q = sum_tail q_j

    Q is a sum over the tail, not 1 minus the head's, so that a student whose head has nearly all mass does not lead to
    log 0. On the tail d KL / d v_j = (q_j / Q) (Q - m) / T.

    Args:
        student_logits: [n, V], v.
        student_temperature: [n, 1].
        indices: [n, K] int64; a column may repeat a class of the row if its probability is 0.
        head: [n, K], log p of the classes, at least `NEVER`.
        tail: [n, 1], log m, at least `NEVER`; with the head it adds up to 1.
        weight: [n].

    Source: the tail bucket of TRL (`_add_tail_bucket`) and the ghost token of Megatron-LM. DistillKit has it as
    SYMMETRIC_UNIFORM (`lossfuncs/kl.py` at 361c7ac), whose m is wrong at T > 1: see `token_targets.py`.
    """
    differentiated = (student_temperature, head, tail, weight)
    if is_traced() or any(value.requires_grad for value in differentiated):
        return (weight * _plain_ghost(student_logits / student_temperature, indices, head, tail)).sum()
    total: Tensor = _GhostKL.apply(student_logits, student_temperature, indices, head, tail, weight)
    return total


def _plain_ghost(scaled: Tensor, indices: Tensor, head: Tensor, tail: Tensor) -> Tensor:
    """Return the KL divergence of each row, [n]."""
    total = scaled.logsumexp(dim=1, keepdim=True)
    log_q = scaled.gather(1, indices) - total
    log_rest = (scaled.scatter(1, indices, NEVER).logsumexp(dim=1, keepdim=True) - total).clamp_min(NEVER)
    of_head = (head.exp() * (head - log_q)).sum(dim=1)
    return of_head + (tail.exp() * (tail - log_rest)).squeeze(1)


class _GhostKL(torch.autograd.Function):
    """The sum of `ghost_kl` with respect to the student's logits."""

    @staticmethod
    def forward(
        ctx: Any, v: Tensor, temperature: Tensor, indices: Tensor, head: Tensor, tail: Tensor, weight: Tensor
    ) -> Tensor:
        """Return the sum, and keep its gradient."""
        x = v / temperature
        total = x.logsumexp(dim=1, keepdim=True)
        log_q = x.gather(1, indices) - total
        x.scatter_(1, indices, NEVER)
        rest = x.logsumexp(dim=1, keepdim=True)
        log_rest = (rest - total).clamp_min(NEVER)
        p = head.exp()
        values = (p * (head - log_q)).sum(dim=1) + (tail.exp() * (tail - log_rest)).squeeze(1)
        # On the tail (q / Q) (Q - m), in which a Q that underflows does no harm.
        gradient = x.sub_(rest).exp_().mul_(log_rest.exp() - tail.exp())
        gradient.scatter_(1, indices, log_q.exp()).scatter_add_(1, indices, -p)
        ctx.save_for_backward(v, temperature, indices, head, tail, weight)
        ctx.gradient = gradient
        return weight.dot(values)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        """Return the gradient with respect to the logits."""
        v, temperature, indices, head, tail, weight = ctx.saved_tensors
        if torch.is_grad_enabled():
            again = (weight * _plain_ghost(v / temperature, indices, head, tail)).sum()
            return *torch.autograd.grad(again, v, gradients[0], create_graph=True), *(None,) * 5
        scale = (weight * gradients[0]).unsqueeze(1) / temperature
        return ctx.gradient * scale, *(None,) * 5


def shaped_kl(
    student_logits: Tensor, student_temperature: Tensor, targets: TokenTargets, temperature: Tensor, weight: Tensor
) -> Tensor:
    """Return sum_i w_i KL(p_i || q_i), with q = softmax(v / T_stu) and p the head and the shaped tail at T_tea.

    The tail is that of `scaled_logits`, but for what its last step takes from classes above the head's last.

    Args:
        student_logits: [n, V], v.
        student_temperature: [n, 1], without a gradient.
        targets: with coordinates.
        temperature: [n, 1], T_tea, without a gradient.
        weight: [n], without a gradient.
    """
    head, tail = head_and_tail(targets, temperature)
    last = head[:, [(targets.top_k or head.shape[1]) - 1]]
    with torch.no_grad():
        rest = _tail_probabilities(targets, temperature, tail.exp(), last.exp())
    total: Tensor = _ShapedKL.apply(student_logits, student_temperature, targets.indices, head, rest, weight)
    return total


def _tail_probabilities(targets: TokenTargets, temperature: Tensor, mass: Tensor, cap: Tensor) -> Tensor:
    """Return the probabilities of the tail, [n, V], 0 in the head, with a given mass [n, 1]."""
    p = tail_shape(targets).div_(temperature).scatter_(1, targets.indices, NEVER)
    p.sub_(p.amax(dim=1, keepdim=True)).exp_()
    for capped in (False, *(True,) * CAP_ROUNDS):
        if capped:
            torch.minimum(p, cap, out=p)
        p.mul_(mass / p.sum(dim=1, keepdim=True))
    return p


class _ShapedKL(torch.autograd.Function):
    """The sum of `shaped_kl` with respect to the student's logits."""

    @staticmethod
    def forward(
        ctx: Any, v: Tensor, temperature: Tensor, indices: Tensor, head: Tensor, rest: Tensor, weight: Tensor
    ) -> Tensor:
        """Return the sum, and keep its gradient."""
        x = v / temperature
        p = head.exp()
        of_teacher = (p * head).sum(dim=1) - torch.special.entr(rest).sum(dim=1)
        of_both = (p * x.gather(1, indices)).sum(dim=1) + torch.linalg.vecdot(rest, x)
        largest = x.amax(dim=1, keepdim=True)
        q = x.sub_(largest).exp_()
        norm = q.sum(dim=1, keepdim=True)
        values = of_teacher - of_both + (norm.log() + largest).squeeze(1)
        ctx.save_for_backward(v, temperature, indices, head, rest, weight)
        ctx.gradient = q.div_(norm).sub_(rest).scatter_add_(1, indices, -p)
        return weight.dot(values)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        """Return the gradient with respect to the logits."""
        v, temperature, indices, head, rest, weight = ctx.saved_tensors
        if torch.is_grad_enabled():
            p = rest.scatter_add(1, indices, head.exp())
            log_q = (v / temperature).log_softmax(dim=1)
            again = -(weight * (p * log_q).sum(dim=1)).sum()
            return *torch.autograd.grad(again, v, gradients[0], create_graph=True), *(None,) * 5
        return ctx.gradient * ((weight * gradients[0]).unsqueeze(1) / temperature), *(None,) * 5


def draws_kl(
    student_logits: Tensor, student_temperature: Tensor, draws: tuple[Tensor, Tensor], weight: Tensor
) -> Tensor:
    """Return sum_i w_i KL(c_i / N_i || q_i), with c the counts of classes that were drawn from the teacher.

    The gradient with respect to the student is that of KL(p || q) in the mean over the draws. The value is not: it is
    above that by what the draws lack in entropy, which no student changes.

    Args:
        student_logits: [n, V].
        student_temperature: [n, 1].
        draws: ids [n, m] int64 and counts [n, m].
        weight: [n].

    Source: Anshumann et al. 2025, Sparse Logit Sampling (2503.16870), with the proposal p itself.
    """
    ids, counts = draws
    share = counts / counts.sum(dim=1, keepdim=True).clamp_min(1.0)
    scaled = student_logits / student_temperature
    log_q = scaled.gather(1, ids) - scaled.logsumexp(dim=1, keepdim=True)
    return (weight * (share * (share.clamp_min(1e-30).log() - log_q)).sum(dim=1)).sum()

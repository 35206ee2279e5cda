"""Cross-entropy and KL from targets of tokens, and their gradient, in few passes over [n, V].

Autograd takes an exponential of all logits for each logarithm of a sum and for each softmax. Here it is one of the
student per temperature, and one of the tail if its shape is stored. The definitions are the plain formulas, from which
second derivatives are computed.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from kdcache.losses.token_targets import CAP_ROUNDS, NEVER, TokenTargets, tail_shape

_TOO_SMALL = 1e-30
"""A sum of exponentials below this is computed again, with the largest of its own terms as origin."""


class SoftTarget(NamedTuple):
    """The teacher's distribution p of n positions, whose head and tail add up to 1; without gradients.

    Attributes:
        indices: [n, K] int64; a column may repeat a class of the row if its probability is 0.
        head: [n, K], log p of the classes, at least `NEVER`.
        tail: [n, 1], log of the mass m of all other classes, at least `NEVER`.
        targets: those whose coordinates are the shape of the tail; None for the mass alone.
        temperature: [n, 1], T_tea, which the shape is softened with; None for 1.
    """

    indices: Tensor
    head: Tensor
    tail: Tensor
    targets: TokenTargets | None = None
    temperature: Tensor | None = None


class HardTarget(NamedTuple):
    """The labels of n positions.

    Attributes:
        labels: [n] int64, -1 where not known.
        weight: a, a number or [], of the cross-entropy of each position whose label is known.
    """

    labels: Tensor
    weight: Tensor | float


class TokenSums(NamedTuple):
    """A weighted sum over n positions, and its terms, which carry no gradient.

    Attributes:
        total: [], sum_i a CE_i + w_i KL_i.
        divergences: [n], KL_i.
        cross_entropies: [n], CE_i, 0 where the label is not known.
    """

    total: Tensor
    divergences: Tensor
    cross_entropies: Tensor


class Tail(NamedTuple):
    """The probabilities scale * s of the classes of a tail; those of the head are 0.

    Attributes:
        log_s: [n, V].
        s: [n, V].
        scale: [n, 1].
    """

    log_s: Tensor
    s: Tensor
    scale: Tensor


def token_sums(
    student_logits: Tensor,
    temperature: Tensor | None,
    soft: SoftTarget,
    weight: Tensor,
    hard: HardTarget | None = None,
) -> TokenSums:
    """Return sum_i a CE(v_i, y_i) + w_i KL(p_i || q_i) and its terms, with q = softmax(v / T_stu).

    With a stored shape r of the tail, and with its mass m alone, which is KL over K + 1 classes:

        KL = sum_head p_j (log p_j - log q_j) + sum_tail r_j (log r_j - log q_j)
        KL = sum_head p_j (log p_j - log q_j) + m (log m - log Q)               Q = sum_tail q_j

    The gradient d KL / d v_j is (q_j - p_j) / T on the head, and on the tail (q_j - r_j) / T or (q_j / Q) (Q - m) / T.
    Q is a sum over the tail, not 1 minus the head's, so that a student whose head has nearly all mass does not lead to
    log 0.

    Args:
        student_logits: [n, V], v.
        temperature: [n, 1], T_stu, without a gradient; None for 1.
        soft: p.
        weight: [n], w, without a gradient.
        hard: y and a; None for the divergence alone.
    """
    return TokenSums(*_TokenSums.apply(student_logits, temperature, soft, weight, hard))


@torch.no_grad()
def tail_of(soft: SoftTarget) -> Tail:
    """Return a tail with its stored shape, in which no class is above the last of the head.

    It is that of `token_targets.scaled_logits`, but for what its last step takes from classes above the head's last.

    Raises:
        ValueError: for targets without coordinates.
    """
    if soft.targets is None:
        raise ValueError("the targets have no coordinates")
    shape = tail_shape(soft.targets)
    if soft.temperature is not None:
        shape.div_(soft.temperature)
    s, level = _softmax(shape.scatter_(1, soft.indices, NEVER))
    scale, last = soft.tail.exp(), (soft.targets.top_k or soft.head.shape[1]) - 1
    mass, cap = scale, soft.head[:, [last]].exp()
    # Of a row without a tail all are 0.
    least = torch.finfo(s.dtype).tiny
    # The scale grows with each round, so that the last limit is the lowest, and holds for the logarithms too.
    for _ in range(CAP_ROUNDS):
        limit = (cap / scale.clamp_min(least)).clamp_min(least)
        scale = mass / torch.minimum(s, limit, out=s).sum(dim=1, keepdim=True)
    return Tail(torch.minimum(shape.sub_(level), limit.log(), out=shape), s, scale)


class _TokenSums(torch.autograd.Function):
    """The sums of `token_sums`."""

    @staticmethod
    def forward(
        ctx: Any, v: Tensor, temperature: Tensor | None, soft: SoftTarget, weight: Tensor, hard: HardTarget | None
    ) -> tuple[Tensor, ...]:
        """Return the sums, and keep the gradient of the total."""
        t = 1.0 if temperature is None else temperature
        q, level = _softmax(v if temperature is None else v / temperature)
        share = None if hard is None else (hard.labels >= 0).to(v.dtype).mul(hard.weight).unsqueeze(1)
        # At T = 1 the same softmax serves the cross-entropy.
        a: Tensor | float = share if share is not None and temperature is None else 0.0
        w, p, mass = weight.unsqueeze(1) / t, soft.head.exp(), soft.tail.exp()
        log_q, q_head = v.gather(1, soft.indices) / t - level, q.gather(1, soft.indices)
        values = (p * (soft.head - log_q)).sum(dim=1, keepdim=True)
        if soft.targets is None:
            in_rest, log_rest = _normalized_rest(q, v, t, soft.indices, level)
            rest = log_rest.exp()
            values += mass * (soft.tail - log_rest)
            slope = in_rest.mul_(w * (rest - mass) + a * rest)
        else:
            log_s, s, scale = tail_of(soft)
            of_both = log_s.sub_(v) if temperature is None else log_s.addcdiv_(v, temperature, value=-1)
            values += scale * torch.linalg.vecdot(s, of_both).unsqueeze(1) + mass * (_log(scale) + level)
            slope = q.mul_(w + a).addcmul_(s, w * scale, value=-1)
        slope.scatter_(1, soft.indices, (w + a) * q_head).scatter_add_(1, soft.indices, -w * p)
        divergences = values.squeeze(1)
        total, cross_entropies = weight.dot(divergences), torch.zeros_like(divergences)
        if hard is not None and share is not None:
            if temperature is not None:
                q, level = _softmax(v)
                slope.addcmul_(q, share)
            at = hard.labels.clamp_min(0).unsqueeze(1)
            slope.scatter_add_(1, at, -share)
            cross_entropies = (level - v.gather(1, at)).squeeze(1) * (hard.labels >= 0)
            total += hard.weight * cross_entropies.sum()
        ctx.save_for_backward(v)
        ctx.found = slope, (temperature, soft, weight, hard)
        ctx.mark_non_differentiable(divergences, cross_entropies)
        return total, divergences, cross_entropies

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        """Return the gradient with respect to the logits."""
        (v,), (slope, inputs) = ctx.saved_tensors, ctx.found
        if torch.is_grad_enabled():
            (found,) = torch.autograd.grad(_plain_total(v, *inputs), v, gradients[0], create_graph=True)
        else:
            found = slope * gradients[0]
        return found, None, None, None, None


def _softmax(logits: Tensor) -> tuple[Tensor, Tensor]:
    """Return the softmax of the rows, [n, V], and the logarithm of their sum of exponentials, [n, 1]."""
    found = logits.softmax(dim=1)
    return found, logits.amax(dim=1, keepdim=True) - found.amax(dim=1, keepdim=True).log()


def _normalized_rest(q: Tensor, v: Tensor, t: Tensor | float, indices: Tensor, level: Tensor) -> tuple[Tensor, Tensor]:
    """Return q / Q in place of q, 0 on the head, and log Q."""
    rest = q.scatter_(1, indices, 0.0).sum(dim=1, keepdim=True)
    if bool((rest > _TOO_SMALL).all()):
        return q.div_(rest), rest.log()
    scaled = (v / t).scatter_(1, indices, NEVER)
    found, of_rest = _softmax(scaled)
    return found, (of_rest - level).clamp_min(NEVER)


def _log(scale: Tensor) -> Tensor:
    """Return the logarithm of a scale, which is 0 for a tail without mass."""
    return scale.clamp_min(torch.finfo(scale.dtype).tiny).log()


def _plain_total(
    v: Tensor, temperature: Tensor | None, soft: SoftTarget, weight: Tensor, hard: HardTarget | None
) -> Tensor:
    """Return the total by autograd alone."""
    total = plain_sum(v, temperature, soft, weight)
    if hard is None:
        return total
    return total + hard.weight * F.cross_entropy(v, hard.labels, ignore_index=-1, reduction="sum")


def plain_sum(v: Tensor, temperature: Tensor | None, soft: SoftTarget, weight: Tensor) -> Tensor:
    """Return sum_i w_i KL(p_i || q_i) by autograd alone; see `token_sums`."""
    scaled = v if temperature is None else v / temperature
    level = scaled.logsumexp(dim=1, keepdim=True)
    log_q = scaled.gather(1, soft.indices) - level
    values = (soft.head.exp() * (soft.head - log_q)).sum(dim=1, keepdim=True)
    if soft.targets is None:
        log_rest = scaled.scatter(1, soft.indices, NEVER).logsumexp(dim=1, keepdim=True) - level
        values = values + soft.tail.exp() * (soft.tail - log_rest.clamp_min(NEVER))
    else:
        log_s, s, scale = tail_of(soft)
        values = values + scale * (s * (log_s - scaled)).sum(dim=1, keepdim=True)
        values = values + soft.tail.exp() * (_log(scale) + level)
    return (weight * values.squeeze(1)).sum()

"""The differences between stored distributions of the next token and those of the teacher."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from kdcache.losses.token_targets import TokenTargets, head_and_tail, scaled_logits

_TINY = 1e-30
"""Smallest divisor, against division by zero."""


def temperatures_of(targets: TokenTargets) -> tuple[float, ...]:
    """Return the temperatures at which stored rows are compared: 1 and 2, or the one that they know."""
    return (1.0, 2.0) if len(targets.temperatures) > 1 else targets.temperatures


def head_variation(logits: Tensor, targets: TokenTargets, temperature: float) -> Tensor:
    """Return the total variation of the tokens of the stored head and of all others together, [n].

    Args:
        logits: [n, V], of the teacher.
        targets: with a head.
        temperature: T.
    """
    live = (logits / temperature).log_softmax(dim=1).gather(1, targets.indices).exp()
    head, tail = head_and_tail(targets, temperature)
    others = (1 - live.sum(dim=1)) - tail.exp().squeeze(1)
    return 0.5 * ((live - head.exp()).abs().sum(dim=1) + others.abs())


def stored_distribution(targets: TokenTargets, temperature: float, student: Tensor | None = None) -> Tensor:
    """Return the distributions that a student is taught, [n, V].

    Args:
        targets: as they are stored.
        temperature: T; of draws the one that they were drawn at.
        student: [V] or [n, V] logits, whose shape a tail without a shape of its own gets; None for a uniform one.
    """
    if targets.draws is not None:
        drawn, counts = targets.draws
        empty = torch.zeros(len(drawn), targets.vocabulary_size, device=drawn.device)
        return empty.scatter_add(1, drawn, counts / counts.sum(dim=1, keepdim=True))
    shape = None if student is None or targets.has_shape else (student / temperature).expand(len(targets), -1)
    return scaled_logits(targets, temperature, shape).softmax(dim=1)


def gradient_errors(
    parts: Callable[[], Iterator[tuple[Tensor, TokenTargets]]], temperatures: tuple[float, ...]
) -> dict[float, float]:
    """Return the relative error of the KD gradient, by temperature, of a student that knows how frequent tokens are.

    That student says the mean of the teacher's distributions at T = 1 everywhere, as one soon does that is trained from
    scratch. With q its distribution, p the teacher's and p' the stored one, the error is |p' - p| / |q - p|, with norms
    over all rows.

    Args:
        parts: yields logits [n, V] and what is stored of them, a few rows at a time; called twice.
        temperatures: T.
    """
    total, rows = torch.zeros(1), 0
    for logits, _ in parts():
        total = total.to(logits.device) + logits.softmax(dim=1).sum(dim=0, dtype=torch.float64)
        rows += len(logits)
    student = (total / rows).clamp_min(_TINY).log().float()
    wrong, whole = dict.fromkeys(temperatures, 0.0), dict.fromkeys(temperatures, 0.0)
    for logits, targets in parts():
        for t in temperatures:
            p, q = (logits / t).softmax(dim=1), (student / t).softmax(dim=0)
            wrong[t] += float((stored_distribution(targets, t, student) - p).square().sum(dtype=torch.float64))
            whole[t] += float((q - p).square().sum(dtype=torch.float64))
    return {t: (wrong[t] / max(whole[t], _TINY)) ** 0.5 for t in temperatures}

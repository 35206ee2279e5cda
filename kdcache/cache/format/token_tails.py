"""Fit the coordinates of the tails of next-token distributions in a basis (docs/FORMAT.md, section 12.4).

What is fitted is what `tail_basis.fit_coordinates` fits: the least squares of the tail, weighted by the probability at
T = 2 and a floor. Its 18 steps of conjugate gradients are most of the cost of a row of 50,000 tokens. Here ten steps
give the same, since they are preconditioned with the normal equations of the average row of a batch, factorized once.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kdcache.cache.format.tail_basis import TailBasis

_FLOOR = 0.03
"""Added to the weights of the tail, whose mean over all tokens is at most 1, as in `tail_basis`."""

_STEPS = 10
"""Steps of conjugate gradients; then coordinates differ by 0.02 of a step from the solution (SmolLM2-135M, R = 32)."""

_RIDGE = 1e-6
"""Multiple of the identity in the normal equations, relative to the sum of the weights."""

_TINY = 1e-30
"""Smallest divisor, against division by zero."""


def fit_tails(logits: Tensor, weights: Tensor, order: Tensor, basis: TailBasis, steps: int = _STEPS) -> Tensor:
    """Return the coordinates [n, R] float32 that fit the tails of rows best, before rounding.

    Args:
        logits: [n, V] float32.
        weights: [n, V] float32, probability at T = 2 relative to its mean. Overwritten.
        order: [n, k] int64, tokens of the head, which are not fitted.
        basis: of the teacher, on the same device.
        steps: of conjugate gradients.
    """
    axes = basis.basis.float()
    weights = weights.add_(_FLOOR).scatter_(1, order, 0.0)
    ridge = _RIDGE * weights.sum(dim=1, keepdim=True)
    residual = (logits - basis.mean).mul_(weights) @ axes.T
    average = (axes * weights.mean(dim=0)) @ axes.T
    average.diagonal().add_(float(ridge.mean()) + _TINY)
    factor = torch.linalg.cholesky(average)
    coordinates = torch.zeros_like(residual)
    direction = solved = _solve(factor, residual)
    energy = (residual * solved).sum(dim=1, keepdim=True)
    for _ in range(steps):
        image = (direction @ axes).mul_(weights) @ axes.T + ridge * direction
        length = energy / (direction * image).sum(dim=1, keepdim=True).clamp_min(_TINY)
        coordinates = coordinates + length * direction
        residual = residual - length * image
        solved, before = _solve(factor, residual), energy
        energy = (residual * solved).sum(dim=1, keepdim=True)
        direction = solved + energy / before.clamp_min(_TINY) * direction
    return coordinates


def _solve(factor: Tensor, rows: Tensor) -> Tensor:
    """Return the solutions [n, R] of the normal equations whose Cholesky factor is given."""
    return torch.cholesky_solve(rows.T, factor).T


def tail_weights(logits: Tensor) -> Tensor:
    """Return the probabilities at T = 2 relative to their mean over all tokens, [n, V] float32."""
    return (logits / 2).softmax(dim=1).mul_(logits.shape[1])

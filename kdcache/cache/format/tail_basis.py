"""Encode the shape of a teacher's tail in R small integers per row (docs/FORMAT.md, section 4.3).

A classifier's logits are an affine function of its last features, so they lie close to a subspace of few dimensions.
A basis of it is fitted once, on a pilot, by principal components; a row then stores its coordinates as int8.

Compared with plain projection and one scale per component, two choices reduce the gradient error of KD on 300 classes
two to three times at the same size (`benchmarks/`):

- The coordinates are the weighted least-squares fit to the tail alone, not the projection of the whole row. The head
  and the label are stored anyway, so their large logits need not be fitted; a class is weighted by its probability at
  T = 2.
- All components share one step, as far as the range of int8 allows. In an orthonormal basis an error of one step costs
  the same in every direction, so finer steps for the weaker components waste bytes; with a common step their
  coordinates are small integers, which zstd compresses well.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

LARGEST = 127
"""Absolute value of a stored coordinate at most, in steps (docs/FORMAT.md, section 4.3)."""

_WEIGHT_TEMPERATURE = 2.0
"""Temperature of the softmax that weights classes in the fit."""

_WEIGHT_FLOOR = 0.03
"""Added to the weights, whose mean over all classes is 1."""

_RIDGE = 1e-6
"""Multiple of the identity in the normal equations, relative to the sum of the weights."""

_ITERATIONS = 18
"""Conjugate gradient iterations per batch."""

_SCALE_QUANTILE = 0.9995
"""Share of a component's coordinates that must be representable (docs/FORMAT.md, section 4.3)."""

_TINY = 1e-30
"""Smallest divisor, against division by zero."""


@dataclass(frozen=True)
class TailBasis:
    """An affine basis of the tail: logits are `mean + (coordinates * scale) @ basis`.

    Attributes:
        basis: [R, C] float16, rows orthonormal up to rounding.
        mean: [C] float32, mean of the pilot's logits.
        scale: [R] float32, logits per step of each coordinate.
    """

    basis: Tensor
    mean: Tensor
    scale: Tensor

    def to(self, device: torch.device | str) -> TailBasis:
        """Return the basis on another device."""
        return TailBasis(self.basis.to(device), self.mean.to(device), self.scale.to(device))

    @property
    def directions(self) -> Tensor:
        """Logits that one step of each coordinate adds, [R, C] float32."""
        return self.basis.float() * self.scale.unsqueeze(1)


def principal_components(logits: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Return (basis [R, C] float16, mean [C] float32) of pilot logits [P, C].

    The entry of largest magnitude of each direction is positive. Computed in float64 from the smaller of the two Gram
    matrices, so that the cost stays low for many classes and for many rows.
    """
    mean = logits.double().mean(dim=0)
    centered = logits.double() - mean
    rows, classes = centered.shape
    if classes <= rows:
        vectors = torch.linalg.eigh(centered.T @ centered).eigenvectors.flip(1)[:, :rank].T
    else:
        vectors = torch.linalg.eigh(centered @ centered.T).eigenvectors.flip(1)[:, :rank].T @ centered
        vectors = vectors / vectors.norm(dim=1, keepdim=True).clamp_min(_TINY)
    signs = vectors.gather(1, vectors.abs().argmax(dim=1, keepdim=True)).sign()
    return (vectors * signs).half(), mean.float()


def fit_coordinates(logits: Tensor, stated: Tensor, basis: Tensor, mean: Tensor) -> Tensor:
    """Return the coordinates [B, R] float32 that fit the tails of rows best, before rounding.

    These are argmin_c sum_j w_j (logits_j - mean_j - (c @ basis)_j)^2 over the classes j that are not stated, where w
    is the softmax at T = 2 relative to its mean, plus a floor. Solved by conjugate gradients, with a fixed number of
    matrix products per batch. The basis is orthonormal and few classes weigh more than the floor, so the system is
    close to a multiple of the identity; a diagonal preconditioner slows convergence down.

    It is most of the cost of encoding, and stays as it is: of a batch of 256 rows with 96 coordinates each, some ten
    have not settled after the last iteration, so that any other solution, or number of iterations, would store other
    bytes. Nor is a factorization per row faster: its normal equations alone take longer than all iterations.

    Args:
        logits: [B, C] float32.
        stated: [B, C] bool, the classes that a row states individually.
        basis: [R, C].
        mean: [C].
    """
    basis = basis.float()
    probabilities = (logits / _WEIGHT_TEMPERATURE).softmax(dim=1)
    weights = (probabilities * logits.shape[1] + _WEIGHT_FLOOR).masked_fill(stated, 0.0)
    # Regularized, since a basis may have more directions than a tail has classes.
    ridge = _RIDGE * weights.sum(dim=1, keepdim=True).clamp_min(_RIDGE)
    residual = direction = (weights * (logits - mean)) @ basis.T
    coordinates = torch.zeros_like(residual)
    energy = residual.square().sum(dim=1, keepdim=True)
    for _ in range(_ITERATIONS):
        image = (weights * (direction @ basis)) @ basis.T + ridge * direction
        length = energy / (direction * image).sum(dim=1, keepdim=True).clamp_min(_TINY)
        coordinates = coordinates + length * direction
        residual = residual - length * image
        before, energy = energy, residual.square().sum(dim=1, keepdim=True)
        direction = residual + energy / before.clamp_min(_TINY) * direction
    return coordinates


def choose_scale(coordinates: Tensor, step: float) -> Tensor:
    """Return the scale [R] float32: `step` logits, or more for components whose coordinates exceed int8."""
    reach = coordinates.abs().float().quantile(_SCALE_QUANTILE, dim=0) / LARGEST
    return reach.clamp_min(step)


def round_coordinates(coordinates: Tensor, scale: Tensor) -> Tensor:
    """Return coordinates [B, R] as int8, in steps of `scale` [R]."""
    return (coordinates / scale).round().clamp(-LARGEST, LARGEST).to(torch.int8)

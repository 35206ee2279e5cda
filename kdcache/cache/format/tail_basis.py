"""The shape of a teacher's tail in R small integers a row.

A classifier's logits are an affine function of its last features, so they lie near a subspace of few dimensions. Its
basis is fitted once, on a pilot, by principal components; a row then keeps its coordinates as int8.

Two things make the same bytes go two to three times as far as plain projection and a scale per component do (gradient
error of KD on 300 classes, `benchmarks/`):

- The coordinates are the weighted least-squares fit to the tail alone, not the projection of the whole row. The head
  and the label are stored anyway; their large logits need not be explained, and a class weighs as much as its
  probability at T = 2 says that it matters.
- All components share one step, as far as int8 reaches. In an orthonormal basis an error of one step costs the same in
  every direction, so finer steps for the weaker components are bytes wasted; with a common step their coordinates are
  small integers, which zstd packs well.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

LARGEST = 127
_WEIGHT_TEMPERATURE = 2.0
_WEIGHT_FLOOR = 0.03
_RIDGE = 1e-6
_ITERATIONS = 18
_TINY = 1e-30


@dataclass(frozen=True)
class TailBasis:
    """Where the tail lies: `mean + (coordinates * scale) @ basis`.

    Attributes:
        basis: [R, C] float16 values, orthonormal rows but for rounding.
        mean: [C] float32, of the pilot's logits.
        scale: [R] float32, logits a step of each coordinate.
    """

    basis: Tensor
    mean: Tensor
    scale: Tensor

    def to(self, device: torch.device | str) -> TailBasis:
        """The same basis on another device."""
        return TailBasis(self.basis.to(device), self.mean.to(device), self.scale.to(device))

    @property
    def directions(self) -> Tensor:
        """[R, C] float32: the logits that one step of each coordinate adds."""
        return self.basis.float() * self.scale.unsqueeze(1)


def principal_components(logits: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """(basis [R, C] float16, mean [C] float32) of pilot logits [P, C]; each direction's largest entry is positive.

    In float64 and through the smaller of the two Gram matrices, so that neither many classes nor many rows are dear.
    """
    mean = logits.double().mean(dim=0)
    centered = logits.double() - mean
    rows, classes = centered.shape
    if classes <= rows:
        vectors = torch.linalg.eigh(centered.T @ centered).eigenvectors.flip(1)[:, :rank].T
    else:
        vectors = torch.linalg.eigh(centered @ centered.T).eigenvectors.flip(1)[:, :rank].T @ centered
        vectors = vectors / vectors.norm(dim=1, keepdim=True).clamp_min(1e-30)
    signs = vectors.gather(1, vectors.abs().argmax(dim=1, keepdim=True)).sign()
    return (vectors * signs).half(), mean.float()


def fit_coordinates(logits: Tensor, stated: Tensor, basis: Tensor, mean: Tensor) -> Tensor:
    """Coordinates [B, R] float32 that explain the tails of rows best, before they are rounded.

    argmin_c sum_j w_j (logits_j - mean_j - (c @ basis)_j)^2 over the classes j that are not stated, where w is the
    softmax at T = 2 relative to its mean, plus a floor. Solved by conjugate gradients: a fixed number of matrix
    products for the whole batch, where a factorisation a row would take R times the memory. The basis is orthonormal
    and few classes weigh more than the floor, so that the system is nearly a multiple of the identity; a diagonal
    preconditioner makes it converge later, not sooner.

    Args:
        logits: [B, C] float32.
        stated: [B, C] bool, the classes that a row keeps one by one.
        basis: [R, C].
        mean: [C].
    """
    basis = basis.float()
    probabilities = (logits / _WEIGHT_TEMPERATURE).softmax(dim=1)
    weights = (probabilities * logits.shape[1] + _WEIGHT_FLOOR).masked_fill(stated, 0.0)
    # A little of the identity, since a basis may have more directions than a tail has classes.
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
    """[R] float32: `step` logits for every component, more for those whose coordinates int8 would not hold."""
    reach = coordinates.abs().float().quantile(0.9995, dim=0) / LARGEST
    return reach.clamp_min(step)


def round_coordinates(coordinates: Tensor, scale: Tensor) -> Tensor:
    """[B, R] int8."""
    return (coordinates / scale).round().clamp(-LARGEST, LARGEST).to(torch.int8)

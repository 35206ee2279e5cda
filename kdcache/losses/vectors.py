"""Losses on vectors of the student and the teacher: embeddings, and features of a layer.

Losses of single samples return one value per sample, [B]. Losses of the relations between samples return their value
for each sample of the batch; `batch_rows` then returns the vectors of the whole batch, of which some processes or
micro-batches hold parts.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from kdcache.losses.batch import BatchRows, rows_of_these

_TINY = 1e-12
"""Smallest squared distance, against the infinite gradient of the root at 0, as in the authors' code of RKD."""

_SHORTEST = 1e-12
"""Length up to which a vector has no direction, as in `torch.nn.functional.normalize`."""

_PKT_TINY = 1e-7
"""Added to probabilities inside the logarithm of PKT, as in the authors' code."""


def unit_vectors(vectors: Tensor, added: float = 0.0) -> Tensor:
    """Return vectors divided by their lengths, [..., D] -> [..., D]; a vector of length 0 stays 0, without a gradient.

    Divided by a small constant instead, as `torch.nn.functional.normalize` and the published implementations do, it
    has a gradient of up to 1e12: one sample of which all features are cut off by a ReLU would destroy the student.

    Args:
        vectors: [..., D].
        added: to the lengths.
    """
    lengths = vectors.norm(dim=-1, keepdim=True)
    is_zero = lengths <= _SHORTEST
    return torch.where(is_zero, 0.0, vectors / torch.where(is_zero, 1.0, lengths + added))


def mse(student: Tensor, teacher: Tensor) -> Tensor:
    """Return the mean of (h - t)^2 over the numbers of a vector, [B, D] -> [B]."""
    return (student - teacher).square().mean(dim=1)


def leaf(student: Tensor, teacher: Tensor, normalize: bool = False) -> Tensor:
    """Return |h - t|^2 (LEAF, Vujanic & Rueckstiess 2025), [B, D] -> [B].

    Args:
        student: [B, D], after the learned linear map.
        teacher: [B, D].
        normalize: divide h by its length, as a teacher of normalized embeddings does.
    """
    student = unit_vectors(student) if normalize else student
    return (student - teacher).square().sum(dim=1)


def l1(student: Tensor, teacher: Tensor) -> Tensor:
    """Return the mean of |h - t| over the numbers of a vector, [B, D] -> [B]."""
    return (student - teacher).abs().mean(dim=1)


def smooth_l1(student: Tensor, teacher: Tensor, beta: float = 1.0) -> Tensor:
    """Return the mean over the numbers of a vector of the smooth L1 loss, quadratic below `beta`, [B, D] -> [B]."""
    return functional.smooth_l1_loss(student, teacher, reduction="none", beta=beta).mean(dim=1)


def cosine(student: Tensor, teacher: Tensor) -> Tensor:
    """Return 1 - cosine, [B, D] -> [B]; 1, without a gradient, if one of the vectors is 0."""
    return 1 - (unit_vectors(student) * unit_vectors(teacher)).sum(dim=1)


def rkd(
    student: Tensor,
    teacher: Tensor,
    distance_weight: float = 25.0,
    angle_weight: float = 50.0,
    batch_rows: BatchRows = rows_of_these,
) -> Tensor:
    """Return the distances and angles between samples, compared (RKD: Park et al. 2019, 1904.05068, eq. 5 to 8).

        w_d mean_ij huber(d_ij(h) / mean d(h), d_ij(t) / mean d(t)) + w_a mean_ijk huber(cos ijk (h), cos ijk (t))

    Both means run over all pairs and triples, i = j included, as in the authors' code (lenscloth/RKD) and in
    RepDistiller, whose weights are the defaults; the mean distance is over i != j, equal vectors included. Widths may
    differ.

    Args:
        student: [B, D].
        teacher: [B, D'].
        distance_weight: w_d.
        angle_weight: w_a; the angles take memory for B^3 numbers.
        batch_rows: returns the vectors of the whole batch.

    Returns:
        [B], the value of the batch for each sample.
    """
    count, student, teacher = len(student), batch_rows(student), batch_rows(teacher)
    value = student.new_zeros(())
    if distance_weight:
        distances = functional.smooth_l1_loss(_relative_distances(student), _relative_distances(teacher))
        value = value + distance_weight * distances
    if angle_weight:
        value = value + angle_weight * functional.smooth_l1_loss(_angles(student), _angles(teacher))
    return value.expand(count)


def _relative_distances(vectors: Tensor) -> Tensor:
    """Return Euclidean distances divided by their mean over i != j, [N, D] -> [N, N]; 0 if all vectors are equal."""
    # Of vectors that are far from 0, the squares cancel in float32; distances do not depend on where 0 is.
    vectors = vectors - vectors.mean(dim=0)
    squares = vectors.square().sum(dim=1)
    squared = (squares.unsqueeze(1) + squares.unsqueeze(0) - 2 * vectors @ vectors.T).clamp_min(_TINY)
    apart = ~torch.eye(len(vectors), dtype=torch.bool, device=vectors.device) & (squared > _TINY)
    distances = torch.where(apart, squared.sqrt(), 0.0)
    # Not the number of those above 0: whether the distance of equal vectors is 0 is a matter of rounding.
    pairs = max(len(vectors) * (len(vectors) - 1), 1)
    return distances / (distances.sum() / pairs).clamp_min(_TINY)


def _angles(vectors: Tensor) -> Tensor:
    """Return the cosines at sample i between the directions to j and k, [N, D] -> [N, N, N]."""
    directions = unit_vectors(vectors.unsqueeze(0) - vectors.unsqueeze(1))
    return directions @ directions.transpose(1, 2)


def similarity_preserving(student: Tensor, teacher: Tensor, batch_rows: BatchRows = rows_of_these) -> Tensor:
    """Return the squared difference of the similarities of samples (SP: Tung & Mori 2019, 1907.09682, eq. 4).

        |G(h) - G(t)|^2 / B^2,  G = rows of h h^T divided by their lengths

    Widths may differ. Reference: RepDistiller, distiller_zoo/SP.py.

    Args:
        student: [B, D].
        teacher: [B, D'].
        batch_rows: returns the vectors of the whole batch.

    Returns:
        [B], the value of the batch for each sample.
    """
    count, student, teacher = len(student), batch_rows(student), batch_rows(teacher)
    similar = [unit_vectors(vectors @ vectors.T) for vectors in (student, teacher)]
    return (similar[0] - similar[1]).square().mean().expand(count)


def probabilistic_transfer(student: Tensor, teacher: Tensor, batch_rows: BatchRows = rows_of_these) -> Tensor:
    """Return the divergence of the probabilities that samples choose each other (PKT: Passalis & Tefas 2018).

        mean_ij p_ij(t) log (p_ij(t) / p_ij(h)),  p_ij = (1 + cos ij) / 2, divided by its sum over j

    Widths may differ. Reference: the authors' passalis/probabilistic_kt, nn/pkt.py, whose 1e-7 is added to both
    probabilities. A vector of length 0 has the cosine 0 to all others.

    Args:
        student: [B, D].
        teacher: [B, D'].
        batch_rows: returns the vectors of the whole batch.

    Returns:
        [B], the value of the batch for each sample.
    """
    count, student, teacher = len(student), batch_rows(student), batch_rows(teacher)
    chosen, target = (_choices(vectors) for vectors in (student, teacher))
    value = (target * ((target + _PKT_TINY) / (chosen + _PKT_TINY)).log()).mean()
    return value.expand(count)


def _choices(vectors: Tensor) -> Tensor:
    """Return how likely each sample chooses each other by its cosine, [N, D] -> [N, N]."""
    directions = unit_vectors(vectors, added=_PKT_TINY)
    similar: Tensor = (directions @ directions.T + 1) / 2
    return similar / similar.sum(dim=1, keepdim=True)

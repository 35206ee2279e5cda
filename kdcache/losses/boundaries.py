"""Losses at and away from the boundaries of classes (BPKD: Liu et al. 2023, 2306.08075).

The authors published the evaluation alone, and the formulas are those of a third party's code. They need label maps.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from kdcache.losses.maps import channel_wise, kl_of_places

_NEIGHBORS = 7
"""Side of the square within which a place of another class makes a boundary."""


def boundaries(
    labels: Tensor, classes: int, size: tuple[int, int], ignore_index: int = 255, neighbors: int = _NEIGHBORS
) -> Tensor:
    """Return how much each place of a coarse grid is on the boundary of each class, [B, C, h, w] in 0 to 1.

    E_c = dilation - erosion of the pixels of class c, averaged over those of a place; 0 at pixels that are ignored.

    Args:
        labels: [B, H, W] integers, of the pixels.
        classes: C.
        size: (h, w) of the grid of the logits.
        ignore_index: label of pixels without one.
        neighbors: side in pixels of the square of dilation and erosion, odd.
    """
    known = (labels != ignore_index) & (labels >= 0)
    of_class = functional.one_hot(torch.where(known, labels, 0).long(), classes).movedim(-1, 1)
    of_class = (of_class * known[:, None]).float()
    reach = neighbors // 2
    dilated = functional.max_pool2d(of_class, neighbors, stride=1, padding=reach)
    eroded = -functional.max_pool2d(-of_class, neighbors, stride=1, padding=reach)
    return functional.adaptive_avg_pool2d((dilated - eroded) * known[:, None], size)


def boundary_kd(student: Tensor, teacher: Tensor, edges: Tensor, tau: float = 1.0) -> Tensor:
    """Return the KL divergence at the boundaries of each class (BPKD's edge term, weight 50), -> [B].

        T^2 sum_c 2 / n_c sum_x E_c(x) KL(x),   n_c = sum_x E_c(x)

    HAZARD: a class whose boundary is one place (n_c = 1) weighs as much as one with a thousand. A class without a
    boundary has no term.

    Args:
        student: [B, C, h, w] logits.
        teacher: [B, C, h, w] logits.
        edges: [B, C, h, w], of `boundaries`.
        tau: T.
    """
    apart = kl_of_places(student, teacher, tau).unsqueeze(1)
    counts = edges.sum(dim=(2, 3))
    sums = (edges * apart).sum(dim=(2, 3))
    return tau**2 * (2 * sums / torch.where(counts > 0, counts, 1.0)).sum(dim=1)


def body_kd(student: Tensor, teacher: Tensor, edges: Tensor, tau: float = 1.0) -> Tensor:
    """Return the divergence over places of the logits away from the boundaries (BPKD's body term, weight 20), -> [B].

    Channel-wise distillation of the logits of class c times 1 - E_c.

    HAZARD: places on a boundary are not left out of the softmax over places; they have the logit 0 in it. Like
    `channel_wise` it needs the level of each place: dump with `over_places: true`.

    Args:
        student: [B, C, h, w] logits.
        teacher: [B, C, h, w] logits.
        edges: [B, C, h, w], of `boundaries`.
        tau: T.
    """
    return channel_wise(student * (1 - edges), teacher * (1 - edges), tau)


def bpkd(
    student: Tensor,
    teacher: Tensor,
    labels: Tensor,
    tau: float = 1.0,
    edge_weight: float = 50.0,
    body_weight: float = 20.0,
    neighbors: int = _NEIGHBORS,
) -> Tensor:
    """Return both terms of BPKD with their weights, -> [B].

    Args:
        student: [B, C, h, w] logits.
        teacher: [B, C, h, w] logits.
        labels: [B, H, W] int64, of the pixels, -1 where ignored.
        tau: T of both.
        edge_weight: of `boundary_kd`.
        body_weight: of `body_kd`.
        neighbors: side in pixels of the square within which another class makes a boundary, odd.
    """
    edges = boundaries(labels, student.shape[1], (student.shape[2], student.shape[3]), -1, neighbors).to(student.dtype)
    at_edges, elsewhere = (term(student, teacher, edges, tau) for term in (boundary_kd, body_kd))
    return edge_weight * at_edges + body_weight * elsewhere

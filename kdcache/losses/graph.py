"""Losses of a graph's nodes and edges: FF-G2M, for a student without edges of its own, such as an MLP.

An edge is a pair of positions in the batch, (source i, target j), whose logits are both there: of all nodes, or of a
part of them with the edges between them (`data/nodes.py`: `edges_among`).

Source: Wu et al. 2023, Extracting low-/high-frequency knowledge from graph neural networks and injecting it into MLPs
(2305.10758), and the authors' code, LirongWu/FF-G2M@2e07b1e.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional


def with_self_loops(edges: Tensor, count: int) -> Tensor:
    """Return the edges [2, E] with one self loop per node; those that there are already are not repeated."""
    nodes = torch.arange(count, device=edges.device).expand(2, -1)
    return torch.cat([edges[:, edges[0] != edges[1]], nodes], dim=1)


def low_frequency(student: Tensor, teacher: Tensor, edges: Tensor) -> Tensor:
    """Return the mean over edges (i, j), self loops included, of KL(p_j || q_i): neighbors agree with the teacher.

    Args:
        student: logits [N, C].
        teacher: logits [N, C].
        edges: [2, E] int64, positions; self loops are added.

    Raises:
        ValueError: if an edge points outside the N nodes.
    """
    _check(edges, len(student))
    source, target = with_self_loops(edges, len(student))
    log_q, log_p = student.log_softmax(dim=1), teacher.log_softmax(dim=1)
    return functional.kl_div(log_q[source], log_p[target], reduction="batchmean", log_target=True)


def high_frequency(student: Tensor, teacher: Tensor, edges: Tensor, tau: float = 1.5) -> Tensor:
    """Return the mean over edges of KL(softmax(|u_i - u_j| / tau) || softmax(|v_i - v_j| / tau)).

    Self loops, whose differences are 0, are left out. It is 0 without edges. The gradient of a difference of 0 is 0.

    Args:
        student: logits v [N, C].
        teacher: logits u [N, C].
        edges: [2, E] int64, positions.
        tau: temperature.

    Raises:
        ValueError: if an edge points outside the N nodes.
    """
    _check(edges, len(student))
    source, target = edges[:, edges[0] != edges[1]]
    if not len(source):
        return student.sum() * 0
    log_q, log_p = (((logits[source] - logits[target]).abs() / tau).log_softmax(dim=1) for logits in (student, teacher))
    return functional.kl_div(log_q, log_p, reduction="batchmean", log_target=True)


def ff_g2m(
    student: Tensor, teacher: Tensor, labels: Tensor, edges: Tensor, lamb: float = 0.4, tau: float = 1.5
) -> Tensor:
    """Return lamb CE + (1 - lamb) (L_low + L_high), the loss of FF-G2M; CE is the mean over the labeled nodes.

    Args:
        student: logits [N, C].
        teacher: logits [N, C].
        labels: [N] int64, -1 for nodes without a label; their term is 0 if none has one.
        edges: [2, E] int64, positions.
        lamb: weight of the labels; 0.4 for a GCN on Cora.
        tau: temperature of the high frequencies; 1.5 for a GCN on Cora.

    Raises:
        ValueError: if an edge points outside the N nodes.
    """
    labeled = labels >= 0
    cross_entropy = functional.cross_entropy(student, labels, ignore_index=-1, reduction="sum")
    cross_entropy = cross_entropy / labeled.sum().clamp_min(1)
    distilled = low_frequency(student, teacher, edges) + high_frequency(student, teacher, edges, tau)
    return lamb * cross_entropy + (1 - lamb) * distilled


def _check(edges: Tensor, count: int) -> None:
    outside = ((edges < 0) | (edges >= count)).any(dim=0)
    if bool(outside.any()):
        first = int(outside.nonzero()[0])
        raise ValueError(f"edge {first}, {edges[:, first].tolist()}, points outside the {count} nodes of the batch")

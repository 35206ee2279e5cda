"""Losses of a graph's nodes and edges: FF-G2M, for a student without edges of its own, such as an MLP.

An edge is a pair of positions in the batch, (source i, target j), whose logits are both there: of all nodes, or of a
part of them with the edges between them (`data/nodes.py`: `edges_among`).

Source: Wu et al. 2023, Extracting low-/high-frequency knowledge from graph neural networks and injecting it into MLPs
(2305.10758), and the authors' code, LirongWu/FF-G2M@2e07b1e.
"""

from __future__ import annotations

from typing import ClassVar, Literal

import torch
from torch import Tensor
from torch.nn import functional

from kdcache.losses.options import AT_1, DivergenceOptions, Positive, Presets


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

    Returns:
        [N], for each node the part of its edges as the source: their mean over the nodes is the mean over the edges.

    Raises:
        ValueError: if an edge points outside the N nodes.
    """
    _check(edges, len(student))
    source, target = with_self_loops(edges, len(student))
    log_q, log_p = student.log_softmax(dim=1), teacher.log_softmax(dim=1)
    return _by_source(_divergence(log_p[target], log_q[source]), source, len(student))


def high_frequency(student: Tensor, teacher: Tensor, edges: Tensor, edge_tau: float = 1.5) -> Tensor:
    """Return the mean over edges of KL(softmax(|u_i - u_j| / edge_tau) || softmax(|v_i - v_j| / edge_tau)).

    Self loops, whose differences are 0, are left out. It is 0 without edges. The gradient of a difference of 0 is 0.

    Args:
        student: logits v [N, C].
        teacher: logits u [N, C].
        edges: [2, E] int64, positions.
        edge_tau: temperature of the differences.

    Returns:
        [N], for each node the part of its edges as the source, as above.

    Raises:
        ValueError: if an edge points outside the N nodes.
    """
    _check(edges, len(student))
    source, target = edges[:, edges[0] != edges[1]]
    log_q, log_p = (
        ((logits[source] - logits[target]).abs() / edge_tau).log_softmax(dim=1) for logits in (student, teacher)
    )
    return _by_source(_divergence(log_p, log_q), source, len(student))


def ff_g2m(
    student_scaled: Tensor,
    teacher_scaled: Tensor,
    labels: Tensor,
    edge_tau: float = 1.5,
    edges: Tensor | None = None,
) -> Tensor:
    """Return the sum of both terms, [B]; without edges it is KL(p || q), the distillation of GLNN.

    Args:
        student_scaled: [B, C].
        teacher_scaled: [B, C].
        labels: [B]; not used.
        edge_tau: temperature of the differences along edges; 1.5 for a GCN on Cora.
        edges: [2, E] int64, positions in the batch; None for none.

    Raises:
        ValueError: if an edge points outside the batch.
    """
    if edges is None:
        edges = labels.new_empty((2, 0))
    low = low_frequency(student_scaled, teacher_scaled, edges)
    return low + high_frequency(student_scaled, teacher_scaled, edges, edge_tau)


def _divergence(log_p: Tensor, log_q: Tensor) -> Tensor:
    """Return KL(p || q) of each edge, [E]."""
    return functional.kl_div(log_q, log_p, reduction="none", log_target=True).sum(dim=1)


def _by_source(of_edges: Tensor, source: Tensor, count: int) -> Tensor:
    """Return values [E] of edges as values [N] of their sources, of the same mean."""
    of_nodes = of_edges.new_zeros(count).index_add(0, source, of_edges)
    return of_nodes * (count / max(len(of_edges), 1))


def _check(edges: Tensor, count: int) -> None:
    outside = ((edges < 0) | (edges >= count)).any(dim=0)
    if bool(outside.any()):
        first = int(outside.nonzero()[0])
        raise ValueError(f"edge {first}, {edges[:, first].tolist()}, points outside the {count} nodes of the batch")


class FFG2M(DivergenceOptions):
    """Options of `ff_g2m`."""

    compute = staticmethod(ff_g2m)
    # The authors' lamb for a GCN on Cora.
    presets: ClassVar[Presets] = {"ff_g2m": {"ce_weight": 0.4, "kd_weight": 0.6, "temperature": AT_1}}
    uses_edges = True
    needs_level = True
    needs_logits = True
    needs_constant_temperature = True
    refused_for_tokens = "it compares nodes of a graph"

    kind: Literal["ff_g2m"] = "ff_g2m"
    edge_tau: Positive = 1.5

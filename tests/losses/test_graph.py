"""FF-G2M's losses against a dense float64 computation over the adjacency matrix."""

from typing import Any

import pytest
import torch
from torch import Tensor

import kdcache
from kdcache.errors import UsageError
from kdcache.losses.graph import ff_g2m, high_frequency, low_frequency, with_self_loops

N, C, TAU = 6, 4, 1.5
LABELS = torch.tensor([0, -1, 3, -1, 1, -1])
EDGES = torch.tensor([[0, 1, 1, 2, 3, 4, 2, 5, 5], [1, 0, 2, 1, 4, 3, 2, 0, 5]])


def _logits() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    student, teacher = torch.randn(2, N, C, generator=generator, dtype=torch.float64)
    return student, teacher


def _dense(student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
    """Return both terms as sums over all pairs of nodes, weighted by the adjacency matrix."""
    adjacency = torch.zeros(N, N, dtype=torch.float64)
    adjacency[EDGES[0], EDGES[1]] = 1
    p, q = teacher.softmax(1), student.softmax(1)
    low = (p[None] * (p.log()[None] - q.log()[:, None])).sum(2)  # [i, j]: KL(p_j || q_i)
    loops = adjacency.clone().fill_diagonal_(1)
    apart_u, apart_v = ((a[:, None] - a[None]).abs() / TAU for a in (teacher, student))
    p2, q2 = apart_u.softmax(2), apart_v.softmax(2)
    high = (p2 * (p2.log() - q2.log())).sum(2)
    plain = adjacency.clone().fill_diagonal_(0)
    return (low * loops).sum() / loops.sum(), (high * plain).sum() / plain.sum()


def test_terms_are_those_of_the_dense_computation() -> None:
    student, teacher = _logits()
    low, high = _dense(student, teacher)
    assert abs(low_frequency(student, teacher, EDGES).mean() - low) < 1e-12
    assert abs(high_frequency(student, teacher, EDGES, TAU).mean() - high) < 1e-12
    labeled = LABELS >= 0
    ce = -student.log_softmax(1)[labeled].gather(1, LABELS[labeled, None]).mean()
    for lamb in (0.4, 0.9):
        loss = kdcache.loss("ff_g2m", ce_weight=lamb, kd_weight=1 - lamb, edge_tau=TAU)
        parts = loss(student, teacher, LABELS, edges=EDGES)
        assert abs(parts.total - (lamb * ce + (1 - lamb) * (low + high))) < 1e-12
        assert abs(parts.distillation - (1 - lamb) * (low + high)) < 1e-12


def test_gradients() -> None:
    student, teacher = _logits()
    student.requires_grad_()
    assert torch.autograd.gradcheck(lambda v: ff_g2m(v, teacher, LABELS, 1.5, EDGES), student)


def test_edges_and_loops_at_the_limits() -> None:
    student, teacher = _logits()
    student.requires_grad_()
    none = EDGES[:, :0]
    assert bool((high_frequency(student, teacher, none) == 0).all())
    expected = torch.nn.functional.kl_div(
        student.log_softmax(1), teacher.softmax(1), reduction="batchmean"
    )  # of self loops alone, what is left is the distillation of GLNN
    assert abs(low_frequency(student, teacher, none).mean() - expected) < 1e-12
    assert abs(ff_g2m(student, teacher, LABELS).mean() - expected) < 1e-12
    assert with_self_loops(EDGES, N).shape == (2, 7 + N)
    equal = torch.zeros(N, C, dtype=torch.float64, requires_grad=True)
    (gradient,) = torch.autograd.grad(ff_g2m(equal, teacher, LABELS, 1.5, EDGES).mean(), equal)
    assert bool(gradient.isfinite().all())


@pytest.mark.parametrize("end", [-1, N])
def test_edges_outside_of_the_batch_are_refused(end: int) -> None:
    student, teacher = _logits()
    edges = torch.cat([EDGES, torch.tensor([[1], [end]])], dim=1)
    for loss in (low_frequency, high_frequency):
        with pytest.raises(ValueError, match=rf"edge 9, \[1, {end}\], points outside the 6 nodes"):
            loss(student, teacher, edges)


@pytest.mark.parametrize(
    ("name", "edges", "what"),
    [
        ("ff_g2m", None, "there are no edges"),
        ("ff_g2m", EDGES.T, r"edges are torch.int64 \[9, 2\]"),
        ("ff_g2m", EDGES.float(), r"edges are torch.float32 \[2, 9\]"),
        ("ff_g2m", EDGES.tolist(), "edges are a list"),
        ("ff_g2m", EDGES + 1, "edge 7 joins 6 and 1, and the batch has 6 samples"),
        ("kd", EDGES, "the loss 'kd' does not use edges"),
    ],
)
def test_wrong_edges_are_refused_by_the_callable(name: str, edges: Any, what: str) -> None:
    with pytest.raises(UsageError, match=what):
        kdcache.loss(name)(*_logits(), LABELS, edges=edges)


def test_unlabeled_nodes_add_nothing_to_the_cross_entropy() -> None:
    student, teacher = _logits()
    parts = kdcache.loss("ff_g2m")(student, teacher, torch.full((N,), -1), edges=EDGES)
    assert parts.cross_entropy == 0
    assert parts.total == parts.distillation

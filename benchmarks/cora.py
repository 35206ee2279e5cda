"""What MLPs learn of a graph network on Cora, from a cache and from the live teacher (`real_teachers.py`)."""

from __future__ import annotations

import argparse
import copy
import statistics
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
from planetoid import read_planetoid
from torch import Tensor, nn

import kdcache
from kdcache.cache.fidelity import total_variation
from kdcache.cli import output
from kdcache.data.nodes import Graph

_WIDTH, _DROPOUT = 128, 0.5
_LR, _WEIGHT_DECAY = 0.01, 5e-4
_VALIDATED_EVERY = 5  # epochs


class GCN(nn.Module):
    """Two graph convolutions with a symmetrically normalized adjacency matrix (Kipf & Welling 2017)."""

    def __init__(self, features: int, classes: int) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(features, _WIDTH, bias=False), nn.Linear(_WIDTH, classes, bias=False)
        self.dropout = nn.Dropout(_DROPOUT)

    def forward(self, features: Tensor, edges: Tensor) -> Tensor:
        """Return logits [N, C] of features [N, F] and edges [2, E]."""
        count = len(features)
        source, target = torch.cat([edges, torch.arange(count, device=edges.device).expand(2, -1)], dim=1)
        degree = torch.bincount(target, minlength=count).float()
        weights = (degree[source] * degree[target]).rsqrt()
        spread = torch.sparse_coo_tensor(torch.stack([target, source]), weights, (count, count), check_invariants=True)
        hidden: Tensor = torch.sparse.mm(spread, self.first(self.dropout(features))).relu()
        logits: Tensor = torch.sparse.mm(spread, self.last(self.dropout(hidden)))
        return logits


class _Run(NamedTuple):
    """A network of one seed.

    Attributes:
        accuracy: on the test nodes.
        logits: of all nodes, [N, C], in evaluation mode.
    """

    accuracy: float
    logits: Tensor


def _trained(
    network: nn.Module, inputs: tuple[Tensor, ...], loss: Callable[[Tensor], Tensor], graph: Graph, epochs: int
) -> _Run:
    """Train a network on all nodes at once, and take the weights of the best accuracy on the validation nodes."""
    optimizer = torch.optim.Adam(network.parameters(), _LR, weight_decay=_WEIGHT_DECAY)
    best, selected = -1.0, network.state_dict()
    for epoch in range(epochs):
        network.train()
        optimizer.zero_grad()
        loss(network(*inputs)).backward()  # type: ignore[no-untyped-call]  # torch's
        optimizer.step()
        if (epoch + 1) % _VALIDATED_EVERY:
            continue
        with torch.no_grad():
            accuracy = _accuracy(network.eval()(*inputs), graph, "validation")
        if accuracy > best:
            best, selected = accuracy, copy.deepcopy(network.state_dict())
    network.load_state_dict(selected)
    with torch.no_grad():
        logits = network.eval()(*inputs)
    return _Run(_accuracy(logits, graph, "test"), logits)


def _accuracy(logits: Tensor, graph: Graph, split: str) -> float:
    mask = graph.masks[split]
    return float((logits.argmax(dim=1) == graph.labels)[mask].float().mean())


def cora(asked: argparse.Namespace) -> None:
    """Accuracy of a GCN, an MLP, and MLPs that learn from the GCN with KD (GLNN) and FF-G2M."""
    graph = read_planetoid(asked.planetoid)
    epochs = 5 if asked.quick else 200
    runs: dict[str, list[tuple[_Run, Tensor]]] = {}
    sizes, errors = [], []
    for seed in range(asked.seeds):
        teacher, size, stored = _teacher(graph, seed, epochs)
        sizes.append(size)
        errors.append(float(total_variation(teacher.logits, stored, 1).mean()))
        runs.setdefault("GCN, the teacher", []).append((teacher, teacher.logits))
        for name, loss in _student_losses(graph, {"live": teacher.logits, "cache": stored}).items():
            torch.manual_seed(seed)
            student = nn.Sequential(
                nn.Linear(graph.features.shape[1], _WIDTH), nn.ReLU(), nn.Dropout(_DROPOUT),
                nn.Linear(_WIDTH, teacher.logits.shape[1]),
            )  # fmt: skip
            run = _trained(student, (graph.features,), loss, graph, epochs)
            runs.setdefault(name, []).append((run, teacher.logits))
    output.table(
        f"Cora: {len(graph):,} nodes, {graph.edges.shape[1]:,} edges; {statistics.mean(sizes):.1f} bytes per node in "
        f"the cache, total variation {statistics.mean(errors):.1e}; {asked.seeds} seeds",
        ["network", "accuracy", "sd", "as the teacher"],
        [
            [
                name,
                f"{statistics.mean(accuracies):.3f}",
                f"{statistics.pstdev(accuracies):.3f}",
                f"{statistics.mean(same):.3f}",
            ]
            for name, of_seeds in runs.items()
            for accuracies, same in [_figures(of_seeds)]
        ],
    )


def _figures(of_seeds: list[tuple[_Run, Tensor]]) -> tuple[list[float], list[float]]:
    """Return accuracies, and shares of nodes with the same class as the teacher of the seed."""
    same = [float((run.logits.argmax(dim=1) == true.argmax(dim=1)).float().mean()) for run, true in of_seeds]
    return [run.accuracy for run, _ in of_seeds], same


def _teacher(graph: Graph, seed: int, epochs: int) -> tuple[_Run, float, Tensor]:
    """Train a GCN and dump it; return it, the bytes of its cache per node, and the logits [N, C] of the cache."""
    torch.manual_seed(seed)
    labels = graph.labels.where(graph.masks["train"], -1)
    ce = kdcache.loss("ce")
    network = GCN(graph.features.shape[1], int(graph.labels.max()) + 1)
    inputs = (graph.features, graph.edges)
    run = _trained(network, inputs, lambda logits: ce(logits, None, labels).total, graph, epochs)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "cora.kdcache"
        cache = kdcache.dump_teacher(kdcache.GraphTeacher(network, graph), graph.samples(), path)
        size = sum(file.stat().st_size for file in path.rglob("*") if file.is_file()) / len(graph)
        return run, size, cache.teacher()(torch.arange(len(graph)))


def _student_losses(graph: Graph, sources: dict[str, Tensor]) -> dict[str, Callable[[Tensor], Tensor]]:
    """Return the loss of each student as a function of its logits [N, C], by name."""
    labels = graph.labels.where(graph.masks["train"], -1)
    # As in GLNN's experiments: temperature 1, and no weight of the labels, which the teacher has seen.
    ce, kd = kdcache.loss("ce"), kdcache.loss("kd", tau=1.0, ce_weight=0.0, kd_weight=1.0)
    ff_g2m = kdcache.loss("ff_g2m")
    found: dict[str, Callable[[Tensor], Tensor]] = {"MLP of the labels": lambda logits: ce(logits, None, labels).total}

    def add(source: str, said: Tensor) -> None:
        found[f"GLNN, {source}"] = lambda logits: kd(logits, said, labels).total
        found[f"FF-G2M, {source}"] = lambda logits: ff_g2m(logits, said, labels, edges=graph.edges).total

    for source, said in sources.items():
        add(source, said)
    return found

"""FF-G2M in training: its steps are those of a loop by hand, and what it cannot be trained on is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.graphs import GCN, C, F, N, graph_file
from helpers.teachers import FunctionTeacher
from helpers.tiny import tiny_samples
from torch import Tensor, nn
from torch.nn import functional

import kdcache
from kdcache.config.schema import Pipeline, TrainSpec
from kdcache.data.datasets import load_split
from kdcache.data.samples import Samples
from kdcache.data.views import View
from kdcache.errors import UsageError
from kdcache.losses import Loss
from kdcache.models.build_for import FeaturesAlone
from kdcache.models.graph_teacher import GraphTeacher
from kdcache.train import edges as edges_module
from kdcache.train.edges import check_edges
from kdcache.train.step import Trainer

LOSS = Loss.model_validate({"name": "ff_g2m"})


class Said:
    """A reporter that keeps what it is told."""

    def __init__(self) -> None:
        self.said: list[str] = []

    def say(self, message: str) -> None:
        self.said.append(message)


def _nodes(folder: Path) -> Samples:
    return load_split({"name": "graph", "root": str(graph_file(folder))}, "train")


def _student() -> nn.Module:
    torch.manual_seed(3)
    network = nn.Linear(F, C).double()
    network.register_forward_pre_hook(FeaturesAlone())
    network.register_forward_pre_hook(lambda _, inputs: (inputs[0].double(),))
    return network


def _dense(student: Tensor, teacher: Tensor, labels: Tensor, edges: Tensor) -> Tensor:
    """FF-G2M's loss of a batch over its adjacency matrix."""
    count = len(student)
    adjacency = torch.zeros(count, count, dtype=torch.float64).index_put(
        (edges[0], edges[1]), torch.ones(edges.shape[1], dtype=torch.float64), accumulate=True
    )
    apart = adjacency.clone().fill_diagonal_(0)
    loops = apart + torch.eye(count, dtype=torch.float64)
    p, q = teacher.softmax(1), student.softmax(1)
    low = (p[None] * (p.log()[None] - q.log()[:, None])).sum(2)
    p2, q2 = (((a[:, None] - a[None]).abs() / 1.5).softmax(2) for a in (teacher, student))
    high = (p2 * (p2.log() - q2.log())).sum(2)
    ce = functional.cross_entropy(student, labels, ignore_index=-1, reduction="sum") / (labels >= 0).sum().clamp_min(1)
    edge_terms = (low * loops).sum() / loops.sum() + (high * apart).sum() / apart.sum().clamp_min(1)
    return 0.4 * ce + 0.6 * edge_terms


@pytest.mark.parametrize("parts", [1, 3])
@pytest.mark.parametrize("batch_size", [N, 12])
def test_steps_are_those_of_a_loop_by_hand(tmp_path: Path, batch_size: int, parts: int) -> None:
    samples = _nodes(tmp_path)
    assert samples.graph is not None
    graph = samples.graph
    with torch.no_grad():
        rows = GraphTeacher(GCN(), graph).eval()(View(samples, []).batch(range(N), 0).images).double()
    spec = TrainSpec(
        epochs=1, batch_size=batch_size, gradient_accumulation_steps=parts, lr=0.1, momentum=0.0, nesterov=False,
        weight_decay=0.0, schedule="constant", num_workers=0,
    )  # fmt: skip
    trained = _student()
    Trainer(trained, spec, LOSS, N).epoch(View(samples, []), 1, FunctionTeacher(lambda ids, _: rows[ids], N))
    by_hand = _student()
    order = torch.randperm(N, generator=torch.Generator().manual_seed(1))
    labels = torch.from_numpy(samples.labels).long()
    for ids in torch.split(order, batch_size):
        here = {int(node): place for place, node in enumerate(ids)}
        pairs = [(here[i], here[j]) for i, j in graph.edges.T.tolist() if i in here and j in here]
        edges = torch.tensor(pairs, dtype=torch.int64).reshape(-1, 2).T
        nodes = torch.cat([ids.double()[:, None], graph.features[ids].double()], dim=1)
        loss = _dense(by_hand(nodes), rows[ids], labels[ids], edges)
        for parameter, gradient in zip(
            by_hand.parameters(), torch.autograd.grad(loss, [*by_hand.parameters()]), strict=True
        ):
            parameter.data -= 0.1 * gradient
    for one, other in zip(trained.parameters(), by_hand.parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-9)


def test_a_batch_of_some_nodes_is_told_of(tmp_path: Path) -> None:
    samples, small, whole = _nodes(tmp_path), Said(), Said()
    check_edges(LOSS, samples, TrainSpec(batch_size=10), small)  # type: ignore[arg-type]  # says only
    assert small.said == [
        "note: a batch of 10 of 30 nodes has both ends of about 10.3% of the edges; with train.batch_size 30 it has all"
    ]
    check_edges(LOSS, samples, TrainSpec(batch_size=64), whole)  # type: ignore[arg-type]
    check_edges(Loss.model_validate({"name": "kd"}), tiny_samples(), TrainSpec(), whole)  # type: ignore[arg-type]
    assert whole.said == []


def test_what_has_no_edges_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    spec: Any = {"dataset": {"name": "digits"}, "student": {"model": "small:mlp"}, "loss": {"name": "ff_g2m"}}
    samples = load_split("digits", "train")
    cache = kdcache.dump_teacher(nn.Sequential(nn.Flatten(), nn.Linear(64, 10)), samples, tmp_path / "c.kdcache")
    with pytest.raises(UsageError, match="digits has no edges") as error:
        kdcache.train_student(Pipeline.model_validate(spec), cache, tmp_path / "run")
    assert "dataset.name: graph" in error.value.fix
    monkeypatch.setattr(edges_module, "n_processes", lambda: 2)
    with pytest.raises(UsageError, match="2 processes share each batch"):
        check_edges(LOSS, _nodes(tmp_path), TrainSpec(), Said())  # type: ignore[arg-type]

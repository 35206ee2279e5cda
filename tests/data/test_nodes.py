"""Graphs: nodes as samples, a teacher of the whole graph, edges of a batch, wrong files."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import kdcache
from kdcache.data.nodes import Graph, edges_among, graph_of, read_graph
from kdcache.errors import MismatchError, UsageError
from kdcache.models.digest import weights_digest
from kdcache.models.graph_teacher import GraphTeacher

N, F, C = 30, 5, 3


class GCN(nn.Module):
    """One layer: the mean of the neighbors' features, then classes. It counts how often it is called."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(F, C)
        self.calls = 0

    def forward(self, features: Tensor, edges: Tensor) -> Tensor:
        self.calls += 1
        adjacency = torch.eye(len(features), dtype=features.dtype)
        adjacency[edges[1], edges[0]] = 1
        logits: Tensor = self.linear(adjacency @ features / adjacency.sum(1, keepdim=True))
        return logits


def _arrays() -> dict[str, Any]:
    rng = np.random.default_rng(0)
    x = rng.standard_normal((N, F)).astype(np.float32)
    x[7] = x[3]  # nodes of equal features and different neighbors
    split = np.arange(N) % 3
    return {
        "x": x,
        "edges": rng.integers(N, size=(2, 80)),
        "y": np.arange(N) % C,
        **{name: split == i for i, name in enumerate(("train", "validation", "test"))},
    }


def _graph(tmp_path: Path, **changed: Any) -> Graph:
    np.savez(tmp_path / "g.npz", **{**_arrays(), **changed})
    return read_graph(tmp_path / "g.npz")


def test_teacher_of_a_graph_is_called_once(tmp_path: Path) -> None:
    graph, network = _graph(tmp_path), GCN()
    samples = graph.samples()
    cache = kdcache.dump_teacher(GraphTeacher(network, graph), samples, tmp_path / "g.kdcache", batch_size=8)
    calls = network.calls
    assert calls <= 3  # before the pass, in the pass, and on another device or in another precision
    with torch.no_grad():
        expected = network.eval()(graph.features, graph.edges)
    torch.testing.assert_close(cache.teacher()(torch.arange(N)), expected, atol=5e-3, rtol=5e-3)
    assert not torch.allclose(expected[3], expected[7])
    assert cache.labels.tolist() == [y if m else -1 for y, m in zip(graph.labels, graph.masks["train"], strict=True)]
    nodes = kdcache.CachedDataset(samples, cache)[4][0]
    assert Graph.features_of(nodes[None]).equal(graph.features[4:5])


def test_teacher_of_other_edges_has_another_digest(tmp_path: Path) -> None:
    network, graph = GCN(), _graph(tmp_path)
    other = _graph(tmp_path, edges=_arrays()["edges"][:, :-1])
    assert weights_digest(GraphTeacher(network, graph)) != weights_digest(GraphTeacher(network, other))


def test_new_weights_are_not_answered_from_memory(tmp_path: Path) -> None:
    graph = _graph(tmp_path)
    first, second = GraphTeacher(GCN(), graph).eval(), GraphTeacher(GCN(), graph).eval()
    nodes = torch.cat([torch.arange(N).float()[:, None], graph.features], dim=1)
    with torch.no_grad():
        before = first(nodes)
        first.load_state_dict(second.state_dict())
        assert first(nodes).equal(second(nodes)) and not first(nodes).equal(before)
        assert first.double()(nodes).dtype == torch.float64
    assert first.train()(nodes.double()).requires_grad


def test_nodes_of_another_graph_are_refused(tmp_path: Path) -> None:
    graph = _graph(tmp_path)
    nodes = torch.cat([torch.arange(N).float()[:, None], graph.features], 1)
    nodes[2, 1] += 1
    with pytest.raises(MismatchError, match="node 2 is not one of"):
        GraphTeacher(GCN(), graph)(nodes)
    with pytest.raises(MismatchError, match=r"returned \[30\] for 30 nodes"):
        GraphTeacher(_Wrong(), graph)(nodes[:2])


class _Wrong(nn.Module):
    def forward(self, features: Tensor, _: Tensor) -> Tensor:
        return features.sum(1)


def test_edges_among_nodes() -> None:
    edges = torch.tensor([[0, 1, 2, 3, 3], [1, 2, 3, 0, 3]])
    assert edges_among(edges, torch.tensor([3, 2, 0]), 4).tolist() == [[1, 0, 0], [0, 2, 0]]


def test_graph_of_torch_geometric(tmp_path: Path) -> None:
    graph = _graph(tmp_path)
    masks = {"train_mask": graph.masks["train"], "val_mask": graph.masks["validation"]}
    data = SimpleNamespace(x=graph.features, edge_index=graph.edges, y=graph.labels[:, None], **masks)
    taken = graph_of(data)
    assert (
        taken.edges.equal(graph.edges)
        and taken.labels.equal(graph.labels)
        and set(taken.masks)
        == {
            "train",
            "validation",
        }
    )
    with pytest.raises(UsageError, match="without x and edge_index"):
        graph_of(SimpleNamespace(y=graph.labels))
    with pytest.raises(UsageError, match="no mask 'test'"):
        taken.samples("test")


@pytest.mark.parametrize(
    ("changed", "error", "what"),
    [
        ({"edges": np.array([[0, 1], [1, N]])}, MismatchError, f"edge 1 of g joins the nodes 1 and {N}"),
        ({"edges": np.array([[0, -1], [1, 0]])}, MismatchError, "edge 1 of g joins the nodes -1 and 0"),
        ({"edges": np.zeros((9, 2), int)}, UsageError, r"edges \[9, 2\]"),
        ({"edges": np.zeros((2, 2))}, UsageError, "edges of float64"),
        ({"y": np.zeros(N - 1, int)}, MismatchError, r"30 nodes and labels \[29\]"),
        ({"y": np.full(N, -2)}, MismatchError, "label -2"),
        ({"train": np.ones(3, bool)}, MismatchError, r"30 nodes and mask train \[3\]"),
        ({"x": np.zeros((N, F, 2))}, UsageError, r"features \[30, 5, 2\]"),
        ({"x": np.full((N, F), "a")}, UsageError, "not a graph"),
    ],
)
def test_wrong_graphs(tmp_path: Path, changed: dict[str, Any], error: type[Exception], what: str) -> None:
    with pytest.raises(error, match=what):
        _graph(tmp_path, **changed)

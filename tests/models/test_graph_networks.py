"""Networks of a graph's nodes: of the whole graph, called once, and of the features of single nodes."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.graphs import GCN, C, F, N, graph_arrays, graph_file, small_graph
from safetensors.torch import load_file
from torch import Tensor, nn

import kdcache
from kdcache.config.schema import ModelSpec, Pipeline
from kdcache.data.nodes import Graph
from kdcache.errors import MismatchError
from kdcache.evaluation.costs import count_multiply_adds
from kdcache.models.build_for import build_for, takes_edges
from kdcache.models.digest import weights_digest
from kdcache.models.graph_teacher import GraphTeacher
from kdcache.models.teacher import load_teacher


def test_teacher_of_a_graph_is_called_once(tmp_path: Path) -> None:
    graph, network = small_graph(tmp_path), GCN()
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
    network, graph = GCN(), small_graph(tmp_path)
    other = small_graph(tmp_path, edges=graph_arrays()["edges"][:, :-1])
    assert weights_digest(GraphTeacher(network, graph)) != weights_digest(GraphTeacher(network, other))


def test_new_weights_are_not_answered_from_memory(tmp_path: Path) -> None:
    graph = small_graph(tmp_path)
    first, second = GraphTeacher(GCN(), graph).eval(), GraphTeacher(GCN(), graph).eval()
    nodes = torch.cat([torch.arange(N).float()[:, None], graph.features], dim=1)
    with torch.no_grad():
        before = first(nodes)
        first.load_state_dict(second.state_dict())
        assert first(nodes).equal(second(nodes)) and not first(nodes).equal(before)
        assert first.double()(nodes).dtype == torch.float64
    assert first.train()(nodes.double()).requires_grad


def test_memory_follows_changes_of_any_kind(tmp_path: Path) -> None:
    graph, network = small_graph(tmp_path), GCN()
    holder, nodes = nn.Sequential(GraphTeacher(network, graph)).eval(), _nodes(graph)
    changes: list[Callable[[], Any]] = [
        lambda: setattr(network.linear, "bias", nn.Parameter(torch.ones(C))),
        lambda: network.linear.weight.mul_(2),
        lambda: holder.load_state_dict(nn.Sequential(GraphTeacher(GCN(), graph)).state_dict()),
    ]
    with torch.no_grad():
        for change in changes:
            before, calls = holder(nodes), network.calls
            assert holder(nodes).equal(before)
            assert network.calls == calls
            change()
            assert not holder(nodes).equal(before)


def test_costs_are_those_of_the_whole_graph(tmp_path: Path) -> None:
    graph = small_graph(tmp_path)
    teacher = GraphTeacher(GCN(), graph).eval()
    with torch.no_grad():
        teacher(_nodes(graph))
    for _ in range(2):
        assert count_multiply_adds(teacher, _nodes(graph)[:1]) == N * N * F + N * F * C


class _Two(nn.Module):
    """Returns logits and an embedding, in a dictionary or a tuple."""

    def __init__(self, kind: type) -> None:
        super().__init__()
        self.gcn, self.kind = GCN(), kind

    def forward(self, features: Tensor, edges: Tensor) -> Any:
        parts = {"logits": self.gcn(features, edges), "embedding": features * 2}
        return parts if self.kind is dict else self.kind(parts.values())


@pytest.mark.parametrize("kind", [dict, tuple, list])
def test_other_outputs_of_a_graph_are_kept(tmp_path: Path, kind: type) -> None:
    graph = small_graph(tmp_path)
    source = "embedding" if kind is dict else 1
    outputs = {"embedding": {"kind": "vector", "source": source, "encoding": "float32"}}
    network = GraphTeacher(_Two(kind), graph)
    logits = {} if kind is dict else {"logits": False}
    options: Any = {"outputs": outputs, "batch_size": 7, **logits}
    cache = kdcache.dump_teacher(network, graph.samples(), tmp_path / "c.kdcache", **options)
    assert cache.teacher("embedding")(torch.arange(N)).equal(graph.features * 2)


def test_networks_are_called_with_what_they_take(tmp_path: Path) -> None:
    class Optional(nn.Module):
        def forward(self, x: Tensor, edge_index: Tensor, edge_weight: Tensor | None = None) -> Tensor:
            return x

    class Single(nn.Module):
        def forward(self, x: Tensor, batch: Tensor | None = None, *rest: Tensor, **named: Tensor) -> Tensor:
            return x

    assert [takes_edges(network) for network in (GCN(), Optional(), Single(), nn.Linear(2, 2), nn.Sequential())] == [
        True, True, False, False, False,
    ]  # fmt: skip
    samples = small_graph(tmp_path).samples()
    mlp = build_for(ModelSpec(model="small:mlp", args={"width": 9}), samples, (1 + F,))
    nodes = _nodes(small_graph(tmp_path))
    assert mlp.get_submodule("hidden").weight.shape == (9, F)
    changed = nodes.clone()
    changed[:, 0] += 1
    assert mlp(nodes).equal(mlp(changed)) and mlp(nodes).equal(copy.deepcopy(mlp)(nodes))
    assert not any("_hook" in key for key in mlp.state_dict())


def _nodes(graph: Graph) -> Tensor:
    return torch.cat([torch.arange(len(graph)).float()[:, None], graph.features], dim=1)


def _pipeline(folder: Path, model: str, **teacher: Any) -> Pipeline:
    (folder / "nets.py").write_text(
        "from helpers.graphs import GCN\nimport torch\nfrom torch import nn\n"
        "def gcn(num_classes, features=5):\n    torch.manual_seed(0)\n    return GCN(num_classes, features)\n"
        "def linear(num_classes, features=5):\n    return nn.Linear(features, num_classes)\n"
    )
    return Pipeline.model_validate(
        {
            "dataset": {"name": "graph", "root": str(graph_file(folder))},
            "teacher": {"model": f"{folder / 'nets.py'}:gcn", "train": {"epochs": 2, "batch_size": N}, **teacher},
            "student": {"model": model, "train": {"epochs": 1, "batch_size": N}},
            "loss": {"name": "kd"},
        }
    )


def test_a_trained_network_of_a_graph_is_loaded_as_it_was(tmp_path: Path) -> None:
    pipeline = _pipeline(tmp_path, "small:mlp")
    trained = kdcache.train_teacher(pipeline, tmp_path / "run")
    assert isinstance(trained.model, GraphTeacher)
    assert set(load_file(tmp_path / "run" / "model.safetensors")) == {"linear.weight", "linear.bias"}
    again = kdcache.train_teacher(pipeline, tmp_path / "run")
    assert again.model.state_dict().keys() == trained.model.state_dict().keys()
    assert weights_digest(again.model) == weights_digest(trained.model)
    pipeline = _pipeline(tmp_path, "small:mlp", weights=str(tmp_path / "run" / "model.safetensors"))
    loaded = load_teacher(pipeline)
    assert weights_digest(loaded.model) == weights_digest(trained.model)
    test = kdcache.load_split(pipeline.dataset, "test")
    assert kdcache.evaluate(loaded.model, test) == trained.test


@pytest.mark.parametrize("width", [4, 6])
def test_networks_of_another_width_are_refused(tmp_path: Path, width: int) -> None:
    pipeline = _pipeline(tmp_path, f"{tmp_path / 'nets.py'}:linear", args={"features": width})
    with pytest.raises(MismatchError, match=r"teacher cannot take the nodes of g, features \[30, 5\]") as error:
        loaded = load_teacher(pipeline)
        kdcache.dump_teacher(loaded.model, loaded.samples, tmp_path / "c.kdcache")
    assert "with F = 5" in error.value.fix
    good = load_teacher(_pipeline(tmp_path, "small:mlp"))
    cache = kdcache.dump_teacher(good.model, good.samples, tmp_path / "good.kdcache")
    assert pipeline.student is not None
    student = pipeline.student.model_copy(update={"args": {"features": width}})
    with pytest.raises(MismatchError, match=r"cannot take the nodes of g, features \[30, 5\] and edges \[2, 80\]"):
        kdcache.train_student(pipeline.model_copy(update={"student": student}), cache, tmp_path / "student")


def test_a_student_may_be_a_network_of_the_graph(tmp_path: Path) -> None:
    pipeline = _pipeline(tmp_path, f"{tmp_path / 'nets.py'}:gcn")
    loaded = load_teacher(pipeline)
    cache = kdcache.dump_teacher(loaded.model, loaded.samples, tmp_path / "good.kdcache", name=loaded.identity)
    assert isinstance(kdcache.train_student(pipeline, cache, tmp_path / "student").model, GraphTeacher)


def test_nodes_of_another_graph_are_refused(tmp_path: Path) -> None:
    graph = small_graph(tmp_path)
    nodes = torch.cat([torch.arange(N).float()[:, None], graph.features], 1)
    nodes[2, 1] += 1
    with pytest.raises(MismatchError, match="node 2 is not one of"):
        GraphTeacher(GCN(), graph)(nodes)
    with pytest.raises(MismatchError, match=r"returned \[30\] for 30 nodes"):
        GraphTeacher(_Wrong(), graph)(nodes[:2])


class _Wrong(nn.Module):
    def forward(self, features: Tensor, _: Tensor) -> Tensor:
        return features.sum(1)


def test_a_network_of_torch_geometric_is_a_teacher_of_its_data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if find_spec("torch_geometric") is None:
        pytest.skip("torch-geometric is not installed: pip install 'kdcache[graphs]'")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of torch, at the import of torch-geometric
        from torch_geometric import nn as theirs  # only where it is installed
    graph = small_graph(tmp_path)
    masks = {f"{name}_mask": graph.masks[split] for name, split in (("train", "train"), ("val", "validation"))}
    torch.save({"x": graph.features, "edge_index": graph.edges, "y": graph.labels, **masks}, tmp_path / "d.pt")
    (tmp_path / "mine.py").write_text(
        "import torch\nfrom torch_geometric.data import Data\nfrom torch_geometric.nn import GCN\n\n\n"
        "def data(split, root):\n    return Data(**torch.load(root))\n\n\n"
        "def gcn(num_classes):\n    torch.manual_seed(0)\n"
        f"    return GCN({F}, 8, num_layers=2, out_channels=num_classes, dropout=0.5)\n"
    )
    monkeypatch.chdir(tmp_path)
    pipeline = Pipeline.model_validate(
        {
            "dataset": {"name": "mine.py:data", "root": "d.pt"},
            "teacher": {"model": "mine.py:gcn"},
            "student": {"model": "small:mlp", "train": {"epochs": 1, "batch_size": N}},
            "loss": {"name": "ff_g2m"},
        }
    )
    loaded = load_teacher(pipeline)
    cache = kdcache.dump_teacher(loaded.model, loaded.samples, tmp_path / "c.kdcache", name=loaded.identity)
    torch.manual_seed(0)
    network = theirs.GCN(F, 8, num_layers=2, out_channels=C, dropout=0.5).eval()
    with torch.no_grad():
        expected = network(graph.features, graph.edges)
    torch.testing.assert_close(cache.teacher()(torch.arange(N)), expected, atol=5e-3, rtol=5e-3)
    assert kdcache.train_student(pipeline, cache, tmp_path / "run").test is not None

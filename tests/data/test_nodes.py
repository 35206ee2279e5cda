"""Graphs: nodes as samples, splits by masks, edges of a batch, graphs of torch-geometric, wrong files."""

import re
import warnings
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from helpers.graphs import F, N, graph_arrays, small_graph
from hypothesis import given
from hypothesis import strategies as st

from kdcache.config.schema import DatasetSpec
from kdcache.data.datasets import SPLITS, load_held_out, load_split
from kdcache.data.nodes import Graph, edges_among, graph_of, is_graph, read_graph
from kdcache.data.views import View
from kdcache.errors import MismatchError, UsageError


def test_edges_among_nodes() -> None:
    edges = torch.tensor([[0, 1, 2, 3, 3], [1, 2, 3, 0, 3]])
    assert edges_among(edges, torch.tensor([3, 2, 0]), 4).tolist() == [[1, 0, 0], [0, 2, 0]]


def test_splits_are_those_of_the_masks(tmp_path: Path) -> None:
    graph = small_graph(tmp_path)
    spec = {"name": "graph", "root": str(tmp_path / "g.npz")}
    train = load_split(spec, "train")
    assert train.graph is not None and train.graph.edges.equal(graph.edges)
    assert train.labels.tolist() == [int(y) if i % 3 == 0 else -1 for i, y in enumerate(graph.labels)]
    for number, split in ((1, "validation"), (2, "test")):
        part = load_split(spec, split)  # type: ignore[arg-type]  # one of them
        batch = View(part, part.transform).batch(range(len(part)), 0)
        assert batch.images[:, 0].tolist() == list(range(number, N, 3))
        assert Graph.features_of(batch.images).equal(graph.features[number::3])
        assert batch.labels.equal(graph.labels[number::3])
    assert train.class_names == part.class_names == ("0", "1", "2")


def test_splits_without_masks_are_held_out_of_the_labels(tmp_path: Path) -> None:
    arrays = {key: value for key, value in graph_arrays().items() if key not in ("validation", "test")}
    np.savez(tmp_path / "g.npz", **arrays, class_names=np.array(["a", "b", "c"]))
    spec = DatasetSpec(name="graph", root=str(tmp_path / "g.npz"), validation_fraction=0.2, test_fraction=0.3)
    splits = {split: load_split(spec, split) for split in SPLITS}
    assert [len(splits[split]) for split in SPLITS] == [N, 2, 3]
    labeled = {int(i) for i in np.flatnonzero(splits["train"].labels >= 0)}
    numbers = {split: {int(splits[split].images.picture(i)[0]) for i in range(len(splits[split]))} for split in SPLITS}  # type: ignore[index]
    assert labeled | numbers["validation"] | numbers["test"] == set(range(0, N, 3))
    assert len(labeled) == 5
    assert splits["test"].class_names == ("a", "b", "c")
    none = spec.model_copy(update={"validation_fraction": 0.0})
    assert load_held_out(none, "validation") is None


def test_nodes_of_no_mask_are_trained_on(tmp_path: Path) -> None:
    graph = small_graph(tmp_path)
    rest = replace(graph, masks={name: mask for name, mask in graph.masks.items() if name != "train"})
    assert rest.labeled.tolist() == list(range(0, N, 3))
    assert replace(graph, masks={}).labeled.tolist() == list(range(N))


def test_a_transform_of_nodes_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="begins with RandomHorizontalFlip"):
        View(small_graph(tmp_path).samples(), [{"RandomHorizontalFlip": {}}])


@given(count=st.integers(1, 12), seed=st.integers(0, 10_000))
def test_edges_among_any_nodes_are_those_of_the_adjacency_matrix(count: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    edges = torch.randint(count, (2, 20), generator=generator)
    nodes = torch.randperm(count, generator=generator)[: int(torch.randint(1, count + 1, (), generator=generator))]
    counts = torch.zeros(count, count).index_put((edges[0], edges[1]), torch.ones(20), accumulate=True)
    found = edges_among(edges, nodes, count)
    among = torch.zeros(len(nodes), len(nodes)).index_put(
        (found[0], found[1]), torch.ones(found.shape[1]), accumulate=True
    )
    assert among.equal(counts[nodes][:, nodes])


def _data_of(graph: Graph, kind: str) -> Any:
    masks = {"train_mask": graph.masks["train"], "val_mask": graph.masks["validation"]}
    given = {"x": graph.features, "edge_index": graph.edges, "y": graph.labels[:, None], **masks}
    if kind == "namespace":
        return SimpleNamespace(**given)
    if find_spec("torch_geometric") is None:
        pytest.skip("torch-geometric is not installed: pip install 'kdcache[graphs]'")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of torch, at the import of torch-geometric
        from torch_geometric.data import Data
    return Data(**given)


@pytest.mark.parametrize("kind", ["namespace", "torch_geometric"])
def test_graph_of_torch_geometric(tmp_path: Path, kind: str) -> None:
    graph = small_graph(tmp_path)
    data = _data_of(graph, kind)
    taken = graph_of(data)
    assert is_graph(data) and is_graph(graph) and not is_graph([]) and graph_of(graph) is graph
    assert taken.edges.equal(graph.edges)
    assert taken.features.equal(graph.features)
    assert taken.labels.equal(graph.labels)
    assert set(taken.masks) == {"train", "validation"}
    data.x = data.x.to_sparse()
    assert graph_of(data).features.equal(graph.features)
    data.x = None
    with pytest.raises(UsageError, match="without x is not a graph"):
        graph_of(data)
    with pytest.raises(UsageError, match="no mask 'test'"):
        taken.samples("test")


@pytest.mark.parametrize("kind", ["namespace", "torch_geometric"])
def test_a_function_may_return_a_graph(tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    made = _data_of(small_graph(tmp_path), kind)
    torch.save(
        {key: getattr(made, key) for key in ("x", "edge_index", "y", "train_mask", "val_mask")}, tmp_path / "d.pt"
    )
    result = "SimpleNamespace(**parts)" if kind == "namespace" else "Data(**parts)"
    source = "types import SimpleNamespace" if kind == "namespace" else "torch_geometric.data import Data"
    (tmp_path / "mine.py").write_text(
        f"import torch\nfrom {source}\ndef graph(split, root):\n    parts = torch.load(root)\n    return {result}\n"
    )
    monkeypatch.chdir(tmp_path)
    spec = {"name": "mine.py:graph", "root": "d.pt", "test_fraction": 0.4}
    train, validation, test = (load_split(spec, split) for split in SPLITS)
    assert (train.name, len(train), len(validation), len(test)) == ("mine.py:graph", N, 10, 4)
    assert int((train.labels >= 0).sum()) == 6
    assert train.graph is not None
    assert train.graph.features.equal(made.x)


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
        ({"validation": np.ones((N, 2), bool)}, MismatchError, r"30 nodes and mask validation \[30, 2\]"),
        ({"train": np.arange(N)}, UsageError, "the mask train of .* has other values than true and false"),
        ({"test": np.full(N, 0.5)}, UsageError, "the mask test of .* has other values"),
        ({"test": np.ones(N, bool)}, MismatchError, r"node 0 of g is in the masks train and test \(10 such nodes\)"),
        ({"x": np.full((N, F), np.nan)}, UsageError, r"feature 0 of node 0 of g is nan \(150 such values\)"),
        (
            {"x": np.where(np.eye(N, F) > 0, np.inf, 0)},
            UsageError,
            r"feature 0 of node 0 of g is inf \(5 such values\)",
        ),
        ({"x": np.full((N, F), 1e39)}, UsageError, "is inf"),
        ({"class_names": np.array(["a", "b"])}, MismatchError, "label 2"),
        ({"x": np.zeros((N, 0))}, UsageError, r"features \[30, 0\]"),
        ({"x": np.zeros((N, F, 2))}, UsageError, r"features \[30, 5, 2\]"),
        ({"x": np.full((N, F), "a")}, UsageError, "not a graph"),
    ],
)
def test_wrong_graphs(tmp_path: Path, changed: dict[str, Any], error: type[Exception], what: str) -> None:
    with pytest.raises(error, match=what):
        small_graph(tmp_path, **changed)


@pytest.mark.parametrize("name", ["x", "edges", "y"])
def test_a_file_without_an_array_is_refused(tmp_path: Path, name: str) -> None:
    np.savez(tmp_path / "g.npz", **{key: value for key, value in graph_arrays().items() if key != name})
    with pytest.raises(UsageError, match=f"not a graph, and lacks {name}") as error:
        read_graph(tmp_path / "g.npz")
    assert "numpy.savez(path, x=[N, F], edges=[2, E], y=[N], train=[N]" in error.value.fix


@pytest.mark.parametrize(
    ("given", "replaced", "fix"),
    [
        ({"edge_index": graph_arrays()["edges"]}, "edges", "edge_index is called edges here"),
        ({"labels": graph_arrays()["y"]}, "y", "labels is called y here"),
        ({"features": graph_arrays()["x"]}, "x", "features is called x here"),
        ({"val_mask": np.ones(N, bool)}, None, "val_mask is called validation here"),
        ({"y": np.eye(3)[graph_arrays()["y"]]}, None, r"of one-hot rows it is y\.argmax\(axis=1\)"),
        ({"y": graph_arrays()["y"].astype(float)}, None, r"y is one integer per node, -1 without a label: y\.astype"),
    ],
)
def test_arrays_as_other_libraries_have_them(
    given: dict[str, Any], replaced: str | None, fix: str, tmp_path: Path
) -> None:
    kept = {name: values for name, values in graph_arrays().items() if name != replaced}
    np.savez(tmp_path / "g.npz", **{**kept, **given})
    with pytest.raises(UsageError) as raised:
        read_graph(tmp_path / "g.npz")
    assert re.search(fix, raised.value.fix)


@pytest.mark.parametrize("name", ["train_mask", "val", "edge_index", "edge_attr"])
def test_an_array_of_another_name_is_refused(name: str, tmp_path: Path) -> None:
    """A mask that is not read would be replaced by a random split, without a word."""
    arrays = {"x": np.zeros((4, 2), np.float32), "edges": np.array([[0, 1], [1, 2]]), "y": np.array([0, 1, 0, 1])}
    np.savez(tmp_path / "g.npz", **arrays, **{name: np.array([True, False, True, False])})  # type: ignore[arg-type]
    with pytest.raises(UsageError, match=f"also holds {name}, which are not arrays of a graph") as raised:
        read_graph(tmp_path / "g.npz")
    assert "name masks train, validation, test" in raised.value.fix

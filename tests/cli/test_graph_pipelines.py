"""Graphs at the prompt: what doctor says of one, and one clear error for each kind of wrong file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers.cli import ok, refused
from helpers.graphs import F, N, graph_arrays, graph_file

from kdcache import open_cache


def _recipe(folder: Path, **changed: Any) -> Path:
    graph_file(folder, **changed)
    (folder / "nets.py").write_text(
        "import torch\nfrom helpers.graphs import GCN\n\n\n"
        "def gcn(num_classes):\n    torch.manual_seed(0)\n    return GCN(num_classes)\n"
    )
    (folder / "graph.yaml").write_text(
        f"dataset: {{name: graph, root: {folder / 'g.npz'}}}\n"
        f"teacher: {{model: '{folder / 'nets.py'}:gcn'}}\n"
        "student: {model: 'small:mlp', train: {epochs: 1, batch_size: 10}}\n"
        "loss: {name: ff_g2m}\n"
    )
    return folder / "graph.yaml"


def test_a_graph_is_examined_dumped_and_learned(tmp_path: Path) -> None:
    recipe, cache = _recipe(tmp_path), tmp_path / "g.kdcache"
    said = ok("doctor", recipe, "--out", tmp_path)
    assert "g: 30 train, 10 validation, 10 test images, 3 classes" in said
    assert "none: 5 features of each node" in said
    assert "g/train, 30 samples, 3 classes" in ok("dump-teacher", recipe, "-o", cache)
    assert "on those of these samples that have a label" in ok("info", cache)
    assert "the same weights" in ok("verify", cache, recipe, "--teacher", "--replay")
    for loss in ("ff_g2m", "kd"):
        run = tmp_path / loss
        assert "test      accuracy" in ok("train-student", recipe, "--cache", cache, "--loss", loss, "-o", run)


@pytest.mark.parametrize(
    ("changed", "code", "what"),
    [
        ({"edges": np.array([[0, 1], [1, N]])}, 4, f"edge 1 of g joins the nodes 1 and {N}"),
        ({"edges": np.zeros((2, 3))}, 2, "edges of float64 numbers"),
        ({"x": np.full((N, F), np.nan)}, 2, "feature 0 of node 0 of g is nan"),
        ({"train": np.ones(7, bool)}, 4, "30 nodes and mask train [7]"),
        ({"test": np.arange(N)}, 2, "the mask test of"),
        ({"validation": np.ones(N, bool)}, 4, "node 0 of g is in the masks train and validation"),
        ({"x": np.zeros((N, F + 1), np.float32)}, 4, "the teacher cannot take the nodes of g, features [30, 6]"),
    ],
)
def test_a_wrong_graph_is_refused_before_the_teacher_runs(
    tmp_path: Path, changed: dict[str, Any], code: int, what: str
) -> None:
    assert what in refused(code, "dump-teacher", _recipe(tmp_path, **changed), "-o", tmp_path / "g.kdcache")
    assert not (tmp_path / "g.kdcache").exists()


_TWO = """

class Two(GCN):
    def forward(self, features, edges):
        return {"logits": super().forward(features, edges), "hidden": features * 2}


def two(num_classes):
    torch.manual_seed(0)
    return Two(num_classes)
"""


def test_a_graph_network_returns_its_other_outputs(tmp_path: Path) -> None:
    recipe, cache = _recipe(tmp_path), tmp_path / "g.kdcache"
    (tmp_path / "nets.py").write_text((tmp_path / "nets.py").read_text() + _TWO)
    two = ["--set", f"teacher.model={tmp_path / 'nets.py'}:two"]
    for output in ("features: {}", "other: {source: network.linear}"):
        said = refused(4, "dump-teacher", recipe, *two, "--set", f"cache.outputs={{{output}}}", "-o", cache)
        assert "inside the network of a whole graph, which runs once for all nodes" in said
    hidden = "cache.outputs={hidden: {encoding: float32}}"
    ok("dump-teacher", recipe, *two, "--set", hidden, "--set", "cache.batch_size=7", "-o", cache)
    stored = open_cache(cache).teacher("hidden")(torch.arange(N))
    np.testing.assert_array_equal(stored.numpy(), 2 * graph_arrays()["x"])


def test_other_edges_are_another_teacher(tmp_path: Path) -> None:
    recipe, cache = _recipe(tmp_path), tmp_path / "g.kdcache"
    ok("dump-teacher", recipe, "-o", cache)
    ok("verify", cache, recipe, "--teacher")
    graph_file(tmp_path, edges=np.array([[0, 1], [1, 0]]))
    assert "this teacher has the weights" in refused(4, "verify", cache, recipe, "--teacher")


def test_a_file_that_is_missing_or_damaged_is_named(tmp_path: Path) -> None:
    recipe = _recipe(tmp_path)
    (tmp_path / "g.npz").write_bytes((tmp_path / "g.npz").read_bytes()[:100])
    assert "numpy.savez(path, x=[N, F], edges=[2, E]" in refused(
        5, "dump-teacher", recipe, "-o", tmp_path / "c.kdcache"
    )
    (tmp_path / "g.npz").unlink()
    assert "file not found" in refused(2, "dump-teacher", recipe, "-o", tmp_path / "c.kdcache")

"""A small graph, and a network of it that counts how often it is called."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from kdcache.data.nodes import Graph, read_graph

N, F, C = 30, 5, 3


class GCN(nn.Module):
    """One layer: the mean of the neighbors' features, then classes. It counts how often it is called."""

    def __init__(self, num_classes: int = C, features: int = F) -> None:
        super().__init__()
        self.linear = nn.Linear(features, num_classes)
        self.calls = 0

    def forward(self, features: Tensor, edges: Tensor) -> Tensor:
        self.calls += 1
        adjacency = torch.eye(len(features), dtype=features.dtype)
        adjacency[edges[1], edges[0]] = 1
        logits: Tensor = self.linear(adjacency @ features / adjacency.sum(1, keepdim=True))
        return logits


def graph_arrays() -> dict[str, Any]:
    """Return the arrays of a graph of `N` nodes with `F` features and `C` classes; every third node is of one mask."""
    rng = np.random.default_rng(0)
    x = rng.standard_normal((N, F)).astype(np.float32)
    x[7] = x[3]  # nodes of equal features and different neighbors
    split = np.arange(N) % 3
    return {
        "x": x,
        "edges": rng.integers(N, size=(2, 80)),
        "y": np.arange(N) * 7 % 10 % C,
        **{name: split == i for i, name in enumerate(("train", "validation", "test"))},
    }


def graph_file(folder: Path, **changed: Any) -> Path:
    """Write the graph, with other arrays in place of some."""
    np.savez(folder / "g.npz", **{**graph_arrays(), **changed})
    return folder / "g.npz"


def small_graph(folder: Path, **changed: Any) -> Graph:
    """Return the graph, with other arrays in place of some."""
    return read_graph(graph_file(folder, **changed))

"""Nodes of a graph as samples.

A sample is one node: a tensor [1 + F], its number and its features. The number tells a teacher that looks at the whole
graph (`models/graph_teacher.py`) which node is meant, as two nodes may have the same features; a student of features
alone drops it: `Graph.features_of`. Content keys cover both.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from kdcache.data.images import ArrayImages
from kdcache.data.npz_files import read_arrays
from kdcache.data.samples import Samples, check_labels
from kdcache.errors import MismatchError, UsageError

MOST_NODES = 2**24
"""The number of a node is stored exactly in float32."""

_MASKS = ("train", "validation", "test")
_CONTENT = "x=[N, F], edges=[2, E], y=[N], train=[N], validation=[N], test=[N]"


@dataclass(frozen=True)
class Graph:
    """A graph with features and labels of its nodes.

    Attributes:
        features: [N, F] float32.
        edges: [2, E] int64, pairs (source, target); an undirected edge is in it in both directions.
        labels: [N] int64, -1 where not known.
        masks: which nodes belong to "train", "validation" and "test", [N] bool each.
        name: of the data set.

    Raises:
        MismatchError: if shapes disagree, or an edge or a label is out of range; names the first.
        UsageError: if it has no nodes, or more than can be numbered.
    """

    features: Tensor
    edges: Tensor
    labels: Tensor
    masks: dict[str, Tensor]
    name: str = "graph"

    def __post_init__(self) -> None:
        count = len(self.features)
        if self.features.ndim != 2 or not 0 < count <= MOST_NODES:
            raise UsageError(
                f"{self.name} has features {list(self.features.shape)}",
                f"give features [N, F] of 1 to {MOST_NODES:,} nodes",
            )
        if self.edges.ndim != 2 or len(self.edges) != 2 or self.edges.is_floating_point():
            raise UsageError(
                f"{self.name} has edges {list(self.edges.shape)} {str(self.edges.dtype).removeprefix('torch.')}",
                "give integers [2, E]: row 0 the sources, row 1 the targets (transpose edges [E, 2])",
            )
        outside = ((self.edges < 0) | (self.edges >= count)).any(dim=0)
        if bool(outside.any()):
            first = int(outside.nonzero()[0])
            raise MismatchError(
                f"edge {first} of {self.name} joins the nodes {self.edges[0, first]} and {self.edges[1, first]}, and "
                f"nodes run from 0 to {count - 1} ({int(outside.sum())} such edges)",
                "number the nodes from 0 in the order of their features",
            )
        for name, values in {"labels": self.labels, **{f"mask {m}": mask for m, mask in self.masks.items()}}.items():
            if values.shape != (count,):
                raise MismatchError(
                    f"{self.name} has {count} nodes and {name} {list(values.shape)}", "give one value per node, [N]"
                )
        check_labels(self.labels.numpy(), int(self.labels.max()) + 1, self.name)

    def __len__(self) -> int:
        return len(self.features)

    def samples(self, visible: str | None = "train") -> Samples:
        """Return all nodes as samples, [1 + F] each, for `dump_teacher`, `CachedDataset` and `align`.

        Args:
            visible: mask of the nodes whose labels are kept, such as "train"; the others have -1. None for all.

        Raises:
            UsageError: if the graph does not have this mask.
        """
        labels = self.labels
        if visible is not None:
            if visible not in self.masks:
                known = ", ".join(self.masks) or "none"
                raise UsageError(
                    f"{self.name} has no mask {visible!r}", f"its masks are {known}; None keeps all labels"
                )
            labels = labels.where(self.masks[visible], -1)
        numbered = torch.cat([torch.arange(len(self)).float()[:, None], self.features.float()], dim=1)
        classes = tuple(map(str, range(int(self.labels.max()) + 1)))
        return Samples(self.name, "nodes", ArrayImages(numbered), labels.numpy().astype(np.int32), classes, [])

    @staticmethod
    def features_of(nodes: Tensor) -> Tensor:
        """Return the features [B, F] of nodes [B, 1 + F]."""
        return nodes[:, 1:]


def edges_among(edges: Tensor, nodes: Tensor, count: int) -> Tensor:
    """Return the edges whose ends are both among some nodes, as positions in `nodes`, [2, e].

    Args:
        edges: [2, E] int64.
        nodes: [B] int64, without repetition.
        count: N, number of nodes of the graph.
    """
    positions = torch.full((count,), -1, device=edges.device)
    positions[nodes] = torch.arange(len(nodes), device=edges.device)
    ends = positions[edges]
    return ends[:, (ends >= 0).all(dim=0)]


def read_graph(path: str | Path) -> Graph:
    """Return the graph in an npz file: `x` [N, F], `edges` [2, E], `y` [N], and masks [N] bool if there are any.

    Raises:
        UsageError: if there is no such file, or an array is missing or of another type.
        CorruptError: if it cannot be read.
        MismatchError: if arrays disagree; see `Graph`.
    """
    path = Path(path)
    arrays = read_arrays(path, _CONTENT)
    missing = [name for name in ("x", "edges", "y") if name not in arrays]
    if missing or arrays["x"].dtype.kind not in "biuf" or arrays["y"].dtype.kind not in "iu":
        types = ", ".join(f"{name} {list(a.shape)} {a.dtype}" for name, a in sorted(arrays.items())) or "nothing"
        raise UsageError(f"{path} holds {types}, not a graph", f"write it with numpy.savez(path, {_CONTENT})")
    if arrays["edges"].dtype.kind not in "iu":
        raise UsageError(f"{path} has edges of {arrays['edges'].dtype} numbers", "give integers [2, E]")
    masks = {name: torch.from_numpy(arrays[name].astype(bool)) for name in _MASKS if name in arrays}
    x, edges, y = arrays["x"].astype(np.float32), arrays["edges"].astype(np.int64), arrays["y"].astype(np.int64)
    return Graph(torch.from_numpy(x), torch.from_numpy(edges), torch.from_numpy(y), masks, path.stem)


def graph_of(data: Any, name: str = "graph") -> Graph:
    """Return a `torch_geometric.data.Data`, or any object with `x`, `edge_index`, `y` and masks like `train_mask`.

    Raises:
        UsageError: if an attribute is missing.
        MismatchError: if they disagree; see `Graph`.
    """
    missing = [key for key in ("x", "edge_index", "y") if not isinstance(getattr(data, key, None), Tensor)]
    if missing:
        raise UsageError(
            f"a {type(data).__name__} without {' and '.join(missing)} is not a graph with labeled nodes",
            "give a torch_geometric.data.Data with x [N, F], edge_index [2, E] and y [N]",
        )
    masks = {"train": "train_mask", "validation": "val_mask", "test": "test_mask"}
    given = {split: mask for split, key in masks.items() if isinstance(mask := getattr(data, key, None), Tensor)}
    masks_on_cpu = {split: mask.cpu().bool() for split, mask in given.items()}
    labels = data.y.cpu().long().flatten()
    return Graph(data.x.detach().cpu().float(), data.edge_index.cpu(), labels, masks_on_cpu, name)

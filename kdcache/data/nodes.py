"""Nodes of a graph as samples.

A sample is one node: a tensor [1 + F], its number and its features. The number tells a teacher that looks at the whole
graph (`models/graph_teacher.py`) which node is meant, as two nodes may have the same features; a student of features
alone drops it: `Graph.features_of`. Content keys cover both.

The training split is all nodes, with the labels of the training nodes alone: a teacher says something about each. The
validation and test splits are the nodes of their masks.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from kdcache.data.images import ArrayImages
from kdcache.data.npz_files import read_arrays
from kdcache.data.samples import Samples, Split, check_labels
from kdcache.errors import MismatchError, UsageError

MOST_NODES = 2**24
"""The number of a node is stored exactly in float32."""

MASKS: tuple[Split, ...] = ("train", "validation", "test")
"""Masks that a graph may have."""

_CONTENT = "x=[N, F], edges=[2, E], y=[N], train=[N], validation=[N], test=[N]"
_A_MASK = "a mask is bool [N]; from numbers of nodes: mask = numpy.zeros(N, bool); mask[numbers] = True"


@dataclass(frozen=True)
class Graph:
    """A graph with features and labels of its nodes.

    Attributes:
        features: [N, F] float32.
        edges: [2, E] int64, pairs (source, target); an undirected edge is in it in both directions.
        labels: [N] int64, -1 where not known.
        masks: which nodes belong to "train", "validation" and "test", [N] bool each.
        name: of the data set.
        class_names: name of each class; "0", "1", ... up to the largest label if empty.

    Raises:
        MismatchError: if shapes disagree, an edge or a label is out of range, or a node is in two masks; names the
            first.
        UsageError: if it has no nodes, more than can be numbered, or features that are not finite.
    """

    features: Tensor
    edges: Tensor
    labels: Tensor
    masks: dict[str, Tensor]
    name: str = "graph"
    class_names: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        count = len(self.features)
        if self.features.ndim != 2 or not 0 < count <= MOST_NODES or not self.features.shape[1]:
            raise UsageError(
                f"{self.name} has features {list(self.features.shape)}",
                f"give features [N, F] of 1 to {MOST_NODES:,} nodes",
            )
        if not bool((finite := self.features.isfinite()).all()):
            node, column = (int(index) for index in (~finite).nonzero()[0])
            raise UsageError(
                f"feature {column} of node {node} of {self.name} is {float(self.features[node, column])} "
                f"({int((~finite).sum())} such values)",
                "replace them, for instance with numpy.nan_to_num(x)",
            )
        self._check_edges(count)
        for name, values in {"labels": self.labels, **{f"mask {m}": mask for m, mask in self.masks.items()}}.items():
            if values.shape != (count,):
                raise MismatchError(
                    f"{self.name} has {count} nodes and {name} {list(values.shape)}",
                    _A_MASK if name.startswith("mask") else "give one label per node, [N], -1 where not known",
                )
        for name, mask in self.masks.items():
            if name != "train" and "train" in self.masks and bool((both := mask & self.masks["train"]).any()):
                raise MismatchError(
                    f"node {int(both.nonzero()[0])} of {self.name} is in the masks train and {name} "
                    f"({int(both.sum())} such nodes)",
                    f"take them out of one: the split {name} is for nodes whose labels were not trained on",
                )
        check_labels(self.labels.numpy(), len(self._classes), self.name)

    def _check_edges(self, count: int) -> None:
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

    @property
    def _classes(self) -> tuple[str, ...]:
        return self.class_names or tuple(map(str, range(int(self.labels.max()) + 1)))

    def __len__(self) -> int:
        return len(self.features)

    def samples(self, visible: str | None = "train") -> Samples:
        """Return all nodes as samples, [1 + F] each, for `dump_teacher`, `CachedDataset` and `align`.

        Args:
            visible: mask of the nodes whose labels are kept, such as "train"; the others have -1. None for all.

        Raises:
            UsageError: if the graph does not have this mask.
        """
        if visible is None:
            return self.split("train", torch.arange(len(self)))
        if visible not in self.masks:
            known = ", ".join(self.masks) or "none"
            raise UsageError(f"{self.name} has no mask {visible!r}", f"its masks are {known}; None keeps all labels")
        return self.split("train", self.masks[visible].nonzero().squeeze(1))

    @property
    def labeled(self) -> Tensor:
        """The nodes of the mask "train", or without it those of no mask, [n] int64."""
        none = torch.zeros(len(self), dtype=torch.bool)
        given = [mask for name, mask in self.masks.items() if name != "train"]
        rest = ~torch.stack([none, *given]).any(dim=0)
        return self.masks.get("train", rest).nonzero().squeeze(1)

    def split(self, name: Split, nodes: Tensor) -> Samples:
        """Return a split of the graph.

        Args:
            name: of the split. That of "train" is all nodes; those of "validation" and "test" are `nodes`.
            nodes: [n] int64, ascending; labels of other nodes are -1.
        """
        shown = torch.zeros(len(self), dtype=torch.bool)
        shown[nodes] = True
        labels = self.labels.where(shown, -1)
        numbered = torch.cat([torch.arange(len(self)).float()[:, None], self.features.float()], dim=1)
        if name != "train":
            numbered, labels = numbered[nodes], labels[nodes]
        images = ArrayImages(numbered)
        return Samples(self.name, name, images, labels.numpy().astype(np.int32), self._classes, [], graph=self)

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


_ARRAYS = ("x", "edges", "y", *MASKS, "class_names")


def read_graph(path: str | Path) -> Graph:
    """Return the graph in an npz file.

    Args:
        path: of a file with `x` [N, F], `edges` [2, E], `y` [N], and if there are any the masks `train`, `validation`
            and `test` [N] bool and `class_names` [C].

    Raises:
        UsageError: if there is no such file, or an array is missing, of another type, or not one of these: a mask of
            another name would be replaced by a random split.
        CorruptError: if it cannot be read.
        MismatchError: if arrays disagree; see `Graph`.
    """
    path = Path(path)
    arrays = read_arrays(path, _CONTENT)
    missing = [name for name in ("x", "edges", "y") if name not in arrays]
    if missing or arrays["x"].dtype.kind not in "biuf" or arrays["y"].dtype.kind not in "iu":
        types = ", ".join(f"{name} {list(a.shape)} {a.dtype}" for name, a in sorted(arrays.items())) or "nothing"
        lacks = f", and lacks {' and '.join(missing)}" if missing else ""
        what = f"{path} holds {types}, not a graph{lacks}"
        raise UsageError(what, "; ".join([*_renamed(arrays), f"write it with numpy.savez(path, {_CONTENT})"]))
    if unknown := sorted(set(arrays).difference(_ARRAYS)):
        fix = f"name masks {', '.join(MASKS)}, and leave out what is not among {', '.join(_ARRAYS)}"
        raise UsageError(
            f"{path} also holds {', '.join(unknown)}, which are not arrays of a graph",
            "; ".join([*_renamed(arrays), fix]),
        )
    if arrays["edges"].dtype.kind not in "iu":
        raise UsageError(f"{path} has edges of {arrays['edges'].dtype} numbers", "give integers [2, E]")
    masks: dict[str, Tensor] = {}
    for name in MASKS:
        if name not in arrays:
            continue
        if arrays[name].dtype != bool and not np.isin(arrays[name], (0, 1)).all():
            raise UsageError(f"the mask {name} of {path} has other values than true and false", _A_MASK)
        masks[name] = torch.from_numpy(arrays[name].astype(bool))
    with np.errstate(over="ignore"):  # a number that is too large becomes inf, which is refused
        x = arrays["x"].astype(np.float32)
    edges, y = arrays["edges"].astype(np.int64), arrays["y"].astype(np.int64)
    names = tuple(map(str, arrays.get("class_names", ())))
    return Graph(torch.from_numpy(x), torch.from_numpy(edges), torch.from_numpy(y), masks, path.stem, names)


_ALSO_CALLED = {
    "edge_index": "edges", "features": "x", "labels": "y", "train_mask": "train", "val_mask": "validation",
    "test_mask": "test",
}  # fmt: skip
"""Names of other libraries for the arrays of a graph."""


def _renamed(arrays: Mapping[str, npt.NDArray[Any]]) -> Iterator[str]:
    """Yield what to change in arrays that are of a graph, under another name or in another form."""
    for name in sorted(set(arrays) & set(_ALSO_CALLED)):
        yield f"{name} is called {_ALSO_CALLED[name]} here"
    if "y" in arrays and arrays["y"].ndim == 2:
        yield "y is one integer per node: of one-hot rows it is y.argmax(axis=1)"
    elif "y" in arrays and arrays["y"].dtype.kind == "f":
        yield "y is one integer per node, -1 without a label: y.astype(int)"


def is_graph(data: Any) -> bool:
    """Return whether something is a `Graph`, or has edges as a `torch_geometric.data.Data` has them."""
    return isinstance(data, Graph) or isinstance(getattr(data, "edge_index", None), Tensor)


def graph_of(data: Any, name: str = "graph") -> Graph:
    """Return the graph of a `torch_geometric.data.Data`.

    Args:
        data: that, or any object with `x`, `edge_index`, `y` and masks like `train_mask`.
        name: of the data set.

    Raises:
        UsageError: if an attribute is missing.
        MismatchError: if they disagree; see `Graph`.
    """
    if isinstance(data, Graph):
        return data
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
    features = data.x.detach().to_dense() if data.x.layout != torch.strided else data.x.detach()
    return Graph(features.cpu().float(), data.edge_index.cpu(), labels, masks_on_cpu, name)

"""A network that is called once with a whole graph, as a teacher of its nodes."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from kdcache.data.nodes import Graph
from kdcache.errors import MismatchError


class _Kept(NamedTuple):
    """What a network returned for the whole graph.

    Attributes:
        state: the tensors it was computed with, kept so that no other ones get their ids.
        versions: id and version of each; every change in place raises a version.
        returned: by the network.
    """

    state: list[Tensor]
    versions: list[tuple[int, int]]
    returned: Any


class GraphTeacher(nn.Module):
    """A network of nodes [B, 1 + F] (`Graph.samples`): it runs another one on the graph once, and returns rows of that.

    The graph belongs to the digest of its weights: of another graph it is another teacher.

    Args:
        network: called as `network(features [N, F], edges [2, E])`, returns logits [N, C], or a dictionary or tuple of
            tensors [N, ...] that holds them.
        graph: whose nodes it is asked for.
    """

    def __init__(self, network: nn.Module, graph: Graph) -> None:
        super().__init__()
        self.features: Tensor
        self.edges: Tensor
        self.network = network
        # A checkpoint is of the network alone; the state has a digest of the graph in their place.
        self.register_buffer("features", graph.features.float(), persistent=False)
        self.register_buffer("edges", graph.edges.long(), persistent=False)
        self._graph_digest = _digest_of(self.features, self.edges)
        self._keeps = True
        self._kept: _Kept | None = None

    def get_extra_state(self) -> Tensor:
        """Return the digest of the graph, [32] uint8."""
        return self._graph_digest

    def set_extra_state(self, state: Any) -> None:
        """Do nothing: weights may be of a network of another graph."""

    def _apply(self, *args: Any, **kwargs: Any) -> GraphTeacher:
        self._kept = None  # computed on another device, or in another type
        moved: GraphTeacher = super()._apply(*args, **kwargs)  # type: ignore[no-untyped-call]  # in torch
        return moved

    @contextmanager
    def recomputing(self) -> Iterator[None]:
        """Run the network in every call, as for a graph that is new each time: so its costs are measured."""
        self._keeps = False
        try:
            yield
        finally:
            self._keeps = True

    def forward(self, nodes: Tensor) -> Any:
        """Return the rows [B, C] of nodes [B, 1 + F] in what the network returns.

        Raises:
            MismatchError: if the network does not return one row per node of the graph, or a node is of another graph.
        """
        numbers = nodes[:, 0].long()
        count = len(self.features)
        wrong = (numbers < 0) | (numbers >= count)
        numbers_here = numbers.clamp(0, count - 1)
        wrong |= (self.features[numbers_here] != Graph.features_of(nodes).to(self.features.dtype)).any(dim=1)
        if bool(wrong.any()):
            raise MismatchError(
                f"node {int(numbers[wrong][0])} is not one of the teacher's graph, which has {count} nodes "
                f"({int(wrong.sum())} of {len(nodes)} in this batch)",
                "dump the nodes of the graph that the teacher was made with: Graph.samples()",
            )
        return self._rows(self._of_all(), numbers_here)

    def _of_all(self) -> Any:
        """Return what the network says of all nodes; in evaluation mode without gradients it runs once per weights."""
        if not self._keeps or self.training or torch.is_grad_enabled():
            return self.network(self.features, self.edges)
        state = [*self.parameters(), *self.buffers()]
        versions = [(id(value), 0 if value.is_inference() else value._version) for value in state]
        if self._kept is None or self._kept.versions != versions:
            self._kept = _Kept(state, versions, self.network(self.features, self.edges))
        return self._kept.returned

    def _rows(self, returned: Any, numbers: Tensor, dimensions: int = 2) -> Any:
        """Return the rows of some nodes of a tensor, or of each tensor in a dictionary or tuple."""
        if isinstance(returned, dict):
            return {name: self._rows(part, numbers, 1) for name, part in returned.items()}
        if type(returned) in (tuple, list):
            return type(returned)(self._rows(part, numbers, 1) for part in returned)
        if not isinstance(returned, Tensor) or returned.ndim < dimensions or len(returned) != len(self.features):
            shape = list(returned.shape) if isinstance(returned, Tensor) else type(returned).__name__
            raise MismatchError(
                f"the graph's network returned {shape} for {len(self.features)} nodes",
                "let it return logits [N, C], one row per node",
            )
        return returned[numbers]


def _digest_of(features: Tensor, edges: Tensor) -> Tensor:
    sha = hashlib.sha256()
    for values in (features, edges):
        sha.update(f"{values.dtype}{list(values.shape)}".encode())
        sha.update(values.cpu().contiguous().numpy().tobytes())
    return torch.frombuffer(bytearray(sha.digest()), dtype=torch.uint8)

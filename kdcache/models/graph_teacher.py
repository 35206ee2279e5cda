"""A network that is called once with a whole graph, as a teacher of its nodes."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from kdcache.data.nodes import Graph
from kdcache.errors import MismatchError


class GraphTeacher(nn.Module):
    """A teacher of nodes [B, 1 + F] (`Graph.samples`): it runs a network on the graph once, and returns rows of that.

    Features and edges are buffers, and so belong to the digest of its weights: of another graph it is another teacher.

    Args:
        network: called as `network(features [N, F], edges [2, E])`, returns logits [N, C].
        graph: whose nodes it is asked for.
    """

    def __init__(self, network: nn.Module, graph: Graph) -> None:
        super().__init__()
        self.features: Tensor
        self.edges: Tensor
        self.network = network
        self.register_buffer("features", graph.features.float())
        self.register_buffer("edges", graph.edges.long())
        self._logits: Tensor | None = None

    def _apply(self, *args: Any, **kwargs: Any) -> GraphTeacher:
        self._logits = None  # computed on another device, or in another type
        moved: GraphTeacher = super()._apply(*args, **kwargs)  # type: ignore[no-untyped-call]  # in torch
        return moved

    def train(self, mode: bool = True) -> GraphTeacher:
        """Set the mode; the logits of evaluation mode are computed anew after training."""
        if mode != self.training:
            self._logits = None
        super().train(mode)
        return self

    def load_state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """Load weights, of which the logits are computed anew."""
        self._logits = None
        return super().load_state_dict(*args, **kwargs)

    def forward(self, nodes: Tensor) -> Tensor:
        """Return the logits [B, C] of nodes [B, 1 + F].

        Raises:
            MismatchError: if the network does not return one row per node of the graph, or a node is of another graph.
        """
        numbers = nodes[:, 0].long()
        count = len(self.features)
        wrong = (numbers < 0) | (numbers >= count)
        numbers_here = numbers.clamp(0, count - 1)
        wrong |= (self.features[numbers_here] != nodes[:, 1:].to(self.features.dtype)).any(dim=1)
        if bool(wrong.any()):
            raise MismatchError(
                f"node {int(numbers[wrong][0])} is not one of the teacher's graph, which has {count} nodes "
                f"({int(wrong.sum())} of {len(nodes)} in this batch)",
                "dump the nodes of the graph that the teacher was made with: Graph.samples()",
            )
        logits = self._of_all()
        return logits[numbers_here]

    def _of_all(self) -> Tensor:
        """Return the logits of all nodes, [N, C]; in evaluation mode without gradients they are computed once."""
        fixed = not self.training and not torch.is_grad_enabled()
        if fixed and self._logits is not None:
            return self._logits
        logits: Tensor = self.network(self.features, self.edges)
        if not isinstance(logits, Tensor) or logits.ndim != 2 or len(logits) != len(self.features):
            shape = list(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
            raise MismatchError(
                f"the graph's network returned {shape} for {len(self.features)} nodes",
                "let it return logits [N, C], one row per node",
            )
        if fixed:
            self._logits = logits
        return logits

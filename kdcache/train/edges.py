"""The edges of a graph between the nodes of a batch, for losses that compare both ends of an edge."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from kdcache.config.schema import TrainSpec
from kdcache.data.nodes import Graph, edges_among
from kdcache.data.samples import Samples
from kdcache.errors import UsageError
from kdcache.losses import Loss
from kdcache.runtime.launched import n_processes
from kdcache.runtime.progress import Progress
from kdcache.train.passes import MicroBatch


class BatchEdges:
    """The edges between the nodes of a batch.

    Args:
        device: on which the batches are.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._moved: tuple[Graph, Tensor] | None = None

    def among(self, micro_batches: Sequence[MicroBatch], samples: Samples) -> Tensor:
        """Return the edges as positions in the joined micro-batches, [2, e].

        Args:
            micro_batches: parts of a batch of nodes, which begin with their numbers.
            samples: whose nodes these are, of a graph.
        """
        graph = samples.graph
        if graph is None:
            raise TypeError(f"{samples.name} is not a graph")
        if self._moved is None or self._moved[0] is not graph:
            self._moved = graph, graph.edges.to(self._device)
        nodes = torch.cat([part.images[:, 0] for part in micro_batches]).long()
        return edges_among(self._moved[1], nodes, len(graph))


def check_edges(loss: Loss, samples: Samples, spec: TrainSpec, progress: Progress) -> None:
    """Check that a loss that compares both ends of an edge gets them, and say if batches have few of the edges.

    Raises:
        UsageError: if the data set is not a graph, or several processes share its batches.
    """
    if not loss.uses_edges:
        return
    if samples.graph is None:
        raise UsageError(
            f"the loss {loss.name} compares nodes that an edge joins, and {samples.name} has no edges",
            "use a data set of nodes and edges (dataset.name: graph), or another loss, such as kd",
        )
    if (processes := n_processes()) > 1:
        raise UsageError(
            f"the loss {loss.name} compares nodes that an edge joins, and {processes} processes share each batch",
            "train in one process; with train.gradient_accumulation_steps its memory is that of a part of the batch",
        )
    batch, count = min(spec.batch_size, len(samples)), len(samples)
    if batch < count:
        share = batch * (batch - 1) / (count * (count - 1))
        progress.say(
            f"note: a batch of {batch:,} of {count:,} nodes has both ends of about {share:.1%} of the edges; with "
            f"train.batch_size {count} it has all"
        )

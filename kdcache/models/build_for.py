"""Build a network for the samples of a data set.

For the nodes of a graph, what it is called with depends on the network. One whose `forward` needs two arguments is
called with the features and edges of the whole graph. Any other one gets the features of single nodes.
"""

from __future__ import annotations

import inspect
from inspect import Parameter

from torch import Tensor, nn

from kdcache.config.schema import ModelSpec
from kdcache.data.nodes import Graph
from kdcache.data.samples import Samples
from kdcache.models.build import build_model
from kdcache.models.graph_teacher import GraphTeacher
from kdcache.models.outputs import drop_selection, take_part
from kdcache.runtime.progress import Progress

_POSITIONAL = (Parameter.POSITIONAL_ONLY, Parameter.POSITIONAL_OR_KEYWORD)


class FeaturesAlone:
    """A forward pre-hook that gives a network the features [B, F] of nodes [B, 1 + F]."""

    def __call__(self, module: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """Return the inputs of the network's own forward."""
        nodes, *others = inputs
        return Graph.features_of(nodes), *others


def takes_edges(network: nn.Module) -> bool:
    """Return whether a network is called with the features and the edges of a graph: `forward` needs two arguments."""
    try:
        parameters = inspect.signature(network.forward).parameters.values()
    except (TypeError, ValueError):  # some callables of compiled libraries do not have a signature
        return False
    needed = [one for one in parameters if one.kind in _POSITIONAL and one.default is Parameter.empty]
    return len(needed) > 1


def build_for(
    spec: ModelSpec,
    samples: Samples,
    shape: tuple[int, ...],
    *,
    outputs: int | None = None,
    trained: bool = False,
    progress: Progress | None = None,
) -> nn.Module:
    """Return the network of a spec for the samples of a data set; see `build_model` for its errors.

    Args:
        spec: section of a pipeline.
        samples: the data set.
        shape: of a sample after the transform.
        outputs: number of outputs of the network; None for the classes of the data set.
        trained: load the weights that the spec names.
        progress: progress reporter; silent if None.
    """
    outputs = samples.num_classes if outputs is None else outputs
    if samples.graph is None:
        return build_model(spec, outputs, shape, trained=trained, progress=progress)
    network = build_model(spec, outputs, tuple(samples.graph.features.shape[1:]), trained=trained, progress=progress)
    if takes_edges(network):
        drop_selection(network)
        of_graph = GraphTeacher(network, samples.graph)
        take_part(of_graph, spec.output, spec.model)
        return of_graph
    network.register_forward_pre_hook(FeaturesAlone(), prepend=True)
    return network

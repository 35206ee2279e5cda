"""A teacher without its smallest weights."""

from __future__ import annotations

from torch import nn
from torch.nn.modules.conv import _ConvNd
from torch.nn.utils.prune import l1_unstructured, remove

from kdcache.errors import UsageError


def prune(network: nn.Module, fraction: float) -> None:
    """Set the smallest weights of each convolution and each linear layer to 0, in place.

    Biases and all other layers keep their values.

    Args:
        network: with its trained weights.
        fraction: of the weights of each layer, by magnitude; between 0 and 1.

    Raises:
        UsageError: if the network has no such layer.

    Source: Kim et al. 2024, R2KD (2311.13934), whose second teacher is pruned by 10 %.
    """
    layers = [layer for layer in network.modules() if isinstance(layer, _ConvNd | nn.Linear)]
    if not layers:
        raise UsageError(
            "the teacher has no convolution and no linear layer to prune", "remove teacher.prune, or prune it yourself"
        )
    for layer in layers:
        l1_unstructured(layer, "weight", fraction)  # type: ignore[no-untyped-call]  # torch's are not typed
        remove(layer, "weight")  # type: ignore[no-untyped-call]

"""Call the constructors of networks with the user's arguments, and adapt images to the networks of libraries."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F

from kdcache.config.schema import ModelSpec
from kdcache.errors import KdcacheError, MismatchError, UsageError
from kdcache.runtime import user_code

SMALLEST_SIDE = 32
"""Side in pixels to which smaller images are enlarged for the networks of libraries, because of their strides."""


def construct(make: Callable[..., Any], spec: ModelSpec, **arguments: Any) -> nn.Module:
    """Return the network that a constructor makes of the user's arguments.

    Raises:
        UsageError: if it raises anything, or does not return a network.
    """
    try:
        model = make(**arguments, **spec.args)
    except KdcacheError:
        raise
    except Exception as error:
        raise UsageError(
            f"{spec.model} cannot be built: {type(error).__name__}: {error} ({user_code.place_of(error)})",
            "correct the `args:` of the model, or the function that makes it",
        ) from error
    if not isinstance(model, nn.Module):
        raise UsageError(f"{spec.model} returned a {type(model).__name__}", "let it return a torch.nn.Module")
    return model


def check_channels(spec: ModelSpec, images: int, network: int = 3) -> None:
    """Check that a network of a library can take images with a number of channels.

    Raises:
        MismatchError: if they are neither gray nor have the network's number of channels.
    """
    if images not in (1, network):
        raise MismatchError(
            f"{spec.model} takes 1 or {network} channels, the images have {images}", "use a network of your own"
        )


class Fit:
    """A forward pre-hook that repeats gray images to the network's channels and enlarges small ones."""

    def __init__(self, height: int, width: int, channels: int = 3) -> None:
        self.size = (height, width)
        self.channels = channels

    def __call__(self, module: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """Return the inputs of the network's own forward."""
        images, *others = inputs
        if images.shape[1] == 1:
            images = images.expand(-1, self.channels, -1, -1)
        height, width = images.shape[2:]
        scale = max(self.size[0] / height, self.size[1] / width)
        if scale > 1:
            images = F.interpolate(images, (round(height * scale), round(width * scale)), mode="bilinear")
        return images, *others

"""Call the constructors of networks with the user's arguments, and adapt images to the networks of libraries."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from inspect import Parameter
from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F

from kdcache.config.schema import ModelSpec
from kdcache.errors import KdcacheError, MismatchError, UsageError
from kdcache.runtime import user_code

_COUNT = "num_classes"
_BY_KEYWORD = (Parameter.POSITIONAL_OR_KEYWORD, Parameter.KEYWORD_ONLY)

SMALLEST_SIDE = 32
"""Side in pixels to which smaller images are enlarged for the networks of libraries, because of their strides."""


def construct(make: Callable[..., Any], spec: ModelSpec, *positional: Any, **arguments: Any) -> nn.Module:
    """Return the network that a constructor makes of the arguments of kdcache and those of the user.

    Raises:
        UsageError: if both set the same argument, or it raises anything or does not return a network.
    """
    given = _without_clash(spec, arguments)
    try:
        model = make(*positional, **arguments, **given)
    except KdcacheError:
        raise
    except Exception as error:
        code = user_code.split(spec.model)[0] if user_code.is_user_code(spec.model) else None
        raise UsageError(
            f"{spec.model} cannot be built: {type(error).__name__}: {error} ({user_code.place_of(error, code)})",
            "correct the `args:` of the model, or the function that makes it",
        ) from error
    if not isinstance(model, nn.Module):
        raise UsageError(f"{spec.model} returned a {type(model).__name__}", "let it return a torch.nn.Module")
    return model


def construct_of_user(make: Callable[..., Any], spec: ModelSpec, num_classes: int) -> nn.Module:
    """Return the network that a function or class of the user makes; it gets `num_classes` only if it takes it.

    Raises:
        UsageError: as `construct`; and for a network in place of a function that makes one.
    """
    if isinstance(make, nn.Module):
        raise UsageError(
            f"{spec.model} is a network, and every training needs a new one",
            "name a function that returns it: def NAME(num_classes): return ...",
        )
    try:
        parameters = [*inspect.signature(make).parameters.values()]
    except (TypeError, ValueError):  # some callables of compiled libraries do not have a signature
        return _construct_by_trying(make, spec, num_classes)
    if parameters and parameters[0].name == _COUNT and parameters[0].kind is Parameter.POSITIONAL_ONLY:
        return construct(make, spec, num_classes)
    takes_it = any(
        one.kind is Parameter.VAR_KEYWORD or (one.name == _COUNT and one.kind in _BY_KEYWORD) for one in parameters
    )
    return construct(make, spec, **({_COUNT: num_classes} if takes_it else {}))


def _construct_by_trying(make: Callable[..., Any], spec: ModelSpec, num_classes: int) -> nn.Module:
    try:
        return construct(make, spec, **{_COUNT: num_classes})
    except UsageError as error:
        if not isinstance(error.__cause__, TypeError):
            raise
        return construct(make, spec)


def _without_clash(spec: ModelSpec, arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Return the arguments of the user without those that kdcache sets to the same value.

    Raises:
        UsageError: if the user sets one to another value.
    """
    for key in arguments.keys() & spec.args.keys():
        if spec.args[key] == arguments[key]:
            continue
        what = (
            f"{spec.model} cannot be built: `args:` sets {key!r} to {spec.args[key]!r}, and kdcache sets it to "
            f"{arguments[key]!r}"
        )
        if key == _COUNT:
            raise UsageError(
                f"{what}, the number of classes of the data set",
                "remove num_classes from `args:`; if a trained teacher has other outputs, set teacher.outputs and "
                "teacher.classes",
            )
        raise UsageError(what, f"remove {key} from `args:`")
    return {key: value for key, value in spec.args.items() if key not in arguments}


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

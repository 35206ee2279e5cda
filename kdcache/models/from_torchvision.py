"""`torchvision:NAME` and `torchvision:NAME@WEIGHTS`: its networks, weights and evaluation transforms."""

from __future__ import annotations

from http.client import HTTPException
from typing import Any

import torch
from torch import nn
from torchvision import models as tv

from kdcache.config.schema import ModelSpec
from kdcache.config.transform import Transform
from kdcache.data.datasets import photograph_transform
from kdcache.errors import UsageError, did_you_mean
from kdcache.models.construct import SMALLEST_SIDE, Fit, check_channels, construct

_AUXILIARY = ("googlenet", "inception_v3")
"""These have auxiliary outputs in training, which no loss uses; `args: {aux_logits: true}` keeps them."""

_AUXILIARY_SIDE = 299
"""Pixels that the auxiliary head of inception_v3 needs; its other layers take smaller images."""


def build(name: str, spec: ModelSpec, num_classes: int, channels: int) -> nn.Module:
    """Return a network of torchvision, with the weights that `name` names or with random ones.

    Raises:
        KdcacheError: for arguments that it does not take, or weights that are not found.
    """
    architecture, _, weights_name = name.partition("@")
    weights = _weights(name)
    check_channels(spec, channels)
    options: dict[str, Any] = {"name": architecture}
    if architecture in _AUXILIARY and "aux_logits" not in spec.args:
        options["aux_logits"] = False
    if architecture in _segmentation_names():
        options["weights_backbone"] = None  # or its constructors download them
    if weights_name:
        _fetch(spec, weights)
        model = construct(tv.get_model, spec, **options, weights=weights)
    else:
        model = construct(tv.get_model, spec, **options, weights=None, num_classes=num_classes)
    if architecture in _segmentation_names():
        return model
    height, width = weights.meta["min_size"]
    if architecture == "inception_v3" and spec.args.get("aux_logits"):
        height = width = _AUXILIARY_SIDE
    if isinstance(model, tv.VisionTransformer):
        height = width = model.image_size  # the only size that it takes; `args:` may set it
    model.register_forward_pre_hook(Fit(max(height, SMALLEST_SIDE), max(width, SMALLEST_SIDE)))
    return model


def names() -> list[str]:
    """Return the names of the networks that classify images, or their pixels."""
    return [*tv.list_models(module=tv), *_segmentation_names()]


def _segmentation_names() -> list[str]:
    return list(tv.list_models(module=tv.segmentation))


def output_of(name: str) -> str | None:
    """Return the part of what a network returns that holds the logits; None for one that returns them alone."""
    return "out" if name.partition("@")[0] in _segmentation_names() else None


def categories(name: str) -> list[str]:
    """Return the class names of the weights that `name` names.

    Raises:
        UsageError: if torchvision has no such network or weights.
    """
    return list(_weights(name).meta["categories"])


def preset(name: str) -> Transform:
    """Return the transform that torchvision evaluates the weights that `name` names with."""
    how = _weights(name).transforms()
    if output_of(name) is not None:
        side = how.resize_size[0]
        return photograph_transform(side, side, how.mean, how.std, how.interpolation.value)
    return photograph_transform(how.resize_size[0], how.crop_size[0], how.mean, how.std, how.interpolation.value)


def _fetch(spec: ModelSpec, weights: Any) -> None:
    """Download torchvision's weights into torch's cache folder, where its constructors look first."""
    try:
        weights.get_state_dict(progress=False, check_hash=True)
    except (OSError, RuntimeError, HTTPException) as error:
        raise UsageError(
            f"the weights of {spec.model} are not on this machine and cannot be downloaded: {error}",
            f"put {weights.url} into {torch.hub.get_dir()}/checkpoints",
        ) from None


def _weights(name: str) -> Any:
    """Return the weights that `name` names, a member of torchvision's enumeration; the default without `@`."""
    architecture, at, weights_name = name.partition("@")
    if architecture not in names():
        raise UsageError(
            f"torchvision has no network {architecture!r} that classifies images{did_you_mean(architecture, names())}",
            "use a name from torchvision.models.list_models(module=torchvision.models), or for pixels "
            "torchvision.models.segmentation",
        )
    known = tv.get_model_weights(architecture)
    if at and weights_name not in known.__members__:
        raise UsageError(
            f"torchvision has no weights {weights_name!r} of {architecture}"
            f"{did_you_mean(weights_name, known.__members__)}",
            f"it has {', '.join(known.__members__)}",
        )
    return known[weights_name or "DEFAULT"]

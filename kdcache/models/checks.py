"""Check a network's output before the work begins."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import nn
from torch.utils.data import Dataset

from kdcache.config.schema import Transform
from kdcache.data.samples import Samples, as_samples
from kdcache.data.views import View
from kdcache.errors import MismatchError


@torch.no_grad()
def try_network(model: nn.Module, view: View, device: torch.device | str, who: str) -> None:
    """Run a network on the first image of a view, to find one that does not fit before the work begins.

    Raises:
        MismatchError: if it cannot take the image, or does not return [B, C].
    """
    images = view[0].images
    model.eval()
    logits = _call(model, images.to(device), who)
    check_logits(logits, len(images), view.samples.num_classes, who)


def samples_for(
    model: nn.Module, data: Samples | Dataset[Any], transform: Transform | None, device: torch.device | str
) -> Samples:
    """Return samples as they are, and any other data set of (image, label) pairs wrapped for a network.

    Args:
        model: its outputs are the classes of a data set without the attribute `classes`.
        data: map-style.
        transform: what is done to an image; None for nothing.
        device: where the network runs.

    Raises:
        KdcacheError: if it is not such a data set.
    """
    samples = as_samples(data)
    if isinstance(data, Samples) or hasattr(data, "classes"):
        return samples
    images = View(samples, transform or []).__getitems__([0]).images
    model.to(device).eval()
    with torch.no_grad():
        logits = _call(model, images.to(device), "teacher")
    outputs = logits.shape[1] if isinstance(logits, torch.Tensor) and logits.ndim == 2 else 0
    # A data set need not have a sample of the last classes.
    return replace(samples, class_names=tuple(map(str, range(max(outputs, samples.num_classes)))))


def _call(model: nn.Module, images: torch.Tensor, who: str) -> object:
    """Return what a network returns for images [B, channels, H, W]; an error of its own is a mismatch."""
    try:
        return model(images)
    except (RuntimeError, ValueError, TypeError, AssertionError) as error:
        raise MismatchError(
            f"the {who} cannot take images {list(images.shape[1:])} (channels, height, width): {error}",
            f"take another {who}, or a transform that gives the images it wants",
        ) from None


def check_logits(logits: object, batch: int, num_classes: int, who: str) -> torch.Tensor:
    """Return a network's output, if it is [B, C].

    Raises:
        MismatchError: if it is anything else.
    """
    if not isinstance(logits, torch.Tensor):
        raise MismatchError(f"the {who} returned a {type(logits).__name__}", "let it return logits, a tensor [B, C]")
    if logits.shape != (batch, num_classes):
        raise MismatchError(
            f"the {who} returned {list(logits.shape)} for {batch} images, the data set has {num_classes} classes",
            f"take a {who} that returns [B, {num_classes}], or the data set that it was made for",
        )
    return logits

"""Check a network's output before work begins."""

from __future__ import annotations

import torch
from torch import nn

from kdcache.data.views import View
from kdcache.errors import MismatchError


@torch.no_grad()
def try_network(model: nn.Module, view: View, device: torch.device | str, who: str) -> None:
    """Run a network on the first image of a view, so that one that does not fit is found before the work begins.

    Raises:
        MismatchError: if it cannot take the image, or does not return [B, C].
    """
    images = view[0].images
    model.eval()
    try:
        logits = model(images.to(device))
    except (RuntimeError, ValueError, TypeError, AssertionError) as error:
        raise MismatchError(
            f"the {who} cannot take images {list(images.shape[1:])} (channels, height, width): {error}",
            f"take another {who}, or a transform that gives the images it wants",
        ) from None
    check_logits(logits, len(images), view.samples.num_classes, who)


def check_logits(model_says: object, batch: int, num_classes: int, who: str) -> torch.Tensor:
    """A network's output, if it is [B, C].

    Raises:
        MismatchError: if it is anything else.
    """
    if not isinstance(model_says, torch.Tensor):
        raise MismatchError(
            f"the {who} returned a {type(model_says).__name__}", "let it return logits, a tensor [B, C]"
        )
    if model_says.shape != (batch, num_classes):
        raise MismatchError(
            f"the {who} returned {list(model_says.shape)} for {batch} images, the data set has {num_classes} classes",
            f"take a {who} that returns [B, {num_classes}], or the data set that it was made for",
        )
    return model_says

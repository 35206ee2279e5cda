"""How good a network is on a split."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import nn
from torch.nn import functional as F

from kdcache.errors import MismatchError, UsageError
from kdcache.views import View, batches, cut_range


class Score(NamedTuple):
    """Over the labelled samples of a split: accuracy in [0, 1], mean negative log-likelihood in nats."""

    accuracy: float
    loss: float


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


@torch.no_grad()
def evaluate(model: nn.Module, view: View, device: torch.device | str = "cpu", batch_size: int = 512) -> Score:
    """Accuracy and negative log-likelihood of a network on a view, in evaluation mode.

    Raises:
        UsageError: if no sample has a label.
    """
    was_training = model.training
    model.eval()
    correct, summed, labelled = 0, 0.0, 0
    cuts = [list(cut) for cut in cut_range(range(len(view)), batch_size)]
    for batch in batches(view, cuts, 0, device):
        logits = model(batch.images.to(device)).float()
        truth = batch.labels.to(device)
        correct += int((logits.argmax(dim=1) == truth).sum())
        summed += float(F.cross_entropy(logits, truth, ignore_index=-1, reduction="sum"))
        labelled += int((truth >= 0).sum())
    model.train(was_training)
    if not labelled:
        raise UsageError(
            f"no sample of {view.samples.name}/{view.samples.split} has a label", "evaluate on a labelled split"
        )
    return Score(correct / labelled, summed / labelled)

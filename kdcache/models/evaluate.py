"""How good a network is on a split."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import nn
from torch.nn import functional as F

from kdcache.data.loader import batches, cut_range
from kdcache.data.views import View
from kdcache.errors import UsageError
from kdcache.models.outputs import logits_of


class SplitScore(NamedTuple):
    """Over the labeled samples of a split: accuracy in [0, 1], mean negative log-likelihood in nats."""

    accuracy: float
    loss: float


@torch.no_grad()
def evaluate(model: nn.Module, view: View, device: torch.device | str = "cpu", batch_size: int = 512) -> SplitScore:
    """Accuracy and negative log-likelihood of a network on a view, in evaluation mode.

    Raises:
        UsageError: if no sample has a label.
    """
    was_training = model.training
    model.eval()
    correct, summed, labeled = 0, 0.0, 0
    cuts = [list(cut) for cut in cut_range(range(len(view)), batch_size)]
    for batch in batches(view, cuts, 0, device):
        logits = logits_of(model(batch.images.to(device))).float()
        truth = batch.labels.to(device)
        correct += int((logits.argmax(dim=1) == truth).sum())
        summed += float(F.cross_entropy(logits, truth, ignore_index=-1, reduction="sum"))
        labeled += int((truth >= 0).sum())
    model.train(was_training)
    if not labeled:
        raise UsageError(
            f"no sample of {view.samples.name}/{view.samples.split} has a label", "evaluate on a labeled split"
        )
    return SplitScore(correct / labeled, summed / labeled)

"""Scores of a network that says a class of every pixel: accuracy, mean intersection over union, and loss."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from kdcache.data.samples import Samples
from kdcache.errors import MismatchError, UsageError
from kdcache.losses.maps import resized

_NUMBERS_AT_ONCE = 2**24
"""Enlarged logits of a batch that are in memory at once, but at least those of one image: 64 MiB in float32."""


class PixelScore(NamedTuple):
    """Scores over the labeled pixels of a split.

    Attributes:
        accuracy: share of the pixels with the right class.
        loss: mean negative log-likelihood of a pixel, in nats.
        mean_iou: mean over the classes of intersection / union; classes that are nowhere, neither in labels nor in
            predictions, are left out.
        iou: of each class; None for one that is nowhere.
    """

    accuracy: float
    loss: float
    mean_iou: float
    iou: tuple[float | None, ...]


class PixelSums(NamedTuple):
    """Sums over the labeled pixels of some batches.

    Attributes:
        right: [C] int64, pixels of each class that are predicted as it.
        predicted: [C] int64, pixels that are predicted as each class.
        labeled: [C] int64, pixels of each class.
        loss: summed negative log-likelihood.
    """

    right: Tensor
    predicted: Tensor
    labeled: Tensor
    loss: float

    def score(self, samples: Samples) -> PixelScore:
        """Return the scores.

        Raises:
            UsageError: if no pixel has a label.
        """
        count = int(self.labeled.sum())
        if not count:
            raise UsageError(f"no pixel of {samples.name}/{samples.split} has a label", "evaluate on a labeled split")
        union = self.predicted + self.labeled - self.right
        iou = tuple(right / of if of else None for right, of in zip(self.right.tolist(), union.tolist(), strict=True))
        known = [each for each in iou if each is not None]
        return PixelScore(int(self.right.sum()) / count, self.loss / count, sum(known) / len(known), iou)


def pixel_sums(logits: Tensor, maps: Tensor) -> PixelSums:
    """Return the sums over the pixels of a batch, on the CPU.

    Args:
        logits: [B, C, h, w], which are enlarged to the size of the label maps.
        maps: [B, H, W] int64, -1 where ignored, on the same device.

    Raises:
        MismatchError: if the logits are not maps of the classes of the labels.
    """
    if logits.ndim != 4 or len(logits) != len(maps) or int(maps.max()) >= logits.shape[1]:
        raise MismatchError(
            f"the network returned {list(logits.shape)} for label maps {list(maps.shape)} of classes up to "
            f"{int(maps.max())}",
            "evaluate a network that returns logits [B, C, h, w] of the classes of the data set",
        )
    classes, loss = logits.shape[1], 0.0
    counts = torch.zeros(3, classes, dtype=torch.int64, device=maps.device)
    images = max(1, _NUMBERS_AT_ONCE // (classes * maps[0].numel()))
    for start in range(0, len(maps), images):
        labels = maps[start : start + images]
        enlarged = resized(logits[start : start + images].float(), (maps.shape[1], maps.shape[2]))
        known = labels >= 0
        # On a CPU `argmax` takes 4 to 17 times as long for few classes.
        truth, guess = labels[known], enlarged.max(dim=1).indices[known]
        counts += torch.stack(
            [torch.bincount(each, minlength=classes) for each in (truth[truth == guess], guess, truth)]
        )
        loss += float(F.cross_entropy(enlarged, labels, ignore_index=-1, reduction="sum"))
    right, predicted, labeled = counts.cpu()
    return PixelSums(right, predicted, labeled, loss)

"""Accuracy and loss of a network on a split."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple

import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import Dataset

from kdcache.config.transform import Transform, step_names
from kdcache.data.loader import batches, cut_range
from kdcache.data.samples import Samples, as_samples
from kdcache.data.views import View
from kdcache.errors import MismatchError, UsageError, counted
from kdcache.models.checks import OutputScale, log_probabilities, output_scale, set_evaluation_mode
from kdcache.models.outputs import logits_of
from kdcache.models.pixel_scores import PixelScore, PixelSums, pixel_sums
from kdcache.runtime.progress import Progress
from kdcache.runtime.terminal import reporter
from kdcache.runtime.user_code import trust


class SplitScore(NamedTuple):
    """Means over the labeled samples of a split.

    Attributes:
        accuracy: between 0 and 1.
        loss: negative log-likelihood, in nats.
    """

    accuracy: float
    loss: float


class Sums(NamedTuple):
    """Sums over the labeled samples of some batches."""

    correct: int
    loss: float
    labeled: int

    def score(self, samples: Samples) -> SplitScore:
        """Return the means.

        Raises:
            UsageError: if no sample has a label.
        """
        if not self.labeled:
            raise UsageError(f"no sample of {samples.name}/{samples.split} has a label", "evaluate on a labeled split")
        return SplitScore(self.correct / self.labeled, self.loss / self.labeled)


def evaluate(
    model: nn.Module,
    samples: Samples | Dataset[Any] | View,
    device: torch.device | str = "cpu",
    batch_size: int = 512,
    transform: Transform | None = None,
    on_batch: Callable[[int], None] | None = None,
    progress: Progress | bool | None = None,
    num_workers: int | Literal["auto"] = "auto",
) -> SplitScore | PixelScore:
    """Return the accuracy and the negative log-likelihood of a network, in evaluation mode.

    For a data set with label maps they are of pixels, with the mean intersection over union.

    The network is moved to the device, and put back into the mode that it was in. A network may also return
    probabilities (Softmax), whose logarithms are then evaluated; one that has underflowed counts as the smallest normal
    number of its type.

    Args:
        model: returns logits [B, C] for images [B, channels, H, W]; for label maps [B, C, h, w].
        samples: from `load_split` or `wrap`, or any map-style data set of (image, label) pairs; labels of -1 are left
            out.
        device: where to run.
        batch_size: images at once.
        transform: what is done to an image, as in a pipeline file; None for the data set's own.
        on_batch: called after each batch with its size.
        progress: True to show progress on stderr, or a progress reporter; silent if None.
        num_workers: number of processes that load images; "auto" as in a pipeline file.

    Raises:
        UsageError: if no sample has a label.
        MismatchError: if the network returns fewer classes than there are labels.
    """
    if not isinstance(samples, View):
        trust(step_names(transform))
        known = as_samples(samples)
        samples = View(known, known.transform if transform is None else transform)
    cuts = [list(cut) for cut in cut_range(range(len(samples)), batch_size)]
    was_training, scorer = model.training, Scorer(model)
    set_evaluation_mode(model.to(device))
    with reporter(progress).task("evaluate", len(samples), "images") as task:
        for batch in batches(samples, cuts, num_workers, device):
            scorer.add(batch.images.to(device), batch.labels, batch.maps)
            task.advance(len(batch.ids))
            if on_batch is not None:
                on_batch(len(batch.ids))
    if model.training != was_training:
        model.train(was_training)
    return scorer.sums.score(samples.samples)


class Scorer:
    """Sums of a network, which is in evaluation mode, over the batches that it is given; see `evaluate`."""

    def __init__(self, model: nn.Module) -> None:
        self.sums: Sums | PixelSums = Sums(0, 0.0, 0)
        self._model = model
        self._scale: OutputScale | None = None

    @torch.no_grad()
    def add(self, images: torch.Tensor, labels: torch.Tensor, maps: torch.Tensor | None = None) -> None:
        """Add a batch of images [B, channels, H, W] on the device of the network.

        Args:
            images: of the batch.
            labels: [B] int64, -1 where not known.
            maps: [B, H, W] int64, the class of each pixel, by which it is then scored; None without.

        Raises:
            MismatchError: if the network does not return logits [B, C] of the classes of the labels.
        """
        outputs = logits_of(self._model(images))
        if maps is not None:
            found = pixel_sums(outputs, maps.to(images.device))
            self.sums = total_of([found] if isinstance(self.sums, Sums) else [self.sums, found])
            return
        _check_classes(outputs, labels)
        self._scale = output_scale(outputs) if self._scale is None else self._scale
        logits = _log_probabilities(outputs) if self._scale == "probabilities" else outputs.float()
        truth = labels.to(images.device)
        found_here = Sums(
            int((logits.argmax(dim=1) == truth).sum()),
            float(F.cross_entropy(logits, truth, ignore_index=-1, reduction="sum")),
            int((truth >= 0).sum()),
        )
        self.sums = total_of([self.sums, found_here])


def total_of(parts: Sequence[Sums | PixelSums]) -> Sums | PixelSums:
    """Return the sums over all of some parts of a split, which are all of pixels or all of images.

    A part without a batch counts as nothing.
    """
    of_pixels = [part for part in parts if isinstance(part, PixelSums)]
    if of_pixels:
        return PixelSums(*(sum(values) for values in zip(*of_pixels, strict=True)))
    return Sums(*(sum(values) for values in zip(*parts, strict=True)))


def _log_probabilities(probabilities: torch.Tensor) -> torch.Tensor:
    return log_probabilities(probabilities).clamp(min=math.log(torch.finfo(probabilities.dtype).tiny))


def _check_classes(logits: torch.Tensor, labels: torch.Tensor) -> None:
    if logits.ndim != 2 or len(logits) != len(labels) or int(labels.max()) >= logits.shape[1]:
        raise MismatchError(
            f"the network returned {list(logits.shape)} for {counted(len(labels), 'image')} with labels up to "
            f"{int(labels.max())}",
            "evaluate a network that returns logits [B, C] of the classes of the data set",
        )

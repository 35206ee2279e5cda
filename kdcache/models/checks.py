"""Check a network before the work begins: its outputs, in the mode and precision in which it will run."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from kdcache.config.transform import Transform
from kdcache.data.samples import Samples, as_samples
from kdcache.data.seeding import seeded
from kdcache.data.views import View
from kdcache.errors import MismatchError, UsageError, counted
from kdcache.models.checkpoints import check_savable
from kdcache.models.outputs import logits_of

OutputScale = Literal["logits", "probabilities", "log-probabilities"]

_TOLERANCE = 2e-5
"""Largest error of the sums of probabilities, in addition to the rounding of their type."""

_CANNOT = (RuntimeError, ValueError, TypeError, AssertionError, LookupError, NotImplementedError)
"""Errors that networks raise for images that they cannot take."""


@torch.no_grad()
def try_network(model: nn.Module, view: View, device: torch.device | str, who: str) -> None:
    """Run a network on the first image of a view, to find one that does not fit before the work begins.

    Raises:
        MismatchError: if it cannot take the image, or does not return [B, C].
    """
    images = view[0].images
    set_evaluation_mode(model)
    with refusing(images, who, view.samples):
        logits = model(images.to(device))
    check_logits(logits, len(images), view.samples.num_classes, who, view.samples.maps is not None)


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
        MismatchError: if a label is not among the outputs of the network; names the sample.
        KdcacheError: if it is not such a data set.
    """
    samples = as_samples(data)
    if isinstance(data, Samples) or hasattr(data, "classes"):
        return samples
    images = View(samples, transform or []).__getitems__([0]).images
    set_evaluation_mode(model.to(device))
    with torch.no_grad(), refusing(images, "teacher"):
        logits = logits_of(model(images.to(device)))
    outputs = logits.shape[1] if logits.ndim == 2 else samples.num_classes
    if (beyond := np.flatnonzero(samples.labels >= outputs)).size:
        raise MismatchError(
            f"sample {beyond[0]} has label {samples.labels[beyond[0]]}, and the teacher returns the logits of "
            f"{outputs} classes ({counted(beyond.size, 'such sample')})",
            f"take a teacher that returns at least {int(samples.labels.max()) + 1} logits, or correct the labels",
        )
    # A data set need not have a sample of the last classes.
    return replace(samples, class_names=tuple(map(str, range(max(outputs, samples.num_classes)))))


def set_evaluation_mode(model: nn.Module) -> None:
    """Put a network into evaluation mode; the program of torch.export stays in the mode that it was exported in."""
    try:
        model.eval()
    except NotImplementedError:
        return


@contextmanager
def refusing(images: Tensor, who: str, samples: Samples | None = None) -> Iterator[None]:
    """Convert the errors that a network raises for images [B, channels, H, W] into a MismatchError.

    Args:
        images: what the network gets.
        who: name of the network in errors.
        samples: of which these are some; None if they are images or tensors.
    """
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except _CANNOT as error:
        if samples is not None and samples.graph is not None:
            features, edges = samples.graph.features, samples.graph.edges
            raise MismatchError(
                f"the {who} cannot take the nodes of {samples.name}, features {list(features.shape)} and edges "
                f"{list(edges.shape)}: {error}",
                f"take another {who}: forward(features [N, F], edges [2, E]) of the whole graph, or "
                f"forward(features [B, F]) of single nodes, with F = {features.shape[1]}",
            ) from None
        what = "images" if images.ndim == 4 else f"{str(images.dtype).removeprefix('torch.')} tensors"
        sides = " (channels, height, width)" if images.ndim == 4 else ""
        raise MismatchError(
            f"the {who} cannot take {what} {list(images.shape[1:])}{sides}: {error}",
            f"take another {who}, or a transform that gives the {what} it wants",
        ) from None


@torch.no_grad()
def try_training(model: nn.Module, view: View, who: str, micro_batch: int) -> None:
    """Run a copy of a network on the CPU in training mode, in which it may return more than in evaluation mode.

    The network itself and the random generators do not change.

    Args:
        model: the network.
        view: of the training images.
        who: name of the network in errors.
        micro_batch: number of images of the smallest micro-batch.

    Raises:
        UsageError: if it has no parameters to train, or the batches are too small for its batch normalization.
        MismatchError: if it cannot take the images, does not return [B, C], or cannot be saved.
    """
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise UsageError(
            f"the {who} has no parameters that can be trained",
            "take a network with parameters that require gradients (not a frozen or an exported one)",
        )
    check_savable(model, who)
    images = view.__getitems__(range(min(max(micro_batch, 1), 2, len(view)))).images
    try:
        # A copy is run: a network may update counters or statistics in training mode.
        trial = copy.deepcopy(model).train()
    except (RuntimeError, TypeError, NotImplementedError, AttributeError):
        return  # a network that cannot be copied may still be trainable
    try:
        with seeded(0), refusing(images, who, view.samples):
            logits = trial(images)
    except MismatchError as error:
        if "more than 1 value per channel" not in error.what:
            raise
        raise UsageError(
            f"the {who} cannot be trained on {counted(len(images), 'image')} at once: its batch normalization needs "
            "at least two",
            "raise train.batch_size, or lower train.gradient_accumulation_steps",
        ) from None
    of_maps = view.samples.maps is not None
    check_logits(logits, len(images), view.samples.num_classes, f"{who} in training mode", of_maps)


def check_logits(returned: object, batch: int, num_classes: int, who: str, of_maps: bool = False) -> Tensor:
    """Return a network's logits, if they are [B, C]; of a tuple, dictionary or record, the part named `logits`.

    Args:
        returned: by the network.
        batch: B, number of images.
        num_classes: C.
        who: name of the network in errors.
        of_maps: whether the data set has a class per pixel, and the logits are [B, C, h, w].

    Raises:
        MismatchError: if they are anything else.
    """
    logits = logits_of(returned, who=who)
    if logits.shape == (batch, num_classes) and not of_maps:
        return logits
    if of_maps and logits.ndim == 4 and logits.shape[:2] == (batch, num_classes):
        return logits
    if of_maps:
        fix = (
            f"take a network that returns [B, {num_classes}, h, w], the logits of each pixel or of larger places, as "
            "those of timm do with `args: {features_only: true}`"
        )
    elif logits.ndim == 4:
        fix = (
            "it says a class of every pixel (segmentation): keep its maps, cache: {logits: false, outputs: {pixels: "
            "{kind: classes, places: grid, source: NAME}}}, where NAME is the module that returns them"
        )
    else:
        fix = f"take a {who} that returns [B, {num_classes}], or the data set that it was made for"
    per_pixel = ", one of them per pixel" if of_maps else ""
    raise MismatchError(
        f"the {who} returned {list(logits.shape)} for {counted(batch, 'image')}, the data set has "
        f"{counted(num_classes, 'class', 'classes')}{per_pixel}",
        fix,
    )


def output_scale(outputs: Tensor, rounded_to: torch.dtype | None = None) -> OutputScale:
    """Return whether the outputs of a network are logits, probabilities (Softmax) or log-probabilities (LogSoftmax).

    Probabilities are at least 0 and sum to 1, and log-probabilities are at most 0 and have a logsumexp of 0, in every
    row; of logits neither is true except by chance. Log-probabilities may be -inf.

    Args:
        outputs: [B, C].
        rounded_to: least precise type that they may have been rounded to; None for their own.
    """
    dtype = outputs.dtype if rounded_to is None else rounded_to
    rounding = torch.finfo(dtype).eps if dtype.is_floating_point else 0.0
    values = outputs.detach().double()
    if not len(values):
        return "logits"
    if bool((values >= 0).all()) and bool(((values.sum(dim=1) - 1).abs() <= _TOLERANCE + rounding).all()):
        return "probabilities"
    # Rounding changes the logsumexp of log-probabilities by at most the entropy times the relative error.
    tolerance = _TOLERANCE + rounding * math.log(values.shape[1])
    if bool((values <= tolerance).all()) and bool((values.logsumexp(dim=1).abs() <= tolerance).all()):
        return "log-probabilities"
    return "logits"


def log_probabilities(probabilities: Tensor) -> Tensor:
    """Return the logarithms of probabilities [B, C] in float32; -inf for those that have underflowed.

    Those below the smallest normal number of their type have lost precision, or are 0.
    """
    if not probabilities.is_floating_point():
        probabilities = probabilities.float()
    underflowed = probabilities < torch.finfo(probabilities.dtype).tiny
    return probabilities.float().log().masked_fill(underflowed, -torch.inf)


def refuse_underflow(probabilities: Tensor, which: str = "") -> None:
    """Check that logits can be recovered from probabilities [B, C], up to an additive constant per row.

    Args:
        probabilities: [B, C].
        which: output of the teacher in errors, such as "as the output color "; "" for the class logits.

    Raises:
        MismatchError: if some have underflowed.
    """
    underflowed = ~log_probabilities(probabilities).isfinite()
    if bool(underflowed.any()):
        raise MismatchError(
            f"the teacher returns {which}probabilities (every row sums to 1), and {int(underflowed.sum())} of "
            f"{probabilities.numel()} have underflowed: its logits cannot be recovered from them",
            "let it return logits: leave out its last layer, a Softmax (with `model: file.py:function`, return the "
            "network without it)",
        )

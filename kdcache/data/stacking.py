"""Samples of one shape as the batch that a network takes."""

from __future__ import annotations

from collections.abc import Sequence

from PIL import Image
from torch import Tensor
from torch.utils.data import default_collate

from kdcache.data.samples import Samples
from kdcache.errors import UsageError

SAME_CHANNELS = (
    "begin the transform with - RGB: {} to make all of them color, or with - Grayscale: {num_output_channels: 1} to "
    "make them gray"
)
"""The fix for gray images among color ones."""


def fix_of_channels(samples: Samples, index: int) -> str:
    """Return the fix for an image with another number of channels than the first; empty if it has the same."""
    picture = samples.images.picture(index)
    if isinstance(picture, Tensor) and picture.ndim != 3:
        return ""
    channels = len(picture.getbands()) if isinstance(picture, Image.Image) else picture.shape[-3]
    first = samples.images.shape()[0]
    return f"; this image has {channels} channels, the first {first}: {SAME_CHANNELS}" if channels != first else ""


def check_sizes(images: Sequence[Tensor]) -> None:
    """Check that all samples have one shape.

    Raises:
        UsageError: if two differ.
    """
    if any(pixels.shape != images[0].shape for pixels in images):
        what = " and ".join(sorted({str(list(pixels.shape)) for pixels in images})[:2])
        if any(pixels.ndim != 3 for pixels in images):
            raise UsageError(
                f"the samples are tensors of different shapes: {what}",
                "pad or cut them to one shape, in the data set or in a step of your own, path/file.py:function",
            )
        if len({len(pixels) for pixels in images}) > 1:
            raise UsageError(f"the transform returns images of different numbers of channels: {what}", SAME_CHANNELS)
        raise UsageError(
            f"the transform returns images of different sizes: {what}",
            "resize them to one size, for instance with - Resize: {size: [224, 224]}",
        )


def as_input(values: Tensor) -> Tensor:
    """Return what a network gets: float32, or int64 of integers, such as token ids."""
    return values.float() if values.is_floating_point() else values.long()


def stack(images: Sequence[Tensor]) -> Tensor:
    """Stack images of one size into [B, channels, H, W] float32, or tensors of another shape into [B, ...]."""
    check_sizes(images)
    # In a worker process, it stacks into shared memory, from where the images need no other copy.
    stacked: Tensor = default_collate([as_input(pixels) for pixels in images])
    return stacked

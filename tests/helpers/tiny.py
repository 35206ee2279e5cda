"""A tiny data set in memory, and a tiny teacher whose logits are exact."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor, nn

from kdcache.config.transform import Transform
from kdcache.data.images import ArrayImages, Images, Picture
from kdcache.data.samples import Samples

FLIP: Transform = [{"RandomHorizontalFlip": {"p": 0.5}}]
"""A random transform, for more than one view."""


def tiny_samples(count: int = 37, num_classes: int = 10, labels: Sequence[int] | None = None) -> Samples:
    """`count` images [1, 4, 4]; pixel (0, 0) is the sample's id / 8, by which a teacher can tell what it was shown."""
    pixels = torch.randint(-8, 9, (count, 1, 4, 4), generator=torch.Generator().manual_seed(0)) / 8
    pixels[:, 0, 0, 0] = torch.arange(count) / 8
    if labels is None:
        labels = [(3 * i + 1) % num_classes for i in range(count)]
    names = tuple(f"class {c}" for c in range(num_classes))
    return Samples("tiny", "train", ArrayImages(pixels), np.array(labels, np.int32), names, [])


class OneByOne:
    """Images that are read one at a time, from others."""

    parallel: ClassVar[bool] = True

    def __init__(self, images: Images) -> None:
        self.images = images

    def __len__(self) -> int:
        return len(self.images)

    def picture(self, index: int) -> Picture:
        return self.images.picture(index)

    def content(self, index: int) -> bytes:
        return self.images.content(index)

    def shape(self) -> tuple[int, ...]:
        return self.images.shape()

    def stamp(self) -> str | None:
        return self.images.stamp()


class TinyTeacher(nn.Module):
    """Linear in the pixels, but for pixel (0, 0), which it does not look at."""

    weight: Tensor

    def __init__(self, num_classes: int = 10, seed: int = 1) -> None:
        super().__init__()
        weight = torch.randint(-8, 9, (16, num_classes), generator=torch.Generator().manual_seed(seed)) / 8
        weight[0] = 0
        self.register_buffer("weight", weight)

    def forward(self, images: Tensor) -> Tensor:
        """[B, 1, 4, 4] -> logits [B, C]."""
        return images.flatten(1) @ self.weight

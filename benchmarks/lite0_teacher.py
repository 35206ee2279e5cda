"""A segmentation network of a published classifier: a head on frozen features of EfficientNet-Lite0."""

from __future__ import annotations

from typing import Any

import torch
from efficientnet_lite import network
from torch import Tensor, nn
from torch.nn import functional as F

_SEEN = {2: 24, 4: 40, 10: 112}
"""Blocks after which features are taken, and their channels: at 1/4, 1/8 and 1/16 of the enlarged image."""

_WIDTH = 96


class HeadOnLite0(nn.Module):
    """Says a class of every 4 x 4 pixels; the features are frozen, and the head is trained.

    Args:
        num_classes: C.
        mean: of each channel that the images were normalized with, [3].
        std: of each channel, [3].
    """

    def __init__(self, num_classes: int, mean: list[float], std: list[float]) -> None:
        super().__init__()
        self.body = network(0).requires_grad_(requires_grad=False)
        self.mean: Tensor
        self.std: Tensor
        self.register_buffer("mean", torch.tensor(mean)[:, None, None])
        self.register_buffer("std", torch.tensor(std)[:, None, None])
        self.features = nn.Sequential(
            nn.Conv2d(sum(_SEEN.values()), _WIDTH, 3, padding=1, bias=False), nn.BatchNorm2d(_WIDTH), nn.ReLU(),
            nn.Conv2d(_WIDTH, _WIDTH, 3, padding=2, dilation=2, bias=False), nn.BatchNorm2d(_WIDTH), nn.ReLU(),
        )  # fmt: skip
        self.classifier = nn.Conv2d(_WIDTH, num_classes, 1)

    def train(self, mode: bool = True) -> HeadOnLite0:
        """Set the mode of the head; the body stays in evaluation mode."""
        super().train(mode)
        self.body.eval()
        return self

    def forward(self, images: Tensor) -> Tensor:
        """[B, 3, H, W] -> logits [B, C, H / 4, W / 4]."""
        height, width = images.shape[2] // 4, images.shape[3] // 4
        with torch.no_grad():
            parts = [F.interpolate(part, (height, width), mode="bilinear") for part in self._of_body(images)]
        logits: Tensor = self.classifier(self.features(torch.cat(parts, dim=1)))
        return logits

    def _of_body(self, images: Tensor) -> list[Tensor]:
        """Return the features of images that are enlarged to twice their size."""
        body: Any = self.body
        pixels = (images * self.std + self.mean - 0.498) / 0.502
        x = F.interpolate(pixels, scale_factor=2.0, mode="bilinear")
        x, found = body._swish(body._bn0(body._conv_stem(x))), []
        for index, block in enumerate(body._blocks[: max(_SEEN) + 1]):
            x = block(x)
            if index in _SEEN:
                found.append(x)
        return found

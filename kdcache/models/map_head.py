"""A network of segmentation: an encoder that returns maps of several sizes, and a head on them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from kdcache.losses.maps import on_largest_grid


class MapHead(nn.Module):
    """Brings maps of an encoder to the size of the largest one, adds them up, and says a class of each place.

    Every map has a 1x1 convolution to `width` channels before it is enlarged, as in the decoder of SegFormer (Xie et
    al. 2021, 2105.15203); the sum passes two 3x3 convolutions, the second one dilated.

    Args:
        num_classes: C.
        channels: of each map of the encoder.
        width: channels of the head.
    """

    def __init__(self, num_classes: int, channels: Sequence[int], width: int) -> None:
        super().__init__()
        self.projections = nn.ModuleList(nn.Conv2d(count, width, 1, bias=False) for count in channels)
        self.features = nn.Sequential(
            nn.BatchNorm2d(width),
            nn.ReLU(inplace=True),
            nn.Conv2d(width, width, 3, padding=1, bias=False),
            nn.BatchNorm2d(width),
            nn.ReLU(inplace=True),
            nn.Conv2d(width, width, 3, padding=2, dilation=2, bias=False),
            nn.BatchNorm2d(width),
            nn.ReLU(inplace=True),
        )
        self.classifier = nn.Conv2d(width, num_classes, 1)

    def forward(self, maps: Sequence[Tensor]) -> Tensor:
        """[B, D_i, h_i, w_i] of each i -> logits [B, C, h, w], h and w those of the largest map."""
        projected = [project(one) for project, one in zip(self.projections, maps, strict=True)]
        logits: Tensor = self.classifier(self.features(torch.stack(on_largest_grid(projected)).sum(dim=0)))
        return logits


class EncoderWithHead(nn.Module):
    """An encoder and a `MapHead`.

    Args:
        encoder: [B, 3, H, W] -> maps, one per item of `channels`.
        num_classes: C.
        channels: of each map.
        width: channels of the head.
        channels_last: whether the maps are [B, h, w, D].
        frozen: whether the encoder stays as it is, its batch norms too, and the head alone is trained.
    """

    def __init__(
        self,
        encoder: nn.Module,
        num_classes: int,
        channels: Sequence[int],
        width: int = 128,
        channels_last: bool = False,
        frozen: bool = False,
    ) -> None:
        super().__init__()
        self.encoder = encoder.requires_grad_(not frozen)
        self.head = MapHead(num_classes, channels, width)
        self.channels_last = channels_last
        self.frozen = frozen

    def train(self, mode: bool = True) -> EncoderWithHead:
        """Set the mode; a frozen encoder stays in evaluation mode."""
        super().train(mode)
        if self.frozen:
            self.encoder.eval()
        return self

    def forward(self, images: Tensor) -> Tensor:
        """[B, 3, H, W] -> logits [B, C, h, w], h and w those of the encoder's largest map."""
        maps = self.encoder(images)
        if self.channels_last:
            maps = [one.permute(0, 3, 1, 2) for one in maps]
        logits: Tensor = self.head(maps)
        return logits

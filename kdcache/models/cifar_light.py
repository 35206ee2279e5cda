"""Lightweight networks for CIFAR-100: MobileNetV2, ShuffleNetV1 and ShuffleNetV2."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from kdcache.models.cifar_blocks import conv, draw_classifier, draw_convolutions, pooled, stage


class InvertedResidual(nn.Module):
    """A depthwise convolution between two 1x1 convolutions, the first of which has `expansion` times the channels."""

    def __init__(self, inputs: int, outputs: int, stride: int, expansion: int) -> None:
        super().__init__()
        inner = inputs * expansion
        self.conv = nn.Sequential(
            *(conv(inputs, inner, 1), nn.BatchNorm2d(inner), nn.ReLU()),
            *(conv(inner, inner, 3, stride, groups=inner), nn.BatchNorm2d(inner), nn.ReLU()),
            *(conv(inner, outputs, 1), nn.BatchNorm2d(outputs)),
        )
        self.adds = stride == 1 and inputs == outputs

    def forward(self, x: Tensor) -> Tensor:
        """[B, inputs, H, W] -> [B, outputs, H / stride, W / stride]."""
        out: Tensor = self.conv(x)
        return x + out if self.adds else out


class MobileNetV2(nn.Module):
    """Sandler et al. 2018 (1801.04381) at half its width, with two strides fewer."""

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        stages = [
            (1, 8, 1, 1),
            (6, 12, 2, 1),
            (6, 16, 3, 2),
            (6, 32, 4, 2),
            (6, 48, 3, 1),
            (6, 80, 3, 2),
            (6, 160, 1, 1),
        ]
        self.conv1 = nn.Sequential(conv(3, 16, stride=2), nn.BatchNorm2d(16), nn.ReLU())
        inputs, blocks = 16, []
        for expansion, outputs, count, stride in stages:
            blocks.append(stage(partial(InvertedResidual, expansion=expansion), inputs, outputs, count, stride))
            inputs = outputs
        self.blocks = nn.Sequential(*blocks)
        self.conv2 = nn.Sequential(conv(inputs, 1280, 1), nn.BatchNorm2d(1280), nn.ReLU())
        self.classifier = nn.Sequential(linear := nn.Linear(1280, num_classes))
        draw_convolutions(self)
        draw_classifier(linear)

    def forward(self, images: Tensor) -> Tensor:
        """[B, 3, H, W] -> logits [B, C]."""
        logits: Tensor = self.classifier(pooled(self.conv2(self.blocks(self.conv1(images)))))
        return logits


class GroupedBlock(nn.Module):
    """A block of ShuffleNetV1; with stride 2 its output and its pooled input are concatenated."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        own = outputs - inputs if stride == 2 else outputs
        inner = own // 4
        self.groups = 1 if inputs == 24 else 3  # the stem's 24 channels are too few to be cut
        self.stride = stride
        self.conv1, self.bn1 = conv(inputs, inner, 1, groups=self.groups), nn.BatchNorm2d(inner)
        self.conv2, self.bn2 = conv(inner, inner, 3, stride, groups=inner), nn.BatchNorm2d(inner)
        self.conv3, self.bn3 = conv(inner, own, 1, groups=3), nn.BatchNorm2d(own)

    def forward(self, x: Tensor) -> Tensor:
        """[B, inputs, H, W] -> [B, outputs, H / stride, W / stride]."""
        out = F.channel_shuffle(F.relu(self.bn1(self.conv1(x))), self.groups)
        out = self.bn3(self.conv3(F.relu(self.bn2(self.conv2(out)))))
        return F.relu(torch.cat([out, F.avg_pool2d(x, 3, 2, 1)], 1) if self.stride == 2 else out + x)


class SplitBlock(nn.Module):
    """A block of ShuffleNetV2 that passes half of the channels unchanged."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        half = channels // 2
        self.conv1, self.bn1 = conv(half, half, 1), nn.BatchNorm2d(half)
        self.conv2, self.bn2 = conv(half, half, groups=half), nn.BatchNorm2d(half)
        self.conv3, self.bn3 = conv(half, half, 1), nn.BatchNorm2d(half)

    def forward(self, x: Tensor) -> Tensor:
        """[B, channels, H, W] -> the same shape."""
        kept, out = x.chunk(2, 1)
        out = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(out)))))
        return F.channel_shuffle(torch.cat([kept, F.relu(self.bn3(self.conv3(out)))], 1), 2)


class DownBlock(nn.Module):
    """A downsampling block of ShuffleNetV2 with two branches."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        half = outputs // 2
        self.conv1, self.bn1 = conv(inputs, inputs, 3, 2, groups=inputs), nn.BatchNorm2d(inputs)
        self.conv2, self.bn2 = conv(inputs, half, 1), nn.BatchNorm2d(half)
        self.conv3, self.bn3 = conv(inputs, half, 1), nn.BatchNorm2d(half)
        self.conv4, self.bn4 = conv(half, half, 3, 2, groups=half), nn.BatchNorm2d(half)
        self.conv5, self.bn5 = conv(half, half, 1), nn.BatchNorm2d(half)

    def forward(self, x: Tensor) -> Tensor:
        """[B, inputs, H, W] -> [B, outputs, H / 2, W / 2]."""
        left = F.relu(self.bn2(self.conv2(self.bn1(self.conv1(x)))))
        right = F.relu(self.bn5(self.conv5(self.bn4(self.conv4(F.relu(self.bn3(self.conv3(x))))))))
        return F.channel_shuffle(torch.cat([left, right], 1), 2)


class ShuffleNetV1(nn.Module):
    """Zhang et al. 2017 (1707.01083), three groups, behind a 1x1 convolution."""

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.conv1, self.bn1 = conv(3, 24, 1), nn.BatchNorm2d(24)
        self.layer1 = stage(GroupedBlock, 24, 240, 4, 2)
        self.layer2 = stage(GroupedBlock, 240, 480, 8, 2)
        self.layer3 = stage(GroupedBlock, 480, 960, 4, 2)
        self.linear = nn.Linear(960, num_classes)

    def forward(self, images: Tensor) -> Tensor:
        """[B, 3, H, W] -> logits [B, C]."""
        out = F.relu(self.bn1(self.conv1(images)))
        logits: Tensor = self.linear(pooled(self.layer3(self.layer2(self.layer1(out)))))
        return logits


class ShuffleNetV2(nn.Module):
    """Ma et al. 2018 (1807.11164), at its full width, behind a 1x1 convolution."""

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.conv1, self.bn1 = conv(3, 24, 1), nn.BatchNorm2d(24)
        self.layer1 = nn.Sequential(DownBlock(24, 116), *(SplitBlock(116) for _ in range(3)))
        self.layer2 = nn.Sequential(DownBlock(116, 232), *(SplitBlock(232) for _ in range(7)))
        self.layer3 = nn.Sequential(DownBlock(232, 464), *(SplitBlock(464) for _ in range(3)))
        self.conv2, self.bn2 = conv(464, 1024, 1), nn.BatchNorm2d(1024)
        self.linear = nn.Linear(1024, num_classes)

    def forward(self, images: Tensor) -> Tensor:
        """[B, 3, H, W] -> logits [B, C]."""
        out = self.layer3(self.layer2(self.layer1(F.relu(self.bn1(self.conv1(images))))))
        logits: Tensor = self.linear(pooled(F.relu(self.bn2(self.conv2(out)))))
        return logits

"""`cifar:NAME`: the networks on which papers compare distillation on CIFAR-100, as in RepDistiller and mdistiller.

Parameters have the names and shapes of the published checkpoints (`cifar_teachers.tar`), which load unchanged; hence
the different names `fc`, `linear` and `classifier`. Weights are initialized as there.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from functools import partial

from torch import Tensor, nn
from torch.nn import functional as F

from kdcache.config.schema import ModelSpec
from kdcache.errors import UsageError, did_you_mean
from kdcache.models.cifar_blocks import conv, draw_classifier, draw_convolutions, pooled, projection, stage
from kdcache.models.cifar_light import MobileNetV2, ShuffleNetV1, ShuffleNetV2
from kdcache.models.construct import Fit, check_channels, construct


class BasicBlock(nn.Module):
    """A residual block of two 3x3 convolutions."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1, self.bn1 = conv(inputs, outputs, 3, stride), nn.BatchNorm2d(outputs)
        self.conv2, self.bn2 = conv(outputs, outputs), nn.BatchNorm2d(outputs)
        self.downsample = projection(inputs, outputs, stride)

    def forward(self, x: Tensor) -> Tensor:
        """[B, inputs, H, W] -> [B, outputs, H / stride, W / stride]."""
        out = F.relu(self.bn1(self.conv1(x)))
        return F.relu(self.bn2(self.conv2(out)) + self.downsample(x))


class ResNet(nn.Module):
    """He et al. 2016 (1512.03385), section 4.2: three stages of (depth - 2) / 6 blocks.

    Args:
        num_classes: size of the output.
        depth: layers with weights.
        width: channels of the first stage in multiples of 16.
        stem: the same of the first convolution.
    """

    def __init__(self, num_classes: int, depth: int, width: int = 1, stem: int = 1) -> None:
        super().__init__()
        count, channels = (depth - 2) // 6, [16 * stem, 16 * width, 32 * width, 64 * width]
        self.conv1, self.bn1 = conv(3, channels[0]), nn.BatchNorm2d(channels[0])
        self.layer1 = stage(BasicBlock, channels[0], channels[1], count, 1)
        self.layer2 = stage(BasicBlock, channels[1], channels[2], count, 2)
        self.layer3 = stage(BasicBlock, channels[2], channels[3], count, 2)
        self.fc = nn.Linear(channels[3], num_classes)
        draw_convolutions(self)

    def forward(self, images: Tensor) -> Tensor:
        """[B, 3, H, W] -> logits [B, C]."""
        out = F.relu(self.bn1(self.conv1(images)))
        logits: Tensor = self.fc(pooled(self.layer3(self.layer2(self.layer1(out)))))
        return logits


class Bottleneck(nn.Module):
    """1x1, 3x3 and 1x1 convolutions, the last to four times as many channels, and what they are added to."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        inner = outputs // 4
        self.conv1, self.bn1 = conv(inputs, inner, 1), nn.BatchNorm2d(inner)
        self.conv2, self.bn2 = conv(inner, inner, 3, stride), nn.BatchNorm2d(inner)
        self.conv3, self.bn3 = conv(inner, outputs, 1), nn.BatchNorm2d(outputs)
        self.shortcut = projection(inputs, outputs, stride)

    def forward(self, x: Tensor) -> Tensor:
        """[B, inputs, H, W] -> [B, outputs, H / stride, W / stride]."""
        out = F.relu(self.bn1(self.conv1(x)))
        out = F.relu(self.bn2(self.conv2(out)))
        return F.relu(self.bn3(self.conv3(out)) + self.shortcut(x))


class ResNet50(nn.Module):
    """The ResNet-50 of ImageNet behind a 3x3 convolution of stride 1, without the first pooling."""

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.conv1, self.bn1 = conv(3, 64), nn.BatchNorm2d(64)
        self.layer1 = stage(Bottleneck, 64, 256, 3, 1)
        self.layer2 = stage(Bottleneck, 256, 512, 4, 2)
        self.layer3 = stage(Bottleneck, 512, 1024, 6, 2)
        self.layer4 = stage(Bottleneck, 1024, 2048, 3, 2)
        self.linear = nn.Linear(2048, num_classes)
        draw_convolutions(self)

    def forward(self, images: Tensor) -> Tensor:
        """[B, 3, H, W] -> logits [B, C]."""
        out = F.relu(self.bn1(self.conv1(images)))
        logits: Tensor = self.linear(pooled(self.layer4(self.layer3(self.layer2(self.layer1(out))))))
        return logits


class WideBlock(nn.Module):
    """A pre-activation block; the first activation also feeds the projection, but not an identity shortcut."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.bn1, self.conv1 = nn.BatchNorm2d(inputs), conv(inputs, outputs, 3, stride)
        self.bn2, self.conv2 = nn.BatchNorm2d(outputs), conv(outputs, outputs)
        self.convShortcut = conv(inputs, outputs, 1, stride) if inputs != outputs else None

    def forward(self, x: Tensor) -> Tensor:
        """[B, inputs, H, W] -> [B, outputs, H / stride, W / stride]."""
        out = F.relu(self.bn1(x))
        shortcut = x if self.convShortcut is None else self.convShortcut(out)
        added: Tensor = shortcut + self.conv2(F.relu(self.bn2(self.conv1(out))))
        return added


class WideResNet(nn.Module):
    """Zagoruyko & Komodakis 2016 (1605.07146), without dropout.

    Args:
        num_classes: size of the output.
        depth: layers with weights.
        width: channels of the first stage in multiples of 16.
    """

    def __init__(self, num_classes: int, depth: int, width: int) -> None:
        super().__init__()
        count, channels = (depth - 4) // 6, [16, 16 * width, 32 * width, 64 * width]

        def block(number: int, stride: int) -> nn.Module:
            blocks = stage(WideBlock, channels[number - 1], channels[number], count, stride)
            return nn.Sequential(OrderedDict(layer=blocks))

        self.conv1 = conv(3, channels[0])
        self.block1, self.block2, self.block3 = block(1, 1), block(2, 2), block(3, 2)
        self.bn1 = nn.BatchNorm2d(channels[3])
        self.fc = nn.Linear(channels[3], num_classes)
        draw_convolutions(self)
        nn.init.zeros_(self.fc.bias)

    def forward(self, images: Tensor) -> Tensor:
        """[B, 3, H, W] -> logits [B, C]."""
        out = self.block3(self.block2(self.block1(self.conv1(images))))
        logits: Tensor = self.fc(pooled(F.relu(self.bn1(out))))
        return logits


class VGG(nn.Module):
    """Simonyan & Zisserman 2014 (1409.1556) with batch norm, one linear layer, and three poolings instead of five.

    Args:
        num_classes: size of the output.
        counts: convolutions of each of the five stages.
    """

    def __init__(self, num_classes: int, counts: tuple[int, ...]) -> None:
        super().__init__()
        inputs = 3
        for number, (count, outputs) in enumerate(zip(counts, (64, 128, 256, 512, 512), strict=True)):
            layers: list[nn.Module] = []
            for _ in range(count):
                layers += [nn.Conv2d(inputs, outputs, 3, padding=1), nn.BatchNorm2d(outputs), nn.ReLU()]
                inputs = outputs
            self.add_module(f"block{number}", nn.Sequential(*layers))
        self.classifier = nn.Linear(inputs, num_classes)
        draw_convolutions(self)
        draw_classifier(self.classifier)

    def forward(self, images: Tensor) -> Tensor:
        """[B, 3, H, W] -> logits [B, C]."""
        out = images
        for number in range(3):
            out = F.max_pool2d(self.get_submodule(f"block{number}")(out), 2)
        logits: Tensor = self.classifier(pooled(self.get_submodule("block4")(self.get_submodule("block3")(out))))
        return logits


NETWORKS: dict[str, Callable[..., nn.Module]] = {
    **{f"resnet{depth}": partial(ResNet, depth=depth) for depth in (8, 14, 20, 32, 44, 56, 110)},
    **{f"resnet{depth}x4": partial(ResNet, depth=depth, width=4, stem=2) for depth in (8, 32)},
    **{f"wrn_{depth}_{width}": partial(WideResNet, depth=depth, width=width) for depth in (16, 40) for width in (1, 2)},
    "vgg8": partial(VGG, counts=(1, 1, 1, 1, 1)),
    "vgg11": partial(VGG, counts=(1, 1, 2, 2, 2)),
    "vgg13": partial(VGG, counts=(2, 2, 2, 2, 2)),
    "vgg16": partial(VGG, counts=(2, 2, 3, 3, 3)),
    "vgg19": partial(VGG, counts=(2, 2, 4, 4, 4)),
    "ResNet50": ResNet50,
    "MobileNetV2": MobileNetV2,
    "ShuffleNetV1": ShuffleNetV1,
    "ShuffleNetV2": ShuffleNetV2,
}


def build(name: str, spec: ModelSpec, num_classes: int, channels: int) -> nn.Module:
    """Return a network with random weights; gray images are repeated to its three channels.

    Raises:
        KdcacheError: for an unknown name or argument, or images with another number of channels.
    """
    if name not in NETWORKS:
        raise UsageError(
            f"there is no network cifar:{name}{did_you_mean(name, NETWORKS)}", f"use one of {', '.join(NETWORKS)}"
        )
    check_channels(spec, channels)
    model = construct(NETWORKS[name], spec, num_classes=num_classes)
    model.register_forward_pre_hook(Fit(1, 1))
    return model

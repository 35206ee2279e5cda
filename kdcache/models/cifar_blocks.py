"""What the networks for CIFAR-100 are built of."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, nn


def conv(inputs: int, outputs: int, size: int = 3, stride: int = 1, groups: int = 1) -> nn.Conv2d:
    """A convolution that keeps the sides of an image, but for its stride; a normalization after it has the bias."""
    return nn.Conv2d(inputs, outputs, size, stride, padding=size // 2, groups=groups, bias=False)


def projection(inputs: int, outputs: int, stride: int) -> nn.Sequential:
    """What brings the input of a residual block to the shape of its output; nothing where it has it."""
    if stride == 1 and inputs == outputs:
        return nn.Sequential()
    return nn.Sequential(conv(inputs, outputs, 1, stride), nn.BatchNorm2d(outputs))


def stage(block: Callable[[int, int, int], nn.Module], inputs: int, outputs: int, count: int, stride: int) -> nn.Module:
    """`count` blocks, the first of which has the stride and the other number of channels."""
    return nn.Sequential(*(block(outputs if i else inputs, outputs, 1 if i else stride) for i in range(count)))


def draw_convolutions(model: nn.Module) -> None:
    """He et al. 2015 (1502.01852), by the number of outputs."""
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
            if module.bias is not None:
                nn.init.zeros_(module.bias)


def draw_classifier(linear: nn.Linear) -> None:
    """Small weights, as the compared VGG and MobileNetV2 begin."""
    nn.init.normal_(linear.weight, std=0.01)
    nn.init.zeros_(linear.bias)


def pooled(features: Tensor) -> Tensor:
    """[B, channels, H, W] -> [B, channels]."""
    return features.mean(dim=(2, 3))

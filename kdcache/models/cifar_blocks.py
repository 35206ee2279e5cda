"""Building blocks of the networks for CIFAR-100."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, nn


def conv(inputs: int, outputs: int, size: int = 3, stride: int = 1, groups: int = 1) -> nn.Conv2d:
    """Return a convolution without bias that keeps the size of an image up to its stride."""
    return nn.Conv2d(inputs, outputs, size, stride, padding=size // 2, groups=groups, bias=False)


def projection(inputs: int, outputs: int, stride: int) -> nn.Sequential:
    """Return the projection of a residual block's input to the shape of its output; the identity if they agree."""
    if stride == 1 and inputs == outputs:
        return nn.Sequential()
    return nn.Sequential(conv(inputs, outputs, 1, stride), nn.BatchNorm2d(outputs))


def stage(block: Callable[[int, int, int], nn.Module], inputs: int, outputs: int, count: int, stride: int) -> nn.Module:
    """Return `count` blocks, the first of which has the stride and changes the number of channels."""
    return nn.Sequential(*(block(outputs if i else inputs, outputs, 1 if i else stride) for i in range(count)))


def draw_convolutions(model: nn.Module) -> None:
    """Initialize convolutions as He et al. 2015 (1502.01852), by the number of outputs."""
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
            if module.bias is not None:
                nn.init.zeros_(module.bias)


def draw_classifier(linear: nn.Linear) -> None:
    """Initialize a classifier with small weights, as in the published VGG and MobileNetV2."""
    nn.init.normal_(linear.weight, std=0.01)
    nn.init.zeros_(linear.bias)


def pooled(features: Tensor) -> Tensor:
    """Return the mean over the image, [B, channels, H, W] -> [B, channels]."""
    return features.mean(dim=(2, 3))

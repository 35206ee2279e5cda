"""Small networks for small images, which learn digits or simple scenes in seconds on a CPU."""

from __future__ import annotations

from torch import Tensor, nn


class SmallCNN(nn.Module):
    """Three 3x3 convolutions with batch norm, the last two with stride 2, then average pooling and a linear layer.

    Args:
        num_classes: size of the output.
        channels: of the images.
        width: channels of the first convolution; the others have 2 and 4 times as many.
    """

    def __init__(self, num_classes: int, channels: int, width: int = 32) -> None:
        super().__init__()
        self.features = nn.Sequential(
            *self._block(channels, width, 1), *self._block(width, 2 * width, 2), *self._block(2 * width, 4 * width, 2)
        )
        self.classifier = nn.Linear(4 * width, num_classes)

    @staticmethod
    def _block(inputs: int, outputs: int, stride: int) -> tuple[nn.Module, ...]:
        convolution = nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False)
        return convolution, nn.BatchNorm2d(outputs), nn.ReLU(inplace=True)

    def forward(self, images: Tensor) -> Tensor:
        """[B, channels, H, W] -> logits [B, C]."""
        logits: Tensor = self.classifier(self.features(images).mean(dim=(2, 3)))
        return logits


class SmallMLP(nn.Module):
    """One hidden layer on the flattened pixels.

    Args:
        num_classes: size of the output.
        channels: of the images.
        height: of the images.
        width_of_image: of the images.
        width: units of the hidden layer.
    """

    def __init__(self, num_classes: int, channels: int, height: int, width_of_image: int, width: int = 32) -> None:
        super().__init__()
        self.hidden = nn.Linear(channels * height * width_of_image, width)
        self.classifier = nn.Linear(width, num_classes)

    def forward(self, images: Tensor) -> Tensor:
        """[B, channels, H, W] -> logits [B, C]."""
        logits: Tensor = self.classifier(self.hidden(images.flatten(1)).relu())
        return logits


class SmallFCN(nn.Module):
    """Says a class of every 4 x 4 pixels: the convolutions of `SmallCNN`, two dilated ones, and a linear layer.

    Args:
        num_classes: size of the output.
        channels: of the images.
        width: channels of the first convolution; the others have 2 and 4 times as many.
    """

    def __init__(self, num_classes: int, channels: int, width: int = 16) -> None:
        super().__init__()
        self.features = nn.Sequential(
            *SmallCNN._block(channels, width, 1),
            *SmallCNN._block(width, 2 * width, 2),
            *SmallCNN._block(2 * width, 4 * width, 2),
            nn.Conv2d(4 * width, 4 * width, 3, padding=2, dilation=2, bias=False),
            nn.BatchNorm2d(4 * width),
            nn.ReLU(inplace=True),
            nn.Conv2d(4 * width, 4 * width, 3, padding=4, dilation=4, bias=False),
            nn.BatchNorm2d(4 * width),
            nn.ReLU(inplace=True),
        )
        self.classifier = nn.Conv2d(4 * width, num_classes, 1)

    def forward(self, images: Tensor) -> Tensor:
        """[B, channels, H, W] -> logits [B, C, H / 4, W / 4]."""
        logits: Tensor = self.classifier(self.features(images))
        return logits

"""Train a 1000-class teacher and a half-trained student on rendered letters, in two to four minutes on a CPU.

The classes are the first letters that six DejaVu fonts share (they come with matplotlib); an image is one of them in a
random font, rotated, sheared, shifted, dimmed and with noise. Many letters of Latin, Greek and Cyrillic look alike, so
that the teacher is unsure among a few classes, as one of photographs is: after 2000 steps its accuracy is about 76% on
new images, with a mean top probability of 0.67. It has 512 features in the last layer, as ResNet-18 has, so that the
rank of its logits has the same bound.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import matplotlib
import numpy as np
import torch
from matplotlib.ft2font import FT2Font
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor, nn
from torch.nn import functional as F

from kdcache.cli import output

_FOLDER = Path(matplotlib.get_data_path()) / "fonts" / "ttf"
_DEJAVU = tuple(
    f"DejaVu{style}" for style in ("Sans", "Sans-Bold", "Sans-Oblique", "Serif", "Serif-Bold", "Serif-Italic")
)
SIZE = 28
_BATCH = 256


class Logits(NamedTuple):
    """Logits of a teacher and a student for images that neither was trained on.

    Attributes:
        teacher: [N, C] float32.
        student: [N, C] float32.
        labels: [N] int64.
    """

    teacher: Tensor
    student: Tensor
    labels: Tensor


def train(classes: int, steps: int, rows: int) -> Logits:
    """Train both, the student for a quarter of the `steps`, and return their logits for `rows` new images."""
    torch.manual_seed(0)
    typefaces = Typefaces(_DEJAVU, letters_of(_DEJAVU, classes))
    output.say(f"training a teacher of {classes} classes, {steps} steps, and a student, {steps // 4} steps")
    images, labels = typefaces.images(rows, torch.Generator().manual_seed(3))
    teacher = trained(network(classes, width=32, features=512), typefaces, steps, seed=1)
    student = trained(network(classes, width=16, features=256), typefaces, steps // 4, seed=2)
    return Logits(_answers(teacher, images), _answers(student, images), labels)


def letters_of(names: Sequence[str], count: int) -> list[str]:
    """Return the first letters that some of matplotlib's fonts share."""
    shared = set.intersection(*(set(FT2Font(str(_FOLDER / f"{name}.ttf")).get_charmap()) for name in names))
    return [chr(code) for code in sorted(shared) if unicodedata.category(chr(code)).startswith("L")][:count]


class Typefaces:
    """Letters drawn in some typefaces.

    Args:
        names: of matplotlib's fonts.
        letters: the classes.
    """

    def __init__(self, names: Sequence[str], letters: Sequence[str]) -> None:
        self.classes = len(letters)
        drawn = np.zeros((len(names), len(letters), SIZE, SIZE), np.float32)
        for style, name in enumerate(names):
            font = ImageFont.truetype(str(_FOLDER / f"{name}.ttf"), 18)
            for number, letter in enumerate(letters):
                image = Image.new("L", (SIZE, SIZE))
                ImageDraw.Draw(image).text((SIZE / 2, SIZE / 2), letter, fill=255, font=font, anchor="mm")
                drawn[style, number] = np.asarray(image, np.float32) / 255
        self._glyphs = torch.from_numpy(drawn)

    def images(self, count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Return (images [count, 1, SIZE, SIZE] float32, labels [count] int64) of random letters."""

        def around_0(*shape: int) -> Tensor:
            return torch.rand(*shape, generator=generator) * 2 - 1

        labels = torch.randint(self.classes, (count,), generator=generator)
        styles = torch.randint(len(self._glyphs), (count,), generator=generator)
        images = self._glyphs[styles, labels].unsqueeze(1)
        placed = torch.cat([torch.eye(2) + 0.25 * around_0(count, 2, 2), 0.2 * around_0(count, 2, 1)], dim=2)
        grid = F.affine_grid(placed, list(images.shape), align_corners=False)
        images = F.grid_sample(images, grid, align_corners=False)
        dimmed = images * (0.75 + 0.25 * around_0(count, 1, 1, 1))
        return dimmed + 0.1 * torch.randn(images.shape, generator=generator), labels


def network(classes: int, width: int, features: int) -> nn.Sequential:
    """Return a network of three convolutions and a hidden layer of `features`, for images [B, 1, SIZE, SIZE]."""
    channels = (1, width, 2 * width, 4 * width)
    layers: list[nn.Module] = []
    for inputs, outputs in pairwise(channels):
        layers += [nn.Conv2d(inputs, outputs, 3, 2, padding=1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU()]
    flat = channels[-1] * (SIZE // 7) ** 2
    layers += [nn.Flatten(), nn.Linear(flat, features, bias=False), nn.BatchNorm1d(features), nn.ReLU()]
    return nn.Sequential(*layers, nn.Linear(features, classes))


def trained(network: nn.Sequential, typefaces: Typefaces, steps: int, seed: int) -> nn.Sequential:
    """Train a network with cross-entropy on new images, and return it in evaluation mode."""
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.SGD(network.parameters(), lr=0.2, momentum=0.9, weight_decay=5e-4, nesterov=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.2, total_steps=steps)
    for _ in range(steps):
        images, labels = typefaces.images(_BATCH, generator)
        optimizer.zero_grad()
        F.cross_entropy(network(images), labels).backward()  # type: ignore[no-untyped-call]  # torch's
        optimizer.step()
        schedule.step()
    return network.eval()


@torch.no_grad()
def _answers(network: nn.Sequential, images: Tensor) -> Tensor:
    return torch.cat([network(images[start : start + _BATCH]) for start in range(0, len(images), _BATCH)])

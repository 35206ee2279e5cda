"""MixUp and CutMix as the last step of a transform, which mixes two images into one.

They compute the same as torchvision's MixUp and CutMix, for one image and its partner instead of a batch.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.distributions import Beta

from kdcache.config.transform import step_names
from kdcache.errors import UsageError

Step = dict[str, dict[str, Any]]

Mixture = tuple[Tensor, Tensor, float]
"""(image [channels, H, W], its partner, returned unchanged, and the share of the image's own label)."""

Mixing = Callable[[Tensor, Tensor, float], Mixture]
"""A step that mixes the partner into an image; torchvision's RandomApply and RandomChoice pass on all arguments."""


class MixUp:
    """A weighted sum of an image and its partner.

    Args:
        alpha: parameter of Beta(alpha, alpha), from which the image's weight is drawn.

    Raises:
        ValueError: if alpha is not above 0, or too large.

    Source: Zhang, Cisse, Dauphin & Lopez-Paz 2018 (1710.09412); torchvision.transforms.v2.MixUp.
    """

    def __init__(self, alpha: float = 1.0) -> None:
        self._ratios = _beta(alpha)

    def __call__(self, image: Tensor, partner: Tensor, share: float) -> Mixture:
        """Draw a weight, and return the mixture."""
        weight = self._ratios.sample().item()
        return partner.mul(1.0 - weight).add_(image.mul(weight)), partner, share * weight


class CutMix:
    """An image in which a random box is replaced by the partner's pixels.

    Args:
        alpha: parameter of Beta(alpha, alpha), from which the share of the image outside the box is drawn, before the
            box is clipped at the edges.

    Raises:
        ValueError: if alpha is not above 0, or too large.

    Source: Yun et al. 2019 (1905.04899); torchvision.transforms.v2.CutMix.
    """

    def __init__(self, alpha: float = 1.0) -> None:
        self._ratios = _beta(alpha)

    def __call__(self, image: Tensor, partner: Tensor, share: float) -> Mixture:
        """Draw the size and center of the box, and return the mixture."""
        height, width = image.shape[-2:]
        half = 0.5 * math.sqrt(1.0 - self._ratios.sample().item())
        columns = _draw_range(width, int(half * width))
        rows = _draw_range(height, int(half * height))
        mixed = image.clone()
        mixed[..., rows, columns] = partner[..., rows, columns]
        box = (rows.stop - rows.start) * (columns.stop - columns.start)
        return mixed, partner, share * (1.0 - box / (width * height))


def _beta(alpha: float) -> Beta:
    concentration = torch.tensor([float(alpha)])
    if not 0.0 < concentration.item() < math.inf:
        raise ValueError(f"alpha must be a finite float32 above 0, not {alpha}")
    return Beta(concentration, concentration)


def _draw_range(side: int, half: int) -> slice:
    """Draw a center in [0, side), and return the range of `half` to both sides of it, clipped to [0, side)."""
    center = int(torch.randint(side, (1,)))
    return slice(max(center - half, 0), min(center + half, side))


MIXINGS: dict[str, Callable[..., Mixing]] = {"MixUp": MixUp, "CutMix": CutMix}

_RANDOM_CONTAINERS = {"RandomApply", "RandomChoice"}


def split_mixing(transform: list[Step]) -> tuple[list[Step], Step | None]:
    """Return the steps for a single image, and the last step if it mixes two images, else None.

    Raises:
        UsageError: if another step mixes two images.
    """
    mixing = transform[-1] if transform and _mixes(transform[-1]) else None
    single = transform if mixing is None else transform[:-1]
    if misplaced := sorted(MIXINGS.keys() & set(step_names(single))):
        raise UsageError(
            f"{' and '.join(misplaced)} can only be the last step of a transform: it mixes two transformed images",
            "put it at the end; to draw one of several, write "
            "- RandomChoice: {transforms: [{MixUp: {alpha: 0.2}}, {CutMix: {alpha: 1.0}}]}",
        )
    return single, mixing


def _mixes(step: Any) -> bool:
    """Return whether a step mixes two images, by itself or by its inner steps."""
    if not (isinstance(step, dict) and len(step) == 1):
        return False
    ((name, arguments),) = step.items()
    inner = arguments.get("transforms") if name in _RANDOM_CONTAINERS and isinstance(arguments, dict) else None
    return name in MIXINGS or (isinstance(inner, list) and bool(inner) and all(map(_mixes, inner)))

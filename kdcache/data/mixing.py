"""MixUp and CutMix as the last step of a transform, which mixes two images into one.

They draw and compute as those of torchvision, for one image and its partner instead of a batch.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.distributions import Beta

from kdcache.config.schema import step_names
from kdcache.errors import UsageError

Step = dict[str, dict[str, Any]]

Mixture = tuple[Tensor, Tensor, float]
"""(image [channels, H, W], its partner, handed on as it is, and the share of the image's own label)."""

Mixing = Callable[[Tensor, Tensor, float], Mixture]
"""A step that mixes more of the partner into an image; torchvision's RandomApply and RandomChoice hand all three on."""


class MixUp:
    """A weighted sum of the two.

    Args:
        alpha: the image's weight is drawn from Beta(alpha, alpha).

    Raises:
        ValueError: if alpha is not above 0, or too large.

    Source: Zhang, Cisse, Dauphin & Lopez-Paz 2018 (1710.09412); torchvision.transforms.v2.MixUp.
    """

    def __init__(self, alpha: float = 1.0) -> None:
        self._ratios = _beta(alpha)

    def __call__(self, image: Tensor, partner: Tensor, share: float) -> Mixture:
        """Draw a ratio, and mix."""
        ratio = self._ratios.sample().item()
        return partner.mul(1.0 - ratio).add_(image.mul(ratio)), partner, share * ratio


class CutMix:
    """A box of the partner in the image.

    Args:
        alpha: the part of the image outside the box, but for what of the box is cut off at the edges, is drawn from
            Beta(alpha, alpha).

    Raises:
        ValueError: if alpha is not above 0, or too large.

    Source: Yun et al. 2019 (1905.04899); torchvision.transforms.v2.CutMix.
    """

    def __init__(self, alpha: float = 1.0) -> None:
        self._ratios = _beta(alpha)

    def __call__(self, image: Tensor, partner: Tensor, share: float) -> Mixture:
        """Draw a ratio and a place for the box, and mix."""
        height, width = image.shape[-2:]
        half = 0.5 * math.sqrt(1.0 - self._ratios.sample().item())
        columns = _within(width, int(half * width))
        rows = _within(height, int(half * height))
        mixed = image.clone()
        mixed[..., rows, columns] = partner[..., rows, columns]
        box = (rows.stop - rows.start) * (columns.stop - columns.start)
        return mixed, partner, share * (1.0 - box / (width * height))


def _beta(alpha: float) -> Beta:
    concentration = torch.tensor([float(alpha)])
    if not 0.0 < concentration.item() < math.inf:
        raise ValueError(f"alpha {alpha} is not a float32 above 0")
    return Beta(concentration, concentration)


def _within(side: int, reach: int) -> slice:
    """As far as `reach` to both sides of a place that is drawn, within [0, side)."""
    center = int(torch.randint(side, (1,)))
    return slice(max(center - reach, 0), min(center + reach, side))


MIXINGS: dict[str, Callable[..., Mixing]] = {"MixUp": MixUp, "CutMix": CutMix}

_DRAWING = {"RandomApply", "RandomChoice"}


def split_mixing(transform: list[Step]) -> tuple[list[Step], Step | None]:
    """Return the steps for a single image, and the last step if it mixes two images.

    Raises:
        UsageError: if a mixing stands anywhere else.
    """
    mixing = transform[-1] if transform and _mixes(transform[-1]) else None
    alone = transform if mixing is None else transform[:-1]
    if astray := sorted(MIXINGS.keys() & set(step_names(alone))):
        raise UsageError(
            f"{' and '.join(astray)} can only be the last step of a transform: it mixes two images that are done",
            "put it at the end; one of several is drawn by "
            "- RandomChoice: {transforms: [{MixUp: {alpha: 0.2}}, {CutMix: {alpha: 1.0}}]}",
        )
    return alone, mixing


def _mixes(step: Any) -> bool:
    if not (isinstance(step, dict) and len(step) == 1):
        return False
    ((name, arguments),) = step.items()
    inner = arguments.get("transforms") if name in _DRAWING and isinstance(arguments, dict) else None
    return name in MIXINGS or (isinstance(inner, list) and bool(inner) and all(map(_mixes, inner)))

"""Before the temperatures: normalization of the raw logits of student and teacher alike, [B, C] -> [B, C]."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from kdcache.losses.options import Presets

_FLAT = 1e-5
"""Deviation, in units of a logit, up to which a row counts as constant."""
_ROUNDING = 8
"""The same in units of the rounding of the largest logit of the row."""


@dataclass(frozen=True)
class Normalization:
    """A normalization, which has no options.

    Attributes:
        compute: the function.
        presets: loss names that choose it, each with what it sets beside it.
        needs_tail_shape: whether it needs the logits of all classes, so that the mass outside a head is not enough.
        removes_level: whether a constant that is added to a row of logits no longer changes anything after it.
    """

    compute: Callable[[Tensor], Tensor]
    presets: Presets = field(default_factory=dict)
    needs_tail_shape: bool = False
    removes_level: bool = False


def none(logits: Tensor) -> Tensor:
    """Return the logits unchanged."""
    return logits


NONE = Normalization(none)


def z_score(logits: Tensor) -> Tensor:
    """Standardize each row: subtract its mean and divide by its standard deviation.

    The student then need not have the teacher's range of logits, only the shape of its rows.

    A row of equal logits has no shape: the result is 0, and so is its gradient, where the published code has a gradient
    of 1e7. A row counts as constant up to a deviation of 1e-5, or 8 units of rounding of its largest logit.

    Source: Sun et al. 2024 (2403.01427); code github.com/sunshangquan/logit-standardization-KD at 2ba3954,
    mdistiller/distillers/KD_ours.py: deviation with n - 1, and 1e-7 added to it.
    """
    centered, deviation = logits - logits.mean(dim=1, keepdim=True), logits.std(dim=1, keepdim=True)
    rounding = _ROUNDING * torch.finfo(logits.dtype).eps * logits.detach().abs().amax(dim=1, keepdim=True)
    is_flat = deviation.detach() <= rounding.clamp_min(_FLAT)
    # The deviation is replaced before the division: 0 times an infinite slope would still spoil the gradient.
    return torch.where(is_flat, 0.0, centered / (torch.where(is_flat, 1.0, deviation) + 1e-7))


# The authors' configurations: weight 9 at T = 2.
Z_SCORE = Normalization(
    z_score,
    presets={"zscore": {"kd_weight": 9.0, "temperature": {"kind": "constant", "tau": 2.0}}},
    needs_tail_shape=True,
    removes_level=True,
)

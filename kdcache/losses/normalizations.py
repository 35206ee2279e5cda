"""In front of the temperatures: what is done to the raw logits of student and teacher alike, [B, C] -> [B, C]."""

from __future__ import annotations

from torch import Tensor


def none(logits: Tensor) -> Tensor:
    """The logits as they are."""
    return logits


def z_score(logits: Tensor) -> Tensor:
    """Logit standardization: each row less its mean, over its standard deviation.

    The student need not have the teacher's logit range any more, only its shape. Of a row of equal logits the result is
    0; its gradient is finite, if large (1e7), for the 1e-7 stands beside the deviation.

    Source: Sun et al. 2024 (2403.01427); code github.com/sunshangquan/logit-standardization-KD at 2ba3954,
    mdistiller/distillers/KD_ours.py: deviation with n - 1, and 1e-7.
    """
    return (logits - logits.mean(dim=1, keepdim=True)) / (logits.std(dim=1, keepdim=True) + 1e-7)

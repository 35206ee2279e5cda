"""Errors of decoded logits, in measures that matter to a student.

The functions take raw logits [B, C] and a temperature.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

TEMPERATURES = (1, 2, 4, 8)


def total_variation(true: Tensor, decoded: Tensor, temperature: float) -> Tensor:
    """Return the total variation, sum of |p_j - p'_j| / 2, [B]: the largest difference in probability of any event."""
    return 0.5 * ((true / temperature).softmax(dim=1) - (decoded / temperature).softmax(dim=1)).abs().sum(dim=1)


def divergence(true: Tensor, decoded: Tensor, temperature: float) -> Tensor:
    """Return KL(p || p') in nats, [B]."""
    log_p, log_q = (true / temperature).log_softmax(dim=1), (decoded / temperature).log_softmax(dim=1)
    return F.kl_div(log_q, log_p, reduction="none", log_target=True).sum(dim=1)


def gradient_error(true: Tensor, decoded: Tensor, student: Tensor, temperature: float) -> float:
    """Return the relative error of the KD gradient of a batch with respect to the student's logits.

    The gradient of T^2 KL is T (q - p), so this is |p' - p| / |q - p|, with Frobenius norms over the batch.

    Args:
        true: [B, C], the teacher's logits.
        decoded: [B, C], the logits decoded from the cache.
        student: [B, C], the student's logits.
        temperature: T.
    """
    p, decoded_p, q = ((logits / temperature).softmax(dim=1) for logits in (true, decoded, student))
    return float((decoded_p - p).norm() / (q - p).norm().clamp_min(torch.finfo(p.dtype).tiny))

"""How far decoded logits are from the true ones, in the measures that matter to a student.

All take raw logits `[B, C]` and a temperature, and return one value a row, `[B]`.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

TEMPERATURES = (1, 2, 4, 8)


def total_variation(true: Tensor, decoded: Tensor, temperature: float) -> Tensor:
    """Half the sum of |p_j - p'_j|: the largest difference in probability that any set of classes can have, [0, 1]."""
    return 0.5 * ((true / temperature).softmax(dim=1) - (decoded / temperature).softmax(dim=1)).abs().sum(dim=1)


def divergence(true: Tensor, decoded: Tensor, temperature: float) -> Tensor:
    """KL(p || p') in nats."""
    log_p, log_q = (true / temperature).log_softmax(dim=1), (decoded / temperature).log_softmax(dim=1)
    return F.kl_div(log_q, log_p, reduction="none", log_target=True).sum(dim=1)


def gradient_error(true: Tensor, decoded: Tensor, student: Tensor, temperature: float) -> float:
    """Relative error of the KD gradient of a batch with respect to the student's logits.

    The gradient of T^2 KL is T (q - p): so this is |p' - p| / |q - p|, Frobenius norms over the batch.

    Args:
        true: [B, C], the teacher's logits.
        decoded: [B, C], what the cache gives for them.
        student: [B, C], logits of the student whose gradient is meant.
        temperature: T.
    """
    p, decoded_p, q = ((logits / temperature).softmax(dim=1) for logits in (true, decoded, student))
    return float((decoded_p - p).norm() / (q - p).norm().clamp_min(torch.finfo(p.dtype).tiny))

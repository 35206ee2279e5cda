"""The log-probability of a next token that a source does not state."""

from __future__ import annotations

import math

import torch
from torch import Tensor

_LEAST_REST = 2.0**-24


def label_log_probs(
    tokens: Tensor, log_probs: Tensor, next_tokens: Tensor, size: int, stated: Tensor | None = None
) -> Tensor:
    """Return the log-probabilities of the next tokens, [n]: outside the top k as stated, or an even share of the rest.

    Args:
        tokens: [n, k], the most probable ones.
        log_probs: [n, k], theirs.
        next_tokens: [n].
        size: V.
        stated: [n], the log-probabilities of the next tokens; None if they are not known.
    """
    at_label = tokens == next_tokens.unsqueeze(1)
    if stated is None:
        rest = (1 - log_probs.exp().sum(dim=1)).clamp_min(_LEAST_REST).log()
        stated = (rest - math.log(max(size - tokens.shape[1], 1))).minimum(log_probs.amin(dim=1))
    return torch.where(at_label.any(dim=1), torch.where(at_label, log_probs, 0.0).sum(dim=1), stated)

"""How good logits are: functions of logits [N, C] and the true labels [N] int64, all of them known.

The probabilities are those at T = 1, computed in float64.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

BINS = 15
"""Of the expected calibration error, as many as in its source."""


def top_k_accuracy(logits: Tensor, labels: Tensor, k: int) -> float:
    """Share of rows whose true class is among the k largest, [0, 1]; of equal logits the lower class comes first."""
    own = logits.gather(1, labels[:, None])
    before = torch.arange(logits.shape[1], device=logits.device) < labels[:, None]
    rank = ((logits > own) | ((logits == own) & before)).sum(dim=1)
    return (rank < k).double().mean().item()


def negative_log_likelihood(logits: Tensor, labels: Tensor) -> float:
    """Mean of -log p of the true class, in nats."""
    return -logits.double().log_softmax(dim=1).gather(1, labels[:, None]).mean().item()


class Reliability(NamedTuple):
    """Rows put into bins of their confidence, the largest probability: (0, 1/bins], (1/bins, 2/bins] and so on.

    Attributes:
        rows: [bins] int64, how many are in each.
        correct: [bins] float64, of those the right ones.
        confidence: [bins] float64, sum of their confidences.
    """

    rows: Tensor
    correct: Tensor
    confidence: Tensor

    @property
    def error(self) -> float:
        """The expected calibration error."""
        return ((self.correct - self.confidence).abs().sum() / self.rows.sum()).item()


def reliability(logits: Tensor, labels: Tensor, bins: int = BINS) -> Reliability:
    """How often rows of some confidence are right."""
    confidence, says = logits.double().softmax(dim=1).max(dim=1)
    edges = torch.linspace(0, 1, bins + 1, dtype=torch.float64, device=logits.device)
    which = torch.bucketize(confidence, edges[1:-1])
    none = torch.zeros(bins, dtype=torch.float64, device=logits.device)
    return Reliability(
        torch.bincount(which, minlength=bins),
        none.index_add(0, which, (says == labels).double()),
        none.index_add(0, which, confidence),
    )


def expected_calibration_error(logits: Tensor, labels: Tensor, bins: int = BINS) -> float:
    """How far confidence and accuracy are apart, [0, 1].

    The confidence of a row is its largest probability. Rows are put into bins of equal width, (0, 1/bins] and so on;
    the error is the mean over the rows of |accuracy - mean confidence| of their bin.

    Source: Guo, Pleiss, Sun & Weinberger 2017 (1706.04599), eq. 3.
    """
    return reliability(logits, labels, bins).error

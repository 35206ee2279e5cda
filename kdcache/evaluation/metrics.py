"""Metrics of classifiers, as functions of logits [N, C] and labels [N] int64, none of them -1.

Probabilities are taken at T = 1 and computed in float64.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

BINS = 15
"""Default number of bins of the expected calibration error, as in its source."""


def top_k_accuracy(logits: Tensor, labels: Tensor, k: int) -> float:
    """Return the share of rows whose label is among the k largest logits, [0, 1]; ties go to the lower class."""
    label_logits = logits.gather(1, labels[:, None])
    is_lower_class = torch.arange(logits.shape[1], device=logits.device) < labels[:, None]
    rank = ((logits > label_logits) | ((logits == label_logits) & is_lower_class)).sum(dim=1)
    return (rank < k).double().mean().item()


def negative_log_likelihood(logits: Tensor, labels: Tensor) -> float:
    """Return the mean of -log p(label), in nats."""
    return -logits.double().log_softmax(dim=1).gather(1, labels[:, None]).mean().item()


class Reliability(NamedTuple):
    """A reliability diagram: rows in bins of equal width of their confidence, (0, 1/bins], (1/bins, 2/bins], ...

    The confidence of a row is its largest probability.

    Attributes:
        rows: [bins] int64, rows per bin.
        correct: [bins] float64, correctly classified rows per bin.
        confidence: [bins] float64, sum of the confidences per bin.
    """

    rows: Tensor
    correct: Tensor
    confidence: Tensor

    @property
    def error(self) -> float:
        """The expected calibration error, [0, 1]."""
        return ((self.correct - self.confidence).abs().sum() / self.rows.sum()).item()


def reliability(logits: Tensor, labels: Tensor, bins: int = BINS) -> Reliability:
    """Compute the reliability diagram."""
    confidence, predicted = logits.double().softmax(dim=1).max(dim=1)
    edges = torch.linspace(0, 1, bins + 1, dtype=torch.float64, device=logits.device)
    bin_index = torch.bucketize(confidence, edges[1:-1])
    zeros = torch.zeros(bins, dtype=torch.float64, device=logits.device)
    return Reliability(
        torch.bincount(bin_index, minlength=bins),
        zeros.index_add(0, bin_index, (predicted == labels).double()),
        zeros.index_add(0, bin_index, confidence),
    )


def expected_calibration_error(logits: Tensor, labels: Tensor, bins: int = BINS) -> float:
    """Compute the expected calibration error, [0, 1].

    It is the mean over the rows of |accuracy - mean confidence| of their bin; see `Reliability`.

    Source: Guo, Pleiss, Sun & Weinberger 2017 (1706.04599), eq. 3.
    """
    return reliability(logits, labels, bins).error

"""What a language model says at taught positions: against the next tokens, and against its teacher at T = 1."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from kdcache.losses.chunked_head import chunk_size
from kdcache.losses.fused_tokens import SoftTarget, token_sums
from kdcache.losses.lm_head import LMHead
from kdcache.losses.token_targets import TokenTargets, head_and_tail

_ELEMENTS = 2**24
"""Logits that are scored at once at most: 64 MiB in float32."""


class TokenScore(NamedTuple):
    """How a language model predicts the next tokens at some positions.

    Attributes:
        positions: their number.
        cross_entropy: mean of -log p(next token), nats.
        accuracy: share of positions whose most probable token is the next one.
        kl: mean KL divergence from the teacher to the network at T = 1, nats; where the cache has only the mass of the
            teacher's tail, over the stored tokens and all others together, which is a lower bound. None without a
            teacher whose probabilities are stored.
        agreement: share of positions with the same most probable token as the teacher; None as for `kl`.
    """

    positions: int
    cross_entropy: float
    accuracy: float
    kl: float | None
    agreement: float | None

    @property
    def perplexity(self) -> float:
        """The exponential of the cross-entropy."""
        return math.exp(self.cross_entropy) if self.cross_entropy < math.log(1e300) else math.inf


class Positions(NamedTuple):
    """Some positions, with the logits of a network.

    Attributes:
        logits: [n, V] float32.
        labels: [n] int64, the next tokens.
        targets: of the teacher; None without one.
    """

    logits: Tensor
    labels: Tensor
    targets: TokenTargets | None


def positions_of(hidden: Tensor, head: LMHead, labels: Tensor, targets: TokenTargets | None) -> Iterator[Positions]:
    """Yield positions with their logits, in chunks.

    Args:
        hidden: [n, d], last hidden states.
        head: of the network, cut to the vocabulary of the cache.
        labels: [n] int64, the next tokens.
        targets: of the teacher; None without one.
    """
    size = chunk_size(len(head.weight), _ELEMENTS)
    for start in range(0, len(hidden), size):
        which = slice(start, start + size)
        part = None if targets is None else targets[which]
        yield Positions(head.logits(hidden[which]), labels[which], part)


class TokenSums:
    """The sums that a `TokenScore` is made of.

    Args:
        device: of the positions.
    """

    def __init__(self, device: torch.device | str) -> None:
        # Positions, their cross-entropy and accuracy; positions with a teacher, their KL and agreement.
        self.sums = torch.zeros(6, dtype=torch.float64, device=device)

    @torch.no_grad()
    def add(self, positions: Positions) -> None:
        """Add positions."""
        logits, labels, targets = positions
        largest = logits.argmax(dim=1)
        cross_entropy = torch.nn.functional.cross_entropy(logits, labels, reduction="none").double().sum()
        found = [logits.new_tensor(len(labels)), cross_entropy, (largest == labels).sum()]
        if targets is not None and targets.draws is None:
            found += [found[0], kl_sum(logits, targets), (largest == targets.indices[:, 0]).sum()]
        self.sums[: len(found)] += torch.stack([value.double() for value in found])

    def score(self) -> TokenScore:
        """Return the score of all positions that were added."""
        count, cross_entropy, accuracy, compared, kl, agreement = self.sums.tolist()
        mean = max(count, 1)
        return TokenScore(
            int(count),
            cross_entropy / mean,
            accuracy / mean,
            kl / compared if compared else None,
            agreement / compared if compared else None,
        )


def kl_sum(logits: Tensor, targets: TokenTargets) -> Tensor:
    """Return the sum over n positions of KL(teacher || network) at T = 1, [], nats.

    Args:
        logits: [n, V].
        targets: with a head. Without a shape the divergence is of K + 1 classes, the last of them the tail.
    """
    targets = targets.to(dtype=logits.dtype)
    soft = SoftTarget(targets.indices, *head_and_tail(targets, 1.0), targets if targets.has_shape else None)
    return token_sums(logits, None, soft, logits.new_ones(len(logits))).total

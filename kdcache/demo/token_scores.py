"""Networks on text that is held out, compared with the live teacher: every probability, and none from a cache."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from kdcache.data.text import TokenizedText
from kdcache.demo.text_teacher import batch_of
from kdcache.models.causal_lm import CausalLM

_SEQUENCES = 32
"""That go through a network at once."""


class HeldOutScore(NamedTuple):
    """Measures of a language model on text that is held out.

    Attributes:
        perplexity: exponential of the mean of -log p(next token).
        kl: mean KL divergence from the teacher at T = 1, nats, over all tokens of the vocabulary.
        agreement: share of positions with the same most probable token as the teacher.
    """

    perplexity: float
    kl: float
    agreement: float


class HeldOut:
    """Text that is held out, and what the teacher says of it.

    Args:
        text: as tokens.
        teacher: of the students.
        device: of the networks.
    """

    def __init__(self, text: TokenizedText, teacher: CausalLM, device: torch.device | str) -> None:
        self._text, self._device = text, device
        self._teacher = list(self._log_probs(teacher))

    @property
    def positions(self) -> int:
        """Number of the positions that are compared."""
        return sum(len(labels) for _, labels in self._teacher)

    def score(self, model: CausalLM) -> HeldOutScore:
        """Return the measures of a network, which is moved to the device."""
        sums = torch.zeros(3, dtype=torch.float64)
        for (p, labels), (q, _) in zip(self._teacher, self._log_probs(model), strict=True):
            parts = (
                F.nll_loss(q, labels, reduction="sum"),
                F.kl_div(q, p, reduction="sum", log_target=True),
                (q.argmax(dim=1) == p.argmax(dim=1)).sum(),
            )
            sums += torch.stack([part.double().cpu() for part in parts])
        nll, kl, agreement = (sums / self.positions).tolist()
        return HeldOutScore(math.exp(nll), kl, agreement)

    @torch.no_grad()
    def _log_probs(self, model: CausalLM) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield log-probabilities [n, V] float32 and next tokens [n] of some sequences at a time."""
        model.network.to(self._device).eval()
        head = model.head.cut(self._text.vocabulary_size)
        for which in torch.split(torch.arange(len(self._text)), _SEQUENCES):
            batch = batch_of(self._text, which.tolist()).to(self._device)
            yield head.logits(model.hidden_states(batch)).log_softmax(dim=1), batch.labels

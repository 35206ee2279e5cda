"""The last layer of a language model, from hidden states to logits, as plain tensors."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from kdcache.errors import UsageError
from kdcache.losses.token_targets import TokenTargets


@dataclass(frozen=True)
class LMHead:
    """The last layer of a language model: logits = softcap * tanh(z / softcap), z = scale * (h W^T + b).

    Attributes:
        weight: [V, d]; for a student whose vocabulary is padded, its first V rows.
        bias: [V]; None without.
        scale: factor of the logits (Cohere's `logit_scale`, 1 / Granite's `logits_scaling`).
        softcap: bound of the logits (Gemma 2); None without.
    """

    weight: Tensor
    bias: Tensor | None = None
    scale: float = 1.0
    softcap: float | None = None

    def cut(self, vocabulary_size: int) -> LMHead:
        """Return the head of the first V tokens: others, of padding or of the student alone, get probability 0."""
        bias = None if self.bias is None else self.bias[:vocabulary_size]
        return replace(self, weight=self.weight[:vocabulary_size], bias=bias)

    def product(self, hidden: Tensor) -> Tensor:
        """Return h W^T + b, [n, d] -> [n, V] float32 (float64 for float64)."""
        found = torch.nn.functional.linear(hidden, self.weight, self.bias)
        return found if found.dtype == torch.float64 else found.float()

    def logits_of(self, product: Tensor) -> Tensor:
        """Return the logits of a product, scaled and capped."""
        scaled = product if self.scale == 1.0 else product * self.scale
        return scaled if self.softcap is None else (scaled / self.softcap).tanh() * self.softcap

    def logits(self, hidden: Tensor) -> Tensor:
        """Return the logits, [n, d] -> [n, V] float32."""
        return self.logits_of(self.product(hidden))


def check_positions(hidden: Tensor, head: LMHead, labels: Tensor, targets: TokenTargets | None) -> None:
    """Check that hidden states, labels and targets are of the same positions, and the head of the same tokens.

    Raises:
        UsageError: for shapes that disagree, or a student that lacks tokens of the teacher.
    """
    if hidden.ndim != 2 or labels.shape != hidden.shape[:1] or labels.dtype != torch.int64:
        raise UsageError(
            f"hidden states are {list(hidden.shape)}, labels {labels.dtype} {list(labels.shape)}",
            "pass hidden states [n, d] of the taught positions and their next tokens, int64 [n]",
        )
    if head.weight.shape[1:] != hidden.shape[1:]:
        raise UsageError(
            f"the head is {list(head.weight.shape)}, and the hidden states have a width of {hidden.shape[1]}",
            "pass the head of the student that the hidden states are of, a weight [V, d]",
        )
    if targets is None:
        return
    if len(targets) != len(hidden):
        raise UsageError(
            f"there are {len(targets):,} targets and {len(hidden):,} hidden states",
            "select the taught positions of both, in the same order",
        )
    if len(head.weight) < targets.vocabulary_size:
        raise UsageError(
            f"the student has {len(head.weight):,} tokens, the teacher {targets.vocabulary_size:,}",
            "use a student with the teacher's tokenizer; tokens behind those of the teacher are allowed",
        )

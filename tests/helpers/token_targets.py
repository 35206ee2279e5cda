"""Targets of tokens, made from dense logits in float64, and logits like those of a language model."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from kdcache.losses.token_targets import TokenTargets

TEMPERATURES = (1.0, 4 / 3, 2.0, 4.0)


def language_logits(n: int, vocabulary_size: int, width: int = 16, seed: int = 0) -> Tensor:
    """Logits W h + b in float64: b falls as in Zipf's law, and a few directions of W have most of the variance."""
    generator = torch.Generator().manual_seed(seed)
    scales = 2.0 / torch.arange(1, width + 1, dtype=torch.float64).sqrt()
    weight = torch.randn(vocabulary_size, width, generator=generator, dtype=torch.float64) * scales
    hidden = torch.randn(n, width, generator=generator, dtype=torch.float64)
    ranks = torch.randperm(vocabulary_size, generator=generator) + 1
    return hidden @ weight.T - ranks.double().log() + 3.0


def targets_of(
    logits: Tensor,
    top_k: int,
    temperatures: tuple[float, ...] = TEMPERATURES,
    rank: int = 0,
    labels: Tensor | None = None,
) -> TokenTargets:
    """Targets of dense logits, in their precision: the head, and with a rank the projection of the tail.

    With labels the head has a column for the label, which repeats the first class where the label is in the head.
    """
    log_probs = logits.log_softmax(dim=1)
    head, indices = log_probs.topk(top_k, dim=1)
    if labels is not None:
        label = labels.unsqueeze(1)
        in_head = (indices == label).any(dim=1, keepdim=True)
        head = torch.cat([head, torch.where(in_head, -math.inf, log_probs.gather(1, label))], dim=1)
        indices = torch.cat([indices, torch.where(in_head, indices[:, :1], label)], dim=1)
    masses = [(logits / t).log_softmax(1).scatter(1, indices, -math.inf).logsumexp(dim=1) for t in temperatures]
    shape = {}
    if rank:
        mean = logits.mean(dim=0)
        _, _, directions = torch.linalg.svd(logits - mean, full_matrices=False)
        basis = directions[:rank]
        shape = {"coordinates": (logits - mean) @ basis.T, "basis": basis, "mean": mean}
    return TokenTargets(
        indices,
        head,
        torch.stack(masses, dim=1),
        temperatures,
        logits.shape[1],
        top_k,
        logits.logsumexp(dim=1),
        **shape,
    )


def drawn(logits: Tensor, rounds: int, temperature: float = 1.0, seed: int = 0) -> TokenTargets:
    """Targets of classes that are drawn from dense logits at a temperature."""
    generator = torch.Generator().manual_seed(seed)
    found = torch.multinomial((logits / temperature).softmax(dim=1), rounds, replacement=True, generator=generator)
    n, columns = len(logits), found.sort(dim=1).values
    ids, counts = torch.zeros_like(columns), torch.zeros(n, rounds, dtype=logits.dtype)
    for row in range(n):
        unique, times = torch.unique(columns[row], return_counts=True)
        ids[row, : len(unique)], counts[row, : len(unique)] = unique, times.to(logits.dtype)
    empty = logits.new_zeros(n, 0)
    return TokenTargets(
        empty.long(), empty, logits.new_zeros(n, 1), (temperature,), logits.shape[1], draws=(ids, counts)
    )

"""Fit the basis of the tails of next-token distributions to a pilot, in little more memory than its logits take."""

from __future__ import annotations

import torch
from torch import Tensor

from kdcache.cache.format.tail_basis import TailBasis, choose_scale
from kdcache.cache.format.token_codec import largest_tokens
from kdcache.cache.format.token_tails import fit_tails, tail_weights

_TOKENS_AT_ONCE = 4096
"""Columns of the pilot that are in float64 at once."""

_ROWS_AT_ONCE = 32
"""Rows of the pilot whose coordinates are fitted at once."""

_TINY = 1e-30
"""Smallest divisor, against division by zero."""


def fit_token_basis(pilot: Tensor, top_k: int, rank: int, step: float) -> TailBasis:
    """Return the first principal components of a pilot, and the scale of their coordinates.

    Args:
        pilot: [P, V] float32 logits, of at least as many rows as the rank.
        top_k: tokens of the head, which are not fitted.
        rank: R.
        step: quantization step of the coordinates, in nats, as far as int8 reaches.
    """
    mean = pilot.mean(dim=0, dtype=torch.float64)
    blocks = [slice(start, start + _TOKENS_AT_ONCE) for start in range(0, pilot.shape[1], _TOKENS_AT_ONCE)]
    gram = torch.zeros(len(pilot), len(pilot), dtype=torch.float64)
    for block in blocks:
        centered = pilot[:, block].double() - mean[block]
        gram += centered @ centered.T
    weights = torch.linalg.eigh(gram).eigenvectors.flip(1)[:, :rank].T
    axes = torch.cat([weights @ (pilot[:, block].double() - mean[block]) for block in blocks], dim=1)
    axes /= axes.norm(dim=1, keepdim=True).clamp_min(_TINY)
    axes *= axes.gather(1, axes.abs().argmax(dim=1, keepdim=True)).sign()
    basis = TailBasis(axes.half(), mean.float(), torch.ones(rank))
    coordinates = []
    for start in range(0, len(pilot), _ROWS_AT_ONCE):
        rows = pilot[start : start + _ROWS_AT_ONCE]
        coordinates.append(fit_tails(rows, tail_weights(rows), largest_tokens(rows, top_k)[0], basis))
    return TailBasis(basis.basis, basis.mean, choose_scale(torch.cat(coordinates), step))

"""Rows of tokens that are drawn from a distribution, and estimate it without bias (docs/FORMAT.md, section 12.3).

RS-KD (Anshumann et al. 2025, "Sparse Logit Sampling", importance sampling with the distribution itself): m tokens are
drawn with replacement from softmax(logits / T), and a student is taught counts / m in place of the distribution.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kdcache.cache.format.codec import index_dtype, not_finite
from kdcache.cache.format.token_encoding import TokenEncoding
from kdcache.cache.format.token_rows import TokenRows
from kdcache.errors import CorruptError

_ROWS_AT_ONCE = 64


def encode_draws(logits: Tensor, encoding: TokenEncoding, seed: int | torch.Generator) -> TokenRows:
    """Return rows of draws: the different tokens in ascending order, and how often each was drawn.

    Args:
        logits: [n, V] of any floating type.
        encoding: of draws; V is that of the logits.
        seed: the same seed and logits give the same draws; or a generator on the device of the logits, which continues
            those of a sequence.

    Raises:
        CorruptError: if a logit is NaN or infinite.
    """
    if len(bad := not_finite(logits)):
        raise CorruptError(f"row {int(bad[0])} holds NaN or infinite logits", "check the teacher")
    (temperature,) = encoding.temperatures
    generator = torch.Generator(logits.device).manual_seed(seed) if isinstance(seed, int) else seed
    parts = []
    for start in range(0, len(logits), _ROWS_AT_ONCE):
        probabilities = (logits[start : start + _ROWS_AT_ONCE].float() / temperature).softmax(dim=1)
        drawn = probabilities.multinomial(encoding.draws, replacement=True, generator=generator).sort(dim=1).values
        parts.append(_counted(drawn, encoding))
    return TokenRows.concatenate(parts)


def _counted(drawn: Tensor, encoding: TokenEncoding) -> TokenRows:
    """Return the different tokens of each row [n, m] of ascending tokens, and their numbers."""
    is_new = torch.ones_like(drawn, dtype=torch.bool)
    is_new[:, 1:] = drawn[:, 1:] != drawn[:, :-1]
    place = is_new.cumsum(dim=1) - 1
    counts = torch.zeros_like(drawn).scatter_add_(1, place, torch.ones_like(drawn))
    tokens = torch.zeros_like(drawn).scatter_(1, place, drawn)
    return TokenRows(draws=tokens.to(index_dtype(encoding.num_classes)), counts=counts.to(torch.uint8))

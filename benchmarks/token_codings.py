"""Codings of next-token distributions that `tokens.py` compares: those of others, and kdcache's.

Those of others are written from their papers and documentation, without kdcache's importers. Each is asked for what a
student is taught in place of the softmax of the teacher at T.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor

from kdcache.cache.format.tail_basis import TailBasis
from kdcache.cache.format.token_codec import encode_tokens
from kdcache.cache.format.token_encoding import TokenEncoding
from kdcache.cache.format.token_rows import TokenRows
from kdcache.cache.format.zarr_store import bytes_per_row
from kdcache.cache.sequences import targets_of
from kdcache.losses.token_targets import scaled_logits

Decoded = Callable[[float, Tensor], Tensor]
"""(T, logits of the student [n, V] divided by T) -> probabilities that the student is taught, [n, V]."""


class Coding(Protocol):
    """A coding of rows."""

    def __call__(self, logits: Tensor, next_tokens: Tensor) -> Decoded:
        """Encode rows [n, V], and return what decodes them."""

    def bytes_per_row(self) -> float:
        """Return the bytes per row of all rows that were encoded."""


def _id_bytes(size: int) -> int:
    return 2 if size <= 2**16 else 4


@dataclass
class TopK:
    """The k most probable tokens with float16 values, renormalized to 1 at each T."""

    size: int
    k: int

    def __call__(self, logits: Tensor, next_tokens: Tensor) -> Decoded:
        """Encode rows."""
        values, tokens = logits.log_softmax(dim=1).topk(self.k, dim=1)
        values = values.half().float()
        return lambda t, _: torch.zeros_like(logits).scatter_(1, tokens, (values / t).softmax(dim=1))

    def bytes_per_row(self) -> float:
        """Return the payload."""
        return self.k * (2 + _id_bytes(self.size))


@dataclass
class DistillKit:
    """The configuration that DistillKit's README recommends, renormalized to 1 at each T.

    Of 128 log-probabilities 16 are bfloat16; the others are the polynomial of powers 0 to 4 and the square root of
    their number that fits them best. DistillKit fits it by a singular value decomposition in float32, which leaves out
    singular values up to 1e-5 (`_solve_least_squares` at a61c2e7); float32 cannot resolve these powers.
    """

    size: int
    k: int = 128
    exact: int = 16
    dtype: torch.dtype = torch.float32

    def __call__(self, logits: Tensor, next_tokens: Tensor) -> Decoded:
        """Encode rows."""
        values, tokens = logits.log_softmax(dim=1).topk(self.k, dim=1)
        number = torch.arange(self.k - self.exact, dtype=self.dtype)
        powers = torch.stack([*(number**power for power in range(5)), number.sqrt()], dim=1)
        left, singular, right = torch.linalg.svd(powers, full_matrices=False)
        inverse = torch.where(singular > 1e-5, 1 / singular, 0.0)
        coefficients = (values[:, self.exact :].to(self.dtype) @ left * inverse @ right).float()
        fitted = coefficients.to(self.dtype) @ powers.T
        decoded = torch.cat([values[:, : self.exact].bfloat16().float(), fitted.float()], dim=1)
        return lambda t, _: torch.zeros_like(logits).scatter_(1, tokens, (decoded / t).softmax(dim=1))

    def bytes_per_row(self) -> float:
        """Return the payload: packed tokens, exact values and six float32 coefficients."""
        return math.ceil(self.k * math.ceil(math.log2(self.size)) / 8) + 2 * self.exact + 4 * 6


@dataclass
class LeftoverGhost:
    """The top k and a ghost token, whose mass at T is taken as the mass that is left at T = 1 to the power 1 / T."""

    size: int
    k: int

    def __call__(self, logits: Tensor, next_tokens: Tensor) -> Decoded:
        """Encode rows."""
        values, tokens = logits.log_softmax(dim=1).topk(self.k, dim=1)
        values = values.half().float()
        left = (1 - values.exp().sum(dim=1, keepdim=True)).clamp_min(1e-7).log()

        def decoded(t: float, student: Tensor) -> Tensor:
            shares = (torch.cat([values, left], dim=1) / t).softmax(dim=1)
            # The gradient of k + 1 classes is that of a tail with the shape of the student's.
            tail = student.scatter(1, tokens, -torch.inf).softmax(dim=1) * shares[:, -1:]
            return tail.scatter_(1, tokens, shares[:, :-1])

        return decoded

    def bytes_per_row(self) -> float:
        """Return the payload."""
        return self.k * (2 + _id_bytes(self.size))


@dataclass
class Draws:
    """RS-KD: N tokens drawn with replacement from the softmax at T = 1, or at each T that is asked for.

    In the paper (arXiv:2503.16870) an entry has 24 bits: 17 for the token and 7 for its count.
    """

    number: int
    at_t: bool = False
    _generator: torch.Generator = field(default_factory=lambda: torch.Generator().manual_seed(0))
    _entries: list[float] = field(default_factory=list)

    def __call__(self, logits: Tensor, next_tokens: Tensor) -> Decoded:
        """Encode rows."""
        counts = self._counts(logits)
        self._entries += (counts > 0).sum(dim=1).tolist()

        def decoded(t: float, _: Tensor) -> Tensor:
            if self.at_t:
                return self._counts(logits / t) / self.number
            shares = (counts / self.number) ** (1 / t)
            return shares / shares.sum(dim=1, keepdim=True)

        return decoded

    def _counts(self, logits: Tensor) -> Tensor:
        drawn = logits.softmax(dim=1).multinomial(self.number, replacement=True, generator=self._generator)
        return torch.zeros_like(logits).scatter_add_(1, drawn, torch.ones_like(drawn, dtype=logits.dtype))

    def bytes_per_row(self) -> float:
        """Return the payload, of the draws at T = 1."""
        return 3 * sum(self._entries) / len(self._entries)


@dataclass
class Stored:
    """Rows of kdcache, as a cache stores and decodes them."""

    encoding: TokenEncoding
    basis: TailBasis | None = None
    _rows: list[TokenRows] = field(default_factory=list)

    def __call__(self, logits: Tensor, next_tokens: Tensor) -> Decoded:
        """Encode rows."""
        rows = encode_tokens(logits, next_tokens, self.encoding, self.basis)
        self._rows.append(rows)
        targets = targets_of(rows, self.encoding, self.basis)
        is_ghost = self.basis is None
        return lambda t, student: scaled_logits(targets, t, student if is_ghost else None).softmax(dim=1)

    def bytes_per_row(self) -> float:
        """Return the compressed bytes on disk, without the basis."""
        return bytes_per_row(self.encoding, TokenRows.concatenate(self._rows))

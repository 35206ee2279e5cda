"""Encode next-token distributions over V tokens as rows (docs/FORMAT.md, section 12.3).

The head is the k most probable tokens. Of all others a row has their mass at T = 1, 4/3, 2 and 4, and with `lowrank`
their shape. The four temperatures are powers of one exponential, e^(x / 4), so that a row is read a few times only:

    e^(x / 4) = q,   e^(x / 2) = q^2,   e^(x / (4/3)) = q^3,   e^x = q^4
"""

from __future__ import annotations

import torch
from torch import Tensor

from kdcache.cache.format.codec import index_dtype
from kdcache.cache.format.row_reductions import largest_classes
from kdcache.cache.format.tail_basis import TailBasis, round_coordinates
from kdcache.cache.format.token_encoding import TokenEncoding
from kdcache.cache.format.token_rows import TokenRows
from kdcache.cache.format.token_tails import fit_tails
from kdcache.errors import CorruptError

_DTYPES = {"float16": torch.float16, "float32": torch.float32}

_SPARE = 32
"""Tokens beyond the head that are selected with it, so that equal logits at its end are seen."""

_BYTES_AT_ONCE = 2**23
"""Bytes of logits that a processor encodes at once: what a core's cache holds is read several times from there."""

_BYTES_ON_A_DEVICE = 2**28
"""Bytes of logits that a GPU encodes at once: it needs more rows to be busy."""

_LOWEST = torch.finfo(torch.float16).min

_FAR = -500.0
"""Logit of a token of the head among those of the tail, whose exponential is 0 in float32 also at T = 4."""


def encode_tokens(
    logits: Tensor, next_tokens: Tensor, encoding: TokenEncoding, basis: TailBasis | None = None
) -> TokenRows:
    """Encode distributions of the next token.

    Args:
        logits: [n, V] raw logits of any floating type, or log-probabilities.
        next_tokens: [n] int64, the token that follows each position.
        encoding: of the rows, with a head; V is that of the logits.
        basis: of the tail, if it is `lowrank`, on the device of the logits.

    Raises:
        CorruptError: if the shape is wrong, or a logit is NaN or infinite.
    """
    if logits.ndim != 2 or logits.shape != (len(next_tokens), encoding.num_classes):
        raise CorruptError(
            f"logits {list(logits.shape)} for {len(next_tokens)} positions and {encoding.num_classes} tokens",
            "pass [n, V]; cut the padding of the model's head off",
        )
    at_once = _BYTES_AT_ONCE if logits.device.type == "cpu" else _BYTES_ON_A_DEVICE
    rows = max(at_once // (4 * encoding.num_classes), 1)
    parts = [
        _encode(logits[start : start + rows].float(), next_tokens[start : start + rows], encoding, basis, start)
        for start in range(0, max(len(logits), 1), rows)
    ]
    return TokenRows.concatenate(parts)


def _encode(
    logits: Tensor, next_tokens: Tensor, encoding: TokenEncoding, basis: TailBasis | None, first: int
) -> TokenRows:
    """Encode a few rows, the first of which has a number for the message of an error."""
    smallest, _ = logits.aminmax(dim=1)
    order, next_largest = largest_tokens(logits, encoding.top_k)
    head = logits.gather(1, order)
    # A NaN is the smallest of its row, and the largest.
    if len(bad := (~(smallest.isfinite() & head[:, 0].isfinite())).nonzero()):
        raise CorruptError(f"row {first + int(bad[0])} holds NaN or infinite logits", "check the teacher")
    sums = _Sums(logits, head, order, next_largest, encoding.temperatures)
    log_total = sums.log_total(1.0)
    columns = {
        "label_log_prob": logits.gather(1, next_tokens.unsqueeze(1)).squeeze(1) - log_total,
        **{name: sums.tail_log_mass(t) for t, name in mass_columns(encoding).items()},
    }
    if "entropy" in encoding.statistics:
        columns["entropy"] = (log_total - sums.mean_logit()).clamp_min(0)
    statistics = torch.stack([columns[name] for name in encoding.statistics], dim=1).clamp(_LOWEST, -_LOWEST).half()
    log_probs = (head - log_total.unsqueeze(1)).clamp_max(0).float()
    if encoding.dtype == "float16":
        log_probs = log_probs.clamp_min(_LOWEST)
    tail = None if basis is None else round_coordinates(fit_tails(logits, sums.weights(), order, basis), basis.scale)
    return TokenRows(
        log_probs.to(_DTYPES[encoding.dtype]),
        order.to(index_dtype(encoding.num_classes)),
        log_total.float() if encoding.level else None,
        statistics,
        tail,
    )


def mass_columns(encoding: TokenEncoding) -> dict[float, str]:
    """Return the columns of the masses outside the head, temperature -> name."""
    names = encoding.statistics[-len(encoding.temperatures) :]
    return dict(zip(encoding.temperatures, names, strict=True))


def largest_tokens(logits: Tensor, top_k: int) -> tuple[Tensor, Tensor]:
    """Return the tokens of the k largest logits, [n, k] int64, and the largest logit outside of them, [n].

    They are in descending order, equal ones in ascending order of token: that of `largest_classes`, which is slow for
    many classes, since it makes an integer of each. Here a few more than k are selected; where all of these are equal
    to the last of the head, the slow way decides.
    """
    spare = min(top_k + _SPARE, logits.shape[1])
    values, tokens = logits.topk(spare, dim=1)
    order = tokens.sort(dim=1).values
    ranked = logits.gather(1, order).sort(dim=1, descending=True, stable=True)
    chosen = order.gather(1, ranked.indices[:, :top_k])
    unclear = ~(values[:, top_k - 1] > values[:, -1])
    if spare < logits.shape[1] and unclear.any():
        chosen[unclear] = largest_classes(logits[unclear], top_k)
    return chosen, values[:, top_k]


class _Sums:
    """Sums of exp(x / T) over the head and over the tail of rows.

    Exponentials are relative to the largest logit of the tail, so that those of a tail of little mass do not vanish.

    Args:
        logits: [n, V] float32.
        head: [n, k], the logits of the head.
        order: [n, k] int64, its tokens.
        largest: [n], the largest logit of the tail.
        temperatures: at which the sums are needed.
    """

    def __init__(
        self, logits: Tensor, head: Tensor, order: Tensor, largest: Tensor, temperatures: tuple[float, ...]
    ) -> None:
        self._head, self._largest = head.double(), largest.double()
        self._centered = (logits - largest.unsqueeze(1)).scatter_(1, order, _FAR)
        fourth = (self._centered / 4).exp_()
        self._half = fourth * fourth
        sums = {1.0: _dot(self._half, self._half), 2.0: self._half.sum(dim=1)}
        if len(temperatures) > 1:
            sums |= {4 / 3: _dot(self._half, fourth), 4.0: fourth.sum(dim=1)}
        self._tails = {t: total.double().log() + self._largest / t for t, total in sums.items()}

    def log_total(self, temperature: float) -> Tensor:
        """Return the log of the sum over all tokens, [n] float64."""
        return torch.logaddexp((self._head / temperature).logsumexp(dim=1), self._tails[temperature])

    def tail_log_mass(self, temperature: float) -> Tensor:
        """Return the log of the mass of the tail, [n] float64."""
        return self._tails[temperature] - self.log_total(temperature)

    def mean_logit(self) -> Tensor:
        """Return the mean of the logits under the distribution at T = 1, [n] float64."""
        log_total = self.log_total(1.0)
        of_head = ((self._head - log_total.unsqueeze(1)).exp() * self._head).sum(dim=1)
        centered = _dot(self._half * self._half, self._centered).double() * (self._largest - log_total).exp()
        return of_head + centered + self._largest * (self._tails[1.0] - log_total).exp()

    def weights(self) -> Tensor:
        """Return the probabilities of the tail at T = 2 relative to their mean over all tokens, [n, V].

        They overwrite what the sums were made of.
        """
        scale = (self._largest / 2 - self.log_total(2.0)).exp() * self._half.shape[1]
        return self._half.mul_(scale.float().unsqueeze(1))


def _dot(first: Tensor, other: Tensor) -> Tensor:
    """Return the dot products of rows, [n, V] x [n, V] -> [n]."""
    dots: Tensor = torch.linalg.vecdot(first, other)
    return dots

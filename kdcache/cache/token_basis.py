"""Fit the basis of the tails of next-token distributions: to a pilot of logits, or to a head and its hidden states.

Logits of a linear head W h + b are principal components of W L, where L L^T is the covariance of the hidden states: an
eigenproblem of d x d, d their width. It needs neither the pilot's logits [P, V], nor a matrix of their size.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import replace

import torch
from torch import Tensor

from kdcache.cache.format.tail_basis import TailBasis, choose_scale
from kdcache.cache.format.token_codec import largest_tokens
from kdcache.cache.format.token_tails import fit_tails, tail_weights
from kdcache.losses.lm_head import LMHead

_TOKENS_AT_ONCE = 4096
"""Columns of the pilot, or rows of a head, that are in float64 at once."""

_ROWS_AT_ONCE = 32
"""Rows of the pilot whose coordinates are fitted at once."""

_SCALED_ROWS = 512
"""Rows whose coordinates say how large these become, at most, of hidden states: their logits take most of the time."""

_CAPPED_ROWS = 1024
"""Rows to which the basis of a head with a bound of its logits is fitted, at most: it takes P^2 V operations."""

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
    axes, mean = _axes_of_columns(lambda block: pilot[:, block], len(pilot), pilot.shape[1], rank)
    basis = _oriented(axes, mean)
    return _scaled(basis, [pilot[start : start + _ROWS_AT_ONCE] for start in _starts(len(pilot))], top_k, step)


def fit_head_basis(hidden: Tensor, head: LMHead, top_k: int, rank: int, step: float) -> TailBasis:
    """Return the first principal components of the logits of a pilot's hidden states.

    They are exact for a linear head; with a bound of the logits (softcap) they are those of the bounded logits of at
    most 1,024 rows.

    Args:
        hidden: [P, d] float32, of at least as many rows as the rank.
        head: of V tokens, on the same device, in float32.
        top_k: tokens of the head of a row, which are not fitted.
        rank: R, at most d without a bound.
        step: quantization step of the coordinates, in nats, as far as int8 reaches.
    """
    if head.softcap is None:
        axes, mean = _axes_of_head(hidden, head, rank)
    else:
        some = hidden[:: -(-len(hidden) // _CAPPED_ROWS)]
        axes, mean = _axes_of_columns(lambda block: _part(head, block).logits(some), len(some), len(head.weight), rank)
    basis = _oriented(axes, mean)
    some = hidden[:: -(-len(hidden) // _SCALED_ROWS)]
    return _scaled(
        basis, (head.logits(some[start : start + _ROWS_AT_ONCE]) for start in _starts(len(some))), top_k, step
    )


def _starts(rows: int) -> range:
    return range(0, rows, _ROWS_AT_ONCE)


def _part(head: LMHead, block: slice) -> LMHead:
    """Return the head of some tokens."""
    return replace(head, weight=head.weight[block], bias=None if head.bias is None else head.bias[block])


def _blocks(size: int) -> list[slice]:
    return [slice(start, start + _TOKENS_AT_ONCE) for start in range(0, size, _TOKENS_AT_ONCE)]


def _axes_of_columns(columns: Callable[[slice], Tensor], rows: int, size: int, rank: int) -> tuple[Tensor, Tensor]:
    """Return the axes [R, V] and the mean [V], float64, of logits [P, V] that are read in blocks of columns."""
    blocks = _blocks(size)
    mean = torch.cat([columns(block).mean(dim=0, dtype=torch.float64) for block in blocks])
    gram = torch.zeros(rows, rows, dtype=torch.float64, device=mean.device)
    for block in blocks:
        centered = columns(block).double() - mean[block]
        gram += centered @ centered.T
    weights = torch.linalg.eigh(gram).eigenvectors.flip(1)[:, :rank].T
    return torch.cat([weights @ (columns(block).double() - mean[block]) for block in blocks], dim=1), mean


def _axes_of_head(hidden: Tensor, head: LMHead, rank: int) -> tuple[Tensor, Tensor]:
    """Return the axes [R, V] and the mean [V], float64, of the logits of a linear head."""
    blocks = _blocks(len(head.weight))
    center = hidden.mean(dim=0, dtype=torch.float64)
    centered = hidden.double() - center
    gram = torch.zeros(hidden.shape[1], hidden.shape[1], dtype=torch.float64, device=hidden.device)
    for block in blocks:
        weight = head.weight[block].double()
        gram += weight.T @ weight
    # A symmetric root: of fewer rows than d the covariance has no Cholesky factor.
    values, vectors = torch.linalg.eigh(centered.T @ centered / len(hidden))
    root = vectors * values.clamp_min(0).sqrt()
    directions = root @ torch.linalg.eigh(root.T @ gram @ root).eigenvectors.flip(1)[:, :rank]
    axes = torch.cat([(head.weight[block].double() @ directions).T for block in blocks], dim=1)
    mean = torch.cat([head.weight[block].double() @ center for block in blocks])
    return axes, (mean if head.bias is None else mean + head.bias.double()) * head.scale


def _oriented(axes: Tensor, mean: Tensor) -> TailBasis:
    """Return a basis of axes of length 1, whose largest entry is positive, with a scale of 1."""
    axes = axes / axes.norm(dim=1, keepdim=True).clamp_min(_TINY)
    axes = axes * axes.gather(1, axes.abs().argmax(dim=1, keepdim=True)).sign()
    return TailBasis(axes.half(), mean.float(), torch.ones(len(axes), device=axes.device))


def _scaled(basis: TailBasis, logits: Iterable[Tensor], top_k: int, step: float) -> TailBasis:
    """Return a basis with the scale that the coordinates of some logits [n, V] need."""
    found = [fit_tails(rows, tail_weights(rows), largest_tokens(rows, top_k)[0], basis) for rows in logits]
    return TailBasis(basis.basis, basis.mean, choose_scale(torch.cat(found), step))

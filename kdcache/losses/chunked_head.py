"""The loss of a language model from its last hidden states, in chunks: [n, V] exists for one chunk alone.

The gradients with respect to the hidden states and the head are computed in the forward pass, chunk by chunk, and
scaled in the backward pass, for every loss. A checkpoint would compute the logits of each chunk once more, four
products with the head instead of three. Beside a chunk, a step holds one [V, d] float32 gradient of the head.

Source: Liger-Kernel's fused linear losses (2410.10989), whose gradient of a bfloat16 head is summed in bfloat16; here
sums over the chunks are float32.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from kdcache.losses.batch import BatchSum, BatchTotals, batch_totals
from kdcache.losses.config import Loss
from kdcache.losses.distillation import LossParts
from kdcache.losses.lm_head import LMHead
from kdcache.losses.registry import NORMALIZATIONS
from kdcache.losses.token_loss import teacher_for_temperatures, token_loss
from kdcache.losses.token_targets import TokenTargets

CHUNK_ELEMENTS = 2**26
"""Logits of a chunk at most: 256 MiB in float32."""


_BLOCK_ELEMENTS = 2**20
"""Logits that go through a loss at once on a CPU at most: 4 MiB in float32, so that its caches hold them."""


def chunk_size(vocabulary_size: int, elements: int = CHUNK_ELEMENTS) -> int:
    """Return the number of positions whose logits are at most `elements`; at least 1."""
    return max(1, elements // vocabulary_size)


def chunked_loss(
    hidden: Tensor,
    head: LMHead,
    labels: Tensor,
    targets: TokenTargets | None,
    loss: Loss,
    epoch: float | None = None,
    theta: Tensor | None = None,
    whole: BatchTotals | None = None,
    label_smoothing: float = 0.0,
    statistics: list[Tensor] | None = None,
    chunk: int | None = None,
) -> LossParts:
    """Return the loss of n taught positions, as `token_loss` of their logits would.

    `total` may be differentiated once, with respect to the hidden states, the head and theta.

    Args:
        hidden: [n, d], the student's last hidden states at the taught positions.
        head: of the student; cut to the teacher's vocabulary here.
        labels: [n] int64, the next tokens, -1 where not known.
        targets: of the same positions; None if the loss does not use the teacher.
        loss: the `loss` section of a pipeline, checked by `check_token_loss`.
        epoch: counted from 1; None for the end of the warm-up and of CTKD's ramp.
        theta: the result of `learned_temperature`, for CTKD.
        whole: totals of the step that these positions are part of; None if they are all of it.
        label_smoothing: of the cross-entropy.
        statistics: sums of the whole step for a temperature that depends on it (DTD), from `batch_statistics`; computed
            from these positions, over all processes of `whole`, if None.
        chunk: positions per chunk; None for `chunk_size`.
    """
    whole = whole or batch_totals(labels)
    if targets is not None:
        head = head.cut(targets.vocabulary_size)
    size = chunk or chunk_size(len(head.weight))
    if _uses_statistics(loss):
        if statistics is None:
            own = batch_statistics(hidden, head, targets, loss, size)
            statistics = [whole.sum(total.unsqueeze(0)) for total in own]
        whole = whole._replace(sum=_Replayed(statistics))

    def of_chunk(logits: Tensor, which: slice, learned: Tensor | None) -> LossParts:
        part = None if targets is None else targets[which]
        return token_loss(logits, labels[which], part, loss, epoch, learned, whole, label_smoothing)

    sizes = _slices(len(hidden), size)
    inputs = (hidden, head.weight, head.bias, theta)
    if torch.is_grad_enabled() and any(value is not None and value.requires_grad for value in inputs):
        return LossParts(*_Chunked.apply(*inputs, head, of_chunk, list(sizes)))
    each = [of_chunk(head.logits(hidden[which]), which, theta) for which in sizes]
    return _sum_of(each, hidden)


class _Chunked(torch.autograd.Function):
    """The sum of the losses of chunks, with gradients from the forward pass."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        theta: Tensor | None,
        head: LMHead,
        of_chunk: Callable[[Tensor, slice, Tensor | None], LossParts],
        chunks: list[slice],
    ) -> tuple[Tensor, ...]:
        """Return the parts of the loss, and keep the gradients of the first."""
        wanted = ctx.needs_input_grad
        kind = torch.float64 if hidden.dtype == torch.float64 else torch.float32
        of_hidden = torch.empty_like(hidden, dtype=kind) if wanted[0] else None
        of_weight = torch.zeros_like(weight, dtype=kind) if wanted[1] else None
        of_bias = torch.zeros_like(bias, dtype=kind) if wanted[2] and bias is not None else None
        of_theta = torch.zeros_like(theta) if wanted[3] and theta is not None else None
        fixed = replace(head, weight=weight.detach(), bias=None if bias is None else bias.detach())
        each = []
        for which in chunks:
            states = hidden[which]
            slopes = fixed.product(states)
            for block in _slices(len(states), _block_size(slopes)):
                product = slopes[block].requires_grad_()
                learned = None if theta is None else theta.detach().requires_grad_(of_theta is not None)
                with torch.enable_grad():
                    here = slice(which.start + block.start, which.start + block.stop)
                    parts = of_chunk(fixed.logits_of(product), here, learned)
                sources = [product] if of_theta is None or learned is None else [product, learned]
                slope, *rest = torch.autograd.grad(parts.total, sources)
                slopes[block] = slope
                each.append(LossParts(*(part.detach() for part in parts)))
                for found in rest:
                    of_theta = found if of_theta is None else of_theta + found
            if of_bias is not None:
                of_bias += slopes.sum(dim=0)
            _add_products(slopes.to(states.dtype), states, weight, which, of_hidden, of_weight)
            # Or the logits of two chunks would be there while those of the next are computed.
            del slopes, product, sources
        ctx.found = of_hidden, of_weight, of_bias, of_theta
        ctx.dtypes = [value.dtype if value is not None else kind for value in (hidden, weight, bias, theta)]
        parts = _sum_of(each, hidden)
        ctx.mark_non_differentiable(*parts[1:])
        return tuple(parts)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        """Return the gradients of the forward pass, scaled."""
        found, ctx.found = ctx.found, None
        if found is None:
            raise RuntimeError("the loss of a chunked head can be differentiated once")
        scaled = (
            None if value is None else value.mul_(gradients[0]).to(dtype)
            for value, dtype in zip(found, ctx.dtypes, strict=True)
        )
        return *scaled, None, None, None


def _add_products(
    slope: Tensor, states: Tensor, weight: Tensor, which: slice, of_hidden: Tensor | None, of_weight: Tensor | None
) -> None:
    """Write slope W to the gradient of the hidden states, and add slope^T h to that of the head."""
    if of_hidden is not None:
        of_hidden[which] = slope @ weight.to(slope.dtype)
    if of_weight is None:
        return
    if of_weight.dtype == slope.dtype:
        of_weight.addmm_(slope.T, states)
    else:
        of_weight += slope.T @ states


def _block_size(logits: Tensor) -> int:
    """Return the number of rows of a chunk that go through a loss at once: on a CPU, as many as its caches hold."""
    return max(1, _BLOCK_ELEMENTS // logits.shape[1]) if logits.device.type == "cpu" else len(logits)


def _slices(count: int, size: int) -> Iterator[slice]:
    for start in range(0, count, size):
        yield slice(start, min(start + size, count))


def _sum_of(each: list[LossParts], like: Tensor) -> LossParts:
    """Return the sum of the parts of chunks; zeros of none."""
    if not each:
        kind = torch.float64 if like.dtype == torch.float64 else torch.float32
        return LossParts(*(like.new_zeros((), dtype=kind) for _ in LossParts._fields))
    return LossParts(*(torch.stack(values).sum() for values in zip(*each, strict=True)))


def _uses_statistics(loss: Loss) -> bool:
    return loss.uses_teacher and loss.temperature.uses_batch


@torch.no_grad()
def batch_statistics(
    hidden: Tensor, head: LMHead, targets: TokenTargets | None, loss: Loss, chunk: int | None = None
) -> list[Tensor]:
    """Return the sums over n positions that the temperature rule of a loss needs of the whole step; [] for most.

    For a step of several micro-batches, add up the lists of all and give the sums to `chunked_loss` of each.

    Args: as `chunked_loss`.
    """
    if targets is None or not _uses_statistics(loss):
        return []
    head = head.cut(targets.vocabulary_size)
    normalize = NORMALIZATIONS[loss.normalization].compute
    totals: list[Tensor] = []
    # Of no positions, which a process may have of a step, there are sums too.
    for which in [*_slices(len(hidden), chunk or chunk_size(len(head.weight)))] or [slice(0, 0)]:
        found: list[Tensor] = []
        rule = loss.temperature.bind(batch_sum=_recording(found))
        rule(normalize(head.logits(hidden[which])), normalize(teacher_for_temperatures(targets[which], loss)))
        totals = [one + other for one, other in zip(totals, found, strict=True)] if totals else found
    return totals


def _recording(found: list[Tensor]) -> BatchSum:
    """Return a sum over the given samples that keeps each result."""

    def add(rows: Tensor) -> Tensor:
        found.append(rows.sum(dim=0))
        return found[-1]

    return add


class _Replayed:
    """Sums over the whole step, in the order in which the temperature rule asks for them, again for each chunk."""

    def __init__(self, totals: list[Tensor]) -> None:
        self.totals = totals
        self.asked = 0

    def __call__(self, rows: Tensor) -> Tensor:
        self.asked += 1
        return self.totals[(self.asked - 1) % len(self.totals)]

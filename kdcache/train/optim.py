"""Optimizers, learning rate schedules and averages of weights."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from torch import nn
from torch.optim import SGD, AdamW, Optimizer
from torch.optim.lr_scheduler import LambdaLR
from torch.optim.swa_utils import get_ema_multi_avg_fn

from kdcache.config.optimizer import OptimizerSpec

_ONECYCLE_RISE = 0.3
_ONECYCLE_START, _ONECYCLE_END = 1 / 25, 1 / (25 * 1e4)


def rate(done: int, steps: float, spec: OptimizerSpec) -> float:
    """Return the learning rate of the step after `done` steps, as a factor of `spec.lr`, with `steps` steps per epoch.

    constant    1
    multistep   gamma to the power of the number of milestones that are passed
    cosine      from 1 down to 0 along half a cosine
    onecycle    from 1/25 up to 1 and down to 4e-6, along half a cosine each (Smith & Topin 2018, 1708.07120; the shape
                and the figures are those of torch's OneCycleLR, the momentum stays)

    The first three follow a linear warm-up from 0 to 1 over `spec.warmup_epochs`.
    """
    at = done / steps
    if spec.schedule == "onecycle":
        top = spec.warmup_epochs or _ONECYCLE_RISE * spec.epochs
        if at < top:
            return _along_cosine(_ONECYCLE_START, 1.0, at / top)
        return _along_cosine(1.0, _ONECYCLE_END, (at - top) / (spec.epochs - top))
    if at < spec.warmup_epochs:
        return min((done + 1) / (steps * spec.warmup_epochs), 1.0)
    if spec.schedule == "multistep":
        return spec.gamma ** sum(at >= milestone for milestone in spec.milestones)
    if spec.schedule == "cosine":
        return _along_cosine(1.0, 0.0, (at - spec.warmup_epochs) / (spec.epochs - spec.warmup_epochs))
    return 1.0


def _along_cosine(start: float, end: float, share: float) -> float:
    return end + (start - end) * (1 + math.cos(math.pi * min(share, 1.0))) / 2


def make_schedule(optimizer: Optimizer, spec: OptimizerSpec, steps: float) -> LambdaLR:
    """Return the schedule of an optimizer with `steps` steps per epoch; to be stepped after each of them."""
    return LambdaLR(optimizer, partial(rate, steps=steps, spec=spec))


def make_optimizer(model: nn.Module, spec: OptimizerSpec, learned: Sequence[nn.Parameter] = ()) -> Optimizer:
    """Return the optimizer of a pipeline, for the model and what is learned beside it."""
    parameters = [*model.parameters(), *learned]
    if spec.optimizer == "adamw":
        return AdamW(parameters, lr=spec.lr, weight_decay=spec.weight_decay)
    nesterov = spec.nesterov and spec.momentum > 0
    return SGD(parameters, lr=spec.lr, momentum=spec.momentum, nesterov=nesterov, weight_decay=spec.weight_decay)


def average_update(decay: float) -> Callable[[Any, Any, Any], None]:
    """Return the update of an exponential moving average; integers, such as tables of indices, are copied."""
    update_floats = get_ema_multi_avg_fn(decay)  # type: ignore[no-untyped-call]  # torch's is not typed

    def update(averages: Any, values: Any, count: Any) -> None:
        if averages[0].is_floating_point() or averages[0].is_complex():
            update_floats(averages, values, count)
        else:
            # Torch truncates: its mean of two equal integers is often one less.
            for average, value in zip(averages, values, strict=True):
                average.copy_(value)

    return update

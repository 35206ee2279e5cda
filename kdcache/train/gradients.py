"""The norm of the gradient at each step: clipped if asked for, and reported once if it explodes.

Norms stay on the device until they are checked, at once on a CPU and every 50 steps on a GPU, where looking at a value
waits for all work before.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

LARGEST_GROWTH = 1e4
"""A gradient whose norm is this many times that of the first step is reported."""

_HARMLESS = 1.0
"""Norm up to which a gradient is not reported: that of the first step may be nearly 0, in a student equal to its
teacher."""

_INTERVAL = 50
"""Steps between two checks on a GPU."""


class _Step(NamedTuple):
    """The gradient of a step: the norm of all of it, the norms [P] of its parameters, and the loss."""

    step: int
    epoch: int
    total: Tensor
    each: Tensor
    names: tuple[str, ...]
    loss: Tensor


class GradientMonitor:
    """Measures, clips and checks the gradients of a network.

    Args:
        parameters: of the network, with their names.
        max_norm: largest norm, to which a larger gradient is clipped; None for no clipping.
        report: called once, with a warning about a gradient that is not finite or has exploded; None for nothing.

    Attributes:
        warning: what was reported; None for nothing.
    """

    def __init__(
        self,
        parameters: Iterable[tuple[str, nn.Parameter]],
        max_norm: float | None = None,
        report: Callable[[str], None] | None = None,
    ) -> None:
        self._parameters, self._max_norm, self._report = [*parameters], max_norm, report
        self._first: float | None = None
        self._n_steps = 0
        self._waiting: list[_Step] = []
        self._measured: tuple[Tensor, Tensor, tuple[str, ...]] | None = None
        self.warning: str | None = None

    @torch.no_grad()
    def measure(self) -> None:
        """Measure the gradients after the backward pass, and clip them.

        Values are those of `torch.nn.utils.clip_grad_norm_`.
        """
        self._measured = None
        if self.warning is not None and self._max_norm is None:
            return
        given = [(name, one.grad) for name, one in self._parameters if one.grad is not None and not one.grad.is_sparse]
        if not given:
            return
        gradients = [gradient for _, gradient in given]
        each = torch.stack(torch._foreach_norm(gradients))
        total = torch.linalg.vector_norm(each)
        self._measured = total, each, tuple(name for name, _ in given)
        if self._max_norm is not None:
            torch._foreach_mul_(gradients, torch.clamp(self._max_norm / (total + 1e-6), max=1.0))

    def add(self, loss: Tensor, epoch: int) -> None:
        """Record what was measured, for a step that the optimizer has taken.

        Args:
            loss: of the step [].
            epoch: number of its epoch, from 1.
        """
        self._n_steps += 1
        if self._measured is None or self.warning is not None:
            return
        total, each, names = self._measured
        self._waiting.append(_Step(self._n_steps, epoch, total, each, names, loss.detach()))
        if total.device.type == "cpu" or len(self._waiting) >= _INTERVAL:
            self.check()

    def check(self) -> None:
        """Check the steps since the last check, and report the first one that is wrong."""
        waiting, self._waiting = self._waiting, []
        if not waiting:
            return
        for step, total in zip(waiting, torch.stack([step.total for step in waiting]).tolist(), strict=True):
            if not math.isfinite(total) or (
                self._first is not None and total > max(LARGEST_GROWTH * self._first, _HARMLESS)
            ):
                self.warning = self._described(step, total)
                if self._report is not None:
                    self._report(self.warning)
                return
            self._first = self._first or total

    def _described(self, step: _Step, total: float) -> str:
        where = f"warning: the gradient of step {step.step} (epoch {step.epoch}, loss {step.loss.item():.4g})"
        advice = "lower train.lr, set train.max_grad_norm, or check the loss and the network there"
        bad = [name for name, norm in zip(step.names, step.each.tolist(), strict=True) if not math.isfinite(norm)]
        if bad:
            others = f" and {len(bad) - 1} more of {len(step.names)} parameters" if len(bad) > 1 else ""
            return f"{where} is not finite in {bad[0]}{others}; {advice}"
        if not math.isfinite(total):
            return f"{where} is too large for its type; {advice}"
        largest = step.names[int(step.each.argmax())]
        return (
            f"{where} has the norm {total:.3g}, and that of the first step has {self._first:.3g}; it is largest in "
            f"{largest}; {advice}"
        )

    def state_dict(self) -> dict[str, Any]:
        """Return what the next check depends on, as plain values."""
        self.check()
        return {"first": self._first, "n_steps": self._n_steps, "warning": self.warning}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what `state_dict` returned."""
        self._first, self._n_steps, self.warning = state["first"], state["n_steps"], state["warning"]

"""Measure the speed of networks for a moment, where the package would take seconds for a figure that no test reads."""

from __future__ import annotations

from torch import Tensor, nn

from kdcache.evaluation import costs

_measure_speed = costs.measure_speed


def measure_briefly(model: nn.Module, image: Tensor, min_run_time: float = costs.MIN_RUN_TIME) -> costs.Speed:
    """Measure as `costs.measure_speed`, but for as short as possible if the time is the usual one."""
    return _measure_speed(model, image, 0.0 if min_run_time == costs.MIN_RUN_TIME else min_run_time)


def shorten() -> None:
    """Measure briefly in this process from now on."""
    costs.measure_speed = measure_briefly

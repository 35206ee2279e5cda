"""Measure the speed of networks for a moment, where the package would take seconds for a figure that no test reads."""

from __future__ import annotations

from functools import partial

from kdcache.evaluation import costs


def shorten() -> None:
    """Measure for as short as possible in this process from now on, unless a call names the time."""
    costs.measure_speed = partial(costs.measure_speed, min_run_time=0.0)

"""States of the random generators that a network may draw from: saved with a run, and switched between networks."""

from __future__ import annotations

import random
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor


class RandomState(NamedTuple):
    """States of the generators of Python, NumPy, torch's CPU and, if it is used, a GPU."""

    python: Any
    numpy: Any
    cpu: Tensor
    cuda: Tensor | None


def random_state(device: torch.device) -> RandomState:
    """Return the present states."""
    cuda = torch.cuda.get_rng_state(device) if device.type == "cuda" else None
    return RandomState(random.getstate(), np.random.get_state(), torch.get_rng_state(), cuda)


def set_random_state(state: RandomState, device: torch.device) -> None:
    """Set the states; that of a GPU only if there is one in `state`."""
    random.setstate(state.python)
    np.random.set_state(state.numpy)
    torch.set_rng_state(state.cpu)
    if device.type == "cuda" and state.cuda is not None:
        torch.cuda.set_rng_state(state.cuda, device)


def as_plain_values(state: RandomState) -> dict[str, Any]:
    """Return states as tensors and plain values, which can be loaded without unpickling."""
    kind, keys, *position = state.numpy
    return {**state._asdict(), "numpy": (kind, keys.tolist(), *position)}


def from_plain_values(values: dict[str, Any]) -> RandomState:
    """Return the states that `as_plain_values` was given."""
    return RandomState(**values)


class SeparateRandomStates:
    """A random state for each of several networks that take turns, so that each draws what it would draw alone.

    Args:
        count: number of networks; all begin with the present state. A single one uses the generators as they are.
        device: on which they are trained.
    """

    def __init__(self, count: int, device: torch.device) -> None:
        self._device = device
        self._before = random_state(device) if count > 1 else None
        self._states = [self._before] * count
        self._current: int | None = None

    def enter(self, index: int) -> None:
        """Continue with the state of a network."""
        if self._before is None or index == self._current:
            return
        if self._current is not None:
            self._states[self._current] = random_state(self._device)
        state = self._states[index]
        if state is not None:
            set_random_state(state, self._device)
        self._current = index

    def leave(self) -> None:
        """Restore the state from before."""
        if self._before is not None:
            set_random_state(self._before, self._device)
            self._current = None

"""Check that a user's function returns the same weights each time: a teacher is built anew by every command."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import nn

from kdcache.data.seeding import kept_generators
from kdcache.errors import UsageError, counted
from kdcache.models.digest import digests_of_parts


def built_with_same_weights(build: Callable[[], nn.Module], name: str, fix: str) -> nn.Module:
    """Return the network of a function whose weights do not depend on the state of the random generators.

    A function that draws random numbers is called twice, since many initialize a network before they load its weights;
    one network is in memory at a time.

    Args:
        build: returns the network.
        name: of the function.
        fix: how to give the weights.

    Raises:
        UsageError: if the second network has other weights.
    """
    before = _generators()
    network = build()
    if _generators() == before:
        return network
    first = digests_of_parts(network)
    del network
    with kept_generators():
        network = build()
    second = digests_of_parts(network)
    different = [part for part in first | second if first.get(part) != second.get(part)]
    if different:
        others = f" and {counted(len(different) - 1, 'other')}" if len(different) > 1 else ""
        raise UsageError(
            f"{name} returns a network with other random weights each time it is called: {different[0]}{others}",
            fix,
        )
    return network


def _generators() -> tuple[Any, ...]:
    """Return the states of the global generators of torch, NumPy and Python, to compare."""
    numpy_state = np.random.get_state(legacy=False)
    return torch.random.get_rng_state().numpy().tobytes(), str(numpy_state), random.getstate()

"""Seeds of views: what a transform draws for view v of sample i is a function of (seed, i, v) alone."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import numpy.typing as npt
import torch


def seed_of(*parts: int) -> int:
    """Return the 64-bit seed that `parts`, each below 2**64, determine."""
    digest = hashlib.blake2b(b"".join(part.to_bytes(8, "little") for part in parts), digest_size=8).digest()
    return int.from_bytes(digest, "little")


def in_hash_order(count: int) -> npt.NDArray[np.int64]:
    """Return 0 to count - 1 in the order of their hashes, [count]: the same with every version of every library."""
    order = sorted(range(count), key=lambda i: hashlib.blake2b(i.to_bytes(8, "little"), digest_size=8).digest())
    return np.array(order, np.int64)


def seed_generators(seed: int) -> None:
    """Seed the generators of Python, NumPy and torch's CPU; `torch.manual_seed` would also seed GPUs."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.default_generator.manual_seed(seed)


@contextmanager
def kept_generators() -> Iterator[None]:
    """Restore the states of the generators of Python, NumPy and torch's CPU at the end of the context."""
    states = random.getstate(), np.random.get_state(), torch.get_rng_state()
    try:
        yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])
        torch.set_rng_state(states[2])


@contextmanager
def kept_torch_generator() -> Iterator[None]:
    """Restore the state of torch's CPU generator at the end of the context."""
    state = torch.get_rng_state()
    try:
        yield
    finally:
        torch.set_rng_state(state)


@contextmanager
def seeded(*parts: int) -> Iterator[None]:
    """Seed the generators of Python, NumPy and torch's CPU from `parts`, and restore their states at the end."""
    with kept_generators():
        seed_generators(seed_of(*parts))
        yield

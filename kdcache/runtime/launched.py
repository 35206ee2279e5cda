"""What torchrun or `accelerate launch` says of this process in the environment; torch is not imported."""

from __future__ import annotations

import os


def is_first() -> bool:
    """Return whether this is the first rank that torchrun or `accelerate launch` started, or a single process."""
    return os.environ.get("RANK", "0") == "0"


def n_processes() -> int:
    """Return how many processes torchrun or `accelerate launch` has started; 1 for one alone."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def local_processes() -> int:
    """Return the number of processes on this machine that torchrun or accelerate started together."""
    given = os.environ.get("LOCAL_WORLD_SIZE", "1")
    return max(int(given), 1) if given.isdecimal() else 1


def agent_holds_store() -> bool:
    """Return whether torchrun's agent holds the store in which ranks find one another; it then outlives them."""
    return os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"

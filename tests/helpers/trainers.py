"""Processes that train together, as torchrun starts them: with its variables in the environment."""

from __future__ import annotations

from collections.abc import Callable
from multiprocessing.process import BaseProcess

from torch.distributed import TCPStore  # type: ignore[attr-defined]  # torch does not list it

from helpers.processes import in_a_process


def together(store: TCPStore, count: int, target: Callable[..., None], *args: object) -> list[BaseProcess]:
    """Start `count` processes, each of which calls `target(rank, environment, *args)`."""
    return [
        in_a_process(
            target,
            rank,
            {
                "RANK": str(rank),
                "LOCAL_RANK": str(rank),
                "WORLD_SIZE": str(count),
                "MASTER_ADDR": "localhost",
                "MASTER_PORT": str(store.port),
                "TORCHELASTIC_USE_AGENT_STORE": "True",
            },
            *args,
        )
        for rank in range(count)
    ]


def meeting_place() -> TCPStore:
    """Return the store by which the processes find one another."""
    return TCPStore("localhost", 0, is_master=True, wait_for_workers=False)

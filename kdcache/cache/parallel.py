"""Work on whole caches, a shard at a time, in parallel. The only module that knows dask.

Every operation is a map over shards and a sum in shard order, so that it needs the memory of a few shards whatever the
size of the cache, and gives the same bits however many workers share it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from threading import Event
from typing import Any, TypeVar

import torch
from dask.base import compute
from dask.delayed import delayed
from dask.system import CPU_COUNT

from kdcache.cache.format.array_specs import raw_bytes
from kdcache.cache.format.schema import Plan
from kdcache.errors import KdcacheError, UsageError
from kdcache.runtime.resources import free_memory

_ROWS_AT_ONCE = 4096

_TINY = 1e-12

_COPIES = 4
"""Of a shard's rows, that are in memory at once while they are gathered, encoded and written."""

_PATIENCE = 10
"""Seconds in which a dask scheduler must answer."""

T = TypeVar("T")


def over(
    function: Callable[..., T], calls: Iterable[tuple[Any, ...]], scheduler: str = "threads", plan: Plan | None = None
) -> list[T]:
    """What a function returns for each tuple of arguments, in their order.

    Args:
        function: of a module, so that other processes can find it.
        calls: one a shard, of little that has to be sent: each names its files, and reads them where it runs.
        scheduler: `threads`, `processes`, or the address of a dask.distributed scheduler (`tcp://HOST:PORT`) whose
            workers see the same files; what a worker that dies had begun, another one does again.
        plan: of the cache whose shards are held in memory: no more run side by side here than half of it has room for.

    Raises:
        UsageError: if there is no such scheduler.
        KdcacheError: what the first call has raised that did; none is under way any more, whoever clears up after it.
    """
    stop = Event() if scheduler == "threads" else None
    attempt = delayed(_attempt, pure=False, traverse=False)
    parts = [attempt(stop, function, *call) for call in calls]
    found = _computed(parts, scheduler, plan)
    for result in found:
        if isinstance(result, KdcacheError):
            raise result
    return found


def _attempt(stop: Event | None, function: Callable[..., Any], *call: Any) -> Any:
    """What a call returns, or the error that it raises, after which no thread begins another."""
    if stop is not None and stop.is_set():
        return None
    try:
        return function(*call)
    except KdcacheError as error:
        if stop is not None:
            stop.set()
        return error


def _computed(parts: list[Any], scheduler: str, plan: Plan | None) -> list[Any]:
    if scheduler in ("threads", "processes"):
        workers = CPU_COUNT
        if plan is not None:
            held = _COPIES * raw_bytes(plan.encoding) * plan.shape.shard_rows
            workers = max(min(workers, free_memory() // 2 // held), 1)
        return list(compute(*parts, scheduler=scheduler, num_workers=workers, traverse=False))  # type: ignore[no-untyped-call]
    try:
        from distributed import Client  # noqa: PLC0415  # an extra
    except ImportError:
        raise UsageError("--scheduler needs dask.distributed", "pip install 'kdcache[cluster]'") from None
    try:
        client = Client(scheduler, timeout=_PATIENCE, set_as_default=False)  # type: ignore[no-untyped-call]
    except (OSError, ValueError) as error:
        raise UsageError(
            f"no dask scheduler answers at {scheduler!r}: {error}",
            "give threads, processes, or the address that `dask scheduler` prints, such as tcp://HOST:8786",
        ) from None
    with client:
        return list(client.gather(client.compute(parts)))  # type: ignore[no-untyped-call]


def of_shard(labels: torch.Tensor, plan: Plan, shard: int) -> torch.Tensor:
    """The labels of one shard: a copy, as what is sent to another process is sent with all that it is a part of."""
    ids = plan.shard_ids(shard)
    return labels[ids.start : ids.stop].clone()

"""Process the shards of a cache in parallel. The only module that imports dask.

Every operation is a map over shards followed by a reduction in shard order. It needs the memory of a few shards
whatever the size of the cache, and gives the same bits for any number of workers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from threading import Event
from typing import Any, TypeVar

import torch
from dask.base import compute
from dask.delayed import delayed
from dask.system import CPU_COUNT

from kdcache.cache.format.array_specs import raw_bytes_of_all_outputs
from kdcache.cache.format.schema import Plan
from kdcache.errors import KdcacheError, UsageError
from kdcache.runtime.resources import free_memory

_COPIES = 4
"""Copies of a shard's rows in memory while they are gathered, encoded and written."""

_CONNECT_TIMEOUT = 10
"""Seconds within which a dask scheduler must answer."""

T = TypeVar("T")


def over(
    function: Callable[..., T], calls: Iterable[tuple[Any, ...]], scheduler: str = "threads", plan: Plan | None = None
) -> list[T]:
    """Call a function with each tuple of arguments in parallel, and return the results in the same order.

    Args:
        function: defined at the top level of a module, so that other processes can import it.
        calls: arguments, small enough to be sent to other processes; one call per shard, which reads its own files.
        scheduler: `threads`, `processes`, or the address of a dask.distributed scheduler (`tcp://HOST:PORT`) whose
            workers see the same files; calls of a worker that dies are repeated by another one.
        plan: of the cache whose shards are held in memory; limits the number of parallel calls on this machine to
            those that fit into half of the free memory.

    Raises:
        UsageError: if the scheduler does not exist.
        KdcacheError: the error of the first call that failed, after all running calls have ended.
    """
    stop = Event() if scheduler == "threads" else None
    attempt = delayed(_attempt, pure=False, traverse=False)
    parts = [attempt(stop, function, *call) for call in calls]
    results = _compute(parts, scheduler, plan)
    for result in results:
        if isinstance(result, KdcacheError):
            raise result
    return results


def _attempt(stop: Event | None, function: Callable[..., Any], *call: Any) -> Any:
    """Return the result of a call, or its error, after which no thread starts another call."""
    if stop is not None and stop.is_set():
        return None
    try:
        return function(*call)
    except KdcacheError as error:
        if stop is not None:
            stop.set()
        return error


def _compute(parts: list[Any], scheduler: str, plan: Plan | None) -> list[Any]:
    """Compute delayed calls with a scheduler."""
    if scheduler in ("threads", "processes"):
        n_workers = CPU_COUNT
        if plan is not None:
            bytes_per_call = _COPIES * raw_bytes_of_all_outputs(plan) * plan.shape.shard_rows
            n_workers = max(min(n_workers, free_memory() // 2 // bytes_per_call), 1)
        if scheduler == "processes":
            return list(compute(*parts, scheduler=scheduler, num_workers=n_workers, traverse=False))  # type: ignore[no-untyped-call]
        # A pool of its own: a forked process inherits that of dask without its threads, and would wait for ever.
        with ThreadPoolExecutor(n_workers) as pool:
            return list(compute(*parts, scheduler=scheduler, pool=pool, traverse=False))  # type: ignore[no-untyped-call]
    try:
        from distributed import Client  # noqa: PLC0415  # an extra
    except ImportError:
        raise UsageError("--scheduler requires dask.distributed", "pip install 'kdcache[cluster]'") from None
    try:
        client = Client(scheduler, timeout=_CONNECT_TIMEOUT, set_as_default=False)  # type: ignore[no-untyped-call]
    except (OSError, ValueError) as error:
        raise UsageError(
            f"no dask scheduler answers at {scheduler!r}: {error}",
            "use threads, processes, or the address that `dask scheduler` prints, such as tcp://HOST:8786",
        ) from None
    with client:
        return list(client.gather(client.compute(parts)))  # type: ignore[no-untyped-call]


def of_shard(labels: torch.Tensor, plan: Plan, shard: int) -> torch.Tensor:
    """Return the labels of one shard, as a copy: a view would be sent to another process with all labels."""
    ids = plan.shard_ids(shard)
    return labels[ids.start : ids.stop].clone()

"""Process the shards of a cache in parallel, and make long calls in a cluster. The only module that imports dask.

Every operation on shards is a map followed by a reduction in shard order. It needs the memory of a few shards whatever
the size of the cache, and gives the same bits for any number of workers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from queue import SimpleQueue
from threading import Event
from typing import Any, TypeVar
from uuid import uuid4

import torch
from dask.base import compute
from dask.delayed import delayed
from dask.system import CPU_COUNT

from kdcache.cache.format.array_specs import raw_bytes_of_shard
from kdcache.cache.format.schema import Plan
from kdcache.errors import IncompleteError, KdcacheError, UsageError
from kdcache.runtime.resources import free_memory

_COPIES = 4
"""Copies of a shard's rows in memory while they are gathered, encoded and written."""

_CONNECT_TIMEOUT = 10
"""Seconds within which a dask scheduler must answer."""

_ADDRESS = "the address that `dask scheduler` prints, such as tcp://HOST:8786"

REPEATS = 3
"""How often a call of a cluster is repeated that raises an error."""

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
            bytes_per_call = _COPIES * raw_bytes_of_shard(plan)
            n_workers = max(min(n_workers, free_memory() // 2 // bytes_per_call), 1)
        if scheduler == "processes":
            return list(compute(*parts, scheduler=scheduler, num_workers=n_workers, traverse=False))  # type: ignore[no-untyped-call]
        # A pool of its own: a forked process inherits that of dask without its threads, and would wait for ever.
        with ThreadPoolExecutor(n_workers) as pool:
            return list(compute(*parts, scheduler=scheduler, pool=pool, traverse=False))  # type: ignore[no-untyped-call]
    with _connected(scheduler, f"use threads, processes, or {_ADDRESS}") as client:
        return list(client.gather(client.compute(parts)))


@contextmanager
def _connected(scheduler: str, fix: str) -> Iterator[Any]:
    """Connect to a dask scheduler, and yield the client.

    Raises:
        UsageError: if it does not answer, or dask.distributed is not installed.
    """
    try:
        from distributed import Client  # noqa: PLC0415  # an extra
    except ImportError:
        raise UsageError("--scheduler requires dask.distributed", "pip install 'kdcache[cluster]'") from None
    try:
        client = Client(scheduler, timeout=_CONNECT_TIMEOUT, set_as_default=False)  # type: ignore[no-untyped-call]
    except (OSError, ValueError) as error:
        raise UsageError(f"no dask scheduler answers at {scheduler!r}: {error}", fix) from None
    with client:
        yield client


class WorkersDied(IncompleteError):
    """Several workers died, one after the other, while they had the same call (exit code 3)."""


class CallInWorker:
    """A long call, as its function sees it in the worker that does it.

    Attributes:
        threads: number of calls that the worker does at the same time.
    """

    def __init__(self, topic: str, index: int) -> None:
        from distributed import get_worker  # noqa: PLC0415  # an extra

        self._worker, self._topic, self._index = get_worker(), topic, index
        self._key = self._worker.get_current_task()
        self.threads = int(self._worker.state.nthreads)

    def send(self, *message: str | int) -> None:
        """Send a message to the process that waits for the result."""
        self._worker.log_event(self._topic, [self._index, *message])

    def check_wanted(self) -> None:
        """Raise an exception, which the function is not to catch, if the worker ends, or the result is not wanted.

        A thread cannot be stopped from outside. So a long call asks this every second or so; if its process has been
        interrupted or killed, the scheduler has released the call.
        """
        from distributed import Reschedule  # noqa: PLC0415  # an extra
        from distributed.core import Status  # noqa: PLC0415

        task = self._worker.state.tasks.get(self._key)
        ends = self._worker.status in (Status.closing, Status.closed, Status.failed)
        if ends or task is None or task.state in ("cancelled", "resumed"):
            raise Reschedule


class Cluster:
    """The workers of a dask.distributed scheduler; see `join_cluster`."""

    def __init__(self, client: Any, scheduler: str) -> None:
        self._client, self._scheduler = client, scheduler

    def threads(self) -> dict[str, int]:
        """Return the number of calls that each worker does at the same time, by the address of the worker."""
        return dict(self._client.nthreads())

    def wait_for_worker(self) -> None:
        """Wait until there is a worker."""
        self._client.wait_for_workers(1)

    def ask(self, function: Callable[..., Any], *arguments: Any) -> dict[str, Any]:
        """Call a function on each worker that is there now, and return the results, or errors, by address.

        Raises:
            IncompleteError: if the scheduler ends.
        """
        try:
            return dict(self._client.run(_caught, function, *arguments, on_error="return"))
        except OSError as error:
            raise self._lost(error) from None

    def outcomes(
        self,
        function: Callable[..., Any],
        calls: Iterable[tuple[Any, ...]],
        on_message: Callable[[int, list[Any]], None],
    ) -> Iterator[tuple[int, Any]]:
        """Call a function with each tuple of arguments, after a `CallInWorker`; yield (index, outcome) as they end.

        A call is repeated if it raises an error, or its worker dies. What is left when the iteration ends is cancelled.

        Args:
            function: defined at the top level of a module.
            calls: arguments.
            on_message: is given the index and the content of each message that a call has sent.

        Raises:
            IncompleteError: if the scheduler ends.
        """
        # Callbacks run in threads of dask; their events are dealt with in this one, which Ctrl-C interrupts.
        events: SimpleQueue[tuple[str, Any]] = SimpleQueue()
        topic = f"kdcache-{uuid4().hex}"
        self._client.subscribe_topic(topic, lambda event: events.put(("message", event[1])))
        futures: list[Any] = []
        try:
            for index, call in enumerate(calls):
                key = f"{topic}-{index}"
                future = self._client.submit(
                    _do_call, topic, index, function, *call, key=key, retries=REPEATS, pure=False
                )
                futures.append(future)
                future.add_done_callback(lambda _, index=index: events.put(("end", index)))
            left = len(futures)
            while left:
                kind, content = events.get()
                if kind == "message":
                    on_message(content[0], content[1:])
                    continue
                left -= 1
                yield content, self._outcome(futures[content])
        finally:
            if self._client.status == "running":
                self._client.cancel(futures)
                self._client.unsubscribe_topic(topic)

    def _outcome(self, future: Any) -> Any:
        """Return what a call has returned, or the error that it has raised.

        Raises:
            IncompleteError: if the scheduler has ended.
        """
        from distributed import CancelledError, KilledWorker  # noqa: PLC0415  # an extra

        try:
            return future.result()
        except CancelledError as error:
            raise self._lost(error) from None
        except KilledWorker as error:
            return WorkersDied(
                f"{error.allowed_failures + 1} workers died while they had it, the last at {error.last_worker.address}",
                "read the output of the workers, and run the same command again",
            )
        except Exception as error:  # noqa: BLE001  # that of the function, for the caller
            return error

    def _lost(self, error: Exception) -> IncompleteError:
        return IncompleteError(
            f"the dask scheduler at {self._scheduler} does not answer any more: {error}",
            "start it again, and run the same command again to resume",
        )


def _caught(function: Callable[..., Any], *arguments: Any) -> Any:
    """Return what a function returns, or its error."""
    try:
        return function(*arguments)
    except Exception as error:  # noqa: BLE001  # for the caller, without a traceback, which cannot always be sent
        return error


def _do_call(topic: str, index: int, function: Callable[..., Any], *call: Any) -> Any:
    return function(CallInWorker(topic, index), *call)


@contextmanager
def join_cluster(scheduler: str) -> Iterator[Cluster]:
    """Connect to a dask.distributed scheduler, and yield its workers.

    Args:
        scheduler: its address, `tcp://HOST:PORT`.

    Raises:
        UsageError: if it does not answer, or dask.distributed is not installed.
    """
    with _connected(scheduler, f"use {_ADDRESS}") as client:
        yield Cluster(client, scheduler)


def of_shard(labels: torch.Tensor, plan: Plan, shard: int) -> torch.Tensor:
    """Return the labels of one shard, as a copy: a view would be sent to another process with all labels."""
    ids = plan.shard_ids(shard)
    return labels[ids.start : ids.stop].clone()

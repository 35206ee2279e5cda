"""Work on whole caches, a shard at a time, in parallel. The only module that knows dask.

Every operation is a map over shards and a sum in shard order, so that it needs the memory of a few shards whatever the
size of the cache, and gives the same bits however many workers share it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from pathlib import Path
from threading import Event
from typing import Any, NamedTuple, TypeVar

import numpy as np
import torch
from dask.base import compute
from dask.delayed import delayed
from dask.system import CPU_COUNT

from kdcache.cache import layout
from kdcache.cache.arrays import raw_bytes
from kdcache.cache.basis import TailBasis
from kdcache.cache.codec import decode, stated_at, tail_log_mass
from kdcache.cache.schema import TAIL_TEMPERATURES, Plan, Summary
from kdcache.cache.verify import Finding, check_shard_rows
from kdcache.errors import KdcacheError, UsageError
from kdcache.machine import free_memory

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


class _Sums(NamedTuple):
    labelled: int
    correct: int
    sharpness: float
    entropy: float
    top_probability: float


def summarise(cache: Path, plan: Plan, scheduler: str = "threads") -> Summary:
    """What a teacher is like, from its cache alone: accuracy, mean sharpness (logsumexp), entropy and confidence."""
    labels = torch.from_numpy(layout.read_samples(cache, plan)[0].astype(np.int64))
    calls = [
        (cache, plan, view, shard, of_shard(labels, plan, shard))
        for view in range(plan.views.count)
        for shard in range(plan.shards)
    ]
    sums = over(_sums, calls, scheduler, plan)
    rows = plan.views.count * plan.dataset.samples
    labelled = sum(part.labelled for part in sums)
    return Summary(
        teacher_accuracy=sum(part.correct for part in sums) / labelled if labelled else None,
        mean_sharpness=math.fsum(part.sharpness for part in sums) / rows,
        mean_entropy=math.fsum(part.entropy for part in sums) / rows,
        mean_top_probability=math.fsum(part.top_probability for part in sums) / rows,
    )


def of_shard(labels: torch.Tensor, plan: Plan, shard: int) -> torch.Tensor:
    """The labels of one shard: a copy, as what is sent to another process is sent with all that it is a part of."""
    ids = plan.shard_ids(shard)
    return labels[ids.start : ids.stop].clone()


def _sums(cache: Path, plan: Plan, view: int, shard: int, truth: torch.Tensor) -> _Sums:
    rows = layout.read_rows(cache, plan, view, plan.shard_ids(shard))
    if rows.indices is None:
        top_log_prob, predicted = decode(rows, truth, plan.encoding).log_softmax(dim=1).max(dim=1)
    else:
        top_log_prob, predicted = rows.log_probs[:, 0].float(), rows.indices[:, 0].long()
    entropy = rows.statistics[:, plan.encoding.statistics.index("entropy")]
    return _Sums(
        labelled=int((truth >= 0).sum()),
        correct=int((predicted == truth).sum()),
        # Exact sums: torch's depend, in their last bit, on how many threads the machine has.
        sharpness=math.fsum(rows.logsumexp.tolist()),
        entropy=math.fsum(entropy.tolist()),
        top_probability=math.fsum(top_log_prob.double().exp().tolist()),
    )


def check_rows(cache: Path, plan: Plan, shards: list[tuple[int, int]]) -> list[Finding]:
    """What cannot be right in the rows of some (view, shard) of a cache."""
    labels = torch.from_numpy(layout.read_samples(cache, plan)[0].astype(np.int64))
    found = over(check_shard_rows, [(cache, plan, view, shard, labels) for view, shard in shards])
    return [finding for part in found for finding in part]


class SelfFidelity(NamedTuple):
    """How near decoded rows of a view are to what was recorded of them, over all rows, without the teacher.

    Attributes:
        view: which one.
        temperature: T.
        tail_mass: mean |recorded - decoded| mass of the tail at T; a lower bound of the total variation.
        logsumexp: mean |recorded - decoded| logsumexp of the log-probabilities divided by T, in nats.
    """

    view: int
    temperature: int
    tail_mass: float
    logsumexp: float


def measure_itself(cache: Path, plan: Plan) -> list[SelfFidelity]:
    """Hold what rows decode to against the masses that were recorded at T = 2, 4, 8 and that decoding does not use.

    Empty where every class is kept: there is nothing that was not recorded.
    """
    if plan.encoding.dense:
        return []
    labels = torch.from_numpy(layout.read_samples(cache, plan)[0].astype(np.int64))
    basis = layout.read_basis(cache, plan)
    measured = []
    for view in range(plan.views.count):
        sums = over(_self_errors, [(cache, plan, view, shard, labels, basis) for shard in range(plan.shards)])
        for place, t in enumerate(TAIL_TEMPERATURES[1:]):
            mass, level = (math.fsum(part[place][kind] for part in sums) / plan.dataset.samples for kind in (0, 1))
            measured.append(SelfFidelity(view, t, mass, level))
    return measured


def _self_errors(
    cache: Path, plan: Plan, view: int, shard: int, labels: torch.Tensor, basis: TailBasis | None
) -> list[tuple[float, float]]:
    """Of one shard, summed over its rows: errors of the tail's mass and of the logsumexp at T = 2, 4, 8."""
    ids = plan.shard_ids(shard)
    errors = [(0.0, 0.0)] * (len(TAIL_TEMPERATURES) - 1)
    shard_rows = layout.read_rows(cache, plan, view, ids)
    for start in range(0, len(ids), _ROWS_AT_ONCE):
        rows = shard_rows[start : start + _ROWS_AT_ONCE]
        truth = labels[ids.start + start : ids.start + start + len(rows)]
        logits = decode(rows, truth, plan.encoding, basis)
        stated = stated_at(rows.indices, truth, plan.encoding.num_classes)  # type: ignore[arg-type]  # it is not dense
        for place, t in enumerate(TAIL_TEMPERATURES[1:]):
            recorded = rows.statistics[:, plan.encoding.statistics.index(f"tail_log_mass_t{t}")].double().exp()
            decoded = tail_log_mass(logits.double(), stated, t).exp()
            # Head and label are stated, so the logsumexp follows from their sum and the share that the tail has.
            level = ((1 - decoded).clamp_min(_TINY).log() - (1 - recorded).clamp_min(_TINY).log()).abs()
            mass, summed = errors[place]
            errors[place] = mass + float((recorded - decoded).abs().sum()), summed + float(level.sum())
    return errors

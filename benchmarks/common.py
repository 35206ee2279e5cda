"""Shared by the speed benchmarks: rows like those of a trained teacher, a cache of them, and interleaved timing."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from kdcache.cache import summary
from kdcache.cache.format.codec import Rows, encode
from kdcache.cache.format.encoding import Encoding, Request
from kdcache.cache.format.fingerprints import SKETCH_PARTS, Inputs
from kdcache.cache.format.schema import DatasetRecord, Plan, TeacherRecord, ViewsRecord
from kdcache.cache.format.sharding import choose_sharding
from kdcache.cache.format.stored_bases import basis_of_logits
from kdcache.cache.format.tail_basis import TailBasis
from kdcache.cache.planner import Candidate, plan_encoding
from kdcache.cache.writer import CacheWriter

_DIRECTIONS = 256
_DECAY = 24.0
_SPREAD = 3.0
_PILOT = 1024
_SHORTEST = 0.2
_NOTHING = "sha256:" + "0" * 64


def made_up_logits(rows: int, classes: int, seed: int) -> Tensor:
    """Return logits [N, C] float32, with a spectrum and a spread close to those of the teacher of `glyphs.py`."""
    directions = torch.randn(_DIRECTIONS, classes, generator=torch.Generator().manual_seed(1))
    features = torch.randn(rows, _DIRECTIONS, generator=torch.Generator().manual_seed(seed))
    falling = torch.exp(-torch.arange(_DIRECTIONS) / _DECAY)
    return _SPREAD / math.sqrt(_DECAY / 2) * (features * falling) @ directions


def request(**settings: object) -> Request:
    """Return a request with the default settings, except for those given."""
    usual = {"top_k": "auto", "tail": "lowrank", "rank": None, "fidelity": None, "dtype": "float16", "pilot_rows": 4096}
    return Request.model_validate(usual | settings)


def planned(classes: int, **settings: object) -> Candidate:
    """Return the encoding that the planner chooses for logits like these."""
    pilot = made_up_logits(_PILOT, classes, seed=2)
    return plan_encoding(pilot, pilot.argmax(dim=1), request(**settings)).chosen


class Pool(NamedTuple):
    """Encoded rows, all different, that are repeated to fill a larger cache.

    Attributes:
        rows: encoded.
        labels: [N] int64.
        encoding: of the rows.
        basis: of their tails.
    """

    rows: Rows
    labels: Tensor
    encoding: Encoding
    basis: TailBasis | None


def encoded(chosen: Candidate, rows: int) -> Pool:
    """Return a pool of encoded rows."""
    parts, labels = [], []
    for start in range(0, rows, 1000):
        logits = made_up_logits(min(1000, rows - start), chosen.encoding.num_classes, seed=3 + start)
        labels.append(logits.argmax(dim=1))
        parts.append(encode(logits, labels[-1], chosen.encoding, chosen.basis))
    return Pool(Rows.concatenate(parts), torch.cat(labels), chosen.encoding, chosen.basis)


class Written(NamedTuple):
    """A cache, and the time to write its shards.

    Attributes:
        path: of the cache.
        plan: of it.
        seconds: in `CacheWriter.write`, including flushing, digests and commit markers.
    """

    path: Path
    plan: Plan
    seconds: float


def write_cache(path: Path, pool: Pool, samples: int) -> Written:
    """Write a sealed cache of `samples` rows, those of the pool repeated."""
    plan = _plan(pool.encoding, samples)
    ids = torch.arange(samples) % len(pool.rows)
    keys = np.arange(samples, dtype=np.uint64)
    writer = CacheWriter.begin(path, plan, pool.labels[ids].int().numpy(), keys, basis_of_logits(pool.basis))
    seconds = 0.0
    for shard in range(plan.shards):
        of_shard = plan.shard_ids(shard)
        rows = pool.rows[ids[of_shard.start : of_shard.stop]]
        count = -(-len(of_shard) // plan.shape.fingerprint_stride)
        inputs = Inputs(np.arange(count, dtype=np.uint32), np.zeros((count, SKETCH_PARTS), np.float32))
        began = time.perf_counter()
        writer.write(0, shard, rows, inputs)
        seconds += time.perf_counter() - began
    writer.seal(summary.summarize(path, plan))
    return Written(path, plan, seconds)


def _plan(encoding: Encoding, samples: int) -> Plan:
    """Return the plan of a cache without a real teacher or data set."""
    names = tuple(map(str, range(encoding.num_classes)))
    return Plan(
        teacher=TeacherRecord(
            name="none", arguments={}, code_digest=None, weights_digest=_NOTHING, parameters=0, precision="float32"
        ),
        dataset=DatasetRecord(name="none", split="train", samples=samples, class_names=names, digest=_NOTHING),
        views=ViewsRecord(count=1, seed=0, transform=[]),
        request=request(),
        encoding=encoding,
        fidelity=None,
        shape=choose_sharding(samples, encoding.top_k * np.dtype(encoding.dtype).itemsize),
        batch_size=256,
        versions={},
        licence="",
        notes="",
    )


def spread(values: Sequence[float]) -> str:
    """Return the mean and the standard deviation (n - 1) of values over seeds, in words."""
    return f"{statistics.mean(values):.1f} +- {statistics.stdev(values) if len(values) > 1 else 0:.1f}"


def distance(values: Sequence[float], others: Sequence[float]) -> str:
    """Return the mean and the standard error of the differences of values to others, in words."""
    apart = [value - other for value, other in zip(values, others, strict=True)]
    error = statistics.stdev(apart) / math.sqrt(len(apart)) if len(apart) > 1 else math.nan
    return f"{statistics.mean(apart):+.2f} +- {error:.2f}"


def in_turn(works: Mapping[str, Callable[[], object]], rounds: int, device: str = "cpu") -> dict[str, float]:
    """Return the median seconds per call of each function, after one warm-up round.

    The functions take turns, so that all run under the same load. Short ones are repeated for at least 0.2 s per turn.
    Results are held until the turn is over, so that each call loads into new memory.
    """
    taken: dict[str, list[float]] = {name: [] for name in works}
    for work in works.values():
        work()
    for _ in range(rounds):
        for name, work in works.items():
            taken[name].append(_seconds(work, device))
    return {name: statistics.median(values) for name, values in taken.items()}


def _seconds(work: Callable[[], object], device: str) -> float:
    kept: list[object] = []
    _wait(device)
    began = time.perf_counter()
    while not kept or time.perf_counter() - began < _SHORTEST:
        kept.append(work())
        # The device runs asynchronously: wait until it has finished.
        _wait(device)
    return (time.perf_counter() - began) / len(kept)


def _wait(device: str) -> None:
    if device != "cpu":
        torch.cuda.synchronize(device)

"""Statistics of the outputs beside class logits, and how those of two caches differ."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from kdcache.cache import parallel
from kdcache.cache.format import stored_bases, zarr_store
from kdcache.cache.format.array_specs import labels_of, output_encoding
from kdcache.cache.format.output_codec import decode_output
from kdcache.cache.format.output_records import DEFAULT_OUTPUT
from kdcache.cache.format.schema import Plan
from kdcache.cache.preconditions import refuse_sequences
from kdcache.cache.reader import Cache

_BLOCK_ROWS = 4096
"""Rows that are decoded at once."""

_BLOCK_NUMBERS = 2**22
"""Numbers of maps that are decoded at once."""


class OutputStatistics(NamedTuple):
    """Statistics of an output over the rows of all views that are here.

    Attributes:
        output: its name.
        kind: vector, score or classes.
        rows: number of rows.
        length: numbers per row; of maps numbers per place, and what follows is of places.
        smallest: smallest number.
        largest: largest number.
        mean_norm: mean Euclidean length of a row.
        deviation: root of the mean squared distance from the mean row.
    """

    output: str
    kind: str
    rows: int
    length: int
    smallest: float
    largest: float
    mean_norm: float
    deviation: float


class OutputDifference(NamedTuple):
    """How an output differs between two caches, over the rows of the views that both have.

    Attributes:
        output: its name.
        rows: number of rows; 0 if they cannot be compared.
        one_minus_cosine: mean of 1 - cosine.
        relative_error: squared differences by squared distances of the first cache's rows from their mean.
        largest: largest difference of two numbers.
        why_not: why they cannot be compared; None if they can.
    """

    output: str
    rows: int
    one_minus_cosine: float
    relative_error: float
    largest: float
    why_not: str | None = None


def output_statistics(cache: Cache, scheduler: str = "threads") -> list[OutputStatistics]:
    """Return the statistics of every output beside the class logits; reads all of their rows.

    Args:
        cache: opened.
        scheduler: as for `parallel.over`.
    """
    plan, statistics = cache.manifest.plan, []
    refuse_sequences(plan, "summarize", "see `kdcache info`, or read the rows with cache.sequences()")
    labels = torch.from_numpy(cache.labels.astype(np.int64))
    for name, record in plan.named_outputs.items():
        calls = [
            (cache.path.absolute(), plan, name, view, shard, parallel.of_shard(labels, plan, shard))
            for view in cache.views
            for shard in range(plan.shards)
        ]
        parts = parallel.over(_shard_sums, calls, scheduler, plan)
        rows = len(cache.views) * len(cache)
        places = rows * math.prod(record.shape[1:])
        mean = torch.stack([part.total for part in parts]).sum(dim=0) / places
        squares = math.fsum(part.squares for part in parts) / places - float(mean.square().sum())
        statistics.append(
            OutputStatistics(
                name,
                record.kind,
                rows,
                record.channels,
                min(part.smallest for part in parts),
                max(part.largest for part in parts),
                math.fsum(part.norms for part in parts) / places,
                max(squares, 0.0) ** 0.5,
            )
        )
    return statistics


def output_differences(first: Cache, second: Cache, scheduler: str = "threads") -> list[OutputDifference]:
    """Return how the outputs that either of two caches of the same samples has differ.

    Args:
        first: opened.
        second: opened.
        scheduler: as for `parallel.over`.
    """
    views = sorted({*first.views}.intersection(second.views))
    found = []
    for name in sorted({*first.outputs, *second.outputs}):
        why_not = _why_not(name, first, second)
        if why_not is not None:
            found.append(OutputDifference(name, 0, 0.0, 0.0, 0.0, why_not))
            continue
        plans = first.manifest.plan, second.manifest.plan
        known = [torch.from_numpy(cache.labels.astype(np.int64)) for cache in (first, second)]
        paths = first.path.absolute(), second.path.absolute()
        calls = [
            (paths, plans, name, view, shard, [parallel.of_shard(of, plans[0], shard) for of in known])
            for view in views
            for shard in range(plans[0].shards)
        ]
        parts = parallel.over(_shard_differences, calls, scheduler, plans[0])
        rows = len(views) * len(first)
        places = rows * math.prod(first.outputs[name].shape[1:])
        mean = torch.stack([part.of_first.total for part in parts]).sum(dim=0) / places
        spread = math.fsum(part.of_first.squares for part in parts) - places * float(mean.square().sum())
        apart = math.fsum(part.squares for part in parts)
        relative = apart / spread if spread > 0 else float(apart > 0)
        cosines = math.fsum(part.cosines for part in parts) / places
        found.append(OutputDifference(name, rows, cosines, relative, max(part.largest for part in parts)))
    return found


def _why_not(name: str, first: Cache, second: Cache) -> str | None:
    records = [cache.outputs.get(name) for cache in (first, second)]
    for record, cache in zip(records, (first, second), strict=True):
        if record is None:
            return f"{cache.path} does not have it"
    kinds = [f"{record.kind} of {' x '.join(map(str, record.shape))}" for record in records if record is not None]
    return None if kinds[0] == kinds[1] else f"it is a {kinds[0]} in one, and a {kinds[1]} in the other"


class _Sums(NamedTuple):
    total: Tensor
    squares: float
    norms: float
    smallest: float
    largest: float


class _Differences(NamedTuple):
    of_first: _Sums
    squares: float
    cosines: float
    largest: float


def _decoded(cache: Path, plan: Plan, output: str, view: int, ids: range, labels: Tensor) -> Iterator[Tensor]:
    """Yield an output of some samples, or the places of its maps, in blocks [B, D] float64; `labels` are [N] int64."""
    rows = zarr_store.output_reader(cache, plan, output).read(view, ids)
    basis, encoding = stored_bases.read_output_basis(cache, plan, output), output_encoding(plan, output)
    truth = torch.from_numpy(labels_of(plan, output, labels.numpy()))
    shape = (1,) if output == DEFAULT_OUTPUT else plan.named_outputs[output].shape
    size = _BLOCK_ROWS if len(shape) == 1 else max(_BLOCK_NUMBERS // math.prod(shape), 1)
    for block in (slice(start, start + size) for start in range(0, len(rows), size)):
        decoded = decode_output(rows[block], truth[block], encoding, basis)
        yield decoded.movedim(1, -1).flatten(0, -2).double()


def _added(parts: Sequence[_Sums]) -> _Sums:
    return _Sums(
        torch.stack([part.total for part in parts]).sum(dim=0),
        math.fsum(part.squares for part in parts),
        math.fsum(part.norms for part in parts),
        min(part.smallest for part in parts),
        max(part.largest for part in parts),
    )


def _sums(values: Tensor) -> _Sums:
    squares = values.square().sum(dim=1)
    smallest, largest = values.aminmax()
    return _Sums(values.sum(dim=0), float(squares.sum()), float(squares.sqrt().sum()), float(smallest), float(largest))


def _shard_sums(cache: Path, plan: Plan, output: str, view: int, shard: int, labels: Tensor) -> _Sums:
    return _added([*map(_sums, _decoded(cache, plan, output, view, plan.shard_ids(shard), labels))])


def _shard_differences(
    paths: tuple[Path, Path], plans: tuple[Plan, Plan], output: str, view: int, shard: int, labels: list[Tensor]
) -> _Differences:
    """Compare the rows of a shard of the first cache with the same rows of the second, in whatever shards."""
    ids = plans[0].shard_ids(shard)
    blocks = [
        _decoded(path, plan, output, view, ids, known) for path, plan, known in zip(paths, plans, labels, strict=True)
    ]
    parts = [_compared(ours, other) for ours, other in zip(*blocks, strict=True)]
    return _Differences(
        _added([part.of_first for part in parts]),
        math.fsum(part.squares for part in parts),
        math.fsum(part.cosines for part in parts),
        max(part.largest for part in parts),
    )


def _compared(ours: Tensor, other: Tensor) -> _Differences:
    apart = ours - other
    cosines = torch.where((apart == 0).all(dim=1), 1.0, functional.cosine_similarity(ours, other, dim=1))
    return _Differences(_sums(ours), float(apart.square().sum()), float((1 - cosines).sum()), float(apart.abs().max()))

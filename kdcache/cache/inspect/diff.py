"""Compare two caches: their manifests, and the logits of their teachers for the same samples."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from kdcache.cache import parallel
from kdcache.cache.fidelity import total_variation
from kdcache.cache.format import stored_bases, zarr_store
from kdcache.cache.format.codec import decode
from kdcache.cache.format.schema import Plan
from kdcache.cache.inspect.output_statistics import OutputDifference, output_differences
from kdcache.cache.preconditions import differences, refuse_sequences
from kdcache.cache.reader import Cache

TEMPERATURES = (1, 4)
QUANTILES = (0.5, 0.9, 0.99)
_BINS = 1000
"""Bins of the histogram of total variation, which is between 0 and 1."""
_BLOCK_ROWS = 4096
"""Rows that are decoded at once."""


class Row(NamedTuple):
    """A row in which two teachers differ.

    Attributes:
        view: index of the view.
        id: id of the sample.
        key: content key of the sample, as hexadecimal digits.
        classes: top class of each teacher.
        total_variation: between their softmaxes at T = 1.
    """

    view: int
    id: int
    key: str
    classes: tuple[str, str]
    total_variation: float


class Variation(NamedTuple):
    """Total variation between two teachers' softmaxes at a temperature: mean, and quantiles with precision 0.001."""

    temperature: int
    mean: float
    quantiles: dict[float, float]


class LogitAgreement(NamedTuple):
    """Agreement of two teachers over their rows.

    Attributes:
        rows: number of rows that were compared, in the views that both caches have.
        same_class: share of rows with the same top class.
        variations: total variation per temperature.
        worst: rows with the largest total variation at T = 1.
    """

    rows: int
    same_class: float
    variations: list[Variation]
    worst: list[Row]


class Difference(NamedTuple):
    """The differences of two caches.

    Attributes:
        manifest: (key, value in the first, value in the second) per difference.
        agreement: agreement of their rows; None if these cannot be compared.
        why_not: reason in that case.
        outputs: differences of the outputs beside the class logits.
    """

    manifest: list[tuple[str, object, object]]
    agreement: LogitAgreement | None
    why_not: str | None
    outputs: Sequence[OutputDifference] = ()


class _ShardResult(NamedTuple):
    same: int
    sums: list[float]
    bins: npt.NDArray[np.int64]
    worst: list[tuple[float, int, int, int, int]]  # minus the total variation, view, id, the two top classes


def compare(first: Cache, second: Cache, worst: int = 10, scheduler: str = "threads") -> Difference:
    """Compare two caches.

    Args:
        first: first cache.
        second: second cache.
        worst: number of rows to list.
        scheduler: as for `parallel.over`.
    """
    for cache in (first, second):
        refuse_sequences(cache.manifest.plan, "diff", "compare the manifests (`kdcache info --json`)")
    before, after = (
        {**manifest.plan.model_dump(), "summary": manifest.summary.model_dump(), "digest": manifest.digest}
        for manifest in (first.manifest, second.manifest)
    )
    differ = differences(before, after)
    if not np.array_equal(first.sample_keys, second.sample_keys):
        common = int(np.isin(first.sample_keys, second.sample_keys).sum())
        why = f"they have different samples or another order: {len(first)} and {len(second)}, {common} of them in both"
        return Difference(differ, None, why)
    views = sorted({*first.views}.intersection(second.views))
    if not views:
        return Difference(differ, None, f"they have no view in common: {[*first.views]} and {[*second.views]}")
    outputs = output_differences(first, second, scheduler)
    for cache in (first, second):
        if cache.manifest.plan.class_encoding is None:
            return Difference(differ, None, f"{cache.path} does not have them", outputs)
    if first.num_classes != second.num_classes:
        why = f"they have {first.num_classes} and {second.num_classes} classes"
        return Difference(differ, None, why, outputs)
    return Difference(differ, _agreement(first, second, views, worst, scheduler), None, outputs)


def _agreement(first: Cache, second: Cache, views: Sequence[int], worst: int, scheduler: str) -> LogitAgreement:
    """Compare the rows of some views of two caches of the same samples, shard by shard of the first."""
    plans = first.manifest.plan, second.manifest.plan
    labels = [torch.from_numpy(cache.labels.astype(np.int64)) for cache in (first, second)]
    paths = first.path.absolute(), second.path.absolute()
    calls = [
        (paths, plans, view, shard, [parallel.of_shard(known, plans[0], shard) for known in labels], worst)
        for view in views
        for shard in range(plans[0].shards)
    ]
    parts = parallel.over(_compare_shard, calls, scheduler, plans[0])
    rows = len(views) * len(first)
    bins = np.sum([part.bins for part in parts], axis=0)
    variations = [
        Variation(t, sum(part.sums[index] for part in parts) / rows, {q: _quantile(bins[index], q) for q in QUANTILES})
        for index, t in enumerate(TEMPERATURES)
    ]
    names, other_names = (plan.dataset.class_names for plan in plans)
    worst_rows = [
        Row(view, id_, f"{first.sample_keys[id_]:016x}", (names[a], other_names[b]), -minus)
        for minus, view, id_, a, b in sorted(row for part in parts for row in part.worst)[:worst]
    ]
    return LogitAgreement(rows, sum(part.same for part in parts) / rows, variations, worst_rows)


def _quantile(bins: npt.NDArray[np.int64], share: float) -> float:
    """Return the upper bound of the bin that contains a quantile."""
    return float(np.searchsorted(np.cumsum(bins), share * bins.sum()) + 1) / _BINS


def _compare_shard(
    paths: tuple[Path, Path], plans: tuple[Plan, Plan], view: int, shard: int, labels: list[Tensor], worst: int
) -> _ShardResult:
    """Compare the rows of a shard of the first cache with the same rows of the second, in whatever shards."""
    ids = plans[0].shard_ids(shard)
    readers = [zarr_store.row_reader(path, plan) for path, plan in zip(paths, plans, strict=True)]
    bases = [stored_bases.read_basis(path, plan) for path, plan in zip(paths, plans, strict=True)]
    same, sums, bins = 0, [0.0] * len(TEMPERATURES), np.zeros((len(TEMPERATURES), _BINS), np.int64)
    worst_rows: list[tuple[float, int, int, int, int]] = []
    rows = [reader.read(view, ids) for reader in readers]
    for start in range(0, len(ids), _BLOCK_ROWS):
        block = slice(start, start + _BLOCK_ROWS)
        ours, other = (
            decode(encoded[block], known[block], plan.encoding, basis)
            for encoded, known, plan, basis in zip(rows, labels, plans, bases, strict=True)
        )
        tops = ours.argmax(dim=1), other.argmax(dim=1)
        same += int((tops[0] == tops[1]).sum())
        for index, t in enumerate(TEMPERATURES):
            variation = total_variation(ours, other, t).double()
            sums[index] += float(variation.sum())
            bins[index] += torch.bincount((variation * _BINS).long().clamp_max(_BINS - 1), minlength=_BINS).numpy()
            if t == 1:
                top = variation.topk(min(worst, len(variation)))
                worst_rows += [
                    (-value, view, ids[start + at], int(tops[0][at]), int(tops[1][at]))
                    for value, at in zip(top.values.tolist(), top.indices.tolist(), strict=True)
                ]
    return _ShardResult(same, sums, bins, sorted(worst_rows)[:worst])

"""What two caches differ in: what their manifests say, and what their teachers say of the same samples."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from kdcache.cache import parallel
from kdcache.cache.fidelity import total_variation
from kdcache.cache.format import zarr_store
from kdcache.cache.format.codec import decode
from kdcache.cache.format.schema import Plan
from kdcache.cache.preconditions import differences
from kdcache.cache.reader import Cache

TEMPERATURES = (1, 4)
QUANTILES = (0.5, 0.9, 0.99)
_FINE = 1000
"""Bins of the histogram of total variation, which is between 0 and 1."""
_ROWS_AT_ONCE = 4096


class Row(NamedTuple):
    """A row on which two teachers differ.

    Attributes:
        view: of the row.
        id: of its sample.
        key: of its content, as hexadecimal digits.
        classes: the top class of each teacher.
        total_variation: at T = 1.
    """

    view: int
    id: int
    key: str
    classes: tuple[str, str]
    total_variation: float


class Variation(NamedTuple):
    """Total variation between two teachers' softmaxes at a temperature: its mean, and quantiles to 0.001."""

    temperature: int
    mean: float
    quantiles: dict[float, float]


class LogitAgreement(NamedTuple):
    """How far two teachers agree, row by row.

    Attributes:
        rows: that were compared, of the views that both caches have.
        same_class: share of rows with the same top class.
        variations: by temperature.
        worst: the rows with the largest total variation at T = 1.
    """

    rows: int
    same_class: float
    variations: list[Variation]
    worst: list[Row]


class Difference(NamedTuple):
    """What two caches differ in.

    Attributes:
        manifest: (key, in the first, in the second).
        agreement: of their rows; None where these cannot be compared.
        why_not: in that case.
    """

    manifest: list[tuple[str, object, object]]
    agreement: LogitAgreement | None
    why_not: str | None


class _Part(NamedTuple):
    same: int
    sums: list[float]
    bins: npt.NDArray[np.int64]
    worst: list[tuple[float, int, int, int, int]]  # minus the total variation, view, id, the two top classes


def compare(first: Cache, second: Cache, worst: int = 10, scheduler: str = "threads") -> Difference:
    """What two caches differ in.

    Args:
        first: a cache.
        second: another one.
        worst: how many rows are named.
        scheduler: as `operations.over` takes it.
    """
    one, two = first.manifest, second.manifest
    ours, theirs = ({**m.plan.model_dump(), "summary": m.summary.model_dump(), "digest": m.digest} for m in (one, two))
    differ = differences(ours, theirs)
    if first.num_classes != second.num_classes:
        return Difference(differ, None, f"they have {first.num_classes} and {second.num_classes} classes")
    if not np.array_equal(first.sample_keys, second.sample_keys):
        common = int(np.isin(first.sample_keys, second.sample_keys).sum())
        why = f"they hold other samples, or another order: {len(first)} and {len(second)}, {common} of them in both"
        return Difference(differ, None, why)
    return Difference(differ, _agreement(first, second, worst, scheduler), None)


def _agreement(first: Cache, second: Cache, worst: int, scheduler: str) -> LogitAgreement:
    one, two = first.manifest.plan, second.manifest.plan
    views = min(one.views.count, two.views.count)
    labels = [torch.from_numpy(cache.labels.astype(np.int64)) for cache in (first, second)]
    paths = first.path.absolute(), second.path.absolute()
    calls = [
        (paths, (one, two), view, shard, [parallel.of_shard(known, one, shard) for known in labels], worst)
        for view in range(views)
        for shard in range(one.shards)
    ]
    parts = parallel.over(_compare_shard, calls, scheduler, one)
    rows = views * len(first)
    bins = np.sum([part.bins for part in parts], axis=0)
    variations = [
        Variation(t, sum(part.sums[place] for part in parts) / rows, {q: _quantile(bins[place], q) for q in QUANTILES})
        for place, t in enumerate(TEMPERATURES)
    ]
    names, others = one.dataset.class_names, two.dataset.class_names
    named = [
        Row(view, id_, f"{first.sample_keys[id_]:016x}", (names[a], others[b]), -minus)
        for minus, view, id_, a, b in sorted(found for part in parts for found in part.worst)[:worst]
    ]
    return LogitAgreement(rows, sum(part.same for part in parts) / rows, variations, named)


def _quantile(bins: npt.NDArray[np.int64], share: float) -> float:
    """The upper bound of the bin that this share of the rows does not exceed."""
    return float(np.searchsorted(np.cumsum(bins), share * bins.sum()) + 1) / _FINE


def _compare_shard(
    paths: tuple[Path, Path], plans: tuple[Plan, Plan], view: int, shard: int, labels: list[Tensor], worst: int
) -> _Part:
    """The rows of a shard of the first cache, wherever they lie in the second."""
    ids = plans[0].shard_ids(shard)
    readers = [zarr_store.RowReader(path, plan) for path, plan in zip(paths, plans, strict=True)]
    bases = [zarr_store.read_basis(path, plan) for path, plan in zip(paths, plans, strict=True)]
    same, sums, bins = 0, [0.0] * len(TEMPERATURES), np.zeros((len(TEMPERATURES), _FINE), np.int64)
    found: list[tuple[float, int, int, int, int]] = []
    rows = [reader.read(view, ids) for reader in readers]
    for start in range(0, len(ids), _ROWS_AT_ONCE):
        some = slice(start, start + _ROWS_AT_ONCE)
        ours, other = (
            decode(each[some], known[some], plan.encoding, basis)
            for each, known, plan, basis in zip(rows, labels, plans, bases, strict=True)
        )
        tops = ours.argmax(dim=1), other.argmax(dim=1)
        same += int((tops[0] == tops[1]).sum())
        for place, t in enumerate(TEMPERATURES):
            variation = total_variation(ours, other, t).double()
            sums[place] += float(variation.sum())
            bins[place] += torch.bincount((variation * _FINE).long().clamp_max(_FINE - 1), minlength=_FINE).numpy()
            if t == 1:
                top = variation.topk(min(worst, len(variation)))
                found += [
                    (-value, view, ids[start + at], int(tops[0][at]), int(tops[1][at]))
                    for value, at in zip(top.values.tolist(), top.indices.tolist(), strict=True)
                ]
    return _Part(same, sums, bins, sorted(found)[:worst])

"""Compare the summary and the fidelity that a manifest states with the rows of its cache (docs/FORMAT.md, section 8).

The summary is computed again. The fidelity was measured against logits that the cache does not hold; but the rows bound
it, since head and label are nearly exact and the true masses of the tail at T = 1, 2, 4, 8 are stored beside them.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from kdcache.cache.format import stored_bases, zarr_store
from kdcache.cache.format.codec import Rows, decode, stated_at, tail_log_mass
from kdcache.cache.format.encoding import TAIL_TEMPERATURES
from kdcache.cache.format.schema import MANIFEST, Plan, Summary
from kdcache.cache.format.tail_basis import TailBasis
from kdcache.cache.format.verified_files import Problem
from kdcache.cache.parallel import of_shard, over
from kdcache.cache.planner import MIN_CLASSES, encoding_without_pilot
from kdcache.cache.summary import ShardStatistics, summary_of
from kdcache.errors import UsageError

_ROWS_AT_ONCE = 2048

_ROUNDING = 1e-9
"""Relative difference of a mean by the order of its sum."""

_DECODED = {"teacher_accuracy": 1e-4, "mean_top_probability": 1e-5}
"""Differences by the rounding of decoded logits, which decides ties; where every class is stored (k = C)."""

_SLACK = 1e-3
"""Total variation by rounding that is not accounted for otherwise."""


def check_summary(stated: Summary, statistics: Sequence[ShardStatistics], plan: Plan) -> list[Problem]:
    """Return the fields of a summary that are not those of the rows, with both values.

    Args:
        stated: the summary of the manifest.
        statistics: of all shards of all views, in order.
        plan: of the cache.
    """
    problems = []
    for name, computed in summary_of(statistics, plan).model_dump().items():
        value = getattr(stated, name)
        is_dense = plan.class_encoding is not None and plan.class_encoding.dense
        tolerance = _DECODED.get(name, 0.0) if is_dense else 0.0
        if value is None or computed is None:
            same = value is computed
        else:
            same = abs(value - computed) <= max(_ROUNDING * abs(computed), tolerance)
        if not same:
            problems.append(Problem(f"{MANIFEST}, summary.{name}", f"states {value}, its rows give {computed}"))
    return problems


def check_fidelity(cache: Path, plan: Plan, has_first_view: bool) -> list[Problem]:
    """Return what is impossible in the fidelity of a plan.

    The pilot's rows are rows of view 0, except in caches that were selected or merged from others.

    Args:
        cache: folder of the cache.
        plan: its plan.
        has_first_view: whether view 0 is here.
    """
    stated, where = plan.fidelity, f"{MANIFEST}, plan.fidelity"
    if stated is None:
        return []
    if _needs_no_pilot(plan):
        return [Problem(where, "is stated, but every class was requested, so that nothing was measured")]
    own_rows = plan.lineage is None or plan.lineage.operation == "convert"
    most = plan.request.pilot_rows if not own_rows else -(-min(plan.request.pilot_rows, plan.dataset.samples) // 4)
    if not 1 <= stated.rows <= most:
        return [Problem(f"{where}.rows", f"states {stated.rows}, the held-out rows of the pilot are 1 to {most}")]
    names = [str(t) for t in TAIL_TEMPERATURES]
    if sorted(stated.total_variation) != names:
        return [Problem(f"{where}.total_variation", f"states T = {', '.join(stated.total_variation)}, not 1, 2, 4, 8")]
    bounds = [(0.0, 1.0)] * len(names)
    if own_rows and has_first_view:
        bounds = _bounds(cache, plan, stated.rows)
    return [
        Problem(f"{where}.total_variation.{name}", f"states {value}, its rows allow {low:.4f} to {high:.4f}")
        for name, (low, high) in zip(names, bounds, strict=True)
        if not low <= (value := stated.total_variation[name]) <= high
    ]


def _needs_no_pilot(plan: Plan) -> bool:
    if plan.class_encoding is None or plan.encoding.num_classes < MIN_CLASSES:
        return True
    try:
        return encoding_without_pilot(plan.encoding.num_classes, plan.request) is not None
    except UsageError:  # a request is informative: a foreign writer may state one that kdcache does not take
        return False


def _bounds(cache: Path, plan: Plan, rows: int) -> list[tuple[float, float]]:
    """Return bounds of the mean total variation over any `rows` rows of view 0, by temperature."""
    labels = torch.from_numpy(zarr_store.read_samples(cache, plan)[0].astype(np.int64))
    basis = stored_bases.read_basis(cache, plan)
    calls = [(cache, plan, shard, of_shard(labels, plan, shard), basis) for shard in range(plan.shards)]
    low, high = np.concatenate(over(_shard_bounds, calls, plan=plan), axis=2)
    least, most = np.partition(low, rows - 1, axis=1)[:, :rows], -np.partition(-high, rows - 1, axis=1)[:, :rows]
    return [
        (max(float(one), 0.0), min(float(other), 1.0))
        for one, other in zip(least.mean(axis=1), most.mean(axis=1), strict=True)
    ]


def _shard_bounds(
    cache: Path, plan: Plan, shard: int, labels: Tensor, basis: TailBasis | None
) -> npt.NDArray[np.float64]:
    """Return lower and upper bounds of the total variation of each row of a shard of view 0, [2, T, B]."""
    rows = zarr_store.read_rows(cache, plan, 0, plan.shard_ids(shard))
    parts = [
        _row_bounds(rows[start : start + _ROWS_AT_ONCE], labels[start : start + _ROWS_AT_ONCE], plan, basis)
        for start in range(0, len(rows), _ROWS_AT_ONCE)
    ]
    bounds: npt.NDArray[np.float64] = torch.cat(parts, dim=2).numpy()
    return bounds


def _row_bounds(rows: Rows, labels: Tensor, plan: Plan, basis: TailBasis | None) -> Tensor:
    """Return lower and upper bounds of the total variation of each row, [2, T, B].

    With the masses m and m' of the tail in both distributions, it is between |m - m'| and max(m, m'): the other classes
    have the same proportions in both.
    """
    encoding = plan.encoding
    logits = decode(rows, labels, encoding, basis).double()
    log_probs = logits.log_softmax(dim=1)
    statistics = dict(zip(encoding.statistics, rows.statistics.double().unbind(dim=1), strict=True))
    # Errors of log-probabilities: of their type, relative; of uint8, absolute and of any class.
    step = torch.zeros(len(rows), dtype=torch.float64)
    if encoding.dtype == "uint8":
        step = statistics["log_prob_range"] / 255 + 2**-10 * statistics["log_prob_max"].abs()
    low, high = [], []
    for t in TAIL_TEMPERATURES:
        probabilities = (logits / t).softmax(dim=1)
        rounding = _SLACK + (2**-9 * (probabilities * log_probs.abs()).sum(dim=1) + torch.expm1(2 * step)) / t
        if rows.indices is None:
            low.append(-rounding)
            high.append(rounding)
        else:
            mass = statistics[f"tail_log_mass_t{t}"].exp()
            decoded = tail_log_mass(logits, stated_at(rows.indices, labels, encoding.num_classes), t).exp()
            low.append((mass - decoded).abs() - rounding)
            high.append(mass.maximum(decoded) + rounding)
    return torch.stack([torch.stack(low), torch.stack(high)])

"""What the rows of a cache say of its teacher and its data: by class, by sharpness, and sample by sample.

Counted a shard at a time; what is kept of a shard is a few numbers a class, histograms, and its worst samples.
"""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from kdcache.cache import parallel
from kdcache.cache.format import zarr_store
from kdcache.cache.format.codec import Rows, decode
from kdcache.cache.format.schema import Plan
from kdcache.cache.format.tail_basis import TailBasis
from kdcache.cache.reader import Cache
from kdcache.cache.summary import CONFIDENCE_BINS, SHARPNESS_BINS_PER_NAT

QUANTILES = (0.01, 0.1, 0.25, 0.5, 0.75, 0.9, 0.99)
SURE = 3.0
"""Nats, a factor of 20, by which another class is more probable than the label where this may be wrong."""

_ROWS_AT_ONCE = 4096
Numbers = npt.NDArray[np.float64]


class OfClass(NamedTuple):
    """The rows of one label.

    Attributes:
        name: of the class.
        samples: how many have this label.
        accuracy: share of their rows whose top class is the label; the three are None where there is no sample.
        confidence: mean largest probability.
        sharpness: mean logsumexp.
    """

    name: str
    samples: int
    accuracy: float | None
    confidence: float | None
    sharpness: float | None


class OfSample(NamedTuple):
    """What the teacher says of one sample, mean over its views.

    Attributes:
        id: its ordinal.
        key: its content key, as hexadecimal digits.
        label: its class.
        label_log_prob: of that class.
        top: the class that is the largest in most of its views.
        margin: nats by which the largest class is more probable than the label; 0 where it is the label.
    """

    id: int
    key: str
    label: str
    label_log_prob: float
    top: str
    margin: float


@dataclass(frozen=True)
class Census:
    """All rows of a cache, counted.

    Attributes:
        rows: of all views.
        classes: one a class.
        quantiles: of the sharpness (logsumexp), by the share of rows below, to 1/256 nat.
        sharpness: rows by bin of the sharpness, [lower bound of the bin] -> rows.
        confidence: rows by bin of the largest probability, from 0 to 1.
        hardest: the samples of which the label's log-probability is lowest.
        suspects: samples of which another class is far more probable than the label, the farthest first.
        suspected: how many there are.
        threshold: from how many nats on they count.
    """

    rows: int
    classes: list[OfClass]
    quantiles: dict[float, float]
    sharpness: dict[float, int]
    confidence: list[int]
    hardest: list[OfSample]
    suspects: list[OfSample]
    suspected: int
    threshold: float


class _Counted(NamedTuple):
    by_class: Numbers  # [4, C]: samples, right rows, confidence, sharpness
    sharpness: Counter[int]
    confidence: npt.NDArray[np.int64]
    hardest: list[tuple[float, int, int, int, float]]  # label's log-probability, id, label, top, margin
    suspects: list[tuple[float, int, int, int, float]]  # minus the margin, id, label, top, label's log-probability
    suspected: int


def take_census(cache: Cache, worst: int = 10, threshold: float = SURE, scheduler: str = "threads") -> Census:
    """Count all rows.

    Args:
        cache: whose.
        worst: how many of the hardest samples, and of the suspects, are named.
        threshold: nats from which a sample is suspected.
        scheduler: as `operations.over` takes it.
    """
    plan, names = cache.manifest.plan, cache.manifest.plan.dataset.class_names
    labels = torch.from_numpy(cache.labels.astype(np.int64))
    calls = [
        (cache.path.absolute(), plan, shard, parallel.of_shard(labels, plan, shard), worst, threshold)
        for shard in range(plan.shards)
    ]
    parts = parallel.over(_count, calls, scheduler, plan)
    samples, right, confidence, sharpness = np.sum([part.by_class for part in parts], axis=0)
    fine = sum((part.sharpness for part in parts), Counter())
    rows = plan.views.count * plan.dataset.samples

    def of_class(number: int) -> OfClass:
        count = int(samples[number])
        seen = count * plan.views.count
        means = (float(total[number] / seen) if seen else None for total in (right, confidence, sharpness))
        return OfClass(names[number], count, *means)

    def of_sample(id_: int, label: int, top: int, label_log_prob: float, margin: float) -> OfSample:
        return OfSample(id_, f"{cache.sample_keys[id_]:016x}", names[label], label_log_prob, names[top], margin)

    hardest = sorted(one for part in parts for one in part.hardest)[:worst]
    suspects = sorted(one for part in parts for one in part.suspects)[:worst]
    return Census(
        rows,
        [of_class(number) for number in range(len(names))],
        {share: _quantile(fine, share * rows) for share in QUANTILES},
        {bin_ / SHARPNESS_BINS_PER_NAT: count for bin_, count in sorted(fine.items())},
        np.sum([part.confidence for part in parts], axis=0).tolist(),
        [of_sample(id_, label, top, log_prob, margin) for log_prob, id_, label, top, margin in hardest],
        [of_sample(id_, label, top, log_prob, -minus) for minus, id_, label, top, log_prob in suspects],
        sum(part.suspected for part in parts),
        threshold,
    )


def _quantile(bins: Counter[int], wanted: float) -> float:
    """Where so many rows are below: within a bin they are taken to lie evenly."""
    below = 0
    for bin_, count in sorted(bins.items()):
        if below + count >= wanted:
            return (bin_ + (wanted - below) / count) / SHARPNESS_BINS_PER_NAT
        below += count
    return math.inf


def _count(path: Path, plan: Plan, shard: int, truth: Tensor, worst: int, threshold: float) -> _Counted:
    """One shard, in all views."""
    ids, views = plan.shard_ids(shard), plan.views.count
    basis = zarr_store.read_basis(path, plan)
    by_class = np.zeros((4, plan.encoding.num_classes))
    fine: Counter[int] = Counter()
    confidences = np.zeros(CONFIDENCE_BINS, np.int64)
    log_probs, margins = torch.zeros(len(ids), dtype=torch.float64), torch.zeros(len(ids), dtype=torch.float64)
    tops = torch.zeros(views, len(ids), dtype=torch.int64)
    known = truth >= 0
    numbers = truth[known].numpy()
    np.add.at(by_class[0], numbers, 1)
    for view in range(views):
        rows = zarr_store.read_rows(path, plan, view, ids)
        top_log_prob, tops[view] = _top(rows, truth, plan, basis)
        label = rows.statistics[:, plan.encoding.statistics.index("label_log_prob")].double()
        probability = top_log_prob.exp().clamp_max(1)
        for line, values in enumerate((tops[view] == truth, probability, rows.logsumexp), start=1):
            np.add.at(by_class[line], numbers, values[known].double().numpy())
        fine.update((rows.logsumexp.double() * SHARPNESS_BINS_PER_NAT).floor().long().tolist())
        places = (probability * CONFIDENCE_BINS).long().clamp_max(CONFIDENCE_BINS - 1)
        confidences += torch.bincount(places, minlength=CONFIDENCE_BINS).numpy()
        log_probs += label / views
        margins += torch.where(tops[view] == truth, 0.0, (top_log_prob - label).clamp_min(0)) / views
    top = tops.mode(dim=0).values
    lines = zip(log_probs.tolist(), ids, truth.tolist(), top.tolist(), margins.tolist(), strict=True)
    labeled = [line for line in lines if line[2] >= 0]
    suspects = sorted(
        (-margin, id_, label, of_top, log_prob)
        for log_prob, id_, label, of_top, margin in labeled
        if margin >= threshold
    )
    return _Counted(by_class, fine, confidences, sorted(labeled)[:worst], suspects[:worst], len(suspects))


def _top(rows: Rows, labels: Tensor, plan: Plan, basis: TailBasis | None) -> tuple[Tensor, Tensor]:
    """(log-probability [B] float64, class [B]) of the largest class."""
    if rows.indices is not None:
        return rows.log_probs[:, 0].double(), rows.indices[:, 0].long()
    parts = [
        decode(rows[start : start + _ROWS_AT_ONCE], labels[start : start + _ROWS_AT_ONCE], plan.encoding, basis)
        .log_softmax(dim=1)
        .max(dim=1)
        for start in range(0, len(rows), _ROWS_AT_ONCE)
    ]
    return torch.cat([part.values for part in parts]).double(), torch.cat([part.indices for part in parts])

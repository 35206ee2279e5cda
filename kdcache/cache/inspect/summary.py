"""Statistics over the rows of a cache: per class, histograms of sharpness and confidence, and notable samples.

Computed shard by shard; of a shard, a few numbers per class, histograms and its worst samples are held in memory.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from kdcache.cache import parallel
from kdcache.cache.format import stored_bases, zarr_store
from kdcache.cache.format.codec import Rows, decode
from kdcache.cache.format.schema import Plan
from kdcache.cache.format.tail_basis import TailBasis
from kdcache.cache.reader import Cache
from kdcache.cache.summary import CONFIDENCE_BINS, SHARPNESS_BINS_PER_NAT

QUANTILES = (0.01, 0.1, 0.25, 0.5, 0.75, 0.9, 0.99)
SURE = 3.0
"""Nats (a factor of 20) by which another class is more probable than the label, from which the label is suspect."""

_BLOCK_ROWS = 4096
"""Rows that are decoded at once."""

Numbers = npt.NDArray[np.float64]


class OfClass(NamedTuple):
    """Statistics of the rows with one label.

    Attributes:
        name: name of the class.
        samples: number of samples with this label.
        accuracy: share of their rows whose top class is the label; None, as the next two, without samples.
        confidence: mean largest probability.
        sharpness: mean logsumexp, in nats.
    """

    name: str
    samples: int
    accuracy: float | None
    confidence: float | None
    sharpness: float | None


class OfSample(NamedTuple):
    """The teacher's prediction for one sample, averaged over its views.

    Attributes:
        id: id of the sample.
        key: its content key, as hexadecimal digits.
        label: name of its class.
        label_log_prob: log-probability of that class.
        top: most frequent top class over the views.
        margin: nats by which the top class is more probable than the label; 0 if it is the label.
    """

    id: int
    key: str
    label: str
    label_log_prob: float
    top: str
    margin: float


@dataclass(frozen=True)
class Census:
    """Statistics over all rows of a cache.

    Attributes:
        rows: number of rows in all views.
        classes: statistics per class.
        quantiles: share of rows -> quantile of the sharpness (logsumexp), with a precision of 1/256 nat.
        sharpness: lower bound of each bin of the sharpness, in nats -> rows.
        confidence: rows per bin of the largest probability, in equal bins from 0 to 1.
        hardest: samples with the lowest log-probability of the label.
        suspects: samples of which another class is far more probable than the label, largest margin first.
        suspected: number of all such samples.
        threshold: smallest margin of a suspect, in nats.
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


class _ShardCensus(NamedTuple):
    by_class: Numbers  # [4, C]: samples, correct rows, confidence, sharpness
    sharpness: Counter[int]
    confidence: npt.NDArray[np.int64]
    hardest: list[tuple[float, int, int, int, float]]  # label's log-probability, id, label, top, margin
    suspects: list[tuple[float, int, int, int, float]]  # minus the margin, id, label, top, label's log-probability
    suspected: int


def take_census(cache: Cache, worst: int = 10, threshold: float = SURE, scheduler: str = "threads") -> Census:
    """Compute statistics over all rows of a cache, in the opened views.

    Args:
        cache: opened.
        worst: number of hardest samples, and of suspects, to list.
        threshold: smallest margin of a suspect, in nats.
        scheduler: as for `parallel.over`.
    """
    plan, names = cache.manifest.plan, cache.manifest.plan.dataset.class_names
    labels = torch.from_numpy(cache.labels.astype(np.int64))
    calls = [
        (cache.path.absolute(), plan, cache.views, shard, parallel.of_shard(labels, plan, shard), worst, threshold)
        for shard in range(plan.shards)
    ]
    parts = parallel.over(_count_shard, calls, scheduler, plan)
    samples, correct, confidence, sharpness = np.sum([part.by_class for part in parts], axis=0)
    fine = sum((part.sharpness for part in parts), Counter())
    rows = len(cache.views) * plan.dataset.samples

    def of_class(index: int) -> OfClass:
        count = int(samples[index])
        n_rows = count * len(cache.views)
        means = (float(total[index] / n_rows) if n_rows else None for total in (correct, confidence, sharpness))
        return OfClass(names[index], count, *means)

    def of_sample(id_: int, label: int, top: int, label_log_prob: float, margin: float) -> OfSample:
        return OfSample(id_, f"{cache.sample_keys[id_]:016x}", names[label], label_log_prob, names[top], margin)

    hardest = sorted(sample for part in parts for sample in part.hardest)[:worst]
    suspects = sorted(sample for part in parts for sample in part.suspects)[:worst]
    return Census(
        rows,
        [of_class(index) for index in range(len(names))],
        {share: _quantile(fine, share * rows) for share in QUANTILES},
        {bin_ / SHARPNESS_BINS_PER_NAT: count for bin_, count in sorted(fine.items())},
        np.sum([part.confidence for part in parts], axis=0).tolist(),
        [of_sample(id_, label, top, log_prob, margin) for log_prob, id_, label, top, margin in hardest],
        [of_sample(id_, label, top, log_prob, -minus) for minus, id_, label, top, log_prob in suspects],
        sum(part.suspected for part in parts),
        threshold,
    )


def _quantile(bins: Counter[int], wanted: float) -> float:
    """Return the value below which `wanted` rows are, with linear interpolation within a bin."""
    below = 0
    for bin_, count in sorted(bins.items()):
        if below + count >= wanted:
            return (bin_ + (wanted - below) / count) / SHARPNESS_BINS_PER_NAT
        below += count
    return math.inf


def _count_shard(
    path: Path, plan: Plan, views: Sequence[int], shard: int, truth: Tensor, worst: int, threshold: float
) -> _ShardCensus:
    """Compute the statistics of one shard, in some views."""
    ids = plan.shard_ids(shard)
    basis = stored_bases.read_basis(path, plan)
    by_class = np.zeros((4, plan.encoding.num_classes))
    fine: Counter[int] = Counter()
    confidences = np.zeros(CONFIDENCE_BINS, np.int64)
    log_probs, margins = torch.zeros(len(ids), dtype=torch.float64), torch.zeros(len(ids), dtype=torch.float64)
    tops = torch.zeros(len(views), len(ids), dtype=torch.int64)
    known = truth >= 0
    classes = truth[known].numpy()
    np.add.at(by_class[0], classes, 1)
    for row, view in enumerate(views):
        rows = zarr_store.read_rows(path, plan, view, ids)
        top_log_prob, tops[row] = _top(rows, truth, plan, basis)
        label = rows.statistics[:, plan.encoding.statistics.index("label_log_prob")].double()
        probability = top_log_prob.exp().clamp_max(1)
        for column, values in enumerate((tops[row] == truth, probability, rows.logsumexp), start=1):
            np.add.at(by_class[column], classes, values[known].double().numpy())
        fine.update((rows.logsumexp.double() * SHARPNESS_BINS_PER_NAT).floor().long().tolist())
        places = (probability * CONFIDENCE_BINS).long().clamp_max(CONFIDENCE_BINS - 1)
        confidences += torch.bincount(places, minlength=CONFIDENCE_BINS).numpy()
        log_probs += label / len(views)
        margins += torch.where(tops[row] == truth, 0.0, (top_log_prob - label).clamp_min(0)) / len(views)
    top = tops.mode(dim=0).values
    lines = zip(log_probs.tolist(), ids, truth.tolist(), top.tolist(), margins.tolist(), strict=True)
    labeled = [line for line in lines if line[2] >= 0]
    suspects = sorted(
        (-margin, id_, label, of_top, log_prob)
        for log_prob, id_, label, of_top, margin in labeled
        if margin >= threshold
    )
    return _ShardCensus(by_class, fine, confidences, sorted(labeled)[:worst], suspects[:worst], len(suspects))


def _top(rows: Rows, labels: Tensor, plan: Plan, basis: TailBasis | None) -> tuple[Tensor, Tensor]:
    """Return (log-probability [B] float64, class [B]) of the top class."""
    if rows.indices is not None:
        return rows.log_probs[:, 0].double(), rows.indices[:, 0].long()
    parts = [
        decode(rows[start : start + _BLOCK_ROWS], labels[start : start + _BLOCK_ROWS], plan.encoding, basis)
        .log_softmax(dim=1)
        .max(dim=1)
        for start in range(0, len(rows), _BLOCK_ROWS)
    ]
    return torch.cat([part.values for part in parts]).double(), torch.cat([part.indices for part in parts])

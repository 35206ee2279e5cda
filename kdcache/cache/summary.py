"""Summarize a teacher from the rows of its cache: accuracy, sharpness, entropy, confidence, and their histograms.

The statistics of a shard are computed from its rows, either while they are written or from the store, with the same
result to the bit; those of a cache are the sums over its shards, in the order of the shards.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from kdcache.cache.format import zarr_store
from kdcache.cache.format.codec import Rows, decode
from kdcache.cache.format.encoding import Encoding
from kdcache.cache.format.schema import Plan, Summary
from kdcache.cache.parallel import of_shard, over

SHARPNESS_BINS_PER_NAT = 256
CONFIDENCE_BINS = 50
_ROWS_PER_DECODE = 4096


class ShardStatistics(NamedTuple):
    """Sums and histograms over the rows of one shard.

    Attributes:
        labeled: number of rows with a label.
        correct: number of rows whose largest class is the label.
        sharpness: sum of the logsumexp.
        entropy: sum of the entropy, in nats.
        top_probability: sum of the largest probability.
        sharpness_bins: rows per bin of the logsumexp; bin b begins at b / `SHARPNESS_BINS_PER_NAT` nats.
        confidence_bins: [`CONFIDENCE_BINS`] int64, rows per bin of the largest probability, from 0 to 1.
    """

    labeled: int
    correct: int
    sharpness: float
    entropy: float
    top_probability: float
    sharpness_bins: Counter[int]
    confidence_bins: npt.NDArray[np.int64]


def shard_statistics(rows: Rows, labels: Tensor, encoding: Encoding) -> ShardStatistics:
    """Compute the statistics of the encoded rows of a shard and their labels [B] int64."""
    top_log_prob, predicted = _largest_class(rows, labels, encoding)
    entropy = rows.statistics[:, encoding.statistics.index("entropy")]
    probability = top_log_prob.exp()
    confidence = (probability.clamp_max(1) * CONFIDENCE_BINS).long().clamp_max(CONFIDENCE_BINS - 1)
    return ShardStatistics(
        labeled=int((labels >= 0).sum()),
        correct=int((predicted == labels).sum()),
        # Exact sums: the last bit of a sum by torch depends on the number of threads.
        sharpness=math.fsum(rows.logsumexp.tolist()),
        entropy=math.fsum(entropy.tolist()),
        top_probability=math.fsum(probability.tolist()),
        sharpness_bins=Counter((rows.logsumexp.double() * SHARPNESS_BINS_PER_NAT).floor().long().tolist()),
        confidence_bins=torch.bincount(confidence, minlength=CONFIDENCE_BINS).numpy(),
    )


def _largest_class(rows: Rows, labels: Tensor, encoding: Encoding) -> tuple[Tensor, Tensor]:
    """Return (log-probability [B] float64, index [B] int64) of the largest class of each row."""
    if rows.indices is not None:
        return rows.log_probs[:, 0].float().double(), rows.indices[:, 0].long()
    parts = [
        decode(rows[start : start + _ROWS_PER_DECODE], labels[start : start + _ROWS_PER_DECODE], encoding)
        .log_softmax(dim=1)
        .max(dim=1)
        for start in range(0, len(rows), _ROWS_PER_DECODE)
    ]
    return torch.cat([part.values for part in parts]).double(), torch.cat([part.indices for part in parts])


def collect_statistics(
    cache: Path,
    plan: Plan,
    known: Mapping[tuple[int, int], ShardStatistics] | None = None,
    scheduler: str = "threads",
) -> list[ShardStatistics]:
    """Return the statistics of all shards, by view and shard; of a cache without class logits there are none.

    Args:
        cache: folder of the cache.
        plan: of the cache.
        known: (view, shard) -> statistics that were computed while the shard was written; only the others are read.
        scheduler: as for `parallel.over`.
    """
    if plan.class_encoding is None:
        return []
    statistics = dict(known or {})
    shards = [(view, shard) for view in range(plan.views.count) for shard in range(plan.shards)]
    if missing := [which for which in shards if which not in statistics]:
        labels = torch.from_numpy(zarr_store.read_samples(cache, plan)[0].astype(np.int64))
        calls = [(cache, plan, view, shard, of_shard(labels, plan, shard)) for view, shard in missing]
        statistics |= zip(missing, over(_stored_statistics, calls, scheduler, plan), strict=True)
    return [statistics[which] for which in shards]


def _stored_statistics(cache: Path, plan: Plan, view: int, shard: int, labels: Tensor) -> ShardStatistics:
    rows = zarr_store.read_rows(cache, plan, view, plan.shard_ids(shard))
    return shard_statistics(rows, labels, plan.encoding)


def summary_of(statistics: Sequence[ShardStatistics], plan: Plan) -> Summary:
    """Return the summary of a cache from the statistics of all its shards, in order."""
    if plan.class_encoding is None:
        return Summary(teacher_accuracy=None, mean_sharpness=None, mean_entropy=None, mean_top_probability=None)
    rows = plan.views.count * plan.dataset.samples
    labeled = sum(part.labeled for part in statistics)
    return Summary(
        teacher_accuracy=sum(part.correct for part in statistics) / labeled if labeled else None,
        mean_sharpness=math.fsum(part.sharpness for part in statistics) / rows,
        mean_entropy=math.fsum(part.entropy for part in statistics) / rows,
        mean_top_probability=math.fsum(part.top_probability for part in statistics) / rows,
    )


def summarize(cache: Path, plan: Plan, scheduler: str = "threads") -> Summary:
    """Return the accuracy, mean sharpness (logsumexp), entropy and confidence of a teacher from its stored rows."""
    return summary_of(collect_statistics(cache, plan, None, scheduler), plan)


def histograms(statistics: Iterable[ShardStatistics]) -> tuple[dict[float, int], list[int]]:
    """Return the histograms of a cache.

    Returns:
        (lower bound of the bin in nats -> rows, by sharpness; rows per bin of the largest probability).
    """
    sharpness: Counter[int] = Counter()
    confidence = np.zeros(CONFIDENCE_BINS, np.int64)
    for part in statistics:
        sharpness.update(part.sharpness_bins)
        confidence += part.confidence_bins
    return {bin_ / SHARPNESS_BINS_PER_NAT: count for bin_, count in sorted(sharpness.items())}, confidence.tolist()

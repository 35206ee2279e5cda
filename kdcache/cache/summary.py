"""Summarize a teacher from its cache: accuracy, sharpness, entropy, confidence."""

from __future__ import annotations

import math
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from kdcache.cache.format import zarr_store
from kdcache.cache.format.codec import decode
from kdcache.cache.format.schema import Plan, Summary
from kdcache.cache.parallel import of_shard, over


class _Sums(NamedTuple):
    labeled: int
    correct: int
    sharpness: float
    entropy: float
    top_probability: float


def summarize(cache: Path, plan: Plan, scheduler: str = "threads") -> Summary:
    """What a teacher is like, from its cache alone: accuracy, mean sharpness (logsumexp), entropy and confidence."""
    labels = torch.from_numpy(zarr_store.read_samples(cache, plan)[0].astype(np.int64))
    calls = [
        (cache, plan, view, shard, of_shard(labels, plan, shard))
        for view in range(plan.views.count)
        for shard in range(plan.shards)
    ]
    sums = over(_sums, calls, scheduler, plan)
    rows = plan.views.count * plan.dataset.samples
    labeled = sum(part.labeled for part in sums)
    return Summary(
        teacher_accuracy=sum(part.correct for part in sums) / labeled if labeled else None,
        mean_sharpness=math.fsum(part.sharpness for part in sums) / rows,
        mean_entropy=math.fsum(part.entropy for part in sums) / rows,
        mean_top_probability=math.fsum(part.top_probability for part in sums) / rows,
    )


def _sums(cache: Path, plan: Plan, view: int, shard: int, truth: torch.Tensor) -> _Sums:
    rows = zarr_store.read_rows(cache, plan, view, plan.shard_ids(shard))
    if rows.indices is None:
        top_log_prob, predicted = decode(rows, truth, plan.encoding).log_softmax(dim=1).max(dim=1)
    else:
        top_log_prob, predicted = rows.log_probs[:, 0].float(), rows.indices[:, 0].long()
    entropy = rows.statistics[:, plan.encoding.statistics.index("entropy")]
    return _Sums(
        labeled=int((truth >= 0).sum()),
        correct=int((predicted == truth).sum()),
        # Exact sums: torch's depend, in their last bit, on how many threads the machine has.
        sharpness=math.fsum(rows.logsumexp.tolist()),
        entropy=math.fsum(entropy.tolist()),
        top_probability=math.fsum(top_log_prob.double().exp().tolist()),
    )

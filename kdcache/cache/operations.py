"""Work on whole caches, a shard at a time, in parallel. The only module that knows dask.

Every operation is a map over shards and a sum in shard order, so that it needs the memory of a few shards whatever the
size of the cache, and gives the same bits however many workers share it.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from dask.base import compute
from dask.delayed import delayed

from kdcache.cache import layout
from kdcache.cache.basis import TailBasis
from kdcache.cache.codec import decode, stated_at, tail_log_mass
from kdcache.cache.schema import TAIL_TEMPERATURES, Plan, Summary
from kdcache.cache.verify import Finding, check_shard_rows

_ROWS_AT_ONCE = 4096
_TINY = 1e-12


class _Sums(NamedTuple):
    labelled: int
    correct: int
    sharpness: float
    entropy: float
    top_probability: float


def summarise(cache: Path, plan: Plan) -> Summary:
    """What a teacher is like, from its cache alone: accuracy, mean sharpness (logsumexp), entropy and confidence."""
    labels = torch.from_numpy(layout.read_samples(cache, plan)[0].astype(np.int64))
    parts = [
        delayed(_sums)(cache, plan, view, shard, labels)
        for view in range(plan.views.count)
        for shard in range(plan.shards)
    ]
    sums = [_Sums(*part) for part in compute(*parts, scheduler="threads")]  # type: ignore[no-untyped-call]
    rows = plan.views.count * plan.dataset.samples
    labelled = sum(part.labelled for part in sums)
    return Summary(
        teacher_accuracy=sum(part.correct for part in sums) / labelled if labelled else None,
        mean_sharpness=math.fsum(part.sharpness for part in sums) / rows,
        mean_entropy=math.fsum(part.entropy for part in sums) / rows,
        mean_top_probability=math.fsum(part.top_probability for part in sums) / rows,
    )


def _sums(cache: Path, plan: Plan, view: int, shard: int, labels: torch.Tensor) -> _Sums:
    ids = plan.shard_ids(shard)
    rows = layout.read_rows(cache, plan, view, ids)
    truth = labels[ids.start : ids.stop]
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
    parts = [delayed(check_shard_rows)(cache, plan, view, shard, labels) for view, shard in shards]
    found: tuple[list[Finding], ...] = compute(*parts, scheduler="threads")  # type: ignore[no-untyped-call]
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
        parts = [delayed(_self_errors)(cache, plan, view, shard, labels, basis) for shard in range(plan.shards)]
        sums = compute(*parts, scheduler="threads")  # type: ignore[no-untyped-call]
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

"""Measure how close decoded rows are to what was recorded of them, without the teacher."""

from __future__ import annotations

import math
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from kdcache.cache.format import zarr_store
from kdcache.cache.format.codec import decode, stated_at, tail_log_mass
from kdcache.cache.format.schema import TAIL_TEMPERATURES, Plan
from kdcache.cache.format.tail_basis import TailBasis
from kdcache.cache.parallel import _ROWS_AT_ONCE, _TINY, over


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
    labels = torch.from_numpy(zarr_store.read_samples(cache, plan)[0].astype(np.int64))
    basis = zarr_store.read_basis(cache, plan)
    measured = []
    for view in range(plan.views.count):
        sums = over(_self_errors, [(cache, plan, view, shard, labels, basis) for shard in range(plan.shards)])
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
    shard_rows = zarr_store.read_rows(cache, plan, view, ids)
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

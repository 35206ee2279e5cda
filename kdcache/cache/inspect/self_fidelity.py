"""Measure without the teacher how well decoded rows match statistics that were stored and not used for decoding."""

from __future__ import annotations

import math
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from kdcache.cache.format import stored_bases, zarr_store
from kdcache.cache.format.codec import decode, stated_at, tail_log_mass
from kdcache.cache.format.encoding import TAIL_TEMPERATURES
from kdcache.cache.format.schema import Plan
from kdcache.cache.format.tail_basis import TailBasis
from kdcache.cache.parallel import over
from kdcache.cache.preconditions import refuse_sequences
from kdcache.cache.reader import Cache

_ROWS_AT_ONCE = 4096
"""Rows that are decoded at once."""

_TINY = 1e-12
"""Smallest mass whose logarithm is taken."""


class SelfFidelity(NamedTuple):
    """Mean error of decoded rows against their stored statistics, over all rows of a view.

    Attributes:
        view: index of the view.
        temperature: T.
        tail_mass: mean |stored - decoded| mass of the tail at T; a lower bound of the total variation.
        logsumexp: mean |stored - decoded| logsumexp of the log-probabilities divided by T, in nats.
    """

    view: int
    temperature: int
    tail_mass: float
    logsumexp: float


def measure_itself(cache: Cache) -> list[SelfFidelity]:
    """Compare decoded rows with the tail masses stored at T = 2, 4, 8, which decoding does not use.

    Returns:
        One result per opened view and temperature; empty if every class is stored, so that there is no tail.
    """
    path, plan = cache.path.absolute(), cache.manifest.plan
    refuse_sequences(plan, "the fidelity of a cache", "compare rows with the teacher's logits in Python")
    if plan.encoding.dense:
        return []
    labels = torch.from_numpy(cache.labels.astype(np.int64))
    basis = stored_bases.read_basis(path, plan)
    measured = []
    for view in cache.views:
        sums = over(_self_errors, [(path, plan, view, shard, labels, basis) for shard in range(plan.shards)])
        for index, t in enumerate(TAIL_TEMPERATURES[1:]):
            mass, level = (math.fsum(part[index][kind] for part in sums) / plan.dataset.samples for kind in (0, 1))
            measured.append(SelfFidelity(view, t, mass, level))
    return measured


def _self_errors(
    cache: Path, plan: Plan, view: int, shard: int, labels: torch.Tensor, basis: TailBasis | None
) -> list[tuple[float, float]]:
    """Return the errors of tail mass and logsumexp at T = 2, 4, 8, summed over the rows of one shard."""
    ids = plan.shard_ids(shard)
    errors = [(0.0, 0.0)] * (len(TAIL_TEMPERATURES) - 1)
    shard_rows = zarr_store.read_rows(cache, plan, view, ids)
    for start in range(0, len(ids), _ROWS_AT_ONCE):
        rows = shard_rows[start : start + _ROWS_AT_ONCE]
        truth = labels[ids.start + start : ids.start + start + len(rows)]
        logits = decode(rows, truth, plan.encoding, basis)
        stated = stated_at(rows.indices, truth, plan.encoding.num_classes)  # type: ignore[arg-type]  # it is not dense
        for index, t in enumerate(TAIL_TEMPERATURES[1:]):
            recorded = rows.statistics[:, plan.encoding.statistics.index(f"tail_log_mass_t{t}")].double().exp()
            decoded = tail_log_mass(logits.double(), stated, t).exp()
            # Head and label are exact, so the error of the logsumexp follows from that of the tail's mass.
            level = ((1 - decoded).clamp_min(_TINY).log() - (1 - recorded).clamp_min(_TINY).log()).abs()
            mass, summed = errors[index]
            errors[index] = mass + float((recorded - decoded).abs().sum()), summed + float(level.sum())
    return errors

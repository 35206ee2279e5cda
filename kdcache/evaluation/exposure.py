"""Canary exposure: how much more a network or a cache says of a sample that was trained on than of one that was not.

A canary is a sample that was put into the training set, such as an image with a random label. References are samples of
the same kind that were not. What has learned nothing of the canary ranks it among them at random.

Source: Carlini, Liu, Erlingsson, Kos & Song 2019 (1802.08232), definition 3, for one canary among R - 1 references.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from kdcache.cache.reader import Cache
from kdcache.data.alignment import match_samples
from kdcache.data.datasets import load_split
from kdcache.data.samples import Samples
from kdcache.errors import MismatchError, UsageError, counted
from kdcache.evaluation.networks import NetworkRef
from kdcache.evaluation.scorecard import logits_of
from kdcache.models.checks import set_evaluation_mode, try_network
from kdcache.runtime.progress import Progress, Silent

COLUMNS = ("mean", "smallest", "largest")
"""Of a table of exposures, after the name."""


def exposure(losses: Tensor, canary: int) -> float:
    """Return log2 R - log2 rank of a canary among R candidates, in bits: from 0 to log2 R.

    The rank is that of its loss, 1 for the smallest. Of equal losses it is the middle rank, so that what says the same
    of all candidates does not look as if it knew the canary.

    Args:
        losses: [R], of the candidates.
        canary: index of the canary among them.
    """
    own = losses[canary]
    lower, equal = int((losses < own).sum()), int((losses == own).sum())
    return math.log2(len(losses)) - math.log2(lower + (equal + 1) / 2)


class Canaries(NamedTuple):
    """Ids of samples of a data set, or of the cache that was made from it.

    Attributes:
        canaries: [n] int64, that the teacher was trained on.
        references: [m] int64, that it was not trained on.
    """

    canaries: npt.NDArray[np.int64]
    references: npt.NDArray[np.int64]

    @property
    def ids(self) -> npt.NDArray[np.int64]:
        """All ids, [n + m], the canaries first."""
        return np.concatenate([self.canaries, self.references])

    def exposures(self, losses: Tensor) -> list[float]:
        """Return the exposure of each canary among all references, of losses [n + m] in the order of `ids`."""
        count = len(self.canaries)
        return [exposure(torch.cat([losses[index : index + 1], losses[count:]]), 0) for index in range(count)]


class Exposure(NamedTuple):
    """The exposure of every canary.

    Attributes:
        name: of a network, or path of a cache.
        bits: of each canary.
    """

    name: str
    bits: list[float]

    @property
    def mean(self) -> float:
        """Mean over the canaries."""
        return statistics.mean(self.bits)

    @property
    def figures(self) -> list[str]:
        """Mean, smallest and largest, for `COLUMNS`."""
        return [f"{bits:.2f}" for bits in (self.mean, min(self.bits), max(self.bits))]


class Exposures(NamedTuple):
    """The exposure of the same canaries in networks and in a cache.

    Attributes:
        candidates: R, a canary and all references.
        measured: one of each network, and one of the cache if there is one.
    """

    candidates: int
    measured: list[Exposure]

    @property
    def explained(self) -> str:
        """What the figures mean, for a person."""
        return (
            f"bits, log2 R - log2 rank of the canary's loss among R = {self.candidates:,} candidates: at most "
            f"{math.log2(self.candidates):.2f}, and {chance(self.candidates):.2f} on average if nothing is known of it"
        )

    def as_record(self) -> dict[str, Any]:
        """Return all figures, for JSON."""
        return {
            "candidates": self.candidates,
            "by_chance": chance(self.candidates),
            "measured": [{"name": one.name, "mean": one.mean, "canaries": one.bits} for one in self.measured],
        }


def chance(candidates: int) -> float:
    """Return the mean exposure of a random rank among R candidates, in bits; log2 e = 1.44 for many."""
    return math.log2(candidates) - math.lgamma(candidates + 1) / math.log(2) / candidates


def named_canaries(canaries: npt.NDArray[np.int64], references: npt.NDArray[np.int64]) -> Canaries:
    """Return canaries [n] and references [m], after checking that each is named once.

    Raises:
        UsageError: if there are none, or an id is named twice.
    """
    for name, ids in (("canaries", canaries), ("references", references)):
        if not len(ids):
            raise UsageError(f"no {name} are named", "name canaries and references, by their ids")
    named = Canaries(canaries, references)
    ids, counts = np.unique(named.ids, return_counts=True)
    if (counts > 1).any():
        raise UsageError(
            f"the sample {ids[counts > 1][0]} is named twice among canaries and references",
            "name each canary and each reference once",
        )
    return named


def measure_exposure(
    networks: Sequence[NetworkRef],
    canaries: Canaries,
    cache: Cache | None = None,
    *,
    device: torch.device | str = "cpu",
    progress: Progress | None = None,
) -> Exposures:
    """Measure the exposure of canaries in networks, by their loss, and in a cache, by that of its rows.

    The loss is -log p of the label, of networks with their transform for evaluation, of a cache on average over the
    views that are here.

    Args:
        networks: of one data set, whose training split has the canaries and the references.
        canaries: ids of samples of the cache, or without one of that split.
        cache: of a teacher.
        device: device of the networks.
        progress: progress reporter; silent if None.

    Raises:
        MismatchError: if an id is not one of a sample with a label.
        KdcacheError: if the weights of a network do not fit, or the data set is not that of the cache.
    """
    progress = progress or Silent()
    samples, ids = load_split(networks[0].pipeline.dataset, "train"), canaries.ids
    count, positions = len(samples), ids
    if cache is not None:
        matched = match_samples(cache, samples, progress)
        samples, count = matched.view.samples, len(cache)
        positions = np.searchsorted(matched.ids, ids).clip(max=len(matched.ids) - 1)
        missing = ids[matched.ids[positions] != ids]
        if len(missing) and 0 <= missing[0] < count:
            raise MismatchError(
                f"sample {missing[0]} of {cache.path} is not in {samples.name}/{samples.split}",
                "use the whole data set that the cache was made from",
            )
    _check_ids(ids, count, samples, positions)
    measured = []
    with progress.task("canaries", len(networks), "networks") as task:
        for network in networks:
            losses = _network_losses(network, samples, positions.tolist(), device)
            measured.append(Exposure(network.name, canaries.exposures(losses)))
            task.advance(1, network.name)
    if cache is not None:
        measured.append(Exposure(str(cache.path), canaries.exposures(_cached_losses(cache, ids))))
    return Exposures(len(canaries.references) + 1, measured)


def _check_ids(ids: npt.NDArray[np.int64], count: int, samples: Samples, positions: npt.NDArray[np.int64]) -> None:
    """Check that ids are of `count` samples, and that the samples at `positions` have labels."""
    outside = ids[(ids < 0) | (ids >= count)]
    if len(outside):
        raise MismatchError(
            f"{outside[0]} is not the id of a sample: there are {counted(count, 'sample')}, counted from 0",
            "name canaries and references by their positions in the data set that was dumped",
        )
    unlabeled = ids[samples.labels[positions] < 0]
    if len(unlabeled):
        raise MismatchError(
            f"sample {unlabeled[0]} has no label, on which its loss depends ({len(unlabeled)} such samples)",
            "give canaries and references labels",
        )


def _network_losses(network: NetworkRef, samples: Samples, positions: list[int], device: torch.device | str) -> Tensor:
    """Return the loss of a network for some samples, [R] float64."""
    model, view = network.load(samples)
    try_network(model, view, "cpu", f"network {network.name}")
    set_evaluation_mode(model.to(device))
    return _losses(logits_of(network, model, view, positions, device), view.labels[positions])


def _cached_losses(cache: Cache, ids: npt.NDArray[np.int64]) -> Tensor:
    """Return the loss of the rows of some samples, the mean over all views that are here, [R] float64."""
    teacher, chosen = cache.teacher(placement="stream"), torch.from_numpy(ids)
    labels = torch.from_numpy(cache.labels[ids].astype(np.int64))
    return torch.stack([_losses(teacher(chosen, view).cpu(), labels) for view in cache.views]).mean(dim=0)


def _losses(logits: Tensor, labels: Tensor) -> Tensor:
    """Return -log p(label) of rows [R, C] with labels [R], float64."""
    return -logits.double().log_softmax(dim=1).gather(1, labels[:, None]).squeeze(1)

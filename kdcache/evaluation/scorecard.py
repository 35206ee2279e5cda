"""Trained networks side by side: how good each is on the same held-out images, how like its teacher, what it costs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from kdcache.cache.fidelity import total_variation
from kdcache.cache.format.fingerprints import digest_of
from kdcache.cache.planner import pilot_ids
from kdcache.cache.reader import Cache
from kdcache.config.schema import DatasetSpec
from kdcache.data.alignment import shared
from kdcache.data.datasets import load_held_out, load_split
from kdcache.data.loader import batches, cut_range
from kdcache.data.samples import Samples
from kdcache.data.views import View
from kdcache.errors import CorruptError, MismatchError, UsageError
from kdcache.evaluation import costs, metrics
from kdcache.evaluation.networks import NetworkRef
from kdcache.models.checks import check_logits, try_network
from kdcache.runtime.progress import Progress, Silent

_BATCH = 256
_TOP = 5


class LikeTeacher(NamedTuple):
    """How near a network is to the teacher of a cache, on rows of view 0.

    Attributes:
        rows: how many, evenly spread over the data set.
        same_class: share of them with the same largest class.
        total_variation_t1: between the softmaxes at T = 1, mean over the rows.
        total_variation_t4: the same at T = 4.
    """

    rows: int
    same_class: float
    total_variation_t1: float
    total_variation_t4: float


class NetworkScore(NamedTuple):
    """What was found of a network; `measures` and `costs` say how.

    Attributes:
        name: of the network.
        top1: accuracy, [0, 1].
        top5: the same of the five largest; None where there are five classes or fewer.
        negative_log_likelihood: in nats.
        calibration_error: [0, 1].
        parameters: how many.
        multiply_adds: of one image.
        image: [channels, H, W] of what it is shown.
        milliseconds: for a batch of one.
        images_per_second: in batches of `costs.BATCH`.
        teacher: how like the teacher it is; None without a cache.
    """

    name: str
    top1: float
    top5: float | None
    negative_log_likelihood: float
    calibration_error: float
    parameters: int
    multiply_adds: int
    image: tuple[int, int, int]
    milliseconds: float
    images_per_second: float
    teacher: LikeTeacher | None

    def as_record(self) -> dict[str, Any]:
        """The same with named values inside."""
        return {**self._asdict(), "teacher": self.teacher._asdict() if self.teacher else None}


class Scorecard(NamedTuple):
    """Networks on one split of one data set.

    Attributes:
        dataset: its name.
        split: which part of it.
        images: how many it has.
        labeled: how many of them have a label; the others are left out.
        matched: samples of the cache that the data set has; None without a cache.
        scores: one a network.
    """

    dataset: str
    split: str
    images: int
    labeled: int
    matched: int | None
    scores: list[NetworkScore]


def score_networks(
    networks: Sequence[NetworkRef],
    split: Literal["validation", "test"] = "test",
    *,
    cache: Cache | None = None,
    rows: int = 4096,
    device: torch.device | str = "cpu",
    progress: Progress | None = None,
) -> Scorecard:
    """Score trained networks on a split of the data set that they were trained for.

    Args:
        networks: one or several.
        split: which part of the data set.
        cache: of the teacher that they are to be compared with, on the samples that it shares with the data set.
        rows: how many of its samples are compared.
        device: where the networks run.
        progress: who is told how it goes.

    Raises:
        MismatchError: if the networks, or the cache, are of different data sets.
        UsageError: if the split is not there, or none of its images has a label.
        CorruptError: if a network returns logits that are no numbers.
        KdcacheError: if a network does not fit.
    """
    progress = progress or Silent()
    samples = same_split([network.pipeline.dataset for network in networks], split)
    labeled = torch.from_numpy(samples.labels >= 0).nonzero().squeeze(1).tolist()
    if not labeled:
        raise UsageError(f"no sample of {samples.name}/{samples.split} has a label", "evaluate on a labeled split")
    taught = _Taught.by(cache, networks[0].pipeline.dataset, rows, progress) if cache is not None else None
    scores = []
    with progress.task("networks", len(networks), "networks") as task:
        for network in networks:
            scores.append(_score(network, samples, labeled, taught, device))
            task.advance(1, network.name)
    matched = len(taught.view) if taught else None
    return Scorecard(samples.name, split, len(samples), len(labeled), matched, scores)


def same_split(specs: Sequence[DatasetSpec], split: Literal["validation", "test"]) -> Samples:
    """The split of the data set that all specs name, perhaps in different words."""
    found: list[tuple[DatasetSpec, Samples]] = []
    for spec in specs:
        if any(spec == known for known, _ in found):
            continue
        samples = load_held_out(spec, split)
        if samples is None:
            raise UsageError(f"{spec.name} has no {split} split", f"set dataset.{split} to the part to hold out for it")
        found.append((spec, samples))
    first, *others = [samples for _, samples in found]
    for other in others:
        if _identity(first) != _identity(other):
            raise MismatchError(
                f"these networks are of different data sets: {first.name}/{first.split} with {len(first)} images and "
                f"{other.name}/{other.split} with {len(other)}, which are not the same",
                "evaluate those of one data set, split in one way, at a time",
            )
    return first


def _identity(samples: Samples) -> tuple[str, tuple[str, ...]]:
    return digest_of(samples.keys(), samples.labels), samples.class_names


class _Taught(NamedTuple):
    """What the teacher of a cache said of some images: their places in a view, which is as it saw them, and logits
    [rows, C]."""

    places: list[int]
    logits: Tensor
    view: View

    @staticmethod
    def by(cache: Cache, dataset: DatasetSpec, rows: int, progress: Progress) -> _Taught:
        images = shared(cache, load_split(dataset, "train"), progress)
        if images.note:
            progress.say(f"note: {images.note}")
        places = pilot_ids(len(images.view), rows)
        # A part of the cache is asked for once: it is not worth bringing all of it anywhere.
        logits = cache.teacher(placement="stream")(torch.from_numpy(images.ids[places]))
        return _Taught(places, logits, images.view)


def _score(
    network: NetworkRef, samples: Samples, labeled: list[int], taught: _Taught | None, device: torch.device | str
) -> NetworkScore:
    model, view = network.load(samples)
    try_network(model, view, "cpu", f"network {network.name}")
    model.to(device).eval()
    logits = logits_of(network, model, view, labeled, device)
    labels = view.labels[labeled]
    image = view[0].images.to(device)
    return NetworkScore(
        network.name,
        metrics.top_k_accuracy(logits, labels, 1),
        metrics.top_k_accuracy(logits, labels, _TOP) if samples.num_classes > _TOP else None,
        metrics.negative_log_likelihood(logits, labels),
        metrics.expected_calibration_error(logits, labels),
        costs.parameters(model),
        costs.multiply_adds(model, image),
        view.shape(),
        *costs.speed(model, image),
        _compare(
            logits_of(network, model, network.view_for_comparison(taught.view), taught.places, device), taught.logits
        )
        if taught
        else None,
    )


@torch.inference_mode()
def logits_of(network: NetworkRef, model: nn.Module, view: View, ids: list[int], device: torch.device | str) -> Tensor:
    """What a network in evaluation mode says of some samples, [len(ids), C] float32 on the CPU."""
    cuts = [ids[cut.start : cut.stop] for cut in cut_range(range(len(ids)), _BATCH)]
    parts = []
    for batch in batches(view, cuts, network.workers, device):
        says = model(batch.images.to(device, non_blocking=True))
        logits = check_logits(says, len(batch.ids), view.samples.num_classes, f"network {network.name}").float().cpu()
        if (wrong := ~logits.isfinite().all(dim=1)).any():
            raise CorruptError(
                f"{network.name} returned NaN or infinite logits for sample {int(batch.ids[wrong][0])} of "
                f"{view.samples.name}/{view.samples.split}",
                "take the checkpoint of a training that did not diverge, and check eval_transform",
            )
        parts.append(logits)
    return torch.cat(parts)


def _compare(logits: Tensor, teacher: Tensor) -> LikeTeacher:
    same = (logits.argmax(dim=1) == teacher.argmax(dim=1)).double().mean().item()
    return LikeTeacher(len(logits), same, *(total_variation(teacher, logits, t).mean().item() for t in (1, 4)))

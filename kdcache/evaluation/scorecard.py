"""Scorecards: accuracy, agreement with the teacher, and cost of trained networks on the same held-out images."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from kdcache.cache.fidelity import total_variation
from kdcache.cache.format.fingerprints import digest_of
from kdcache.cache.planner import pilot_ids
from kdcache.cache.reader import Cache
from kdcache.config.schema import DatasetSpec
from kdcache.data.alignment import match_samples
from kdcache.data.datasets import load_held_out, load_split
from kdcache.data.loader import batches, cut_range
from kdcache.data.samples import Samples
from kdcache.data.views import View
from kdcache.errors import CorruptError, MismatchError, UsageError
from kdcache.evaluation import costs, metrics
from kdcache.evaluation.networks import NetworkRef
from kdcache.models.checks import check_logits, log_probabilities, output_scale, set_evaluation_mode, try_network
from kdcache.runtime.progress import Progress, Silent

_BATCH = 256
_TOP = 5


class TeacherAgreement(NamedTuple):
    """Agreement of a network with the teacher of a cache, on rows of view 0.

    Attributes:
        rows: number of rows, evenly spread over the data set.
        same_class: share of the rows with the same top class.
        total_variation_t1: total variation between the softmax outputs at T = 1, mean over the rows.
        total_variation_t4: the same at T = 4.
    """

    rows: int
    same_class: float
    total_variation_t1: float
    total_variation_t4: float


class NetworkScore(NamedTuple):
    """Metrics and costs of a network; see `metrics` and `costs`.

    Attributes:
        name: name of the network.
        top1: top-1 accuracy, [0, 1].
        top5: top-5 accuracy, [0, 1]; None for five classes or fewer.
        negative_log_likelihood: in nats.
        calibration_error: [0, 1].
        parameters: number of parameters.
        multiply_adds: per image.
        image: [channels, H, W], shape of its input.
        milliseconds: latency of one image.
        images_per_second: throughput in batches of `costs.BATCH`.
        teacher: agreement with the teacher; None without a cache.
    """

    name: str
    top1: float
    top5: float | None
    negative_log_likelihood: float
    calibration_error: float
    parameters: int
    multiply_adds: int
    image: tuple[int, ...]
    milliseconds: float
    images_per_second: float
    teacher: TeacherAgreement | None

    def as_record(self) -> dict[str, Any]:
        """Return the score as nested dictionaries, for JSON."""
        return {**self._asdict(), "teacher": self.teacher._asdict() if self.teacher else None}


class Scorecard(NamedTuple):
    """Scores of networks on one split of one data set.

    Attributes:
        dataset: name of the data set.
        split: name of the split.
        images: number of images of the split.
        labeled: number of images with a label; the others are left out.
        matched: number of samples of the cache that the data set has; None without a cache.
        scores: one per network.
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
        split: split of the data set.
        cache: cache of a teacher to compare with, on the samples that it shares with the data set.
        rows: number of its samples that are compared.
        device: device of the networks.
        progress: progress reporter; silent if None.

    Raises:
        MismatchError: if the networks, or the networks and the cache, have different data sets.
        UsageError: if the data set has no such split, none of its images has a label, or a network was trained without
            class logits.
        CorruptError: if a network returns NaN or infinite logits.
        KdcacheError: if the weights of a network do not fit.
    """
    progress = progress or Silent()
    for network in networks:
        network.check_class_logits()
    samples = same_split([network.pipeline.dataset for network in networks], split)
    labeled = torch.from_numpy(samples.labels >= 0).nonzero().squeeze(1).tolist()
    if not labeled:
        raise UsageError(f"no sample of {samples.name}/{samples.split} has a label", "evaluate on a labeled split")
    teacher = _teacher_rows(cache, networks[0].pipeline.dataset, rows, progress) if cache is not None else None
    scores = []
    with progress.task("networks", len(networks), "networks") as task:
        for network in networks:
            scores.append(_score(network, samples, labeled, teacher, device))
            task.advance(1, network.name)
    matched = len(teacher.view) if teacher else None
    return Scorecard(samples.name, split, len(samples), len(labeled), matched, scores)


def same_split(specs: Sequence[DatasetSpec], split: Literal["validation", "test"]) -> Samples:
    """Load the split of the data set that all specs describe, at one path or at several.

    Raises:
        UsageError: if the data set has no such split.
        MismatchError: if the specs describe different data sets.
    """
    loaded: list[tuple[DatasetSpec, Samples]] = []
    for spec in specs:
        if any(spec == known for known, _ in loaded):
            continue
        samples = load_held_out(spec, split)
        if samples is None:
            raise UsageError(
                f"{spec.name} has no {split} split",
                f"set dataset.{split}_fraction to the part of the images to hold out",
            )
        loaded.append((spec, samples))
    first, *others = [samples for _, samples in loaded]
    for other in others:
        if _identity(first) != _identity(other):
            raise MismatchError(
                f"the networks were trained on different data sets: {first.name}/{first.split} with {len(first)} "
                f"images and {other.name}/{other.split} with {len(other)}, which are not the same",
                "evaluate networks of one data set with the same splits at a time",
            )
    return first


def _identity(samples: Samples) -> tuple[str, tuple[str, ...]]:
    return digest_of(samples.keys(), samples.labels), samples.class_names


class _TeacherRows(NamedTuple):
    """Logits of the teacher of a cache for some of its images.

    Attributes:
        indices: positions of the images in `view`.
        logits: [len(indices), C].
        view: the images as the teacher saw them.
    """

    indices: list[int]
    logits: Tensor
    view: View


def _teacher_rows(cache: Cache, dataset: DatasetSpec, rows: int, progress: Progress) -> _TeacherRows:
    images = match_samples(cache, load_split(dataset, "train"), progress)
    if images.note:
        progress.say(f"note: {images.note}")
    indices = pilot_ids(len(images.view), rows)
    # Each row is read once: no faster placement pays off.
    logits = cache.teacher(placement="stream")(torch.from_numpy(images.ids[indices]))
    return _TeacherRows(indices, logits, images.view)


def _score(
    network: NetworkRef,
    samples: Samples,
    labeled: list[int],
    teacher: _TeacherRows | None,
    device: torch.device | str,
) -> NetworkScore:
    """Build a network, and compute its metrics on the labeled samples, its costs, and its agreement."""
    model, view = network.load(samples)
    try_network(model, view, "cpu", f"network {network.name}")
    set_evaluation_mode(model.to(device))
    logits = logits_of(network, model, view, labeled, device)
    labels = view.labels[labeled]
    image = view[0].images.to(device)
    return NetworkScore(
        network.name,
        metrics.top_k_accuracy(logits, labels, 1),
        metrics.top_k_accuracy(logits, labels, _TOP) if samples.num_classes > _TOP else None,
        metrics.negative_log_likelihood(logits, labels),
        metrics.expected_calibration_error(logits, labels),
        costs.count_parameters(model),
        costs.count_multiply_adds(model, image),
        view.shape(),
        *costs.measure_speed(model, image),
        _agreement(
            logits_of(network, model, network.view_for_comparison(teacher.view), teacher.indices, device),
            teacher.logits,
        )
        if teacher
        else None,
    )


@torch.inference_mode()
def logits_of(network: NetworkRef, model: nn.Module, view: View, ids: list[int], device: torch.device | str) -> Tensor:
    """Return the logits of a network in evaluation mode for some samples, [len(ids), C] float32 on the CPU.

    Of a network that returns probabilities, they are the log-probabilities; one that has underflowed is replaced by the
    smallest normal number of its type.

    Raises:
        CorruptError: if a logit is NaN or infinite.
        KdcacheError: if the network does not return logits [B, C].
    """
    id_batches = [ids[cut.start : cut.stop] for cut in cut_range(range(len(ids)), _BATCH)]
    parts = []
    for batch in batches(view, id_batches, network.workers, device):
        output = model(batch.images.to(device, non_blocking=True))
        logits = check_logits(output, len(batch.ids), view.samples.num_classes, f"network {network.name}").cpu()
        if (not_finite := ~logits.isfinite().all(dim=1)).any():
            raise CorruptError(
                f"{network.name} returned NaN or infinite logits for sample {int(batch.ids[not_finite][0])} of "
                f"{view.samples.name}/{view.samples.split}",
                "use a checkpoint of a training that did not diverge, and check eval_transform",
            )
        parts.append(logits)
    outputs = torch.cat(parts)
    if not outputs.is_floating_point() or output_scale(outputs) != "probabilities":
        return outputs.float()
    return log_probabilities(outputs).clamp(min=math.log(torch.finfo(outputs.dtype).tiny))


def _agreement(logits: Tensor, teacher: Tensor) -> TeacherAgreement:
    same = (logits.argmax(dim=1) == teacher.argmax(dim=1)).double().mean().item()
    return TeacherAgreement(len(logits), same, *(total_variation(teacher, logits, t).mean().item() for t in (1, 4)))

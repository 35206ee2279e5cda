"""Scores of networks that say a class of every pixel, on the same held-out images."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from kdcache.cache.planner import pilot_ids
from kdcache.cache.reader import Cache
from kdcache.data.alignment import MatchedSamples, match_samples
from kdcache.data.datasets import has_label_maps, load_split
from kdcache.data.loader import batches, cut_range
from kdcache.data.samples import Samples
from kdcache.data.views import View
from kdcache.errors import CorruptError
from kdcache.evaluation import costs
from kdcache.evaluation.networks import NetworkRef
from kdcache.evaluation.scorecard import same_split
from kdcache.losses.maps import resized
from kdcache.models.checks import set_evaluation_mode, try_network
from kdcache.models.evaluate import evaluate
from kdcache.models.outputs import logits_of
from kdcache.models.pixel_scores import PixelScore
from kdcache.runtime.progress import Progress, Silent
from kdcache.train.dense import map_of_classes

_BATCH = 16

_ROWS = 512
"""Images of a cache that are compared at most."""


class PlaceAgreement(NamedTuple):
    """Agreement of a network with the teacher of a cache, at the teacher's places of some images, view 0.

    Attributes:
        images: number of images, evenly spread over the data set.
        same_class: share of the places with the same top class.
        total_variation: between the softmax outputs at T = 1, mean over the places.
        by_class: share of the places of each class of the teacher; None for a class that it never says.
    """

    images: int
    same_class: float
    total_variation: float
    by_class: tuple[float | None, ...]


class PixelNetworkScore(NamedTuple):
    """Scores and costs of a network.

    Attributes:
        name: of the network.
        score: on the labeled pixels of the split.
        parameters: number of parameters.
        multiply_adds: per image.
        image: [channels, H, W], shape of its input.
        milliseconds: latency of one image.
        images_per_second: throughput in batches of `costs.BATCH`.
        teacher: agreement with the teacher; None without a cache.
    """

    name: str
    score: PixelScore
    parameters: int
    multiply_adds: int
    image: tuple[int, ...]
    milliseconds: float
    images_per_second: float
    teacher: PlaceAgreement | None

    def as_record(self) -> dict[str, Any]:
        """Return the score as nested dictionaries, for JSON."""
        teacher = self.teacher._asdict() if self.teacher else None
        return {**self._asdict(), "score": self.score._asdict(), "teacher": teacher}


class PixelScorecard(NamedTuple):
    """Scores of networks on one split of one data set.

    Attributes:
        dataset: name of the data set.
        split: name of the split.
        images: number of images of the split.
        class_names: name of each class.
        scores: one per network.
    """

    dataset: str
    split: str
    images: int
    class_names: tuple[str, ...]
    scores: list[PixelNetworkScore]


def are_of_pixels(networks: Sequence[NetworkRef]) -> bool:
    """Return whether the data set of some networks has a class per pixel."""
    return bool(networks) and has_label_maps(networks[0].pipeline.dataset)


def score_pixels(
    networks: Sequence[NetworkRef],
    split: Literal["validation", "test"] = "test",
    *,
    cache: Cache | None = None,
    rows: int = _ROWS,
    device: torch.device | str = "cpu",
    progress: Progress | None = None,
) -> PixelScorecard:
    """Score trained networks on a split of the data set that they were trained for.

    Args:
        networks: one or several.
        split: split of the data set.
        cache: cache of a teacher to compare with, on the samples that it shares with the data set.
        rows: number of its images that are compared; at most 512.
        device: device of the networks.
        progress: progress reporter; silent if None.

    Raises:
        MismatchError: if the networks, or the networks and the cache, have different data sets.
        UsageError: if the data set has no such split, or the cache no map of classes.
        CorruptError: if a network returns NaN or infinite logits.
        KdcacheError: if the weights of a network do not fit.
    """
    progress = progress or Silent()
    samples = same_split([network.pipeline.dataset for network in networks], split)
    compared = None
    if cache is not None:
        train = load_split(networks[0].pipeline.dataset, "train")
        map_of_classes(cache, train)  # before its samples are looked for
        found = match_samples(cache, train, progress)
        if found.note:
            progress.say(f"note: {found.note}")
        compared = ComparedImages.of(cache, found, rows)
    scores = []
    with progress.task("networks", len(networks), "networks") as task:
        for network in networks:
            scores.append(_score(network, samples, compared, device))
            task.advance(1, network.name)
    return PixelScorecard(samples.name, split, len(samples), samples.class_names, scores)


class ComparedImages(NamedTuple):
    """Images of a cache as its teacher saw them, and what it said.

    Attributes:
        view: the images.
        indices: of those that are compared.
        ids: [n] int64, of these in the cache.
        cache: of the teacher.
        output: name of the map of classes.
    """

    view: View
    indices: list[int]
    ids: Tensor
    cache: Cache
    output: str

    @classmethod
    def of(cls, cache: Cache, found: MatchedSamples, rows: int) -> ComparedImages:
        """Return some images of a cache, evenly spread over those that the data set has.

        Args:
            cache: of the teacher.
            found: the samples that are in the cache and in the data set.
            rows: number of images, at most 512.

        Raises:
            UsageError: if the cache has no map of classes.
            MismatchError: if it is of other classes than the data set's.
        """
        output = map_of_classes(cache, found.view.samples)
        indices = pilot_ids(len(found.view), min(rows, _ROWS))
        return cls(found.view, indices, torch.from_numpy(found.ids[indices]), cache, output)


def _score(
    network: NetworkRef,
    samples: Samples,
    compared: ComparedImages | None,
    device: torch.device | str,
) -> PixelNetworkScore:
    """Build a network, and compute its scores, its costs, and its agreement with the teacher."""
    model, view = network.load(samples)
    try_network(model, view, "cpu", f"network {network.name}")
    set_evaluation_mode(model.to(device))
    score = evaluate(model, view, device, _BATCH, num_workers=network.workers)
    if not isinstance(score, PixelScore):
        raise TypeError("the data set has label maps, and its scores are of pixels")
    image = view[0].images.to(device)
    return PixelNetworkScore(
        network.name,
        score,
        costs.count_parameters(model),
        costs.count_multiply_adds(model, image),
        view.shape(),
        *costs.measure_speed(model, image),
        None if compared is None else place_agreement(network, model, compared, device),
    )


@torch.inference_mode()
def place_agreement(
    network: NetworkRef, model: nn.Module, compared: ComparedImages, device: torch.device | str
) -> PlaceAgreement:
    """Return the agreement of a network with the teacher, at the teacher's places.

    Args:
        network: where the model comes from.
        model: on the device, in evaluation mode.
        compared: the images.
        device: of the model.

    Raises:
        CorruptError: if a logit is NaN or infinite.
    """
    teacher = compared.cache.teacher(compared.output, placement="stream")
    view = network.view_for_comparison(compared.view)
    cuts = [range(cut.start, cut.stop) for cut in cut_range(range(len(compared.indices)), _BATCH)]
    ids = [[compared.indices[position] for position in cut] for cut in cuts]
    distance = 0.0
    same, said = (torch.zeros(view.samples.num_classes, dtype=torch.int64) for _ in range(2))
    for cut, batch in zip(cuts, batches(view, ids, network.workers, device), strict=True):
        theirs = teacher(compared.ids[cut.start : cut.stop])
        ours = logits_of(model(batch.images.to(device))).float().cpu()
        if not ours.isfinite().all():
            raise CorruptError(
                f"{network.name} returned NaN or infinite logits", "use a checkpoint of a training that did not diverge"
            )
        ours = resized(ours, (theirs.shape[2], theirs.shape[3]))
        ours, theirs = (maps.movedim(1, -1).flatten(0, 2) for maps in (ours, theirs))
        top = theirs.max(dim=1).indices  # see `pixel_sums`
        same += torch.bincount(top[ours.max(dim=1).indices == top], minlength=len(same))
        said += torch.bincount(top, minlength=len(said))
        distance += float((ours.softmax(dim=1) - theirs.softmax(dim=1)).abs().sum()) / 2
    places = int(said.sum())
    by_class = tuple(each / of if of else None for each, of in zip(same.tolist(), said.tolist(), strict=True))
    return PlaceAgreement(len(compared.indices), int(same.sum()) / places, distance / places, by_class)

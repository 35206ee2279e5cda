"""Statistics of the teacher of a cache, compared with the predictions of trained networks on the same images."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from kdcache.cache.reader import Cache
from kdcache.data.alignment import MatchedSamples
from kdcache.data.images import Picture
from kdcache.data.mixing import split_mixing
from kdcache.evaluation.runs import Group, RunRecord
from kdcache.losses.temperatures import sharpness_logsumexp, sharpness_max

HARDEST = 16
SHARPNESS = ("largest", "logsumexp")
_ROWS_AT_ONCE = 4096


class Predictions(NamedTuple):
    """Predictions of a network on R rows.

    Attributes:
        top: [R] int64, class of the largest logit.
        largest: [R] float32, largest logit.
        logsumexp: [R] float32, logsumexp of the logits.
    """

    top: Tensor
    largest: Tensor
    logsumexp: Tensor

    @staticmethod
    def of(logits: Tensor) -> Predictions:
        """Return the predictions of logits [R, C]."""
        return Predictions(logits.argmax(dim=1), sharpness_max(logits), sharpness_logsumexp(logits))


class HardSample(NamedTuple):
    """A sample to whose label the teacher gives a low probability.

    Attributes:
        id: id of the sample in the cache.
        label: its class.
        top: top class of the teacher.
        log_prob: log-probability of the label, nats.
        picture: the image before any transform; None if the data set does not have it.
    """

    id: int
    label: int
    top: int
    log_prob: float
    picture: Picture | None


class Cost(NamedTuple):
    """Forward passes of the teacher with the cache and without.

    Attributes:
        teacher_passes: images of the one pass that made the cache, all views.
        live_teacher_passes: images of the passes that a live teacher would have run to train the same students.
        students: number of students trained from this cache.
        cache_bytes: size of the cache.
    """

    teacher_passes: int
    live_teacher_passes: int
    students: int
    cache_bytes: int


@dataclass(frozen=True)
class TeacherStats:
    """The teacher of a cache on view 0 of all N samples, and the networks of the runs on R of them.

    Attributes:
        digest: digest of the cache.
        labels: [N] int64, -1 if unknown; all -1 for mixed images.
        mixed: whether the teacher's images were mixed.
        predictions: of the teacher, on all N rows.
        log_prob: [N] float64, log-probability of the label; NaN if it is unknown.
        ids: [R] int64, ids of the samples that the networks were run on, evenly spread.
        networks: predictions of each run's network on these R samples; empty if the data set is not available.
        hardest: samples with the lowest log_prob, lowest first.
        cost: forward passes of the teacher.
    """

    digest: str
    labels: Tensor
    mixed: bool
    predictions: Predictions
    log_prob: Tensor
    ids: Tensor
    networks: list[Predictions]
    hardest: list[HardSample]
    cost: Cost

    @property
    def wrong(self) -> Tensor:
        """[N] bool: labeled rows whose top class is not the label; these are the rows that KA changes."""
        return (self.labels >= 0) & (self.predictions.top != self.labels)

    def sharpness(self, group: Group) -> dict[str, Tensor]:
        """Return `largest` logit and `logsumexp` of a group, each [R], as means over the seeds."""
        members = [self.networks[run] for run in group.members]
        return {kind: torch.stack([getattr(member, kind) for member in members]).mean(dim=0) for kind in SHARPNESS}

    def by_class(self, num_classes: int) -> Tensor:
        """Return the teacher's accuracy per class, [C] float64; NaN for a class without rows."""
        known = self.labels >= 0
        rows, correct = (self.labels[mask] for mask in (known, known & ~self.wrong))
        return torch.bincount(correct, minlength=num_classes).double() / torch.bincount(rows, minlength=num_classes)

    def predictions_where_wrong(self, group: Group) -> tuple[int, int, int]:
        """Count the top classes of a group on the rows that KA changes, over all seeds.

        Returns:
            Rows with the label, with the teacher's class, and with another class as the top class.
        """
        wrong = self.wrong[self.ids]
        label, of_teacher = self.labels[self.ids][wrong], self.predictions.top[self.ids][wrong]
        tops = [self.networks[run].top[wrong] for run in group.members]
        as_label = sum(int((top == label).sum()) for top in tops)
        as_teacher = sum(int((top == of_teacher).sum()) for top in tops)
        return as_label, as_teacher, len(tops) * len(label) - as_label - as_teacher

    def disagreement(self, group: Group, num_classes: int) -> Tensor:
        """Return rows by the teacher's top class and by the group's, [C, C] int64, over all seeds."""
        teacher = self.predictions.top[self.ids]
        pairs = torch.cat([teacher * num_classes + self.networks[run].top for run in group.members])
        return torch.bincount(pairs, minlength=num_classes**2).view(num_classes, num_classes)


def teacher_stats(
    cache: Cache,
    images: MatchedSamples | None,
    indices: list[int],
    networks: Sequence[Predictions],
    runs: Sequence[RunRecord],
) -> TeacherStats:
    """Compute the statistics in one pass over view 0 of a cache.

    Args:
        cache: of the teacher.
        images: images of its samples; None if they are not available.
        indices: R positions among the images (or in the cache, without images) that the networks were run on.
        networks: their predictions there.
        runs: the runs of these networks.
    """
    # Each row is read once: no faster placement pays off.
    teacher = cache.teacher(placement="stream")
    plan = cache.manifest.plan
    mixed = split_mixing(plan.views.transform)[1] is not None
    labels = torch.full_like(teacher.labels, -1) if mixed else teacher.labels
    predictions, log_probs = [], []
    for ids in torch.split(torch.arange(len(cache)), _ROWS_AT_ONCE):
        logits = teacher(ids)
        predictions.append(Predictions.of(logits))
        label_log_prob = logits.double().log_softmax(dim=1).gather(1, labels[ids].clamp_min(0)[:, None]).squeeze(1)
        log_probs.append(label_log_prob.masked_fill(labels[ids] < 0, torch.nan))
    of_teacher = Predictions(*(torch.cat(values) for values in zip(*predictions, strict=True)))
    log_prob = torch.cat(log_probs)
    return TeacherStats(
        cache.manifest.digest,
        labels,
        mixed,
        of_teacher,
        log_prob,
        torch.tensor(indices) if images is None else torch.from_numpy(images.ids[indices]),
        [*networks],
        _hardest(images, labels, of_teacher, log_prob),
        _cost(cache, runs),
    )


def _hardest(
    images: MatchedSamples | None, labels: Tensor, predictions: Predictions, log_prob: Tensor
) -> list[HardSample]:
    labeled = (labels >= 0).nonzero().squeeze(1)
    hardest = labeled[log_prob[labeled].argsort(stable=True)][:HARDEST].tolist()
    return [
        HardSample(
            id_,
            int(labels[id_]),
            int(predictions.top[id_]),
            float(log_prob[id_]),
            _picture(images, id_) if images else None,
        )
        for id_ in hardest
    ]


def _picture(images: MatchedSamples, id_: int) -> Picture | None:
    """Return the image of a sample of the cache; None if the data set does not have it, or has no images."""
    index = int(np.searchsorted(images.ids, id_))
    source = images.view.samples.images
    exists = index < len(images.ids) and images.ids[index] == id_
    return source.picture(index) if exists and len(source.shape()) == 3 else None


def _cost(cache: Cache, runs: Sequence[RunRecord]) -> Cost:
    students = [run for run in runs if run.uses_teacher and cache.manifest.digest in run.caches]
    live = sum(run.epochs * (run.images or len(cache)) for run in students)
    return Cost(cache.manifest.plan.views.count * len(cache), live, len(students), cache.bytes_on_disk)

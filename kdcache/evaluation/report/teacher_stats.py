"""The teacher of a cache as the rows say it was, and what the networks of runs say of the same images."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from kdcache.cache.reader import Cache
from kdcache.data.alignment import Shared
from kdcache.data.images import Picture
from kdcache.data.mixing import split_mixing
from kdcache.evaluation.runs import Group, RunRecord
from kdcache.losses.temperatures import sharpness_logsumexp, sharpness_max

HARDEST = 16
SHARPNESS = ("largest", "logsumexp")
_ROWS_AT_ONCE = 4096


class Predictions(NamedTuple):
    """What a network says of some rows: its top class [R] int64, its largest logit and its logsumexp [R] float32."""

    top: Tensor
    largest: Tensor
    logsumexp: Tensor

    @staticmethod
    def of(logits: Tensor) -> Predictions:
        """Of logits [R, C]."""
        return Predictions(logits.argmax(dim=1), sharpness_max(logits), sharpness_logsumexp(logits))


class HardSample(NamedTuple):
    """A sample whose label the teacher finds improbable; its picture before the transform, where it is at hand."""

    id: int
    label: int
    top: int
    log_prob: float
    picture: Picture | None


class Cost(NamedTuple):
    """What running the teacher once has saved.

    Attributes:
        once: rows that it was run for.
        live: rows that it would have been run for, had it been there while these students were trained.
        students: how many learned from this cache.
        bytes: of the cache.
    """

    once: int
    live: int
    students: int
    bytes: int


@dataclass(frozen=True)
class TeacherStats:
    """The teacher of a cache on view 0 of all its samples, and the runs' networks on some of them.

    Attributes:
        digest: of the cache.
        labels: [N] int64, -1 where not known; of mixed images none is.
        mixed: whether the teacher saw mixed images.
        teacher: on all rows.
        log_prob: [N] float64, of the label; NaN where it is not known.
        ids: [R] int64, those that the networks were shown, evenly spread.
        networks: by run; empty where the data set is not at hand.
        hardest: the labels that it finds least probable, the least first.
        cost: of the teacher.
    """

    digest: str
    labels: Tensor
    mixed: bool
    teacher: Predictions
    log_prob: Tensor
    ids: Tensor
    networks: list[Predictions]
    hardest: list[HardSample]
    cost: Cost

    @property
    def wrong(self) -> Tensor:
        """[N] bool: labeled rows whose top class is not the label, which are those that KA changes."""
        return (self.labels >= 0) & (self.teacher.top != self.labels)

    def sharpness(self, group: Group) -> dict[str, Tensor]:
        """Of a group on the rows that it was shown, each [R], mean over the seeds: `largest` logit, `logsumexp`."""
        each = [self.networks[place] for place in group.members]
        return {kind: torch.stack([getattr(says, kind) for says in each]).mean(dim=0) for kind in SHARPNESS}

    def by_class(self, num_classes: int) -> Tensor:
        """Accuracy of the teacher on each class, [C] float64; NaN where no row has that label."""
        known = self.labels >= 0
        rows, right = (self.labels[which] for which in (known, known & ~self.wrong))
        return torch.bincount(right, minlength=num_classes).double() / torch.bincount(rows, minlength=num_classes)

    def verdicts(self, group: Group) -> tuple[int, int, int]:
        """What a group says of the rows that KA changes: the label, the teacher's class, another; over all seeds."""
        here = self.wrong[self.ids]
        label, of_teacher = self.labels[self.ids][here], self.teacher.top[self.ids][here]
        said = [self.networks[place].top[here] for place in group.members]
        right = sum(int((top == label).sum()) for top in said)
        taught = sum(int((top == of_teacher).sum()) for top in said)
        return right, taught, len(said) * len(label) - right - taught

    def disagreement(self, group: Group, num_classes: int) -> Tensor:
        """[C, C] int64: rows by the teacher's top class and by the network's, over all seeds."""
        teacher = self.teacher.top[self.ids]
        pairs = torch.cat([teacher * num_classes + self.networks[place].top for place in group.members])
        return torch.bincount(pairs, minlength=num_classes**2).view(num_classes, num_classes)


def study(
    cache: Cache, images: Shared | None, places: list[int], networks: Sequence[Predictions], runs: Sequence[RunRecord]
) -> TeacherStats:
    """Go once through view 0 of a cache.

    Args:
        cache: of the teacher.
        images: of its samples, if they are at hand.
        places: R, those among the images that the networks were shown.
        networks: what they said.
        runs: whose networks they are.
    """
    # Each row is asked for once: it is not worth bringing them anywhere.
    teacher = cache.teacher(placement="stream")
    plan = cache.manifest.plan
    mixed = split_mixing(plan.views.transform)[1] is not None
    labels = torch.full_like(teacher.labels, -1) if mixed else teacher.labels
    said, log_probs = [], []
    for some in torch.split(torch.arange(len(cache)), _ROWS_AT_ONCE):
        logits = teacher(some)
        said.append(Predictions.of(logits))
        own = logits.double().log_softmax(dim=1).gather(1, labels[some].clamp_min(0)[:, None]).squeeze(1)
        log_probs.append(own.masked_fill(labels[some] < 0, torch.nan))
    says = Predictions(*(torch.cat(values) for values in zip(*said, strict=True)))
    log_prob = torch.cat(log_probs)
    return TeacherStats(
        cache.manifest.digest,
        labels,
        mixed,
        says,
        log_prob,
        torch.tensor(places) if images is None else torch.from_numpy(images.ids[places]),
        [*networks],
        _hardest(images, labels, says, log_prob),
        _cost(cache, runs),
    )


def _hardest(images: Shared | None, labels: Tensor, says: Predictions, log_prob: Tensor) -> list[HardSample]:
    known = (labels >= 0).nonzero().squeeze(1)
    worst = known[log_prob[known].argsort(stable=True)][:HARDEST].tolist()
    return [
        HardSample(
            id_,
            int(labels[id_]),
            int(says.top[id_]),
            float(log_prob[id_]),
            _picture(images, id_) if images else None,
        )
        for id_ in worst
    ]


def _picture(images: Shared, id_: int) -> Picture | None:
    """Of a sample of the cache, if the data set has it."""
    place = int(np.searchsorted(images.ids, id_))
    there = place < len(images.ids) and images.ids[place] == id_
    return images.view.samples.images.picture(place) if there else None


def _cost(cache: Cache, runs: Sequence[RunRecord]) -> Cost:
    taught = [run for run in runs if run.uses_teacher and cache.manifest.digest in run.caches]
    live = sum(run.epochs * (run.images or len(cache)) for run in taught)
    return Cost(cache.manifest.plan.views.count * len(cache), live, len(taught), cache.bytes_on_disk)

"""The students of a sweep, and which of them can share their batches."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

from kdcache.config.schema import Pipeline
from kdcache.config.text import TextPipeline
from kdcache.train.sweep_points import Point

_AGREE = {
    "batch_size",
    "gradient_accumulation_steps",
    "view_order",
    "precision",
    "channels_last",
    "num_workers",
    "labels_per_class",
    "data_seed",
}
"""Keys of `train` in which the students of a group agree."""

_SEVERAL_AT_ONCE = {"tensorboard"}
"""Trackers that log several runs of one process at the same time."""


class Job(NamedTuple):
    """A student to train.

    Attributes:
        point: combination.
        seed: of its training.
        folder: run folder.
        data_seed: that of its pipeline, or that of its group; None for `seed`.
    """

    point: Point
    seed: int
    folder: Path
    data_seed: int | None

    @property
    def name(self) -> str:
        """The name of the combination, and the seed."""
        return f"{self.point.name}, seed {self.seed}"

    @property
    def epochs(self) -> int:
        """The largest number of epochs."""
        return int(self.point.pipeline.section("student").train.epochs)

    @property
    def pipeline(self) -> Pipeline | TextPipeline:
        """The pipeline of the combination with the seeds of this student."""
        student = self.point.pipeline.section("student")
        train = student.train.model_copy(update={"seed": self.seed, "data_seed": self.data_seed})
        return self.point.pipeline.model_copy(update={"student": student.model_copy(update={"train": train})})


def all_jobs(points: Iterable[Point], seeds: int, out: Path) -> list[Job]:
    """Return a job for each combination and seed, from the seed of its pipeline upwards."""
    return [
        Job(point, seed, out / point.name / f"seed{seed}", train.data_seed)
        for point in points
        for train in [point.pipeline.section("student").train]
        for seed in range(train.seed, train.seed + seeds)
    ]


def grouped(jobs: Iterable[Job]) -> list[list[Job]]:
    """Return groups of jobs that can share their batches: only what follows from the seed may differ in a group."""
    groups: dict[str, list[Job]] = {}
    for job in jobs:
        groups.setdefault(_of_loading(job), []).append(job)
    return list(groups.values())


def with_one_order(group: Sequence[Job]) -> list[Job]:
    """Return the jobs of a group, all with the order of images of the first.

    Those that have its seed are left as they are, so that they are the same students as in a sweep of one seed.
    """
    first = group[0]
    if first.data_seed is not None:
        return list(group)
    return [job if job.seed == first.seed else job._replace(data_seed=first.seed) for job in group]


def divided(groups: Iterable[Sequence[Job]], parts: int) -> list[Sequence[Job]]:
    """Return groups that so many processes can share evenly, the largest first: larger ones are cut into halves."""
    pieces = [group for group in groups if group]
    largest = -(-sum(map(len, pieces)) // parts)
    while True:
        pieces.sort(key=len, reverse=True)
        if not pieces or len(pieces[0]) == 1 or (len(pieces) >= parts and len(pieces[0]) <= largest):
            return pieces
        whole = pieces.pop(0)
        half = len(whole) // 2
        pieces += [whole[:half], whole[half:]]


def _of_loading(job: Job) -> str:
    """Return all that the batches of a student follow from, without the seed of the order."""
    pipeline, student = job.point.pipeline, job.point.pipeline.section("student")
    train = student.train
    return json.dumps(
        [
            pipeline.model_dump(mode="json", include={"dataset", "transform", "join"}),
            student.transform,
            train.model_dump(mode="json", include=_AGREE),
            job.seed if train.labels_per_class is not None else None,  # which labels are shown follows from it
            job.name if set(train.trackers) - _SEVERAL_AT_ONCE else None,
        ]
    )

"""Many students of one cache: losses, networks, options and seeds, each combination a run of its own.

One process holds the data set and the cache once, for all students. Several map both from the local disk: they share
the memory that these take. (What each keeps of a small cache's logits decoded, `decoded.py`, is its own.)
"""

from __future__ import annotations

import itertools
import json
import re
import statistics
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, replace
from multiprocessing import get_context
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal, NamedTuple

import torch

from kdcache.cache.placement.choose import Placement
from kdcache.cache.reader import Cache
from kdcache.config.loader import load_pipeline
from kdcache.config.schema import Pipeline
from kdcache.config.yaml_lines import read_yaml
from kdcache.data.images import ArrayImages, map_images
from kdcache.errors import IncompleteError, InterruptedRun, KdcacheError, MismatchError, UsageError
from kdcache.runtime.atomic_write import write_file
from kdcache.runtime.progress import Progress, Silent
from kdcache.train.inputs import TrainingInputs, inputs_from_caches, inputs_without_teacher
from kdcache.train.run_folder import check_trackers
from kdcache.train.train import train_on

_POINT = "point.json"


class Point(NamedTuple):
    """One combination of what a sweep goes over.

    Attributes:
        name: of its folder and its line in the table.
        pipeline: resolved.
    """

    name: str
    pipeline: Pipeline


@dataclass(frozen=True)
class Student:
    """What came of one student; accuracies in [0, 1].

    Attributes:
        point: which combination.
        seed: of its training.
        run: its folder.
        test: test accuracy; None without a test split, or if it failed.
        validation: of the selected epoch; None without a validation split, or if it failed.
        seconds: of training.
        failed: why, if it did.
    """

    point: str
    seed: int
    run: str
    test: float | None
    validation: float | None
    seconds: float
    failed: str | None = None


@dataclass(frozen=True)
class SweepSummary:
    """The students of one combination over the seeds; `spread` is the standard deviation (n - 1), 0 for one seed."""

    point: str
    students: list[Student]

    @property
    def accuracies(self) -> list[float]:
        """Test accuracies of those that were trained to the end."""
        return [student.test for student in self.students if student.test is not None]

    @property
    def mean(self) -> float | None:
        """Of the test accuracies; None if there is none."""
        return statistics.mean(self.accuracies) if self.accuracies else None

    @property
    def spread(self) -> float:
        """Of the test accuracies."""
        return statistics.stdev(self.accuracies) if len(self.accuracies) > 1 else 0.0

    @property
    def validation(self) -> float | None:
        """Mean of the validation accuracies; None if there is none."""
        known = [student.validation for student in self.students if student.validation is not None]
        return statistics.mean(known) if known else None

    @property
    def seconds(self) -> float:
        """Mean of the training times."""
        return statistics.mean(student.seconds for student in self.students)


def combinations(path: Path, overrides: Sequence[str], over: Sequence[str]) -> list[Point]:
    """All combinations of the values of some keys, in a pipeline file.

    Args:
        path: the file.
        overrides: `KEY=VALUE`, for all of them.
        over: `KEY=VALUE,VALUE,...` or `KEY=[VALUE, ...]`; the key `loss` takes names, and with each the file's options
            of another loss go.

    Raises:
        UsageError: with everything that is wrong with the first combination that is not a good pipeline.
    """
    axes = [_axis(given) for given in over]
    keys = [key for key, _ in axes]
    if len(set(keys)) < len(keys):
        raise UsageError(f"--over names a key twice: {', '.join(keys)}", "give all values of a key in one --over")
    points: list[Point] = []
    for values in itertools.product(*(values for _, values in axes)):
        chosen = dict(zip(keys, values, strict=True))
        loss = chosen.get("loss")
        given = [f"{key}={json.dumps(value)}" for key, value in chosen.items() if key != "loss"]
        pipeline = load_pipeline(path, [*overrides, *given], None if loss is None else str(loss))
        name = ",".join(f"{key.rpartition('.')[2]}={_plain(value)}" for key, value in chosen.items()) or "student"
        if any(point.name == name for point in points):
            name = f"{name},{len(points)}"
        points.append(Point(name, pipeline))
    return points


def _axis(given: str) -> tuple[str, list[Any]]:
    key, sign, text = given.partition("=")
    if not (sign and key and text):
        raise UsageError(f"--over {given!r} is not KEY=VALUE,VALUE", "write for instance --over loss=kd,dtkd")
    values, _ = read_yaml(text, f"--over {given}")
    if isinstance(values, str) and "," in values:
        values = [read_yaml(part, f"--over {given}")[0] for part in values.split(",")]
    return key, values if isinstance(values, list) else [values]


def _plain(value: Any) -> str:
    text = value if isinstance(value, str) else json.dumps(value)
    return re.sub(r"[^A-Za-z0-9.+_-]+", "-", text).strip("-")


class _Job(NamedTuple):
    point: Point
    seed: int
    folder: Path


@dataclass(frozen=True)
class _Room:
    """Where students are taught: what they have in common, made once for each data set and transform.

    Attributes:
        caches: opened.
        device: where to train.
        placement: of the caches.
        other_pixels, by_content, allow_missing: see `train_student`.
        made: inputs by what they depend on.
    """

    caches: Sequence[Cache]
    device: str
    placement: Placement | Literal["auto"]
    other_pixels: bool
    by_content: bool
    allow_missing: bool
    made: dict[str, TrainingInputs]

    def inputs(self, pipeline: Pipeline, progress: Progress | None = None) -> TrainingInputs:
        """Of a pipeline's data set, transform and way to join caches, and whether its loss needs them."""
        key = f"{pipeline.loss.uses_teacher} {pipeline.model_dump_json(include={'dataset', 'transform', 'join'})}"
        if key not in self.made and self.caches:
            self.made[key] = inputs_from_caches(
                pipeline,
                self.caches,
                device=self.device,
                placement=self.placement,
                other_pixels=self.other_pixels,
                by_content=self.by_content,
                allow_missing=self.allow_missing,
                progress=progress,
            )
        elif key not in self.made:
            self.made[key] = inputs_without_teacher(pipeline)
        return self.made[key]

    def train_on(self, job: _Job, progress: Progress | None = None) -> Student:
        """Train a student; what is wrong with it alone does not end the sweep."""
        student = job.point.pipeline.section("student")
        train = student.train.model_copy(update={"seed": job.seed})
        pipeline = job.point.pipeline.model_copy(update={"student": student.model_copy(update={"train": train})})
        inputs = self.inputs(pipeline, progress)
        try:
            train_on(pipeline, inputs, job.folder, device=self.device)
        except InterruptedRun:
            raise
        except KdcacheError as error:
            return Student(job.point.name, job.seed, str(job.folder), None, None, 0.0, error.what)
        return _found(job)


def sweep(
    points: Sequence[Point],
    seeds: int,
    caches: Sequence[Cache],
    out: Path,
    *,
    device: str = "cpu",
    placement: Placement | Literal["auto"] = "auto",
    other_pixels: bool = False,
    by_content: bool = False,
    allow_missing: bool = False,
    processes: int = 1,
    progress: Progress | None = None,
) -> list[SweepSummary]:
    """Train a student for each combination and seed; those whose run folder is there already are taken as they are.

    Args:
        points: what differs.
        seeds: students a combination, from the seed of its pipeline upwards.
        caches: the teacher; none only for losses that use no teacher.
        out: a folder with a run folder POINT/seedN for each; may be that of an earlier, smaller sweep.
        device: where to train.
        placement: where the rows are held; with several processes, `auto` is a mapped file.
        other_pixels, by_content, allow_missing: see `train_student`.
        processes: that train side by side.
        progress: who is told how it goes.

    Raises:
        MismatchError: if `out` has runs of the same name from another pipeline or cache.
        IncompleteError: if a process dies.
        KdcacheError: if a pipeline and the caches do not belong together.
    """
    progress = progress or Silent()
    for point in points:
        if not caches and point.pipeline.loss.uses_teacher:
            raise UsageError(f"{point.name} needs a teacher", "give its cache with --cache, or sweep over ce alone")
        check_trackers(point.pipeline.section("student").train.trackers)
        _enter(point, caches, out)
    jobs = [
        _Job(point, seed, out / point.name / f"seed{seed}")
        for point in points
        for seed in _seeds(point.pipeline, seeds)
    ]
    waiting = [job for job in jobs if not job.folder.exists()]
    if len(waiting) < len(jobs):
        progress.say(f"{len(jobs) - len(waiting)} of {len(jobs)} students are trained already")
    trained = {job.folder: _found(job) for job in jobs if job.folder.exists()}
    # What is in a mapped file is in memory once, however many processes there are.
    held = "mmap" if processes > 1 and placement == "auto" else placement
    room = _Room(caches, device, held, other_pixels, by_content, allow_missing, {})
    with progress.task("students", len(waiting), "students") as task:
        for job, student in _each(room, waiting, processes, progress):
            trained[job.folder] = student
            note = "failed" if student.test is None else f"{student.test:.1%}"
            task.advance(1, f"{student.point}, seed {student.seed}: {note}")
    return [SweepSummary(point.name, [trained[job.folder] for job in jobs if job.point is point]) for point in points]


def _seeds(pipeline: Pipeline, count: int) -> range:
    first = pipeline.section("student").train.seed
    return range(first, first + count)


def _enter(point: Point, caches: Sequence[Cache], out: Path) -> None:
    """Give a combination its folder, or see that it has it."""
    pipeline = point.pipeline.model_dump(mode="json")
    now = {"pipeline": pipeline, "caches": [cache.manifest.digest for cache in caches]}
    path = out / point.name / _POINT
    if path.is_file():
        before = json.loads(path.read_text(encoding="utf-8"))
        if before != now:
            raise MismatchError(
                f"{path.parent} holds students of the same name from another pipeline or cache",
                "give another folder with -o, or delete that one",
            )
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    write_file(path, json.dumps(now, indent=2) + "\n")


def _found(job: _Job) -> Student:
    metrics = json.loads((job.folder / "metrics.json").read_text(encoding="utf-8"))
    test = metrics["test"]["accuracy"] if metrics["test"] else None
    validation = metrics["best"]["validation_accuracy"]
    return Student(job.point.name, job.seed, str(job.folder), test, validation, metrics["seconds"])


def _each(room: _Room, jobs: Sequence[_Job], processes: int, progress: Progress) -> Iterator[tuple[_Job, Student]]:
    if processes == 1 or len(jobs) < 2:
        for job in jobs:
            yield job, room.train_on(job, progress)
        return
    for job in jobs:
        room.inputs(job.point.pipeline, progress)  # what does not fit is said here, once
    with TemporaryDirectory(prefix="kdcache-sweep-") as folder:
        made = {key: _mapped(inputs, Path(folder) / str(n)) for n, (key, inputs) in enumerate(room.made.items())}
        worker = replace(room, caches=[], made=made)
        pool = ProcessPoolExecutor(processes, get_context("spawn"), _enter_worker, (worker, processes))
        try:
            futures = {pool.submit(_train_in_worker, job): job for job in jobs}
            for future in as_completed(futures):
                yield futures[future], future.result()
        except BrokenProcessPool as error:
            raise IncompleteError(
                f"a process of the sweep has ended: {error}",
                "run the same command again, with a lower -j if memory ran out: trained students are kept",
            ) from error
        finally:
            pool.shutdown(cancel_futures=True)


def _mapped(inputs: TrainingInputs, folder: Path) -> TrainingInputs:
    """TrainingInputs that processes may be given: images in memory become images in a file that all of them map."""
    folder.mkdir()

    def split(name: str) -> Any:
        samples = getattr(inputs, name)
        if samples is None or not isinstance(samples.images, ArrayImages):
            return samples
        return replace(samples, images=map_images(samples.images, folder / name))

    return replace(inputs, **{name: split(name) for name in ("samples", "validation", "test")})


_here: _Room | None = None
"""Of a process of the pool."""


def _enter_worker(room: _Room, processes: int) -> None:
    global _here  # noqa: PLW0603  # a process of a pool has no other place to keep what it was given
    torch.set_num_threads(max(1, torch.get_num_threads() // processes))
    _here = room


def _train_in_worker(job: _Job) -> Student:
    assert _here is not None, "a process is given its room first"  # noqa: S101
    return _here.train_on(job)

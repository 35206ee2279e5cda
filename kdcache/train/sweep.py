"""Many students of one cache: losses, networks, options and seeds, each combination a run of its own.

One process loads the data set and the cache once, for all students. Several processes map both from the local disk, and
share that memory. (Each decodes the logits of a small cache for itself, `decoded_teacher.py`.)
"""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import ExitStack
from dataclasses import dataclass, replace
from multiprocessing import get_context
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import NamedTuple

from kdcache.cache.reader import Cache
from kdcache.config.schema import Pipeline
from kdcache.errors import IncompleteError, KdcacheError, MismatchError, UsageError, counted
from kdcache.runtime.folder_lock import locked
from kdcache.runtime.progress import Progress, Silent, Task
from kdcache.train.inputs import CacheOptions, TrainingInputs, inputs_from_caches, inputs_without_teacher
from kdcache.train.run_folder import check_trackers, described_differences, read_json, write_json
from kdcache.train.sweep_points import Point
from kdcache.train.sweep_worker import (
    ProgressQueue,
    StudentProgress,
    completed,
    enter_worker,
    mapped_inputs,
    worker_state,
)
from kdcache.train.train import train_on

_POINT = "point.json"


@dataclass(frozen=True)
class StudentResult:
    """The result of one student; accuracies in [0, 1].

    Attributes:
        point: name of the combination.
        seed: of its training.
        run: its folder.
        test: test accuracy; None without a test split, or if it failed.
        validation: accuracy of the selected epoch; None without a validation split, or if it failed.
        seconds: duration of training.
        failed: the error, if it failed.
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
    students: list[StudentResult]

    @property
    def accuracies(self) -> list[float]:
        """Test accuracies of the students that did not fail."""
        return [student.test for student in self.students if student.test is not None]

    @property
    def mean(self) -> float | None:
        """Mean of the test accuracies; None without any."""
        return statistics.mean(self.accuracies) if self.accuracies else None

    @property
    def spread(self) -> float:
        """Standard deviation of the test accuracies."""
        return statistics.stdev(self.accuracies) if len(self.accuracies) > 1 else 0.0

    @property
    def validation(self) -> float | None:
        """Mean of the validation accuracies; None without any."""
        known = [student.validation for student in self.students if student.validation is not None]
        return statistics.mean(known) if known else None

    @property
    def seconds(self) -> float:
        """Mean of the training times."""
        return statistics.mean(student.seconds for student in self.students)


class _Job(NamedTuple):
    point: Point
    seed: int
    folder: Path

    @property
    def name(self) -> str:
        return f"{self.point.name}, seed {self.seed}"

    @property
    def epochs(self) -> int:
        return int(self.point.pipeline.section("student").train.epochs)


@dataclass(frozen=True)
class _SweepContext:
    """What the students of a sweep share.

    Attributes:
        caches: opened.
        device: where to train.
        options: see `train_student`.
        inputs_by_key: inputs by the sections of the pipeline that they depend on, loaded once each.
    """

    caches: Sequence[Cache]
    device: str
    options: CacheOptions
    inputs_by_key: dict[str, TrainingInputs]

    def inputs(self, pipeline: Pipeline, progress: Progress | None = None) -> TrainingInputs:
        """Return the inputs of a pipeline, loaded at the first call."""
        key = f"{pipeline.loss.uses_teacher} {pipeline.model_dump_json(include={'dataset', 'transform', 'join'})}"
        if key not in self.inputs_by_key:
            self.inputs_by_key[key] = (
                inputs_from_caches(pipeline, self.caches, self.options, device=self.device, progress=progress)
                if self.caches
                else inputs_without_teacher(pipeline, progress)
            )
        return self.inputs_by_key[key]

    def train(self, job: _Job, progress: Progress) -> StudentResult:
        """Train a student; an error of this student alone is part of its result."""
        student = job.point.pipeline.section("student")
        train = student.train.model_copy(update={"seed": job.seed})
        pipeline = job.point.pipeline.model_copy(update={"student": student.model_copy(update={"train": train})})
        inputs = self.inputs(pipeline)
        try:
            train_on(pipeline, inputs, job.folder, device=self.device, progress=progress)
        except KdcacheError as error:
            return StudentResult(job.point.name, job.seed, str(job.folder), None, None, 0.0, error.what)
        return _read_result(job)


def sweep(
    points: Sequence[Point],
    seeds: int,
    caches: Sequence[Cache],
    out: Path,
    options: CacheOptions | None = None,
    *,
    device: str = "cpu",
    processes: int = 1,
    progress: Progress | None = None,
) -> list[SweepSummary]:
    """Train a student for each combination and seed; finished run folders are not trained again.

    Args:
        points: combinations.
        seeds: number of students per combination, from the seed of its pipeline upwards.
        caches: of the teacher; empty only for losses that use no teacher.
        out: folder with a run folder POINT/seedN for each student; may be that of an earlier, smaller sweep.
        options: see `train_student`; with several processes, placement `auto` is a mapped file.
        device: where to train.
        processes: number of students that are trained at the same time.
        progress: progress reporter; silent if None.

    Raises:
        UsageError: if another process is writing a combination of `out`.
        MismatchError: if `out` has runs of the same name from another pipeline or cache.
        IncompleteError: if a process dies.
        KdcacheError: if a pipeline and the caches are inconsistent.
    """
    progress, options = progress or Silent(), options or CacheOptions()
    for point in points:
        if not caches and point.pipeline.loss.uses_teacher:
            raise UsageError(f"{point.name} needs a teacher", "pass its cache with --cache, or sweep over ce alone")
        check_trackers(point.pipeline.section("student").train.trackers)
    with ExitStack() as locks:
        for point in points:
            locks.enter_context(locked(out / point.name))
            _begin_point(point, caches, out)
        jobs = [
            _Job(point, seed, out / point.name / f"seed{seed}")
            for point in points
            for seed in _seeds(point.pipeline, seeds)
        ]
        waiting = [job for job in jobs if not job.folder.exists()]
        if len(waiting) < len(jobs):
            progress.say(f"trained already: {len(jobs) - len(waiting)} of {counted(len(jobs), 'student')}")
        results = {job.folder: _read_result(job) for job in jobs if job.folder.exists()}
        if processes > 1 and options.placement == "auto":
            # A mapped file is in memory once, however many processes read it.
            options = replace(options, placement="mmap")
        context = _SweepContext(caches, device, options, {})
        for job in waiting:
            context.inputs(job.point.pipeline, progress)  # inconsistent inputs are found before the first student
        with progress.task("sweep", sum(job.epochs for job in waiting), "epochs") as task:
            finished = _train_all(context, waiting, processes, task, progress)
            for number, (job, student) in enumerate(finished, 1):
                results[job.folder] = student
                outcome = "failed" if student.test is None else f"{student.test:.1%}"
                task.advance(0, f"{number} of {counted(len(waiting), 'student')}, {job.name}: {outcome}")
    return [SweepSummary(point.name, [results[job.folder] for job in jobs if job.point is point]) for point in points]


def _seeds(pipeline: Pipeline, count: int) -> range:
    first = pipeline.section("student").train.seed
    return range(first, first + count)


def _begin_point(point: Point, caches: Sequence[Cache], out: Path) -> None:
    """Create the folder of a combination, or check that it is of the same pipeline and caches.

    Raises:
        MismatchError: if it is not.
    """
    pipeline = point.pipeline.model_dump(mode="json")
    configuration = {"pipeline": pipeline, "caches": [cache.manifest.digest for cache in caches]}
    path = out / point.name / _POINT
    if path.is_file():
        if changes := described_differences(read_json(path), configuration):
            raise MismatchError(
                f"{path.parent} holds students of the same name with other settings: {changes}",
                "write to another folder with -o, or delete that one",
            )
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(path, configuration)


def _read_result(job: _Job) -> StudentResult:
    metrics = read_json(job.folder / "metrics.json")
    test = metrics["test"]["accuracy"] if metrics["test"] else None
    validation = metrics["best"]["validation_accuracy"]
    return StudentResult(job.point.name, job.seed, str(job.folder), test, validation, metrics["seconds"])


def _train_all(
    context: _SweepContext, jobs: Sequence[_Job], processes: int, task: Task, progress: Progress
) -> Iterator[tuple[_Job, StudentResult]]:
    """Yield each job with its result, as soon as it is finished; in this process, or in several others."""
    if processes == 1 or len(jobs) < 2:
        for job in jobs:
            with StudentProgress(job.name, job.epochs, task.advance, progress.say) as of_student:
                result = context.train(job, of_student)
            yield job, result
        return
    with TemporaryDirectory(prefix="kdcache-sweep-") as folder:
        mapped = {
            key: mapped_inputs(inputs, Path(folder) / str(n))
            for n, (key, inputs) in enumerate(context.inputs_by_key.items())
        }
        queue = ProgressQueue()
        given = (replace(context, caches=[], inputs_by_key=mapped), queue, processes)
        pool = ProcessPoolExecutor(processes, get_context("spawn"), enter_worker, given)
        try:
            futures = {pool.submit(_train_in_worker, job): job for job in jobs}
            for future in completed(futures, lambda: queue.forward(task, progress)):
                yield futures[future], future.result()
        except BrokenProcessPool as error:
            raise IncompleteError(
                f"a process of the sweep died: {error}",
                "run the same command again, with a lower -j if memory ran out: finished students are kept",
            ) from error
        finally:
            pool.shutdown(cancel_futures=True)


def _train_in_worker(job: _Job) -> StudentResult:
    context, queue = worker_state()
    with StudentProgress(job.name, job.epochs, queue.advance, queue.say) as progress:
        result: StudentResult = context.train(job, progress)
    return result

"""Many students of one cache: losses, networks, options and seeds, each combination a run of its own.

One process loads the data set and the cache once, for all students; trained together, they share each batch, too.
Several processes map both from the local disk, and share that memory. (Each decodes the logits of a small cache for
itself, `decoded_teacher.py`.)
"""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import ExitStack
from dataclasses import dataclass, replace
from multiprocessing import get_context, get_start_method
from pathlib import Path
from tempfile import TemporaryDirectory

from kdcache.cache.reader import Cache
from kdcache.config.schema import Pipeline
from kdcache.errors import IncompleteError, KdcacheError, MismatchError, UsageError, counted
from kdcache.runtime.distributed import n_processes
from kdcache.runtime.folder_lock import locked
from kdcache.runtime.progress import Progress, Silent, Task
from kdcache.train.inputs import CacheOptions, TrainingInputs, inputs_from_caches, inputs_without_teacher
from kdcache.train.run_folder import check_trackers, described_differences, read_json, write_json
from kdcache.train.run_result import RunResult
from kdcache.train.sweep_groups import Job, all_jobs, divided, grouped, with_one_order
from kdcache.train.sweep_points import Point
from kdcache.train.sweep_worker import (
    ProgressQueue,
    StudentProgress,
    completed,
    enter_worker,
    mapped_inputs,
    reporters,
    worker_state,
)
from kdcache.train.train import Student, train_together

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
        sections = pipeline.model_dump_json(include={"dataset", "transform", "join"})
        key = f"{pipeline.loss.uses_teacher} {sorted(pipeline.loss.outputs)} {sections}"
        if key not in self.inputs_by_key:
            with_teacher = self.inputs_by_key.get(f"True [] {sections}")
            self.inputs_by_key[key] = (
                with_teacher.without_teacher()
                if with_teacher is not None
                else inputs_from_caches(pipeline, self.caches, self.options, device=self.device, progress=progress)
                if self.caches
                else inputs_without_teacher(pipeline, progress)
            )
        return self.inputs_by_key[key]

    def train(
        self, jobs: Sequence[Job], reporters: Sequence[StudentProgress], on_end: Callable[[Job, StudentResult], None]
    ) -> None:
        """Train students that share their batches; an error of kdcache of one student is part of its result.

        Any other error of a student is raised when the others have ended.
        """
        unexpected: list[Exception] = []

        def ended(index: int, outcome: RunResult | Exception) -> None:
            job, reporter = jobs[index], reporters[index]
            if isinstance(outcome, KdcacheError):
                result = StudentResult(job.point.name, job.seed, str(job.folder), None, None, 0.0, outcome.what)
                reporter.say(f"failed: {outcome.what}")
            elif isinstance(outcome, Exception):
                unexpected.append(outcome)
                return
            else:
                result = _read_result(job)
            reporter.finish()
            on_end(job, result)

        students = [
            Student(job.pipeline, self.inputs(job.pipeline), job.folder, reporter)
            for job, reporter in zip(jobs, reporters, strict=True)
        ]
        train_together(students, ended, device=self.device)
        if unexpected:
            raise unexpected[0]


def sweep(
    points: Sequence[Point],
    seeds: int,
    caches: Sequence[Cache],
    out: Path,
    options: CacheOptions | None = None,
    *,
    device: str = "cpu",
    processes: int = 1,
    together: bool = False,
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
        processes: number of processes that train at the same time.
        together: load each batch once for all students that can share it. Students that differ in their seed then see
            the images in one order, that of the first (`train.data_seed`).
        progress: progress reporter; silent if None.

    Raises:
        UsageError: if another process is writing a combination of `out`.
        MismatchError: if `out` has runs of the same name from another pipeline or cache.
        IncompleteError: if a process dies.
        KdcacheError: if a pipeline and the caches are inconsistent.
    """
    progress, options = progress or Silent(), options or CacheOptions()
    if together and n_processes() > 1:
        raise UsageError(
            f"students are trained together in one process, and torchrun started {n_processes()}",
            "run the command without torchrun, with -j for several processes",
        )
    for point in points:
        if not caches and point.pipeline.loss.uses_cache:
            raise UsageError(f"{point.name} needs a teacher", "pass its cache with --cache, or sweep over ce alone")
        check_trackers(point.pipeline.section("student").train.trackers)
    with ExitStack() as locks:
        for point in points:
            locks.enter_context(locked(out / point.name))
            _begin_point(point, caches, out)
        jobs = all_jobs(points, seeds, out)
        groups = [with_one_order(group) for group in grouped(jobs)] if together else [[job] for job in jobs]
        waiting = [[job for job in group if not job.folder.exists()] for group in groups]
        count = sum(map(len, waiting))
        if count < len(jobs):
            progress.say(f"trained already: {len(jobs) - count} of {counted(len(jobs), 'student')}")
        if together:
            _describe(waiting, progress)
        results = {job.folder: _finished(job) for group in groups for job in group if job.folder.exists()}
        if processes > 1 and options.placement == "auto":
            # A mapped file is in memory once, however many processes read it.
            options = replace(options, placement="mmap")
        context = _SweepContext(caches, device, options, {})
        # Inconsistent inputs are found before the first student; inputs with a teacher serve losses without one, too.
        for job in sorted(itertools.chain(*waiting), key=lambda job: not job.point.pipeline.loss.uses_cache):
            context.inputs(job.point.pipeline, progress)
        with progress.task("sweep", sum(job.epochs for job in itertools.chain(*waiting)), "epochs") as task:

            def on_end(job: Job, student: StudentResult) -> None:
                results[job.folder] = student
                ended = count - sum(each.folder not in results for each in itertools.chain(*waiting))
                outcome = "failed" if student.test is None else f"{student.test:.1%}"
                task.advance(0, f"{ended} of {counted(count, 'student')}, {job.name}: {outcome}")

            _train_all(context, divided(waiting, processes), processes, on_end, task, progress)
    return [SweepSummary(point.name, [results[job.folder] for job in jobs if job.point is point]) for point in points]


def _describe(groups: Sequence[Sequence[Job]], progress: Progress) -> None:
    """Say which students share their batches, and their order of images."""
    sizes = [len(group) for group in groups if group]
    if not sizes:
        return
    progress.say(
        f"training {counted(sum(sizes), 'student')} together in {counted(len(sizes), 'group')} "
        f"({', '.join(map(str, sizes))}): each batch is loaded once for a group"
    )
    if any(job.data_seed != job.point.pipeline.section("student").train.data_seed for group in groups for job in group):
        progress.say(
            "note: students of a group that differ in their seed see the images in the same order, that of the first "
            "(train.data_seed in their resolved.yaml), so the spread over seeds does not include the order"
        )


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


def _finished(job: Job) -> StudentResult:
    """Return the result of a student that is trained already.

    Raises:
        MismatchError: if it saw the images in another order than this sweep shows them in.
    """
    before = read_json(job.folder / "metrics.json").get("data_seed")
    if before != job.data_seed:
        raise MismatchError(
            f"{job.folder} was trained with train.data_seed {before}, and it is {job.data_seed} in this sweep",
            "repeat the command with --together if it had it before, or else without; or write to another folder",
        )
    return _read_result(job)


def _read_result(job: Job) -> StudentResult:
    metrics = read_json(job.folder / "metrics.json")
    test = metrics["test"]["accuracy"] if metrics["test"] else None
    validation = metrics["best"]["validation_accuracy"]
    return StudentResult(job.point.name, job.seed, str(job.folder), test, validation, metrics["seconds"])


def _train_all(
    context: _SweepContext,
    groups: Sequence[Sequence[Job]],
    processes: int,
    on_end: Callable[[Job, StudentResult], None],
    task: Task,
    progress: Progress,
) -> None:
    """Train groups of students, in this process or in several others; each result is reported when it is there."""
    if processes == 1 or len(groups) < 2:
        for group in groups:
            context.train(group, reporters(group, task.advance, progress.say), on_end)
        return
    with TemporaryDirectory(prefix="kdcache-sweep-") as folder:
        queue = ProgressQueue()
        mapped = mapped_inputs(context.inputs_by_key, Path(folder))
        given = (replace(context, caches=[], inputs_by_key=mapped), queue, processes, get_start_method())
        pool = ProcessPoolExecutor(processes, get_context("spawn"), enter_worker, given)
        try:
            futures = [pool.submit(_train_in_worker, group) for group in groups]
            for future in completed(futures, lambda: queue.forward(task, progress)):
                for job, result in future.result():
                    on_end(job, result)
        except BrokenProcessPool as error:
            raise IncompleteError(
                f"a process of the sweep died: {error}",
                "run the same command again, with a lower -j if memory ran out: finished students are kept",
            ) from error
        finally:
            pool.shutdown(cancel_futures=True)


def _train_in_worker(group: Sequence[Job]) -> list[tuple[Job, StudentResult]]:
    context, queue = worker_state()
    results: list[tuple[Job, StudentResult]] = []
    context.train(group, reporters(group, queue.advance, queue.say), lambda *result: results.append(result))
    return results

"""Many students of one cache: losses, networks, options and seeds, each combination a run of its own.

One process loads the data set and the cache once, for all students; trained together, they share each batch, too.
Several processes map both from the local disk, and share that memory. (Each decodes the logits of a small cache for
itself, `decoded_teacher.py`.)
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path

from kdcache.cache.reader import Cache
from kdcache.config.text import TextPipeline
from kdcache.errors import MismatchError, UsageError, counted
from kdcache.runtime.folder_lock import locked
from kdcache.runtime.launched import n_processes
from kdcache.runtime.progress import Progress, Silent
from kdcache.train.inputs import CacheOptions
from kdcache.train.run_folder import check_trackers, described_differences, read_json, write_json
from kdcache.train.sweep_cluster import train_on_cluster
from kdcache.train.sweep_context import SweepContext, finished_result
from kdcache.train.sweep_groups import Job, all_jobs, grouped, with_one_order
from kdcache.train.sweep_local import train_here
from kdcache.train.sweep_points import Point
from kdcache.train.sweep_results import SweepSummary
from kdcache.train.sweep_tally import Tally

_POINT = "point.json"


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
    scheduler: str | None = None,
    progress: Progress | None = None,
) -> list[SweepSummary]:
    """Train a student for each combination and seed; finished run folders are not trained again.

    Args:
        points: combinations.
        seeds: number of students per combination, from the seed of its pipeline upwards.
        caches: of the teacher; empty only for losses that use no teacher.
        out: folder with a run folder POINT/seedN for each student; may be that of an earlier, smaller sweep.
        options: see `train_student`; with several processes or a cluster, placement `auto` is a mapped file.
        device: where to train; with `scheduler` also `auto`, a GPU if the worker has one.
        processes: number of processes that train at the same time.
        together: load each batch once for all students that can share it. Students that differ in their seed then see
            the images in one order, that of the first (`train.data_seed`).
        scheduler: address of a dask.distributed scheduler, `tcp://HOST:PORT`, whose workers see the same files and
            train the students; None for this machine.
        progress: progress reporter; silent if None.

    Raises:
        UsageError: if another process is writing a combination of `out`.
        MismatchError: if `out` has runs of the same name from another pipeline or cache.
        IncompleteError: if a process dies.
        KdcacheError: if a pipeline and the caches are inconsistent.
    """
    progress, options = progress or Silent(), options or CacheOptions()
    _check_processes(processes, together, scheduler)
    if together and any(isinstance(point.pipeline, TextPipeline) for point in points):
        raise UsageError(
            "--together shares the loading of images among students, and language models read tokens and rows alone",
            "leave out --together; -j trains several at the same time",
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
        results = {job.folder: finished_result(job) for group in groups for job in group if job.folder.exists()}
        context, tally = SweepContext(caches, device, options, {}), Tally(waiting, results, progress)
        if scheduler is None:
            train_here(context, waiting, processes, tally, progress)
        elif count:
            train_on_cluster(context, waiting, scheduler, tally, progress)
    return [SweepSummary(point.name, [results[job.folder] for job in jobs if job.point is point]) for point in points]


def _check_processes(processes: int, together: bool, scheduler: str | None) -> None:
    """Check that only one way to share the work among processes is asked for.

    Raises:
        UsageError: if there are several.
    """
    if (together or scheduler is not None) and n_processes() > 1:
        students = "are trained together in one process" if scheduler is None else "are trained by the dask workers"
        raise UsageError(
            f"students {students}, and torchrun started {n_processes()}",
            "run the command without torchrun, with -j for several processes",
        )
    if processes > 1 and scheduler is not None:
        raise UsageError(
            f"-j {processes} is for processes of this machine, and --scheduler {scheduler} for those of a cluster",
            "leave out one of them: each thread of a dask worker trains one student at a time",
        )


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

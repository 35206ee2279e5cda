"""Train the students of a sweep on this machine: in this process, or in several."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import replace
from multiprocessing import get_context, get_start_method
from pathlib import Path
from tempfile import TemporaryDirectory

from kdcache.errors import IncompleteError
from kdcache.runtime.progress import Progress, Task
from kdcache.train.sweep_context import SweepContext
from kdcache.train.sweep_groups import Job, divided
from kdcache.train.sweep_results import StudentResult
from kdcache.train.sweep_tally import Tally
from kdcache.train.sweep_worker import ProgressQueue, completed, enter_worker, mapped_inputs, reporters, worker_state


def train_here(
    context: SweepContext, waiting: Sequence[Sequence[Job]], processes: int, tally: Tally, progress: Progress
) -> None:
    """Train groups of students, in this process or in several others; each result is reported when it is there.

    Args:
        context: what they share.
        waiting: the groups.
        processes: number of processes.
        tally: is given the results.
        progress: progress reporter.

    Raises:
        IncompleteError: if a process dies.
        KdcacheError: if a pipeline and the caches are inconsistent, before the first student is trained.
    """
    if processes > 1 and context.options.placement == "auto":
        # A mapped file is in memory once, however many processes read it.
        context = replace(context, options=replace(context.options, placement="mmap"))
    context.load([*itertools.chain(*waiting)], progress)
    groups = divided(waiting, processes)
    with tally.task() as task:
        if processes == 1 or len(groups) < 2:
            for group in groups:
                context.train(group, reporters(group, task.advance, progress.say), tally.end)
        else:
            _train_in_processes(context, groups, processes, tally, task, progress)


def _train_in_processes(
    context: SweepContext,
    groups: Sequence[Sequence[Job]],
    processes: int,
    tally: Tally,
    task: Task,
    progress: Progress,
) -> None:
    """Train groups of students in several processes, which map the inputs."""
    with TemporaryDirectory(prefix="kdcache-sweep-") as folder:
        queue = ProgressQueue()
        mapped = mapped_inputs(context.inputs_by_key, Path(folder))
        given = (replace(context, caches=[], inputs_by_key=mapped), queue, processes, get_start_method())
        pool = ProcessPoolExecutor(processes, get_context("spawn"), enter_worker, given)
        try:
            futures = [pool.submit(_train_in_worker, group) for group in groups]
            for future in completed(futures, lambda: queue.forward(task, progress)):
                for job, result in future.result():
                    tally.end(job, result)
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

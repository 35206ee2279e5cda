"""Train the students of a sweep in the workers of a dask.distributed cluster, a group of students per call.

The workers see the same files: run folders and their checkpoints are what a call of a dead worker is resumed from by
another one. Each student is what it is in a sweep on one machine.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path
from typing import Any
from uuid import uuid4

from kdcache.cache.parallel import REPEATS, Cluster, WorkersDied, join_cluster
from kdcache.errors import UsageError, counted
from kdcache.runtime.folder_lock import lock_file
from kdcache.runtime.progress import Progress, Task
from kdcache.runtime.versions import versions
from kdcache.train.sweep_context import SweepContext, finished_result
from kdcache.train.sweep_groups import Job, divided
from kdcache.train.sweep_messages import CacheToOpen, Place, Request, Trained, Unfit
from kdcache.train.sweep_results import StudentResult
from kdcache.train.sweep_tally import Tally
from kdcache.train.trainer_process import TrainerDied, examine, train_in_worker


def train_on_cluster(
    context: SweepContext, waiting: Sequence[Sequence[Job]], scheduler: str, tally: Tally, progress: Progress
) -> None:
    """Train groups of students in the workers of a cluster; each result is reported when it is there.

    Args:
        context: what they share.
        waiting: the groups; larger ones are divided among the threads of the workers.
        scheduler: address of the dask scheduler.
        tally: is given the results.
        progress: progress reporter.

    Raises:
        UsageError: if the scheduler does not answer, or a worker has other versions or does not see the folders.
        IncompleteError: if the scheduler ends.
        KdcacheError: if a pipeline and the caches are inconsistent, before the first student is trained.
    """
    jobs = [*itertools.chain(*waiting)]
    with join_cluster(scheduler) as cluster:
        if not cluster.threads():
            progress.say(f"waiting for a worker at {scheduler}")
            cluster.wait_for_worker()
        place = _common_place(cluster, context, jobs[0].folder.parent)
        threads = cluster.threads()
        at_once = max(sum(threads.values()), 1)
        progress.say(f"training in {counted(len(threads), 'worker')} with {counted(at_once, 'thread')}")
        # What is inconsistent is found here. The rows of the cache are for the workers: none are loaded.
        replace(context, device="cpu", options=replace(context.options, placement="stream")).load(
            jobs, _Quiet(progress)
        )
        options = context.options
        if options.placement == "auto":
            # Wherever a student is resumed, it sees the same order; and processes of one machine share the memory.
            options = replace(options, placement="mmap")
        sweep, groups = uuid4().hex, divided(waiting, at_once)
        requests = [(Request(sweep, place, context.device, options, group),) for group in groups]
        crashes: list[str] = []
        with tally.task() as task:
            shown = _Shown(groups, task, progress)
            for index, outcome in cluster.outcomes(train_in_worker, requests, shown.on_message):
                shown.end(index)
                for job, student in _students(groups[index], outcome, crashes):
                    tally.end(job, student)
        if crashes:
            raise RuntimeError(f"a student raised an error in a worker:\n{crashes[0]}")


def _common_place(cluster: Cluster, context: SweepContext, folder: Path) -> Place:
    """Return what all workers must see and have, after checking those that are there now.

    Args:
        cluster: its workers.
        context: of the sweep.
        folder: of a combination, which this process has locked.

    Raises:
        UsageError: if a worker cannot train the students, or resume what another one has begun.
    """
    own, agreed = versions()["kdcache"], None
    for address, found in _answers(cluster, versions):
        if found["kdcache"] != own:
            raise UsageError(
                f"the worker at {address} has kdcache {found['kdcache']}, and this process has {own}",
                f"pip install 'kdcache[cluster]=={own}' in the environment of all workers",
            )
        agreed = agreed or (address, found)
        for name, version in found.items():
            if version != agreed[1][name]:
                raise UsageError(
                    f"the worker at {address} has {name} {version}, and that at {agreed[0]} has {agreed[1][name]}",
                    "install the same versions on all workers: a student is resumed with those it was begun with",
                )
    lock = lock_file(folder)
    with lock.open("rb") as file:
        os.fsync(file.fileno())  # so that other machines read what this process has written
        holder = file.read().decode(errors="replace")
    caches = [CacheToOpen(str(each.path.absolute()), each.views, each.manifest.digest) for each in context.caches]
    place = Place(str(Path.cwd()), str(lock), holder, tuple(caches), agreed[1] if agreed else None)
    for _, found in _answers(cluster, examine, place):
        if isinstance(found, Unfit):
            raise found.error
    return place


def _answers(cluster: Cluster, function: Any, *arguments: Any) -> Iterator[tuple[str, Any]]:
    """Yield what a function returns on each worker, with the address of the worker.

    Raises:
        UsageError: if a worker cannot call it.
    """
    for address, answer in cluster.ask(function, *arguments).items():
        if isinstance(answer, OSError):
            continue  # it has ended since
        if isinstance(answer, Exception):
            raise _without_kdcache(f"the worker at {address}", answer)
        yield address, answer


def _without_kdcache(who: str, error: Exception) -> UsageError:
    return UsageError(
        f"{who} cannot run kdcache {versions()['kdcache']}: {type(error).__name__}: {error}",
        "install it in the environment of the scheduler and of all workers: pip install 'kdcache[cluster]'",
    )


def _students(group: Sequence[Job], outcome: Any, crashes: list[str]) -> list[tuple[Job, StudentResult]]:
    """Return the students of a group with their results, and add an error that is not one of kdcache's to the others.

    Raises:
        KdcacheError: if a worker that came later cannot train.
    """
    if isinstance(outcome, Trained):
        if outcome.crash is not None:
            crashes.append(outcome.crash)
        return [(group[index], student) for index, student in outcome.students]
    if isinstance(outcome, Unfit):
        raise outcome.error
    if isinstance(outcome, TrainerDied | WorkersDied):
        what = f"{outcome.what}; repeated {REPEATS} times" if isinstance(outcome, TrainerDied) else outcome.what
        return [
            (
                job,
                finished_result(job)
                if job.folder.exists()
                else StudentResult(job.point.name, job.seed, str(job.folder), None, None, 0.0, what),
            )
            for job in group
        ]
    if isinstance(outcome, ImportError) or "deserializ" in str(outcome):
        raise _without_kdcache("a worker, or the scheduler,", outcome)
    raise outcome


class _Quiet:
    """A progress reporter that shows tasks, and no messages: the workers send theirs."""

    def __init__(self, progress: Progress) -> None:
        self._progress = progress

    def task(self, what: str, total: int, unit: str) -> AbstractContextManager[Task]:
        """Begin an operation of `total` units; the context ends it."""
        return self._progress.task(what, total, unit)

    def say(self, message: str) -> None:
        """Do nothing."""


class _Shown:
    """The progress of groups: an epoch that is repeated, or trained by two workers, counts once.

    Args:
        groups: of students.
        task: counts epochs.
        progress: shows messages.
    """

    def __init__(self, groups: Sequence[Sequence[Job]], task: Task, progress: Progress) -> None:
        self._left = [sum(job.epochs for job in group) for group in groups]
        self._whole, self._task, self._progress = [*self._left], task, progress
        self._notes: set[str] = set()

    def on_message(self, index: int, message: list[Any]) -> None:
        """Show a message from the worker of a group."""
        kind, *content = message
        if kind == "epochs":
            left = min(self._left[index], max(self._whole[index] - content[0], 0))
            self._task.advance(self._left[index] - left, content[1])
            self._left[index] = left
        elif kind == "say" or content[0] not in self._notes:  # the workers send the same notes when they load inputs
            self._notes.add(content[0])
            self._progress.say(content[0])

    def end(self, index: int) -> None:
        """Count the epochs of a group that has ended, and were not counted."""
        self._task.advance(self._left[index])
        self._left[index] = 0

"""The progress of a sweep: how many students have ended, and how."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from kdcache.errors import counted
from kdcache.runtime.progress import Progress, Task
from kdcache.train.sweep_groups import Job
from kdcache.train.sweep_results import StudentResult


class Tally:
    """Counts the students that have ended.

    Args:
        waiting: groups of the students to train.
        results: those of all students by run folder; the new ones are added.
        progress: progress reporter.
    """

    def __init__(
        self, waiting: Sequence[Sequence[Job]], results: dict[Path, StudentResult], progress: Progress
    ) -> None:
        self._jobs, self._results, self._progress = [*itertools.chain(*waiting)], results, progress
        self._task: Task | None = None

    @contextmanager
    def task(self) -> Iterator[Task]:
        """Begin the task of training all epochs."""
        with self._progress.task("sweep", sum(job.epochs for job in self._jobs), "epochs") as task:
            self._task = task
            yield task

    def end(self, job: Job, student: StudentResult) -> None:
        """Count a student that has ended during the task."""
        self._results[job.folder] = student
        if self._task is not None:
            ended = sum(each.folder in self._results for each in self._jobs)
            self._task.advance(0, f"{ended} of {counted(len(self._jobs), 'student')}, {job.name}: {_outcome(student)}")


def _outcome(student: StudentResult) -> str:
    """Return how a student has ended, in a few words."""
    if student.failed is not None:
        return "failed"
    if student.test is not None:
        return f"{student.test:.1%}"
    return "trained" if student.held_out is None else f"held-out loss {student.held_out:.4g}"

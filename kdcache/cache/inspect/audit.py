"""Check a cache's files and rows as far as possible without its dataset and teacher (`kdcache verify`)."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch

from kdcache.cache.format import store_files, zarr_store
from kdcache.cache.format.integrity import NOT_LISTED, check_inputs, check_samples, check_shard_rows, unlisted_files
from kdcache.cache.format.read_records import read_commit, read_manifest, read_plan
from kdcache.cache.format.row_axes import axis_of
from kdcache.cache.format.schema import MANIFEST, PLAN, FileRecord, Plan, commit_file
from kdcache.cache.format.verified_files import AGAIN, Problem, damaged_files
from kdcache.cache.inspect.stated_figures import check_fidelity, check_summary
from kdcache.cache.parallel import of_shard, over
from kdcache.cache.reader import refusal
from kdcache.cache.remote.mirror import files_of, missing_views, views_here
from kdcache.cache.summary import ShardStatistics, shard_statistics
from kdcache.errors import CorruptError, IncompleteError, KdcacheError, counted

_MAX_SHOWN = 3
"""Problems listed in an error message."""


@dataclass(frozen=True)
class Audit:
    """The result of checking every file and every row of a cache.

    Attributes:
        path: folder of the cache.
        digest: its root digest; None if it is not sealed.
        files: number of files that were read.
        rows: number of rows that were checked.
        problems: problems found.
        incomplete: error that says why the cache cannot be used yet; None if it is complete.
        system_files: files such as `.DS_Store`, which a system added and nothing reads.
    """

    path: Path
    digest: str | None
    files: int
    rows: int
    problems: list[Problem] = field(default_factory=list)
    incomplete: IncompleteError | None = None
    system_files: list[str] = field(default_factory=list)

    @property
    def failure(self) -> KdcacheError | None:
        """Return the error, with its exit code, for what is wrong; None for a complete cache without problems."""
        if not self.problems:
            return self.incomplete
        first = "\n  ".join(map(str, self.problems[:_MAX_SHOWN]))
        more = len(self.problems) - _MAX_SHOWN
        if all(problem.what == NOT_LISTED for problem in self.problems):
            fix = "delete these files only; they do not belong to the cache, and no digest covers them"
        elif self.digest is None:
            fix = "run its `kdcache dump-teacher` command again: it writes damaged shards again"
        else:
            fix = AGAIN
        return CorruptError(
            f"{self.path} is damaged:\n  {first}" + (f"\n  and {counted(more, 'more problem')}" if more > 0 else ""),
            fix,
        )


def audit(path: Path) -> Audit:
    """Read every file of a cache and check every row.

    Of an unsealed cache, the finished shards are checked.

    Raises:
        UsageError: if `path` is not a cache.
        CorruptError: if manifest, plan or a commit marker differs from what was written, so that nothing else can be
            trusted.
    """
    if (path / MANIFEST).is_file():
        manifest = read_manifest(path / MANIFEST)
        plan, files = manifest.plan, manifest.files
        store_files.check_listed(path, plan, {name: record.size for name, record in files.items()})
        views = views_here(path, plan)
        present = files_of(manifest, views)
        unlisted, system_files = unlisted_files(path, files)
        damaged = damaged_files(path, present) + unlisted
        shards = [(view, shard) for view in views for shard in range(plan.shards)]
        problems, rows, statistics = _check_contents(path, plan, shards, damaged)
        if not damaged + problems:
            problems = check_inputs(path, plan, views) + check_fidelity(path, plan, 0 in views)
            if len(views) == plan.views.count:
                problems += check_summary(manifest.summary, statistics, plan)
        what = missing_views(path, plan.views.count, views)
        incomplete = (
            IncompleteError(what, f"download them: kdcache pull URL {path}; or use these views only") if what else None
        )
        return Audit(path, manifest.digest, len(present) + 1, rows, damaged + problems, incomplete, system_files)
    unsealed = refusal(path)
    if not isinstance(unsealed, IncompleteError):
        raise unsealed
    plan = read_plan(path / PLAN)
    written: dict[str, FileRecord] = {}
    markers: list[Problem] = []
    committed = []
    for view in range(plan.views.count):
        for shard in range(plan.shards):
            if (path / (marker := commit_file(view, shard))).is_file():
                listed = read_commit(path / marker).files
                # No digest covers a marker yet: it may list fewer files than its shard, or files outside the cache.
                if sorted(listed) == sorted(store_files.shard_files(plan, view, shard)):
                    written |= listed
                    committed.append((view, shard))
                else:
                    markers.append(Problem(marker, "does not list the files of its shard"))
    damaged = markers + damaged_files(path, written)
    problems, rows, _ = _check_contents(path, plan, committed, damaged)
    return Audit(path, None, len(written) + len(committed) + len(markers) + 1, rows, damaged + problems, unsealed)


def _check_contents(
    path: Path, plan: Plan, shards: list[tuple[int, int]], damaged: list[Problem]
) -> tuple[list[Problem], int, list[ShardStatistics]]:
    """Return problems in the contents of undamaged files, the number of rows that were checked, and statistics."""
    names = {problem.where for problem in damaged}
    if not names.isdisjoint(store_files.common_files(plan)):
        return [], 0, []
    intact = [(view, shard) for view, shard in shards if names.isdisjoint(store_files.shard_files(plan, view, shard))]
    axis = axis_of(plan, plan.output_names[0])
    count = sum(axis.rows_of(shard) for _, shard in intact)
    if problems := check_samples(path, plan):
        return problems, count, []
    labels = torch.from_numpy(zarr_store.read_samples(path, plan)[0].astype(np.int64))
    parts = over(_check_shard, [(path, plan, view, shard, labels) for view, shard in intact])
    return [problem for part, _ in parts for problem in part], count, [of for _, of in parts if of is not None]


def _check_shard(
    cache: Path, plan: Plan, view: int, shard: int, labels: torch.Tensor
) -> tuple[list[Problem], ShardStatistics | None]:
    """Return the problems in the rows of a shard, and their statistics if there are none."""
    problems, rows = check_shard_rows(cache, plan, view, shard, labels)
    if problems or rows is None:
        return problems, None
    return [], shard_statistics(rows, of_shard(labels, plan, shard), plan.encoding)

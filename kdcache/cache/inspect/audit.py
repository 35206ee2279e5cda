"""Everything that can be known of a cache's health without its data set and its teacher."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch

from kdcache.cache.format import array_specs, zarr_store
from kdcache.cache.format.integrity import (
    NOT_LISTED,
    Problem,
    check_inputs,
    check_samples,
    check_shard_rows,
    damaged_files,
    strangers,
)
from kdcache.cache.format.read_records import read_commit, read_manifest, read_plan
from kdcache.cache.format.schema import MANIFEST, PLAN, FileRecord, Plan, commit_file
from kdcache.cache.parallel import over
from kdcache.cache.reader import refusal
from kdcache.cache.remote.mirror import files_of, views_here
from kdcache.errors import CorruptError, IncompleteError, KdcacheError

_SHOWN = 3


@dataclass(frozen=True)
class Audit:
    """What a check of every file and every row of a cache has found.

    Attributes:
        path: of the cache.
        digest: its root digest; None where it is not sealed.
        files: how many were read.
        rows: how many were looked at.
        findings: what cannot be right.
        incomplete: why it cannot be used yet, whatever was found.
    """

    path: Path
    digest: str | None
    files: int
    rows: int
    findings: list[Problem] = field(default_factory=list)
    incomplete: IncompleteError | None = None

    @property
    def failure(self) -> KdcacheError | None:
        """What it comes to: None for a whole cache, else an error with its exit code."""
        if not self.findings:
            return self.incomplete
        first = "\n  ".join(map(str, self.findings[:_SHOWN]))
        more = len(self.findings) - _SHOWN
        if all(finding.what == NOT_LISTED for finding in self.findings):
            fix = "delete them, nothing of the cache; no digest covers them"
        elif self.digest is None:
            fix = "run its `kdcache dump-teacher` command again: it makes damaged shards anew"
        else:
            fix = array_specs.AGAIN
        return CorruptError(
            f"{self.path} is damaged:\n  {first}" + (f"\n  and {more} more findings" if more > 0 else ""), fix
        )


def audit(path: Path) -> Audit:
    """Read every file of a cache and look at every row.

    An unsealed cache is checked as far as it is written.

    Raises:
        UsageError: if there is no cache at `path`.
        CorruptError: if the manifest, the plan or a marker is not as it was written: nothing else can be trusted then.
    """
    if (path / MANIFEST).is_file():
        manifest = read_manifest(path / MANIFEST)
        plan, files = manifest.plan, manifest.files
        array_specs.check_listed(path, plan, {name: record.size for name, record in files.items()})
        views = views_here(path, plan)
        here = files_of(manifest, views)
        findings = damaged_files(path, here) + strangers(path, files)
        shards = [(view, shard) for view in views for shard in range(plan.shards)]
        found, rows = _contents(path, plan, shards, findings)
        if not findings + found:
            found = check_inputs(path, plan, views)
        return Audit(path, manifest.digest, len(here) + 1, rows, findings + found, _partial(path, plan, views))
    incomplete = refusal(path)
    if not isinstance(incomplete, IncompleteError):
        raise incomplete
    plan = read_plan(path / PLAN)
    written: dict[str, FileRecord] = {}
    markers: list[Problem] = []
    committed = []
    for view in range(plan.views.count):
        for shard in range(plan.shards):
            if (path / (marker := commit_file(view, shard))).is_file():
                listed = read_commit(path / marker).files
                # Nothing else covers a marker yet: it may list less than its shard, or files outside of the cache.
                if sorted(listed) == sorted(array_specs.shard_files(plan, view, shard)):
                    written |= listed
                    committed.append((view, shard))
                else:
                    markers.append(Problem(marker, "lists other files than those of its shard"))
    findings = markers + damaged_files(path, written)
    found, rows = _contents(path, plan, committed, findings)
    return Audit(path, None, len(written) + len(committed) + len(markers) + 1, rows, findings + found, incomplete)


def _partial(path: Path, plan: Plan, views: tuple[int, ...]) -> IncompleteError | None:
    """What is to be said of a cache of which only some views were pulled."""
    if len(views) == plan.views.count:
        return None
    return IncompleteError(
        f"{path} holds only {len(views)} of {plan.views.count} views: {', '.join(map(str, views))}",
        "pull the others with `kdcache pull URL DIR`; students can be trained from those that are there",
    )


def _contents(
    path: Path, plan: Plan, shards: list[tuple[int, int]], damaged: list[Problem]
) -> tuple[list[Problem], int]:
    """What is wrong in the contents of files that are as they were written, and how many rows were looked at."""
    names = {finding.where for finding in damaged}
    if not names.isdisjoint(array_specs.common_files(plan)):
        return [], 0
    whole = [(view, shard) for view, shard in shards if names.isdisjoint(array_specs.shard_files(plan, view, shard))]
    found = check_samples(path, plan)
    if not found:
        found = check_rows(path, plan, whole)
    return found, sum(len(plan.shard_ids(shard)) for _, shard in whole)


def check_rows(cache: Path, plan: Plan, shards: list[tuple[int, int]]) -> list[Problem]:
    """What cannot be right in the rows of some (view, shard) of a cache."""
    labels = torch.from_numpy(zarr_store.read_samples(cache, plan)[0].astype(np.int64))
    found = over(check_shard_rows, [(cache, plan, view, shard, labels) for view, shard in shards])
    return [finding for part in found for finding in part]

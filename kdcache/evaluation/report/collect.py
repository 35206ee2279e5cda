"""What can be found out about finished runs beside one another, and beside the teacher of a cache."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from kdcache.cache.planner import pilot_ids
from kdcache.cache.reader import Cache
from kdcache.data.alignment import Shared, shared
from kdcache.data.datasets import load_split
from kdcache.data.samples import Samples
from kdcache.data.views import View
from kdcache.errors import MismatchError, UsageError
from kdcache.evaluation.metrics import Reliability, reliability
from kdcache.evaluation.networks import NetworkRef
from kdcache.evaluation.report.teacher_stats import Predictions, TeacherStats, study
from kdcache.evaluation.runs import Group, Mean, RunRecord, find_runs, group_runs, read_run
from kdcache.evaluation.scorecard import logits_of, same_split
from kdcache.models.checks import try_network
from kdcache.runtime.progress import Progress, Silent

_OTHER = 0.005
"""Accuracies on the test split that differ by more are not of the same network on the same images."""


class OnTest(NamedTuple):
    """A network on the labeled test images: by confidence, and by class ([C] int64 each)."""

    calibration: Reliability
    rows: Tensor
    correct: Tensor


@dataclass(frozen=True)
class ReportData:
    """All that a report shows.

    Attributes:
        dataset: its name.
        class_names: where they are known; empty without a cache and without the data set.
        runs: in the order in which they were given.
        groups: the same, put together over seeds.
        tests: by run; empty where there is no test split at hand.
        taught: None without a cache.
        notes: what a reader must know: what is left out, and why.
    """

    dataset: str
    class_names: tuple[str, ...]
    runs: list[RunRecord]
    groups: list[Group]
    tests: list[OnTest]
    taught: TeacherStats | None
    notes: list[str]

    def members(self, group: Group) -> list[RunRecord]:
        """The runs of a group."""
        return [self.runs[place] for place in group.members]

    @property
    def students(self) -> list[Group]:
        """The groups of students."""
        return [group for group in self.groups if group.network == "student"]

    def calibration(self, group: Group) -> Reliability:
        """Of all test images that the networks of a group were shown."""
        each = [self.tests[place].calibration for place in group.members]
        return Reliability(*(torch.stack(values).sum(dim=0) for values in zip(*each, strict=True)))

    def by_class(self, group: Group) -> Tensor:
        """Accuracy of each class on the test split, [C] float64, over all seeds; NaN where it has no image."""
        each = [self.tests[place] for place in group.members]
        return sum(test.correct for test in each).double() / sum(test.rows for test in each)  # type: ignore[union-attr]  # of tensors, and there is at least one

    def means(self, group: Group) -> dict[str, Mean | None]:
        """The table's figures of a group: accuracies and calibration error in [0, 1], nats, seconds."""
        runs = self.members(group)
        return {
            "test": Mean.of(run.accuracy for run in runs),
            "validation": Mean.of(run.validation for run in runs),
            "negative_log_likelihood": Mean.of(run.loss for run in runs),
            "calibration_error": Mean.of(self.tests[place].calibration.error for place in group.members)
            if self.tests
            else None,
            "seconds": Mean.of(run.seconds for run in runs),
        }

    def as_record(self) -> dict[str, Any]:
        """The figures of the table, of KA and of the cost, for programs."""
        taught = self.taught
        groups = [
            {
                "group": group.label,
                "network": group.network,
                "model": group.model,
                "loss": group.loss or None,
                "differences": group.differences,
                "runs": [run.trained.name for run in self.members(group)],
                "seeds": [run.seed for run in self.members(group)],
                **{name: mean and mean._asdict() for name, mean in self.means(group).items()},
            }
            for group in self.groups
        ]
        return {
            "dataset": self.dataset,
            "groups": groups,
            "cache": taught and taught.digest,
            "changed_by_ka": int(taught.wrong.sum()) if taught else None,
            "cost": taught and taught.cost._asdict(),
            "notes": self.notes,
        }


def collect(
    paths: Sequence[Path],
    cache: Cache | None = None,
    *,
    rows: int = 4096,
    device: torch.device | str = "cpu",
    progress: Progress | None = None,
) -> ReportData:
    """Look at runs, and at the teacher of a cache.

    Args:
        paths: run folders, or folders of sweeps.
        cache: of a teacher of the same data set.
        rows: how many of its samples the networks are shown.
        device: where the networks run.
        progress: who is told how it goes.

    Raises:
        MismatchError: if the runs, or the cache, are of different data sets.
        KdcacheError: if a folder is no run, or a network does not fit.
    """
    progress = progress or Silent()
    folders, unfinished = find_runs(paths)
    notes = [f"{folder} is not finished, and left out." for folder in unfinished]
    runs = [read_run(folder) for folder in folders]
    test = _test_split(runs, notes)
    taught = _cached_images(runs, cache, notes, progress) if cache is not None else None
    seen = taught.view if taught else None
    places = pilot_ids(len(taught.view if taught else cache), rows) if cache is not None else []
    looked = []
    if test is not None or seen is not None:
        with progress.task("networks", len(runs), "networks") as task:
            for run in runs:
                looked.append(_look(run.trained, test, seen, places, device))
                task.advance(1, run.trained.name)
    tests = [found for found, _ in looked if found is not None]
    if test is not None:
        notes += [_drift(run, found) for run, found in zip(runs, tests, strict=True) if _drift(run, found)]
    networks = [says for _, says in looked if says is not None]
    known = test or (seen.samples if seen else None)
    return ReportData(
        runs[0].pipeline.dataset.name,
        known.class_names if known else cache.manifest.plan.dataset.class_names if cache else (),
        runs,
        group_runs(runs),
        tests,
        study(cache, taught, places, networks, runs) if cache is not None else None,
        notes,
    )


def _test_split(runs: Sequence[RunRecord], notes: list[str]) -> Samples | None:
    specs = [run.pipeline.dataset for run in runs]
    try:
        samples = same_split(specs, "test")
    except UsageError as error:
        # What cannot be loaded can only be compared by what it is called.
        if odd := next((run for run in runs if run.pipeline.dataset != specs[0]), None):
            raise MismatchError(
                f"{error.what}, and {runs[0].trained.name} and {odd.trained.name} name different data sets",
                "report on the runs of one data set at a time",
            ) from None
        notes.append(f"There is no test split to look at ({error.what}): what needs one is left out.")
        return None
    if not (samples.labels >= 0).any():
        notes.append("No test image has a label: what needs labels is left out.")
        return None
    return samples


def _cached_images(runs: Sequence[RunRecord], cache: Cache, notes: list[str], progress: Progress) -> Shared | None:
    digest = cache.manifest.digest
    others = [run for run in runs if run.uses_teacher and digest not in run.caches]
    if others:
        notes.append(f"{len(others)} of the students, {others[0].trained.name} first, learned from another cache.")
    try:
        samples = load_split(runs[0].pipeline.dataset, "train")
    except UsageError as error:
        if all(digest not in run.caches for run in runs):
            raise MismatchError(
                f"{error.what}, and none of the runs says that it learned from {cache.path}",
                "give the cache that they learned from, or bring the data set",
            ) from None
        notes.append(f"The images of the cache are not at hand ({error.what}): no student is shown them.")
        return None
    images = shared(cache, samples, progress)
    if images.note:
        notes.append(f"{images.note}: the networks are shown what both have.")
    return images


def _drift(run: RunRecord, found: OnTest) -> str:
    """A warning, if a network is not as good as it was when it was trained."""
    now = int(found.correct.sum()) / int(found.rows.sum())
    if run.accuracy is None or abs(now - run.accuracy) <= _OTHER:
        return ""
    return (
        f"{run.trained.name} had a test accuracy of {run.accuracy:.2%} when it was trained, and has {now:.2%} here: "
        "the images, the transform or the libraries are others. Figures by class and calibration are those of here."
    )


def _look(
    trained: NetworkRef,
    test: Samples | None,
    seen: View | None,
    places: list[int],
    device: torch.device | str,
) -> tuple[OnTest | None, Predictions | None]:
    """A network on the labeled test images, and on samples of a cache as its teacher saw them."""
    samples = test or (seen.samples if seen else None)
    assert samples is not None, "a network is loaded for something"  # noqa: S101
    model, view = trained.load(samples)
    try_network(model, view, "cpu", f"network {trained.name}")
    model.to(device).eval()
    on_test = _on_test(trained, model, view, device) if test is not None else None
    if seen is None:
        return on_test, None
    return on_test, Predictions.of(logits_of(trained, model, trained.view_for_comparison(seen), places, device))


def _on_test(trained: NetworkRef, model: nn.Module, view: View, device: torch.device | str) -> OnTest:
    labeled = (view.labels >= 0).nonzero().squeeze(1)
    logits, labels = logits_of(trained, model, view, labeled.tolist(), device), view.labels[labeled]
    classes = view.samples.num_classes
    right = labels[logits.argmax(dim=1) == labels]
    return OnTest(
        reliability(logits, labels),
        torch.bincount(labels, minlength=classes),
        torch.bincount(right, minlength=classes),
    )

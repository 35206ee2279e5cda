"""The data of a report: finished runs side by side, and compared with the teacher of a cache."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from kdcache.cache.inspect.outputs import described_outputs
from kdcache.cache.planner import pilot_ids
from kdcache.cache.reader import Cache
from kdcache.data.alignment import MatchedSamples, match_samples
from kdcache.data.datasets import load_split
from kdcache.data.samples import Samples
from kdcache.data.views import View
from kdcache.errors import MismatchError, UsageError
from kdcache.evaluation.exposure import Exposures
from kdcache.evaluation.metrics import Reliability, reliability
from kdcache.evaluation.networks import NetworkRef
from kdcache.evaluation.report.teacher_stats import Predictions, TeacherStats, teacher_stats
from kdcache.evaluation.runs import Group, Mean, RunRecord, find_runs, group_runs, read_run, without_copies
from kdcache.evaluation.scorecard import logits_of, same_split
from kdcache.models.checks import try_network
from kdcache.runtime.progress import Progress, Silent

_TOLERANCE = 0.005
"""Test accuracies of one network that differ by more are reported as a change of images, transform or libraries."""


class HeldOutResult(NamedTuple):
    """A network on the labeled test images.

    Attributes:
        calibration: its reliability diagram.
        rows: [C] int64, images per class.
        correct: [C] int64, correctly classified images per class.
    """

    calibration: Reliability
    rows: Tensor
    correct: Tensor


@dataclass(frozen=True)
class ReportData:
    """Everything that a report shows.

    Attributes:
        dataset: name of the data set.
        class_names: names of the classes; empty if neither the cache nor the data set is available.
        runs: in the order in which they were passed.
        groups: the runs grouped over seeds.
        tests: test results by run; empty if no test split is available.
        teacher: statistics of the teacher; None without a cache.
        notes: what is left out, and why.
        outputs: outputs of the teacher in the cache beside its class logits, in words.
        exposures: of canaries; None if none are given.
    """

    dataset: str
    class_names: tuple[str, ...]
    runs: list[RunRecord]
    groups: list[Group]
    tests: list[HeldOutResult]
    teacher: TeacherStats | None
    notes: list[str]
    outputs: dict[str, str] = field(default_factory=dict)
    exposures: Exposures | None = None

    def members(self, group: Group) -> list[RunRecord]:
        """Return the runs of a group."""
        return [self.runs[index] for index in group.members]

    @property
    def students(self) -> list[Group]:
        """The groups of students."""
        return [group for group in self.groups if group.network == "student"]

    def calibration(self, group: Group) -> Reliability:
        """Return the reliability diagram of a group, over all seeds."""
        members = [self.tests[index].calibration for index in group.members]
        return Reliability(*(torch.stack(values).sum(dim=0) for values in zip(*members, strict=True)))

    def by_class(self, group: Group) -> Tensor:
        """Return the test accuracy per class, [C] float64, over all seeds; NaN for a class without images."""
        correct = torch.stack([self.tests[index].correct for index in group.members]).sum(dim=0)
        rows = torch.stack([self.tests[index].rows for index in group.members]).sum(dim=0)
        return correct.double() / rows

    def means(self, group: Group) -> dict[str, Mean | None]:
        """Return the means of a group: accuracies and calibration error in [0, 1], likelihood in nats, seconds."""
        runs = self.members(group)
        return {
            "test": Mean.of(run.accuracy for run in runs),
            "validation": Mean.of(run.validation for run in runs),
            "negative_log_likelihood": Mean.of(run.loss for run in runs),
            "calibration_error": Mean.of(self.tests[index].calibration.error for index in group.members)
            if self.tests
            else None,
            "seconds": Mean.of(run.seconds for run in runs),
        }

    def as_record(self) -> dict[str, Any]:
        """Return the means of all groups, the rows changed by KA and the cost, for JSON."""
        teacher = self.teacher
        groups = [group.as_record(self.members(group), self.means(group)) for group in self.groups]
        return {
            "dataset": self.dataset,
            "groups": groups,
            "cache": teacher and teacher.digest,
            "changed_by_ka": int(teacher.wrong.sum()) if teacher else None,
            "cost": teacher and teacher.cost._asdict(),
            "outputs": self.outputs,
            "notes": self.notes,
            **({"exposures": self.exposures.as_record()} if self.exposures else {}),
        }


def collect(
    paths: Sequence[Path],
    cache: Cache | None = None,
    *,
    rows: int = 4096,
    device: torch.device | str = "cpu",
    progress: Progress | None = None,
) -> ReportData:
    """Read runs, run their networks, and compare them with the teacher of a cache.

    Args:
        paths: run folders, or folders of sweeps.
        cache: of a teacher of the same data set.
        rows: number of its samples that the networks are run on.
        device: device of the networks.
        progress: progress reporter; silent if None.

    Raises:
        MismatchError: if the runs, or the runs and the cache, have different data sets.
        KdcacheError: if a folder is not a run, or the weights of a network do not fit.
    """
    progress = progress or Silent()
    folders, unfinished = find_runs(paths)
    notes = [f"{folder} is not finished and is left out." for folder in unfinished]
    runs, copies = without_copies([read_run(folder) for folder in folders])
    notes += [f"{copy.network_ref.name} is a copy of {run.network_ref.name} and is left out." for copy, run in copies]
    outputs = described_outputs(cache.manifest.plan.outputs) if cache is not None else {}
    if not _have_class_logits(runs):
        notes.append("The runs have no class logits: sections of class predictions are left out.")
        dataset = runs[0].pipeline.dataset.name
        return ReportData(dataset, (), runs, group_runs(runs), [], None, notes, outputs)
    test = _test_split(runs, notes)
    images = cached_images(runs, cache, notes, progress) if cache is not None else None
    view = images.view if images else None
    indices = pilot_ids(len(images.view if images else cache), rows) if cache is not None else []
    tests: list[HeldOutResult] = []
    predictions: list[Predictions] = []
    if test is not None or view is not None:
        with progress.task("networks", len(runs), "networks") as task:
            for run in runs:
                on_test, on_cache = _run_network(run.network_ref, test, view, indices, device)
                tests += [on_test] if on_test is not None else []
                predictions += [on_cache] if on_cache is not None else []
                task.advance(1, run.network_ref.name)
    if test is not None:
        notes += [note for run, result in zip(runs, tests, strict=True) if (note := _changed_accuracy(run, result))]
    samples = test or (view.samples if view else None)
    return ReportData(
        runs[0].pipeline.dataset.name,
        samples.class_names if samples else cache.manifest.plan.dataset.class_names if cache else (),
        runs,
        group_runs(runs),
        tests,
        teacher_stats(cache, images, indices, predictions, runs) if cache is not None else None,
        notes,
        outputs,
    )


def _have_class_logits(runs: Sequence[RunRecord]) -> bool:
    """Return whether the networks of all runs return class logits.

    Raises:
        UsageError: if only some of them do.
    """
    have, lack = ([run for run in runs if run.has_class_logits is each] for each in (True, False))
    if have and lack:
        raise UsageError(
            f"{lack[0].network_ref.name} was trained without class logits, and {have[0].network_ref.name} with them",
            "report on runs of one kind at a time",
        )
    return bool(have)


def _test_split(runs: Sequence[RunRecord], notes: list[str]) -> Samples | None:
    """Return the test split of all runs; None, with a note, if it is not available or has no labels."""
    samples = shared_test_split(runs, notes)
    if samples is None:
        return None
    if not (samples.labels >= 0).any():
        notes.append("No test image has a label: sections that need labels are left out.")
        return None
    return samples


def shared_test_split(runs: Sequence[RunRecord], notes: list[str]) -> Samples | None:
    """Return the test split of all runs; None, with a note, if it is not available.

    Raises:
        MismatchError: if the runs have different data sets.
    """
    specs = [run.pipeline.dataset for run in runs]
    try:
        return same_split(specs, "test")
    except UsageError as error:
        # Data sets that cannot be loaded can only be compared by their configuration.
        if other := next((run for run in runs if run.pipeline.dataset != specs[0]), None):
            raise MismatchError(
                f"{error.what}, and {runs[0].network_ref.name} and {other.network_ref.name} name different data sets",
                "report on the runs of one data set at a time",
            ) from None
        notes.append(f"The test split is not available ({error.what}): sections that need it are left out.")
        return None


def cached_images(
    runs: Sequence[RunRecord], cache: Cache, notes: list[str], progress: Progress
) -> MatchedSamples | None:
    """Return the images of the cache in the data set of the runs; None, with a note, if it is not available.

    Raises:
        MismatchError: if no sample of the data set is in the cache, or none of the runs was trained from it.
    """
    digest = cache.manifest.digest
    others = [run for run in runs if run.uses_teacher and digest not in run.caches]
    if others:
        notes.append(f"{len(others)} of the students, first {others[0].network_ref.name}, used another cache.")
    try:
        samples = load_split(runs[0].pipeline.dataset, "train")
    except UsageError as error:
        if all(digest not in run.caches for run in runs):
            raise MismatchError(
                f"{error.what}, and none of the runs was trained from {cache.path}",
                "pass the cache that they were trained from, or make the data set available",
            ) from None
        notes.append(f"The images of the cache are not available ({error.what}): the students are not run on them.")
        return None
    images = match_samples(cache, samples, progress)
    if images.note:
        notes.append(f"{images.note}: the networks are run on the samples that both have.")
    return images


def _changed_accuracy(run: RunRecord, result: HeldOutResult) -> str:
    """Return a warning if a network has another test accuracy than after its training."""
    accuracy = int(result.correct.sum()) / int(result.rows.sum())
    if run.accuracy is None or abs(accuracy - run.accuracy) <= _TOLERANCE:
        return ""
    return (
        f"{run.network_ref.name} had a test accuracy of {run.accuracy:.2%} after training and has {accuracy:.2%} now: "
        "the images, the transform or the libraries have changed. Accuracy by class and calibration are those of now."
    )


def _run_network(
    network: NetworkRef,
    test: Samples | None,
    cached: View | None,
    indices: list[int],
    device: torch.device | str,
) -> tuple[HeldOutResult | None, Predictions | None]:
    """Run a network on the labeled test images, and on samples of a cache as its teacher saw them."""
    samples = test or (cached.samples if cached else None)
    assert samples is not None, "there are images to run the network on"  # noqa: S101
    model, view = network.load(samples)
    try_network(model, view, "cpu", f"network {network.name}")
    model.to(device).eval()
    on_test = _test_result(network, model, view, device) if test is not None else None
    if cached is None:
        return on_test, None
    return on_test, Predictions.of(logits_of(network, model, network.view_for_comparison(cached), indices, device))


def _test_result(network: NetworkRef, model: nn.Module, view: View, device: torch.device | str) -> HeldOutResult:
    labeled = (view.labels >= 0).nonzero().squeeze(1)
    logits, labels = logits_of(network, model, view, labeled.tolist(), device), view.labels[labeled]
    classes = view.samples.num_classes
    correct = labels[logits.argmax(dim=1) == labels]
    return HeldOutResult(
        reliability(logits, labels),
        torch.bincount(labels, minlength=classes),
        torch.bincount(correct, minlength=classes),
    )

"""The report of networks that say a class of every pixel: tables over seeds, learning curves, classes and pictures."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kdcache.cache.reader import Cache
from kdcache.data.samples import Samples
from kdcache.errors import counted
from kdcache.evaluation.pixel_runs import PixelRun, read_pixel_run
from kdcache.evaluation.pixel_scorecard import ComparedImages, PlaceAgreement, place_agreement
from kdcache.evaluation.report.charts import Line, draw_classes, draw_lines
from kdcache.evaluation.report.collect import cached_images, shared_test_split
from kdcache.evaluation.report.html import GroupLabel, Heading, Paragraph, Part, Pictures, Table, render
from kdcache.evaluation.report.map_charts import MapPicture, draw_maps
from kdcache.evaluation.report.pixel_pictures import PicturedImages
from kdcache.evaluation.report.sections import Report, figure, table_of_classes
from kdcache.evaluation.runs import Group, Mean, group_runs, without_copies
from kdcache.models.checks import set_evaluation_mode, try_network
from kdcache.runtime.progress import Progress, Silent

_PICTURES = 4
"""Images that are shown."""

_NETWORKS = 6
"""Groups whose maps are shown at most."""


@dataclass(frozen=True)
class PixelReportData:
    """Everything that a report of networks of pixels shows.

    Attributes:
        dataset: name of the data set.
        class_names: names of the classes.
        runs: in the order in which they were passed.
        groups: the runs grouped over seeds.
        agreements: of each run with the teacher of the cache; empty without one, or if its images are not available.
        pictures: of some images.
        cache: the cache; None without one.
        notes: what is left out, and why.
    """

    dataset: str
    class_names: tuple[str, ...]
    runs: list[PixelRun]
    groups: list[Group]
    agreements: list[PlaceAgreement]
    pictures: list[MapPicture]
    cache: Cache | None
    notes: list[str]

    def members(self, group: Group) -> list[PixelRun]:
        """Return the runs of a group."""
        return [self.runs[index] for index in group.members]

    def means(self, group: Group) -> dict[str, Mean | None]:
        """Return the means of a group on the test split, of the validation of its selected epochs, and of seconds."""
        runs = self.members(group)
        tests = [run.test for run in runs if run.test is not None]
        return {
            "mean_iou": Mean.of(test.mean_iou for test in tests),
            "pixel_accuracy": Mean.of(test.accuracy for test in tests),
            "negative_log_likelihood": Mean.of(test.loss for test in tests),
            "validation_mean_iou": Mean.of(run.validation for run in runs),
            "seconds": Mean.of(run.record.seconds for run in runs),
        }

    def iou(self, group: Group) -> list[Mean | None]:
        """Return the mean intersection over union of each class over the runs of a group; None for one that is nowhere.

        Empty without a test split.
        """
        tests = [run.test.iou for run in self.members(group) if run.test is not None]
        return [Mean.of(of_class) for of_class in zip(*tests, strict=True)]

    def agreement(self, group: Group) -> list[PlaceAgreement]:
        """Return the agreement of each run of a group with the teacher; none if it was not measured."""
        return [self.agreements[index] for index in group.members] if self.agreements else []

    def as_record(self) -> dict[str, Any]:
        """Return the means of all groups, for JSON."""
        return {
            "dataset": self.dataset,
            "classes": self.class_names,
            "groups": [
                {
                    **group.as_record([run.record for run in self.members(group)], self.means(group)),
                    "iou": [mean and mean.mean for mean in self.iou(group)],
                    "agreements": [each._asdict() for each in self.agreement(group)],
                }
                for group in self.groups
            ],
            "cache": self.cache.manifest.digest if self.cache is not None else None,
            "notes": self.notes,
        }


def collect_pixels(
    folders: Sequence[Path],
    cache: Cache | None = None,
    *,
    rows: int = 4096,
    device: torch.device | str = "cpu",
    progress: Progress | None = None,
) -> PixelReportData:
    """Read runs, compare their networks with the teacher of a cache, and run them on the images that are shown.

    Args:
        folders: of the runs.
        cache: of a teacher of the same data set.
        rows: number of its images that the networks are run on, at most 512.
        device: device of the networks.
        progress: progress reporter; silent if None.

    Raises:
        MismatchError: if the runs, or the runs and the cache, have different data sets.
        UsageError: if the cache has no map of classes.
        KdcacheError: if a folder is not a run, or the weights of a network do not fit.
    """
    progress = progress or Silent()
    notes: list[str] = []
    read = [read_pixel_run(folder) for folder in folders]
    records, copies = without_copies([run.record for run in read])
    runs = [run for run in read if any(run.record is record for record in records)]
    notes += [f"{copy.network_ref.name} is a copy of {run.network_ref.name} and is left out." for copy, run in copies]
    test = shared_test_split(records, notes)
    found = cached_images(records, cache, notes, progress) if cache is not None else None
    compared = ComparedImages.of(cache, found, rows) if cache is not None and found is not None else None
    groups = group_runs(records)
    agreements, pictures = _run_networks(runs, groups, test, compared, notes, device, progress)
    names = test.class_names if test is not None else records[0].network_ref.class_names or ()
    dataset = records[0].pipeline.dataset.name
    return PixelReportData(dataset, names, runs, groups, agreements, pictures, cache, notes)


def _run_networks(
    runs: Sequence[PixelRun],
    groups: Sequence[Group],
    test: Samples | None,
    compared: ComparedImages | None,
    notes: list[str],
    device: torch.device | str,
    progress: Progress,
) -> tuple[list[PlaceAgreement], list[MapPicture]]:
    """Return the agreement of each run with the teacher, and pictures with the first run of each group."""
    samples = test if compared is None else compared.view.samples
    if samples is None:
        return [], []
    shown = {group.members[0]: group.label for group in groups[:_NETWORKS]}
    if len(groups) > _NETWORKS:
        notes.append(f"The pictures show the first {_NETWORKS} of {len(groups)} groups.")
    pictured = None if compared is None else PicturedImages.of_cache(compared, _PICTURES)
    agreements: list[PlaceAgreement] = []
    said: list[tuple[str, list[Tensor]]] = []
    with progress.task("networks", len(runs), "networks") as task:
        for number, run in enumerate(runs):
            network = run.record.network_ref
            if compared is not None or number in shown:
                model, view = network.load(samples)
                try_network(model, view, "cpu", f"network {network.name}")
                set_evaluation_mode(model.to(device))
                agreements += [] if compared is None else [place_agreement(network, model, compared, device)]
                pictured = pictured or PicturedImages.of_test(view, _PICTURES)
                maps = pictured.said_by(network, model, view, device) if number in shown else None
                if maps is not None:
                    said.append((shown[number] or network.network, maps))
                elif number in shown:
                    notes.append(f"{network.name} sees other sections of the images, and is left out of the pictures.")
            task.advance(1, network.name)
    return agreements, [] if pictured is None else pictured.pictures(said)


def write_pixel_report(data: PixelReportData) -> Report:
    """Write the page, and draw its charts; the same data gives the same bytes."""
    parts = list(_sections(data))
    drawn = [chart for part in parts if isinstance(part, Pictures) for chart in part.charts]
    return Report(render(f"{data.dataset}: {counted(len(data.runs), 'run')}", parts), drawn)


def _sections(data: PixelReportData) -> Iterator[Part]:
    """Yield all parts of the page, with the sections for which there is data."""
    for note in data.notes:
        yield Paragraph(note, "note")
    yield from _over_seeds(data)
    yield from _learning_curves(data)
    yield from _by_class(data)
    if data.agreements:
        yield from _agreement(data)
    if data.pictures:
        yield from _pictures(data)
    if data.cache is None:
        yield Paragraph(
            "The agreement with the teacher and its maps need its cache: kdcache report RUN... --cache NAME.kdcache "
            "-o FILE.html",
            "faint",
        )
    else:
        yield Paragraph(f"Digest of the cache: {data.cache.manifest.digest}.", "faint")


def _over_seeds(data: PixelReportData) -> Iterator[Part]:
    """Yield the table of all groups."""
    yield Heading("Over seeds")
    rows = []
    for group in data.groups:
        means = data.means(group)
        rows.append(
            (
                GroupLabel.of(group),
                str(len(group.members)),
                figure(means["mean_iou"], ".2f", 100),
                figure(means["validation_mean_iou"], ".2f", 100),
                figure(means["pixel_accuracy"], ".2f", 100),
                figure(means["negative_log_likelihood"], ".4f"),
                figure(means["seconds"], ".1f"),
            )
        )
    columns = ["", "runs", "test mIoU, %", "validation mIoU, %", "pixel accuracy, %", "NLL, nats", "training, s"]
    yield Table(columns, rows)
    yield Paragraph(
        "Mean, and standard deviation (n - 1) for more than one run. mIoU: mean over the classes of intersection / "
        "union of the labeled pixels of the whole split. Pixel accuracy and NLL, the negative log-likelihood of a "
        "pixel, are of the test split. Use the validation mIoU to choose between groups.",
        "faint",
    )


def _learning_curves(data: PixelReportData) -> Iterator[Part]:
    """Yield losses and validation scores over the epochs."""
    yield Heading("Learning curves")
    yield Paragraph("One line per run.", "faint")
    lines = [Line(group.index, group.label, run.record.rows) for group in data.groups for run in data.members(group)]
    yield Pictures.of(
        [
            draw_lines(lines, {"loss": "-"}, "loss", "training loss, nats"),
            draw_lines(lines, {"validation_mean_iou": "-"}, "validation-mean-iou", "validation mIoU, %", 100),
            draw_lines(lines, {"validation_accuracy": "-"}, "validation-accuracy", "validation pixel accuracy, %", 100),
            draw_lines(lines, {"validation_loss": "-"}, "validation-loss", "validation loss, nats"),
        ]
    )


def _by_class(data: PixelReportData) -> Iterator[Part]:
    """Yield the intersection over union of each class."""
    of_groups = [(group, iou) for group in data.groups if (iou := data.iou(group))]
    if not of_groups:
        return
    yield Heading("Intersection over union by class")
    yield Paragraph("On the test split, mean over the seeds.")
    values = [_as_tensor([mean and mean.mean for mean in iou]) for _, iou in of_groups]
    columns = [GroupLabel.of(group) for group, _ in of_groups]
    yield from table_of_classes(columns, values, values, data.class_names, "IoU")
    lines = [(group.index, group.label, each) for (group, _), each in zip(of_groups, values, strict=True)]
    yield Pictures([draw_classes(lines, data.class_names, "classes", "IoU")])


def _agreement(data: PixelReportData) -> Iterator[Part]:
    """Yield the agreement with the teacher, at its places."""
    yield Heading("Agreement with the teacher")
    images = data.agreements[0].images
    yield Paragraph(
        f"At every place of the teacher's maps of {counted(images, 'cached image')}, view 0, evenly spread over the "
        "data set: share of the places with the same top class, and total variation (TV) between the softmax of "
        "network and teacher at T = 1. Mean over the seeds."
    )
    rows = []
    for group in data.groups:
        found = data.agreement(group)
        same, distance = Mean.of(each.same_class for each in found), Mean.of(each.total_variation for each in found)
        rows.append((GroupLabel.of(group), figure(same, ".2f", 100), figure(distance, ".4f")))
    yield Table(["", "agreement, %", "TV"], rows)
    values = [
        torch.stack([_as_tensor(each.by_class) for each in data.agreement(group)]).nanmean(dim=0)
        for group in data.groups
    ]
    yield Paragraph("The same by the class that the teacher says:")
    columns = [GroupLabel.of(group) for group in data.groups]
    yield from table_of_classes(columns, values, values, data.class_names, "agreement")


def _pictures(data: PixelReportData) -> Iterator[Part]:
    """Yield images with all maps."""
    yield Heading("Pictures")
    of_cache = data.pictures[0].teacher is not None
    which = "cached images as the teacher saw them in view 0" if of_cache else "images of the test split"
    yield Paragraph(
        f"Of {which}, evenly spread and not selected. Maps are enlarged to the image. Of each group the run with the "
        "first seed is shown; where it differs, its class has its color, and light gray is where it does not."
    )
    yield Pictures(
        [draw_maps(each, data.class_names, f"picture-{number:02d}") for number, each in enumerate(data.pictures)]
    )


def _as_tensor(values: Sequence[float | None]) -> Tensor:
    return torch.tensor([math.nan if value is None else value for value in values], dtype=torch.float64)

"""The sections of a report, in text, tables and charts."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from kdcache.errors import counted
from kdcache.evaluation.exposure import COLUMNS, Exposures
from kdcache.evaluation.metrics import BINS
from kdcache.evaluation.report import charts, teacher_sections
from kdcache.evaluation.report.charts import Chart, Line
from kdcache.evaluation.report.collect import ReportData
from kdcache.evaluation.report.html import CLASSES_SHOWN, GroupLabel, Heading, Paragraph, Part, Pictures, Table, render
from kdcache.evaluation.runs import Mean

_ROUNDING = 1e-6
"""Relative change of a mean temperature that rounding alone can make."""


@dataclass(frozen=True)
class Report:
    """A report.

    Attributes:
        html: the HTML file.
        charts: the charts in it.
    """

    html: str
    charts: list[Chart]


def write_report(data: ReportData) -> Report:
    """Write the page, and draw its charts; the same data gives the same bytes."""
    parts = list(_sections(data))
    drawn = [chart for part in parts if isinstance(part, Pictures) for chart in part.charts]
    return Report(render(f"{data.dataset}: {counted(len(data.runs), 'run')}", parts), drawn)


def _sections(data: ReportData) -> Iterator[Part]:
    """Yield all parts of the page, with the sections for which there is data."""
    teacher = data.teacher
    for note in data.notes:
        yield Paragraph(note, "note")
    yield from over_seeds(data)
    yield from learning_curves(data)
    yield from temperatures(data)
    if teacher is not None:
        yield from teacher_sections.sharpness(data, teacher)
        yield from teacher_sections.knowledge_adjustment(data, teacher)
    if data.tests or teacher is not None:
        yield from by_class(data)
    if data.tests:
        yield from calibration(data)
    if teacher is not None:
        yield from teacher_sections.disagreement(data, teacher)
        yield from teacher_sections.hardest(data, teacher)
    if data.exposures is not None:
        yield from canary_exposure(data.exposures)
    yield from cost(data)
    if data.outputs:
        yield Heading("Other outputs of the teacher")
        yield Table(["", "in the cache"], [*data.outputs.items()])
    if teacher is None and data.runs[0].has_class_logits:
        yield Paragraph(
            "Sharpness, the rows changed by KA, the teacher's accuracy by class, disagreement, the hardest samples and "
            "the teacher's forward passes need its cache: kdcache report RUN... --cache NAME.kdcache -o FILE.html",
            "faint",
        )


def canary_exposure(exposures: Exposures) -> Iterator[Part]:
    """Yield the exposure of canaries in networks and cache."""
    yield Heading("Canary exposure")
    yield Paragraph(f"In {exposures.explained} (Carlini et al. 2019).")
    yield Table(["", *COLUMNS], [(one.name, *one.figures) for one in exposures.measured])


def over_seeds(data: ReportData) -> Iterator[Part]:
    """Yield the table of all groups."""
    yield Heading("Over seeds")
    rows = []
    for group in data.groups:
        means = data.means(group)
        rows.append(
            (
                GroupLabel.of(group),
                str(len(group.members)),
                _percent(means["test"]),
                _percent(means["validation"]),
                figure(means["negative_log_likelihood"], ".4f"),
                figure(means["calibration_error"], ".4f"),
                figure(means["seconds"], ".1f"),
            )
        )
    yield Table(["", "runs", "test, %", "validation, %", "NLL, nats", "ECE", "training, s"], rows)
    yield Paragraph(
        "Mean, and standard deviation (n - 1) for more than one run. NLL and ECE: negative log-likelihood and expected "
        f"calibration error ({BINS} bins) on the test split. Use the validation accuracy to choose between groups.",
        "faint",
    )


def learning_curves(data: ReportData) -> Iterator[Part]:
    """Yield losses and validation accuracy over the epochs."""
    yield Heading("Learning curves")
    yield Paragraph("One line per run.", "faint")
    lines, draw = _lines(data), charts.draw_lines
    yield Pictures.of(
        [
            draw(lines, {"loss": "-"}, "loss", "training loss, nats"),
            draw(lines, {"validation_accuracy": "-"}, "validation-accuracy", "validation accuracy, %", 100),
            draw(lines, {"validation_loss": "-"}, "validation-loss", "validation loss"),
        ]
    )


def temperatures(data: ReportData) -> Iterator[Part]:
    """Yield the temperatures over the epochs; nothing if all are constant."""
    if not (lines := [*filter(_changes, _lines(data))]):
        return
    yield Heading("Temperatures over training")
    yield Paragraph(
        "Means over the training images; solid: student, dashed: teacher. DTKD gives the sharper of the two the higher "
        "temperature; equal temperatures mean equal sharpness. Runs with constant temperatures are left out.",
    )
    columns = {"student_temperature": "-", "teacher_temperature": "--"}
    yield Pictures.of([charts.draw_lines(lines, columns, "temperatures", "mean temperature")])


def by_class(data: ReportData) -> Iterator[Part]:
    """Yield the accuracy by class: networks on the test split, the teacher on the cached images."""
    teacher = data.teacher
    lines = [(group, data.by_class(group)) for group in data.groups] if data.tests else []
    drawn: list[tuple[int | None, str, Tensor]] = [(group.index, group.label, accuracy) for group, accuracy in lines]
    columns: list[str | GroupLabel] = [GroupLabel.of(group) for group, _ in lines]
    values = [accuracy for _, accuracy in lines]
    yield Heading("Accuracy by class")
    sources = ["Networks: on the test split, over all seeds."] if lines else []
    if teacher is not None and (teacher.labels >= 0).any():
        of_teacher = teacher.by_class(len(data.class_names))
        drawn.append((None, "teacher, on cached training images", of_teacher))
        columns, values = [*columns, "teacher, cached"], [*values, of_teacher]
        sources.append(
            "Teacher: on the cached images, which are training images, so its accuracy on unseen images may be lower."
        )
    if not values:
        yield Paragraph("No available image has a label.")
        return
    yield Paragraph(" ".join(sources))
    yield from table_of_classes(columns, values, values[: len(lines)] or values, data.class_names, "accuracy")
    yield Pictures([charts.draw_classes(drawn, data.class_names, "classes")])


def table_of_classes(
    columns: Sequence[str | GroupLabel],
    values: Sequence[Tensor],
    ordered_by: Sequence[Tensor],
    names: Sequence[str],
    measure: str,
) -> Iterator[Part]:
    """Yield a table of a share per class: of all classes, or of those with the lowest ones.

    Args:
        columns: heading of each column.
        values: [C] of each column, NaN for a class without any.
        ordered_by: those whose mean decides which classes are shown.
        names: of the classes.
        measure: what is shown.
    """
    mean = torch.stack([*ordered_by]).nanmean(dim=0)
    lowest = [class_ for class_ in mean.argsort(stable=True).tolist() if not mean[class_].isnan()][:CLASSES_SHOWN]
    if len(mean) > CLASSES_SHOWN:
        yield Paragraph(
            f"The table shows the {len(lowest)} of {len(mean):,} classes with the lowest {measure}, lowest first.",
            "faint",
        )
    shown = lowest if len(mean) > CLASSES_SHOWN else sorted(lowest)
    yield Table(
        ["class", *columns],
        [(names[class_], *(_share(float(column[class_])) for column in values)) for class_ in shown],
    )


def calibration(data: ReportData) -> Iterator[Part]:
    """Yield the reliability diagrams."""
    yield Heading("Calibration")
    yield Paragraph(
        f"Reliability diagrams on the test split, over all seeds, with {BINS} bins of confidence. Bars below the "
        "dashed line are overconfident, bars above it underconfident. Gray: share of the images in each bin."
    )
    yield Pictures(
        [
            charts.draw_reliability(data.calibration(group), group.index, group.label, f"reliability-{group.index:02d}")
            for group in data.groups
        ]
    )


def cost(data: ReportData) -> Iterator[Part]:
    """Yield training times, and the forward passes of the teacher."""
    yield Heading("Cost")
    rows: list[tuple[str | GroupLabel, *tuple[str, ...]]] = []
    for group in data.groups:
        seconds = [run.seconds for run in data.members(group)]
        rows.append((GroupLabel.of(group), str(len(seconds)), figure(Mean.of(seconds), ".1f"), f"{sum(seconds):,.1f}"))
    yield Table(["", "runs", "training, s per run", "training, s in total"], rows)
    if (teacher := data.teacher) is None:
        return
    cost = teacher.cost
    passes = [
        ("cache, bytes", f"{cost.cache_bytes:,}"),
        ("teacher forward passes to make the cache", f"{cost.teacher_passes:,}"),
    ]
    if cost.students:
        students = counted(cost.students, "student")
        passes += [
            (f"with a live teacher, for {students}", f"{cost.live_teacher_passes:,}"),
            ("reduction factor", f"{cost.live_teacher_passes / cost.teacher_passes:.1f}"),
        ]
    yield Table(["", "images"], passes)
    yield Paragraph(f"Digest of the cache: {teacher.digest}.", "faint")


def _lines(data: ReportData) -> list[Line]:
    return [Line(group.index, group.label, run.rows) for group in data.groups for run in data.members(group)]


def _changes(line: Line) -> bool:
    """Return whether a temperature changes over the epochs, or differs between student and teacher."""
    values = [
        value
        for key in ("student_temperature", "teacher_temperature")
        for row in line.rows
        if (value := row.get(key)) is not None
    ]
    return bool(values) and max(values) - min(values) > _ROUNDING * abs(max(values))


def figure(mean: Mean | None, form: str, factor: float = 1) -> str:
    """Return a mean with its spread, in a format and times a factor; empty for None."""
    if mean is None:
        return ""
    spread = "" if mean.spread is None else f" ± {factor * mean.spread:{form}}"
    return f"{factor * mean.mean:{form}}{spread}"


def _percent(mean: Mean | None) -> str:
    return figure(mean, ".2f", 100)


def _share(value: float) -> str:
    return "" if value != value else f"{value:.1%}"  # noqa: PLR0124  # NaN: the class has no images

"""The chapters of a report, and the report: what was found, in words, tables and pictures."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from kdcache.evaluation.metrics import BINS
from kdcache.evaluation.report import charts, teacher_sections
from kdcache.evaluation.report.charts import Chart, Line
from kdcache.evaluation.report.collect import ReportData
from kdcache.evaluation.report.html import CLASSES_SHOWN, Part, document, heading, named, paragraph, pictures, table
from kdcache.evaluation.runs import Mean

_STEADY = 1e-6
"""A mean temperature that moves by less, relatively, has moved by rounding alone."""


@dataclass(frozen=True)
class Report:
    """A report.

    Attributes:
        html: the page.
        charts: its pictures.
    """

    html: str
    charts: list[Chart]


def write_report(findings: ReportData) -> Report:
    """The page of what was found, and its pictures; the same findings make the same bytes."""
    drawn: list[Chart] = []
    parts = []
    for part in _chapters(findings):
        if isinstance(part, str):
            parts.append(part)
        else:
            here = [chart for chart in part if chart is not None]
            drawn += here
            parts.append(pictures(here))
    return Report(document(f"{findings.dataset}: {_count(len(findings.runs), 'run')}", parts), drawn)


def _chapters(found: ReportData) -> Iterator[Part]:
    taught = found.taught
    for note in found.notes:
        yield paragraph(note, "note")
    yield from over_seeds(found)
    yield from learning_curves(found)
    yield from temperatures(found)
    if taught is not None:
        yield from teacher_sections.sharpness(found, taught)
        yield from teacher_sections.adjusted(found, taught)
    if found.tests or taught is not None:
        yield from by_class(found)
    if found.tests:
        yield from calibration(found)
    if taught is not None:
        yield from teacher_sections.disagreement(found, taught)
        yield from teacher_sections.hardest(found, taught)
    yield from cost(found)
    if taught is None:
        yield paragraph(
            "Sharpness, what KA changes, the teacher by class, disagreement, the hardest samples and the teacher's "
            "passes need its cache: kdcache report RUN... --cache NAME.kdcache -o FILE.html",
            "faint",
        )


def over_seeds(found: ReportData) -> Iterator[Part]:
    """The table."""
    yield heading("Over seeds")
    rows = []
    for group in found.groups:
        means = found.means(group)
        rows.append(
            [
                named(group),
                str(len(group.members)),
                _percent(means["test"]),
                _percent(means["validation"]),
                _figure(means["negative_log_likelihood"], ".4f"),
                _figure(means["calibration_error"], ".4f"),
                _figure(means["seconds"], ".1f"),
            ]
        )
    yield table(["", "runs", "test, %", "validation, %", "NLL, nats", "ECE", "training, s"], rows)
    yield paragraph(
        "Mean, and standard deviation (n - 1) where there are several runs. NLL and ECE: negative log-likelihood "
        f"and expected calibration error ({BINS} bins) on the test split. Choose by the validation accuracy.",
        "faint",
    )


def learning_curves(found: ReportData) -> Iterator[Part]:
    """Losses and accuracy over the epochs."""
    yield heading("Learning curves")
    yield paragraph("A line a run.", "faint")
    lines, draw = _lines(found), charts.draw_lines
    yield [
        draw(lines, {"loss": "-"}, "loss", "training loss, nats"),
        draw(lines, {"validation_accuracy": "-"}, "validation-accuracy", "validation accuracy, %", 100),
        draw(lines, {"validation_loss": "-"}, "validation-loss", "validation NLL, nats"),
    ]


def temperatures(found: ReportData) -> Iterator[Part]:
    """DTKD's picture; nothing where all temperatures are constant."""
    if not (lines := [*filter(_moves, _lines(found))]):
        return
    yield heading("Temperatures over training")
    yield paragraph(
        "Means over the training images: solid the student's, dashed the teacher's. DTKD softens the sharper of the "
        "two more; where its lines meet, both are equally sharp. Runs with constant temperatures are left out.",
    )
    both = {"student_temperature": "-", "teacher_temperature": "--"}
    yield [charts.draw_lines(lines, both, "temperatures", "mean temperature")]


def by_class(found: ReportData) -> Iterator[Part]:
    """Networks on the test split, and the teacher where it was."""
    taught = found.taught
    lines = [(group, found.by_class(group)) for group in found.groups] if found.tests else []
    drawn: list[tuple[int | None, str, Tensor]] = [(group.number, group.label, accuracy) for group, accuracy in lines]
    columns: list[str] = [named(group) for group, _ in lines]
    values = [accuracy for _, accuracy in lines]
    yield heading("Accuracy by class")
    said = ["Networks: on the test split, over all seeds."] if lines else []
    if taught is not None and (taught.labels >= 0).any():
        of_teacher = taught.by_class(len(found.class_names))
        drawn.append((None, "teacher, on cached training images", of_teacher))
        columns, values = [*columns, "teacher, cached"], [*values, of_teacher]
        said.append(
            "The teacher: on the cached images, which are training images, so that it may be better there than on "
            "any that it has not seen."
        )
    if not values:
        yield paragraph("No image at hand has a label.")
        return
    yield paragraph(" ".join(said))
    mean = torch.stack(values[: len(lines)] or values).nanmean(dim=0)
    worst = [place for place in mean.argsort(stable=True).tolist() if not mean[place].isnan()][:CLASSES_SHOWN]
    if len(mean) > CLASSES_SHOWN:
        yield paragraph(f"The table has the {len(worst)} worst of {len(mean):,} classes, the worst first.", "faint")
    shown = worst if len(mean) > CLASSES_SHOWN else sorted(worst)
    yield table(
        ["class", *columns],
        [[found.class_names[place], *(_share(float(each[place])) for each in values)] for place in shown],
    )
    yield [charts.draw_classes(drawn, found.class_names, "classes")]


def calibration(found: ReportData) -> Iterator[Part]:
    """Reliability diagrams."""
    yield heading("Calibration")
    yield paragraph(
        f"On the test split, over all seeds, in {BINS} bins of confidence: bars on the dashed line are neither too "
        "sure nor too modest. Behind them, the share of the images in each bin."
    )
    yield [
        charts.draw_reliability(found.calibration(group), group.number, group.label, f"reliability-{group.number:02d}")
        for group in found.groups
    ]


def cost(found: ReportData) -> Iterator[Part]:
    """Training, and the teacher's passes."""
    yield heading("Cost")
    yield table(
        ["", "runs", "training, s each", "training, s all"],
        [
            [named(group), str(len(runs)), _figure(Mean.of(run.seconds for run in runs), ".1f"),
             f"{sum(run.seconds for run in runs):,.1f}"]
            for group in found.groups
            for runs in [found.members(group)]
        ],
    )  # fmt: skip
    if (taught := found.taught) is None:
        return
    cost = taught.cost
    rows = [["cache, bytes", f"{cost.bytes:,}"], ["teacher's forward passes, done once", f"{cost.once:,}"]]
    if cost.students:
        learned = f"with a live teacher, for {_count(cost.students, 'student')}"
        rows += [[learned, f"{cost.live:,}"], ["times fewer", f"{cost.live / cost.once:.1f}"]]
    yield table(["", "images"], rows)
    yield paragraph(f"The cache is {taught.digest}.", "faint")


def _lines(found: ReportData) -> list[Line]:
    return [Line(group.number, group.label, run.rows) for group in found.groups for run in found.members(group)]


def _moves(line: Line) -> bool:
    """Whether a temperature changes over the epochs, or is not the other's."""
    each = [
        value
        for key in ("student_temperature", "teacher_temperature")
        for row in line.rows
        if (value := row.get(key)) is not None
    ]
    return bool(each) and max(each) - min(each) > _STEADY * abs(max(each))


def _figure(mean: Mean | None, form: str, factor: float = 1) -> str:
    if mean is None:
        return ""
    spread = "" if mean.spread is None else f" ± {factor * mean.spread:{form}}"
    return f"{factor * mean.mean:{form}}{spread}"


def _percent(mean: Mean | None) -> str:
    return _figure(mean, ".2f", 100)


def _share(value: float) -> str:
    return "" if value != value else f"{value:.1%}"  # noqa: PLR0124  # NaN: there is no image of the class


def _count(number: int, what: str) -> str:
    return f"{number:,} {what}{'' if number == 1 else 's'}"

"""The sections of a report about the teacher of a cache."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from kdcache.evaluation.report import charts
from kdcache.evaluation.report.collect import ReportData
from kdcache.evaluation.report.html import (
    CLASSES_SHOWN,
    GroupLabel,
    Heading,
    Paragraph,
    Part,
    Pictures,
    Sample,
    SampleGrid,
    Table,
)
from kdcache.evaluation.report.teacher_stats import SHARPNESS, TeacherStats

_MOST_CONFUSED = 12


def sharpness(data: ReportData, teacher: TeacherStats) -> Iterator[Part]:
    """Yield the sharpness of students and teacher."""
    yield Heading("Sharpness")
    students = data.students if teacher.networks else []
    of_teacher = {kind: getattr(teacher.predictions, kind)[teacher.ids] for kind in SHARPNESS}
    of_students = [teacher.sharpness(group) for group in students]
    yield Paragraph(
        f"On {len(teacher.ids):,} of the {len(teacher.labels):,} cached images, view 0. Each point is the mean over a "
        "twentieth of them, ordered by the teacher's sharpness. The authors' code of DTKD takes the largest logit as "
        "sharpness, their paper the logsumexp.",
    )
    names: list[str | GroupLabel] = ["teacher", *map(GroupLabel.of, students)]
    yield Table(
        ["", "largest logit", "deviation", "logsumexp", "deviation"],
        [
            (
                name,
                *(
                    f"{value:.3f}"
                    for kind in SHARPNESS
                    for value in (values[kind].mean(), values[kind].std(correction=0))
                ),
            )
            for name, values in zip(names, [of_teacher, *of_students], strict=True)
        ],
    )
    if students:
        pairs = [*zip(students, of_students, strict=True)]
        yield Pictures(
            [
                charts.draw_sharpness(
                    of_teacher[kind],
                    [(group.index, group.label, values[kind]) for group, values in pairs],
                    f"sharpness-{kind}",
                    title,
                )
                for kind, title in zip(SHARPNESS, ("largest logit", "logsumexp"), strict=True)
            ]
        )


def knowledge_adjustment(data: ReportData, teacher: TeacherStats) -> Iterator[Part]:
    """Yield the rows where the teacher is wrong, and the predictions of the students there."""
    yield Heading("Where KA changes the teacher")
    labeled, wrong = int((teacher.labels >= 0).sum()), teacher.wrong
    if not labeled:
        yield Paragraph(
            "The teacher saw mixed images, which have no single label."
            if teacher.mixed
            else "No cached image has a label."
        )
        return
    changed = int(wrong.sum())
    yield Paragraph(
        f"The teacher's top class is not the label in {changed:,} of {labeled:,} labeled rows of view 0 "
        f"({changed / labeled:.2%}). In these rows KA swaps the two, or uses the smoothed label."
    )
    distilled = [run for run in data.runs if run.uses_teacher]
    if any(run.pipeline.section("student").train.labels_per_class is not None for run in distilled):
        yield Paragraph("Students with labels_per_class use fewer labels; KA changes only rows with these.", "faint")
    if not changed:
        return
    compared = int(wrong[teacher.ids].sum())
    if teacher.networks and data.students and compared:
        part = "" if compared == changed else f", on the {compared:,} of them that the students were run on"
        yield Paragraph(f"Predictions of the students in these rows, over all seeds{part}:")
        counts_by_group = [(group, teacher.predictions_where_wrong(group)) for group in data.students]
        yield Table(
            ["", "the label", "the teacher's class", "another class"],
            [
                (GroupLabel.of(group), *(f"{count:,} ({count / sum(counts):.0%})" for count in counts))
                for group, counts in counts_by_group
            ],
        )
        yield Pictures([charts.draw_where_wrong([(group.label, counts) for group, counts in counts_by_group], "ka")])
    yield from _changed_by_class(data, teacher)


def _changed_by_class(data: ReportData, teacher: TeacherStats) -> Iterator[Part]:
    """Yield the table of the rows that KA changes, by class."""
    classes, wrong = len(data.class_names), teacher.wrong
    rows = torch.bincount(teacher.labels.clamp_min(0)[teacher.labels >= 0], minlength=classes)
    counts = torch.bincount(teacher.labels[wrong], minlength=classes)
    order = counts.argsort(descending=True, stable=True)[:CLASSES_SHOWN].tolist()
    shown = [class_ for class_ in order if counts[class_]]
    changed_classes = int((counts > 0).sum())
    part = "" if len(shown) == changed_classes else f", the {len(shown)} of {changed_classes:,} with the most such rows"
    yield Paragraph(f"By class{part}:")
    yield Table(
        ["class", "labeled rows", "changed", "share", "most frequent prediction"],
        [
            (
                data.class_names[class_],
                f"{rows[class_]:,}",
                f"{counts[class_]:,}",
                f"{counts[class_] / rows[class_]:.1%}",
                data.class_names[int(teacher.predictions.top[wrong & (teacher.labels == class_)].mode().values)],
            )
            for class_ in shown
        ],
    )


def disagreement(data: ReportData, teacher: TeacherStats) -> Iterator[Part]:
    """Yield the classes in which students and teacher differ most."""
    students, names = data.students, data.class_names
    if not students or not teacher.networks:
        return
    yield Heading("Where student and teacher disagree")
    counts = [teacher.disagreement(group, len(names)) for group in students]
    different = torch.stack([count - count.diag().diag() for count in counts]).sum(dim=0)
    confused = different.sum(dim=0) + different.sum(dim=1)
    order = [class_ for class_ in confused.argsort(descending=True, stable=True).tolist() if confused[class_]]
    if not order:
        yield Paragraph("They have the same top class for every image.")
        return
    shown = torch.tensor(sorted(order[:_MOST_CONFUSED]))
    part = "" if len(shown) == len(names) else f" The {len(shown)} most confused of {len(names):,} classes."
    yield Paragraph(
        f"Top classes on {len(teacher.ids):,} cached images, number of images over all seeds; columns: student, rows: "
        f"teacher.{part}"
    )
    yield Pictures(
        [
            charts.draw_disagreement(
                count[shown][:, shown],
                [names[class_] for class_ in shown.tolist()],
                group.label,
                f"disagreement-{group.index:02d}",
            )
            for group, count in zip(students, counts, strict=True)
        ]
    )


def hardest(data: ReportData, teacher: TeacherStats) -> Iterator[Part]:
    """Yield the samples with the lowest probability of the label, with their images."""
    if not teacher.hardest:
        return
    names = data.class_names
    yield Heading("Hardest samples")
    yield Paragraph("The cached images to whose label the teacher gives the lowest probability, before any transform.")
    yield SampleGrid(
        [
            Sample(
                sample.picture,
                [
                    f"label {names[sample.label]}",
                    f"teacher {names[sample.top]}" if sample.top != sample.label else "teacher the same",
                    f"log p(label) {sample.log_prob:.2f}",
                    f"sample {sample.id}",
                ],
            )
            for sample in teacher.hardest
        ]
    )

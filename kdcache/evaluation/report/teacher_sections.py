"""The chapters of a report that are about the teacher of a cache."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from kdcache.evaluation.report import charts
from kdcache.evaluation.report.collect import ReportData
from kdcache.evaluation.report.html import CLASSES_SHOWN, Part, heading, named, paragraph, samples, table
from kdcache.evaluation.report.teacher_stats import SHARPNESS, TeacherStats

_MOST_CONFUSED = 12


def sharpness(found: ReportData, taught: TeacherStats) -> Iterator[Part]:
    """Students against the teacher."""
    yield heading("Sharpness")
    students = found.students if taught.networks else []
    of_teacher = {kind: getattr(taught.teacher, kind)[taught.ids] for kind in SHARPNESS}
    of_students = [taught.sharpness(group) for group in students]
    yield paragraph(
        f"On {len(taught.ids):,} of the {len(taught.labels):,} cached images, view 0: each point is the mean over "
        "a twentieth of them, ordered by the teacher's sharpness. The authors of DTKD take the largest logit for "
        "sharpness, their paper the logsumexp.",
    )
    yield table(
        ["", "largest logit", "deviation", "logsumexp", "deviation"],
        [
            [
                name,
                *(
                    f"{value:.3f}"
                    for kind in SHARPNESS
                    for value in (sharp[kind].mean(), sharp[kind].std(correction=0))
                ),
            ]
            for name, sharp in zip(["teacher", *map(named, students)], [of_teacher, *of_students], strict=True)
        ],
    )
    if students:
        numbered = [*zip(students, of_students, strict=True)]
        yield [
            charts.draw_sharpness(
                of_teacher[kind],
                [(group.number, group.label, sharp[kind]) for group, sharp in numbered],
                f"sharpness-{kind}",
                title,
            )
            for kind, title in zip(SHARPNESS, ("largest logit", "logsumexp"), strict=True)
        ]


def adjusted(found: ReportData, taught: TeacherStats) -> Iterator[Part]:
    """Where the teacher is wrong, and what the students say there."""
    yield heading("Where KA changes the teacher")
    known, wrong = int((taught.labels >= 0).sum()), taught.wrong
    if not known:
        yield paragraph(
            "The teacher saw mixed images, which have no one label." if taught.mixed else "No cached image has a label."
        )
        return
    changed = int(wrong.sum())
    yield paragraph(
        f"The teacher's top class is not the label in {changed:,} of {known:,} labeled rows of view 0 "
        f"({changed / known:.2%}). There KA swaps the two, or takes the smoothed label."
    )
    taught_runs = [run for run in found.runs if run.uses_teacher]
    if any(run.pipeline.section("student").train.labels_per_class is not None for run in taught_runs):
        yield paragraph("Students with labels_per_class know fewer labels, and KA acts on those alone.", "faint")
    if not changed:
        return
    here = int(wrong[taught.ids].sum())
    if taught.networks and found.students and here:
        verdicts = [(group, taught.verdicts(group)) for group in found.students]
        yield paragraph(
            "What the students say of these rows, over all seeds"
            f"{'' if here == changed else f', on the {here:,} that are among the images they were shown'}:"
        )
        yield table(
            ["", "the label", "the teacher's class", "another"],
            [
                [named(group), *(f"{count:,} ({count / sum(counts):.0%})" for count in counts)]
                for group, counts in verdicts
            ],
        )
        yield [charts.draw_verdicts([(group.label, counts) for group, counts in verdicts], "ka")]
    classes = len(found.class_names)
    rows = torch.bincount(taught.labels.clamp_min(0)[taught.labels >= 0], minlength=classes)
    counts = torch.bincount(taught.labels[wrong], minlength=classes)
    most = [place for place in counts.argsort(descending=True, stable=True)[:CLASSES_SHOWN].tolist() if counts[place]]
    touched = int((counts > 0).sum())
    those = "" if len(most) == touched else f", the {len(most)} of {touched:,} with most of these rows"
    yield paragraph(f"By class{those}:")
    yield table(
        ["class", "labeled rows", "changed", "share", "most often said instead"],
        [
            [
                found.class_names[place],
                f"{rows[place]:,}",
                f"{counts[place]:,}",
                f"{counts[place] / rows[place]:.1%}",
                found.class_names[int(taught.teacher.top[wrong & (taught.labels == place)].mode().values)],
            ]
            for place in most
        ],
    )


def disagreement(found: ReportData, taught: TeacherStats) -> Iterator[Part]:
    """The most confused classes."""
    students, names = found.students, found.class_names
    if not students or not taught.networks:
        return
    yield heading("Where student and teacher disagree")
    counts = [taught.disagreement(group, len(names)) for group in students]
    apart = sum(count - count.diag().diag() for count in counts)
    confused = torch.as_tensor(apart).sum(dim=0) + torch.as_tensor(apart).sum(dim=1)
    most = [place for place in confused.argsort(descending=True, stable=True).tolist() if confused[place]]
    if not most:
        yield paragraph("They have the same top class everywhere.")
        return
    shown = torch.tensor(sorted(most[:_MOST_CONFUSED]))
    of_all = "" if len(shown) == len(names) else f" The {len(shown)} most confused of {len(names):,} classes."
    yield paragraph(
        f"Top classes on {len(taught.ids):,} cached images, rows over all seeds: across the student's, down the "
        f"teacher's.{of_all}"
    )
    yield [
        charts.draw_disagreement(
            count[shown][:, shown],
            [names[place] for place in shown.tolist()],
            group.label,
            f"disagreement-{group.number:02d}",
        )
        for group, count in zip(students, counts, strict=True)
    ]


def hardest(found: ReportData, taught: TeacherStats) -> Iterator[Part]:
    """With their pictures."""
    if not taught.hardest:
        return
    names = found.class_names
    yield heading("Hardest samples")
    yield paragraph("The cached images whose label the teacher finds least probable, before any transform.")
    yield samples(
        (
            one.picture,
            [
                f"label {names[one.label]}",
                f"teacher {names[one.top]}" if one.top != one.label else "teacher the same",
                f"log p(label) {one.log_prob:.2f}",
                f"sample {one.id}",
            ],
        )
        for one in taught.hardest
    )

"""The report of language models: tables over seeds, learning curves, and what they say of the sequences of a cache."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from kdcache.cache.reader import Cache
from kdcache.errors import UsageError, counted
from kdcache.evaluation.report.charts import Line, draw_lines
from kdcache.evaluation.report.html import GroupLabel, Heading, Paragraph, Part, Pictures, Table, render
from kdcache.evaluation.report.sections import Report, figure
from kdcache.evaluation.runs import Group, Mean, group_settings
from kdcache.evaluation.text_runs import TextRun, read_text_run
from kdcache.evaluation.token_scores import LanguageScore, score_language_models
from kdcache.runtime.progress import Progress, Silent


@dataclass(frozen=True)
class TextReportData:
    """Everything that a report of language models shows.

    Attributes:
        runs: in the order in which they were passed.
        groups: the runs grouped over seeds.
        scores: of each run on the sequences of a cache; empty without one.
        cache: the cache; None without one.
        notes: what is left out, and why.
    """

    runs: list[TextRun]
    groups: list[Group]
    scores: list[LanguageScore]
    cache: Cache | None
    notes: list[str]

    def members(self, group: Group) -> list[TextRun]:
        """Return the runs of a group."""
        return [self.runs[index] for index in group.members]

    def means(self, group: Group) -> dict[str, Mean | None]:
        """Return the means of a group on the sequences that were held out, and of its training times."""
        best = [run.best for run in self.members(group) if run.best is not None]
        found = {
            name: Mean.of(getattr(line, name) for line in best)
            for name in ("held_out_loss", "perplexity", "kl", "agreement")
        }
        return {**found, "seconds": Mean.of(run.seconds for run in self.members(group))}

    def as_record(self) -> dict[str, Any]:
        """Return the means of all groups, and the scores on the cache, for JSON."""
        return {
            "groups": [
                {
                    "group": group.label,
                    "model": group.model,
                    "loss": group.loss,
                    "differences": group.differences,
                    "runs": [run.name for run in self.members(group)],
                    "seeds": [run.seed for run in self.members(group)],
                    **{name: mean and mean._asdict() for name, mean in self.means(group).items()},
                }
                for group in self.groups
            ],
            "cache": self.cache.manifest.digest if self.cache is not None else None,
            "scores": [score._asdict() for score in self.scores],
            "notes": self.notes,
        }


def collect_text(
    folders: Sequence[Path],
    cache: Cache | None = None,
    *,
    rows: int = 4096,
    device: torch.device | str = "cpu",
    progress: Progress | None = None,
) -> TextReportData:
    """Read runs of language models, and measure their networks on the sequences of a cache.

    Args:
        folders: of the runs.
        cache: of sequences; None for what their metrics have.
        rows: largest number of its sequences.
        device: device of the networks.
        progress: progress reporter; silent if None.

    Raises:
        KdcacheError: if a folder is not a run, or a network cannot be loaded.
    """
    runs = [read_text_run(folder) for folder in folders]
    if alone := [run for run in runs if run.pipeline is None]:
        raise UsageError(
            f"{alone[0].name} is a network without a run, and a report is of runs",
            f"measure it with: kdcache evaluate {alone[0].name} --cache CACHE",
        )
    scores = []
    if cache is not None:
        scores = score_language_models(runs, cache, rows=rows, device=device, progress=progress or Silent())
    notes = [f"{run.name} held no sequences out, so its epochs were not measured." for run in runs if not run.held_out]
    return TextReportData(runs, group_settings([run.settings for run in runs]), scores, cache, notes)


def write_text_report(data: TextReportData) -> Report:
    """Write the page, and draw its charts; the same data gives the same bytes."""
    parts = list(_sections(data))
    drawn = [chart for part in parts if isinstance(part, Pictures) for chart in part.charts]
    return Report(render(f"Language models: {counted(len(data.runs), 'run')}", parts), drawn)


def _sections(data: TextReportData) -> Iterator[Part]:
    """Yield all parts of the page, with the sections for which there is data."""
    for note in data.notes:
        yield Paragraph(note, "note")
    yield from _over_seeds(data)
    if data.scores:
        yield from _on_cache(data)
    yield from _learning_curves(data)


def _over_seeds(data: TextReportData) -> Iterator[Part]:
    """Yield the table of all groups."""
    yield Heading("Over seeds")
    rows = []
    for group in data.groups:
        means = data.means(group)
        rows.append(
            (
                GroupLabel.of(group),
                str(len(group.members)),
                figure(means["held_out_loss"], ".4f"),
                figure(means["perplexity"], ".4g"),
                figure(means["kl"], ".4f"),
                figure(means["agreement"], ".2f", 100),
                figure(means["seconds"], ".1f"),
            )
        )
    columns = ["", "runs", "held-out loss", "perplexity", "KL, nats", "agreement, %", "training, s"]
    yield Table(columns, rows)
    yield Paragraph(
        "Mean, and standard deviation (n - 1) for more than one run, of the selected epoch, on the sequences that each "
        "run held out. The loss is that of training, so it is comparable between runs of one loss only. KL: mean "
        "divergence from the teacher at T = 1. Agreement: share of positions with the teacher's most probable token.",
        "faint",
    )


def _on_cache(data: TextReportData) -> Iterator[Part]:
    """Yield the scores of all runs on the same sequences."""
    yield Heading("On the sequences of the cache")
    labels = {index: group for group in data.groups for index in group.members}
    measured = sorted({(score.sequences, score.positions) for score in data.scores})
    if len(measured) == 1:
        ((sequences, positions),) = measured
        what = f"All networks on the same {counted(sequences, 'sequence')} with {positions:,} taught positions."
    else:
        each = "; ".join(f"{positions:,} positions of {counted(count, 'sequence')}" for count, positions in measured)
        what = f"Not all networks on the same positions, so that figures cannot be compared: {each}."
    yield Paragraph(what)
    rows: list[tuple[str | GroupLabel, *tuple[str, ...]]] = []
    for index, (run, score) in enumerate(zip(data.runs, data.scores, strict=True)):
        rows.append(
            (
                GroupLabel.of(labels[index]),
                str(run.seed),
                "" if score.seen == "others" else score.seen,
                f"{score.perplexity:.4g}",
                f"{score.accuracy:.2%}",
                f"{score.calibration_error:.4f}",
                "" if score.kl is None else f"{score.kl:.4f}",
                "" if score.agreement is None else f"{score.agreement:.2%}",
                f"{score.parameters:,}",
            )
        )
    yield Table(["", "seed", "sequences", "perplexity", "top-1", "ECE", "KL, nats", "agreement", "parameters"], rows)
    if data.cache is not None:
        yield Paragraph(f"Digest of the cache: {data.cache.manifest.digest}.", "faint")


def _learning_curves(data: TextReportData) -> Iterator[Part]:
    """Yield losses and measures of held-out sequences over the epochs."""
    yield Heading("Learning curves")
    yield Paragraph("One line per run.", "faint")
    lines = [Line(group.index, group.label, run.rows) for group in data.groups for run in data.members(group)]
    yield Pictures.of(
        [
            draw_lines(lines, {"loss": "-"}, "loss", "training loss, nats"),
            draw_lines(lines, {"held_out_loss": "-"}, "held-out-loss", "held-out loss, nats"),
            draw_lines(lines, {"perplexity": "-"}, "perplexity", "held-out perplexity"),
            draw_lines(lines, {"kl": "-"}, "kl", "held-out KL to the teacher, nats"),
            draw_lines(lines, {"agreement": "-"}, "agreement", "held-out agreement, %", 100),
        ]
    )

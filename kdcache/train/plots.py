"""Plots of a run and of a sweep."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from kdcache.runtime.atomic_write import open_atomic

_DOTS_BELOW = 40

_LONG_NAME = 12


def draw_curves(rows: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Write a PNG of the lines of metrics.csv: losses on the left, accuracy on the right.

    Args:
        rows: `loop.Epoch` as a dict, one per epoch.
        path: of the PNG.
    """
    figure = Figure(figsize=(9, 3.6), layout="constrained")
    FigureCanvasAgg(figure)
    validated = any(row["validation_accuracy"] is not None for row in rows)
    losses, *accuracy = figure.subplots(1, 1 + validated, squeeze=False)[0]
    line = partial(_line, rows)
    line(losses, "loss", "training: total", "C0")
    line(losses, "cross_entropy", "training: labels", "C1")
    line(losses, "distillation", "training: teacher, before warm-up", "C2")
    line(losses, "validation_loss", "validation: labels" if validated else "held-out samples", "C3")
    losses.set_ylabel("loss, nats")
    for axes in accuracy:
        of_pixels = "validation_mean_iou" in rows[0]
        line(axes, "validation_mean_iou" if of_pixels else "validation_accuracy", "validation", "C3", 100)
        axes.set_ylabel("mean IoU, %" if of_pixels else "accuracy, %")
    _finish(figure, [losses, *accuracy], path)


def draw_token_curves(rows: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Write a PNG of the lines of metrics.csv of a language model: losses on the left, perplexity on the right.

    Args:
        rows: `tokens.loop.TokenEpoch` as a dict, one per epoch.
        path: of the PNG.
    """
    figure = Figure(figsize=(9, 3.6), layout="constrained")
    FigureCanvasAgg(figure)
    held_out = any(row["perplexity"] is not None for row in rows)
    losses, *perplexity = figure.subplots(1, 1 + held_out, squeeze=False)[0]
    line = partial(_line, rows)
    line(losses, "loss", "training: total", "C0")
    line(losses, "cross_entropy", "training: next tokens", "C1")
    line(losses, "distillation", "training: teacher, before warm-up", "C2")
    line(losses, "held_out_loss", "held-out sequences: total", "C3")
    line(losses, "kl", "held-out sequences: KL to the teacher", "C4")
    losses.set_ylabel("loss, nats")
    for axes in perplexity:
        line(axes, "perplexity", "held-out sequences", "C3")
        axes.set_ylabel("perplexity")
    _finish(figure, [losses, *perplexity], path)


def _line(rows: Sequence[Mapping[str, Any]], axes: Axes, key: str, label: str, color: str, factor: float = 1.0) -> None:
    """Draw a column of metrics.csv over the epochs, unless it is empty."""
    dots = "o-" if len(rows) < _DOTS_BELOW else "-"
    values = [math.nan if row[key] is None else factor * row[key] for row in rows]
    if not all(math.isnan(value) for value in values):
        axes.plot([row["epoch"] for row in rows], values, dots, markersize=3, color=color, label=label)


def _finish(figure: Figure, drawn: Sequence[Axes], path: Path) -> None:
    """Add legends and the label of the epochs, and write the picture."""
    for axes in drawn:
        axes.set_xlabel("epoch")
        axes.legend(frameon=False, fontsize=8)
        axes.spines[["top", "right"]].set_visible(False)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    _write(figure, path, 120)


def draw_accuracies(
    by_point: Mapping[str, Sequence[float]],
    teacher: float | None,
    title: str,
    path: Path,
    label: str = "loss of the student",
    measure: str = "test accuracy, %",
) -> None:
    """Write a PNG of test accuracies: one dot per seed, a bar at the mean of each column, a line for the teacher.

    Args:
        by_point: accuracies in [0, 1], one per seed.
        teacher: accuracy of the teacher on the same split; None if unknown.
        title: one line.
        path: of the PNG.
        label: of the horizontal axis.
        measure: label of the vertical axis.
    """
    figure = Figure(figsize=(max(7, 1.2 * len(by_point)), 4), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    if teacher is not None:
        axes.axhline(100 * teacher, color="0.4", linestyle="--", linewidth=1, label=f"teacher, {teacher:.1%}")
        axes.legend(loc="lower right", frameon=False)
    for column, accuracies in enumerate(by_point.values()):
        percent = [100 * accuracy for accuracy in accuracies]
        if not percent:
            continue
        # Dots of one column are side by side, so that equal accuracies do not overlap.
        offsets = [0.1 * (i - (len(percent) - 1) / 2) for i in range(len(percent))]
        axes.plot([column + offset for offset in offsets], percent, "o", color=f"C{column}", alpha=0.7)
        mean = statistics.mean(percent)
        axes.hlines(mean, column - 0.35, column + 0.35, color=f"C{column}", linewidth=2.5)
        axes.annotate(f"{mean:.1f}", (column + 0.38, mean), va="center", fontsize=9)
    names = list(by_point)
    axes.set_xticks(range(len(names)), names)
    if max(map(len, names)) > _LONG_NAME:
        axes.tick_params(axis="x", labelrotation=20)
    axes.set_xlim(-0.6, len(names) - 0.3)
    axes.set_xlabel(label)
    axes.set_ylabel(measure)
    axes.set_title(title, fontsize=10)
    axes.spines[["top", "right"]].set_visible(False)
    _write(figure, path, 150)


def draw_language_models(
    by_student: Mapping[str, Sequence[tuple[float, float]]], teacher: float, title: str, path: Path
) -> None:
    """Write a PNG of perplexity and KL to the teacher: a line of dots per student, one per seed, a bar at their mean.

    Args:
        by_student: (perplexity, KL in nats) of each seed.
        teacher: its perplexity, a dashed line.
        title: one line.
        path: of the PNG.
    """
    figure = Figure(figsize=(9, 1.6 + 0.45 * len(by_student)), layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(1, 2, sharey=True)
    for axes, measure, label in zip(panels, (0, 1), ("perplexity", "KL to the teacher, nats"), strict=True):
        for line, values in enumerate(by_student.values()):
            found = [value[measure] for value in values]
            axes.plot(found, [line] * len(found), "o", color=f"C{line}", alpha=0.7)
            axes.vlines(statistics.mean(found), line - 0.3, line + 0.3, color=f"C{line}", linewidth=2.5)
        axes.set_xlabel(label)
        axes.grid(axis="x", color="0.9")
        axes.spines[["top", "right"]].set_visible(False)
    panels[0].axvline(teacher, color="0.4", linestyle="--", linewidth=1, label=f"teacher, {teacher:.3g}")
    panels[0].legend(frameon=False, fontsize=8)
    panels[1].set_xlim(left=0)
    panels[0].set_yticks(range(len(by_student)), list(by_student))
    panels[0].invert_yaxis()
    figure.suptitle(title, fontsize=10)
    _write(figure, path, 150)


def _write(figure: Figure, path: Path, dpi: int) -> None:
    """Write a figure as a PNG, atomically."""
    with open_atomic(path) as file:
        figure.savefig(file, format="png", dpi=dpi)

"""Charts of a report, small enough for a phone: SVG for the page, PNG for papers and slides."""

from __future__ import annotations

import html
import io
import math
import re
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib as mpl
import torch
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.ticker import MaxNLocator
from torch import Tensor

from kdcache.evaluation.metrics import Reliability
from kdcache.evaluation.runs import Row
from kdcache.runtime.atomic_write import open_atomic

_GRAY = "0.5"
"""Legible on white and on black."""
_DASHES = ["-", "--", "-.", ":"]
_COLORS = 10
_BINS = 20
_MARKERS_BELOW = 12
_LABEL_LENGTH = 38
_CLASS_LENGTH = 12
_CLASSES_NAMED = 20


class Chart(NamedTuple):
    """A chart.

    Attributes:
        name: its name, for a file.
        title: what it shows.
        figure: the drawing.
    """

    name: str
    title: str
    figure: Figure


class Line(NamedTuple):
    """A run in a chart: index and label of its group, and its rows of metrics.csv."""

    group: int
    label: str
    rows: Sequence[Row]


@contextmanager
def drawing() -> Iterator[None]:
    """Draw names of classes and files as plain text, in any script."""
    with (
        mpl.rc_context({"text.parse_math": False, "svg.fonttype": "none", "font.size": 9, "legend.fontsize": 8}),
        warnings.catch_warnings(),
    ):
        # The browser has fonts for the characters that matplotlib's fonts lack.
        warnings.filterwarnings("ignore", message="Glyph .* missing from", category=UserWarning)
        yield


@drawing()
def as_svg(chart: Chart) -> str:
    """Return an SVG element with its text as text, and with the color of the surrounding text in place of black."""
    file = io.StringIO()
    no_metadata = dict.fromkeys(("Creator", "Date", "Format", "Type"))
    with mpl.rc_context({"svg.hashsalt": chart.name}):
        chart.figure.savefig(file, format="svg", transparent=True, metadata=no_metadata)
    text = re.sub(r"<!--.*?-->", "", file.getvalue(), flags=re.DOTALL)
    used = {*re.findall(r'(?:url\(#|href="#)([^)"]+)', text)}
    text = re.sub(r"<[^<>]+>", lambda tag: _for_page(tag.group(), used), text[text.index("<svg") :])
    width, height = (72 * inches for inches in chart.figure.get_size_inches())
    opening = (
        f'<svg viewBox="0 0 {width:g} {height:g}" width="{width:g}pt" role="img" '
        f'aria-label="{html.escape(chart.title)}" fill="currentColor">'
    )
    return re.sub(r"<svg[^>]*>", lambda _: opening, text, count=1).strip()


def _for_page(tag: str, used: set[str]) -> str:
    """Return a tag without black, and without an id that nothing refers to: ids must be unique on the page."""
    tag = re.sub(r' id="([^"]+)"', lambda match: match.group() if match.group(1) in used else "", tag)
    return tag.replace("#000000", "currentColor").replace("xlink:href", "href")


@drawing()
def save_png(chart: Chart, folder: Path) -> Path:
    """Save a chart as a PNG on white in a folder; the same chart gives the same bytes."""
    path = folder / f"{chart.name}.png"
    FigureCanvasAgg(chart.figure)
    with open_atomic(path) as file:
        chart.figure.savefig(file, format="png", dpi=150, metadata={"Software": None})
    return path


def _style(group: int) -> dict[str, Any]:
    """Return a line style that is unique for a group: colors first, then dashes."""
    return {"color": f"C{group % _COLORS}", "linestyle": _DASHES[group // _COLORS % len(_DASHES)]}


def color_of(group: int) -> str:
    """Return the color of a group in all charts."""
    return mpl.colors.to_hex(_style(group)["color"])


def short(text: str, longest: int = _LABEL_LENGTH) -> str:
    """Return the text in one line, truncated; a leading space keeps names with an underscore in the legend."""
    text = " ".join("".join(letter if letter.isprintable() else " " for letter in text).split())
    text = text if len(text) <= longest else text[: longest - 1] + "…"
    return f" {text}" if text.startswith("_") else text


def _figure(labels: int = 0, height: float = 2.5) -> tuple[Figure, Axes]:
    """Return an empty chart with room for a legend of `labels` lines below it."""
    figure = Figure(figsize=(3.9, height + 0.17 * labels), layout="constrained")
    axes = figure.add_subplot()
    axes.spines[["top", "right"]].set_visible(False)
    return figure, axes


def _legend(figure: Figure, handles: Mapping[str, Any], columns: int = 1) -> None:
    if len(handles) > 1:
        labels = [short(label) for label in handles]
        figure.legend([*handles.values()], labels, loc="outside lower left", frameon=False, ncols=columns)


def _name_columns(axes: Axes, names: Sequence[str]) -> None:
    """Set the labels of the x axis, rotated if one is long."""
    if max(map(len, names)) > 2:
        axes.set_xticks(range(len(names)), names, rotation=50, ha="right", rotation_mode="anchor")
    else:
        axes.set_xticks(range(len(names)), names)


@drawing()
def draw_lines(
    lines: Sequence[Line], keys: Mapping[str, str], name: str, title: str, factor: float = 1
) -> Chart | None:
    """Draw columns of metrics.csv over the epochs, one line per run and column.

    Args:
        lines: the runs.
        keys: the columns, with the line style of each.
        name: name of the chart.
        title: quantity and unit.
        factor: factor of the values.

    Returns:
        The chart; None if no run has any of the columns.
    """
    available = [(line, key) for line in lines for key in keys if any(row.get(key) is not None for row in line.rows)]
    if not available:
        return None
    figure, axes = _figure(len({line.group for line, _ in available}))
    handles: dict[str, Any] = {}
    for line, key in available:
        values = [math.nan if (value := row.get(key)) is None else factor * value for row in line.rows]
        style = _style(line.group) | ({"linestyle": keys[key]} if len(keys) > 1 else {})
        markers: dict[str, Any] = {"marker": "o", "markersize": 3} if len(line.rows) < _MARKERS_BELOW else {}
        (drawn,) = axes.plot(range(1, len(values) + 1), values, linewidth=1.2, alpha=0.85, **style, **markers)
        handles.setdefault(line.label, drawn)
    axes.set_xlabel("epoch")
    axes.set_ylabel(title)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    _legend(figure, handles)
    return Chart(name, title, figure)


@drawing()
def draw_sharpness(teacher: Tensor, students: Sequence[tuple[int, str, Tensor]], name: str, title: str) -> Chart:
    """Draw the sharpness of students against the teacher's, as means over twentieths of the rows.

    Args:
        teacher: [R].
        students: (index, label, [R]) of each group.
        name: name of the chart.
        title: measure of sharpness.
    """
    figure, axes = _figure(len(students) + 1)
    bins = torch.tensor_split(teacher.argsort(stable=True), min(_BINS, len(teacher)))
    of_teacher = [float(teacher[rows].mean()) for rows in bins]
    (equal,) = axes.plot(of_teacher, of_teacher, color=_GRAY, linestyle="--", linewidth=1)
    handles: dict[str, Any] = {"equal sharpness": equal}
    for group, label, sharpness in students:
        means = [float(sharpness[rows].mean()) for rows in bins]
        (handles[label],) = axes.plot(of_teacher, means, marker="o", markersize=3, linewidth=1.2, **_style(group))
    axes.set_xlabel(f"teacher: {title}")
    axes.set_ylabel(f"student: {title}")
    _legend(figure, handles)
    return Chart(name, f"{title} of student against teacher", figure)


@drawing()
def draw_reliability(diagram: Reliability, group: int, label: str, name: str) -> Chart:
    """Draw accuracy by confidence, and in gray the share of the rows with that confidence."""
    figure, axes = _figure(1)
    width = 1 / len(diagram.rows)
    left = [index * width for index in range(len(diagram.rows))]
    shares = (diagram.rows / diagram.rows.sum()).tolist()
    accuracy = torch.where(diagram.rows > 0, diagram.correct / diagram.rows.clamp_min(1), 0).tolist()
    share_bars = axes.bar(left, shares, width, align="edge", color=_GRAY, alpha=0.35)
    inner = [edge + 0.15 * width for edge in left]
    accuracy_bars = axes.bar(inner, accuracy, 0.7 * width, align="edge", color=_style(group)["color"], alpha=0.75)
    axes.plot([0, 1], [0, 1], color=_GRAY, linestyle="--", linewidth=1)
    axes.set_xlim(0, 1)
    axes.set_ylim(0, 1)
    axes.set_xlabel("confidence")
    axes.set_title(short(label), fontsize=9)
    _legend(figure, {"accuracy": accuracy_bars, "share of the images": share_bars}, 2)
    return Chart(name, f"reliability of {label}", figure)


@drawing()
def draw_classes(
    accuracies: Sequence[tuple[int | None, str, Tensor]], names: Sequence[str], name: str, measure: str = "accuracy"
) -> Chart:
    """Draw a measure of each class; with many classes, each line is sorted from the lowest to the highest.

    Args:
        accuracies: (index, or None for the teacher; label; [C]) of each line; NaN for a class without images.
        names: names of the classes.
        name: name of the chart.
        measure: what is shown.
    """
    figure, axes = _figure(len(accuracies), 2.9)
    few = len(names) <= _CLASSES_NAMED
    handles = {}
    for group, label, values in accuracies:
        percent = 100 * (values if few else values[~values.isnan()].sort().values)
        style = {"color": "black", "linestyle": "--"} if group is None else _style(group)
        # With few classes a line between two markers only shows that they are of one group.
        line: dict[str, Any] = {"marker": "o", "markersize": 4, "linewidth": 0.5} if few else {"linewidth": 1.2}
        (handles[label],) = axes.plot(range(len(percent)), percent.tolist(), **style, **line)
    if few:
        _name_columns(axes, [short(text, _CLASS_LENGTH) for text in names])
    else:
        axes.set_xlabel(f"classes, from the lowest to the highest {measure}")
    axes.set_ylabel(f"{measure}, %")
    _legend(figure, handles)
    return Chart(name, f"{measure} by class", figure)


@drawing()
def draw_where_wrong(counts_by_group: Sequence[tuple[str, tuple[int, int, int]]], name: str) -> Chart:
    """Draw the predictions of students where the teacher is wrong, one bar per group.

    Args:
        counts_by_group: label, and rows with (the label, the teacher's class, another class) predicted, of each group.
        name: name of the chart.
    """
    figure, axes = _figure(3, 0.9 + 0.26 * len(counts_by_group))
    start = [0.0] * len(counts_by_group)
    handles = {}
    for kind, color in enumerate(("C2", "C3", _GRAY)):
        shares = [100 * counts[kind] / max(sum(counts), 1) for _, counts in counts_by_group]
        bars = axes.barh(range(len(counts_by_group)), shares, 0.7, start, color=color, alpha=0.8)
        handles[("the label", "the teacher's class", "another class")[kind]] = bars
        start = [before + share for before, share in zip(start, shares, strict=True)]
    axes.set_yticks(range(len(counts_by_group)), [short(label, 26) for label, _ in counts_by_group], fontsize=8)
    axes.invert_yaxis()
    axes.set_xlim(0, 100)
    axes.set_xlabel("share of these rows, %")
    _legend(figure, handles)
    return Chart(name, "predictions of the students where the teacher is wrong", figure)


@drawing()
def draw_disagreement(counts: Tensor, names: Sequence[str], label: str, name: str) -> Chart:
    """Draw the rows by the teacher's class and the student's, [M, M]; the diagonal is not colored."""
    figure, axes = _figure(0, 1.6 + 0.27 * len(names))
    largest = max(int((counts - counts.diag().diag()).max()), 1)
    for row, line in enumerate(counts.tolist()):
        for column, count in enumerate(line):
            if row != column and count:
                shade = 0.1 + 0.6 * count / largest
                axes.add_patch(Rectangle((column - 0.5, row - 0.5), 1, 1, facecolor="C1", alpha=shade, linewidth=0))
            if count:
                color = _GRAY if row == column else "black"
                axes.text(column, row, str(count), ha="center", va="center", color=color, fontsize=7)
    ticks = [short(text, _CLASS_LENGTH) for text in names]
    _name_columns(axes, ticks)
    axes.set_yticks(range(len(names)), ticks)
    axes.set_xlim(-0.5, len(names) - 0.5)
    axes.set_ylim(len(names) - 0.5, -0.5)
    axes.spines[:].set_visible(False)
    axes.tick_params(length=0)
    axes.set_xlabel("student")
    axes.set_ylabel("teacher")
    axes.set_title(short(label), fontsize=9)
    return Chart(name, f"disagreement of {label} and the teacher", figure)

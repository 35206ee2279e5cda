"""Pictures of a report, each small enough to be read on a phone: SVG for the page, PNG for papers and slides."""

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

_GRAY = "0.5"
"""Legible on white and on black."""
_DASHES = ["-", "--", "-.", ":"]
_COLOURS = 10
_PARTS = 20
_DOTS_BELOW = 12
_LONGEST = 38
_LONGEST_CLASS = 12
_NAMED = 20


class Chart(NamedTuple):
    """A picture, under a name that may be that of a file, and what it shows."""

    name: str
    title: str
    figure: Figure


class Line(NamedTuple):
    """A run in a picture: its group's number and label, and what it is drawn from."""

    group: int
    label: str
    rows: Sequence[Row]


@contextmanager
def _drawing() -> Iterator[None]:
    """Names of classes and files are no formulas, and may be in any script."""
    with (
        mpl.rc_context({"text.parse_math": False, "svg.fonttype": "none", "font.size": 9, "legend.fontsize": 8}),
        warnings.catch_warnings(),
    ):
        # The page's own fonts draw what matplotlib's have not.
        warnings.filterwarnings("ignore", message="Glyph .* missing from", category=UserWarning)
        yield


@_drawing()
def as_svg(chart: Chart) -> str:
    """An SVG element, its text as text, black in whatever color the text around it has."""
    held = io.StringIO()
    nothing = dict.fromkeys(("Creator", "Date", "Format", "Type"))
    with mpl.rc_context({"svg.hashsalt": chart.name}):
        chart.figure.savefig(held, format="svg", transparent=True, metadata=nothing)
    text = re.sub(r"<!--.*?-->", "", held.getvalue(), flags=re.DOTALL)
    used = {*re.findall(r'(?:url\(#|href="#)([^)"]+)', text)}
    text = re.sub(r"<[^<>]+>", lambda tag: _for_a_page(tag.group(), used), text[text.index("<svg") :])
    width, height = (72 * inches for inches in chart.figure.get_size_inches())
    opening = (
        f'<svg viewBox="0 0 {width:g} {height:g}" width="{width:g}pt" role="img" '
        f'aria-label="{html.escape(chart.title)}" fill="currentColor">'
    )
    return re.sub(r"<svg[^>]*>", lambda _: opening, text, count=1).strip()


def _for_a_page(tag: str, used: set[str]) -> str:
    """A tag without its black, and without its name, which is another tag's too on the same page, if nobody uses it."""
    tag = re.sub(r' id="([^"]+)"', lambda found: found.group() if found.group(1) in used else "", tag)
    return tag.replace("#000000", "currentColor").replace("xlink:href", "href")


@_drawing()
def save_png(chart: Chart, folder: Path) -> Path:
    """A PNG on white in a folder; without the version of matplotlib in it, it changes only with what it shows."""
    path = folder / f"{chart.name}.png"
    FigureCanvasAgg(chart.figure)
    chart.figure.savefig(path, dpi=150, metadata={"Software": None})
    return path


def _style(group: int) -> dict[str, Any]:
    """Of so many lines that each is another: colors first, then dashes."""
    return {"color": f"C{group % _COLOURS}", "linestyle": _DASHES[group // _COLOURS % len(_DASHES)]}


def color_of(group: int) -> str:
    """The color that a group has in all pictures."""
    return mpl.colors.to_hex(_style(group)["color"])


def _short(text: str, longest: int = _LONGEST) -> str:
    """In one line, cut off; what begins with an underscore would be left out of a legend."""
    text = " ".join("".join(letter if letter.isprintable() else " " for letter in text).split())
    text = text if len(text) <= longest else text[: longest - 1] + "…"
    return f" {text}" if text.startswith("_") else text


def _figure(labels: int = 0, height: float = 2.5) -> tuple[Figure, Axes]:
    """An empty picture with room for a legend of so many lines below it."""
    figure = Figure(figsize=(3.9, height + 0.17 * labels), layout="constrained")
    axes = figure.add_subplot()
    axes.spines[["top", "right"]].set_visible(False)
    return figure, axes


def _legend(figure: Figure, handles: Mapping[str, Any], columns: int = 1) -> None:
    if len(handles) > 1:
        labels = [_short(label) for label in handles]
        figure.legend([*handles.values()], labels, loc="outside lower left", frameon=False, ncols=columns)


def _name_columns(axes: Axes, names: Sequence[str]) -> None:
    """Names below a picture, aslant where they are long."""
    if max(map(len, names)) > 2:
        axes.set_xticks(range(len(names)), names, rotation=50, ha="right", rotation_mode="anchor")
    else:
        axes.set_xticks(range(len(names)), names)


@_drawing()
def draw_lines(
    lines: Sequence[Line], keys: Mapping[str, str], name: str, title: str, factor: float = 1
) -> Chart | None:
    """Columns of metrics.csv over the epochs, a line a run and column; None where no run has any of them.

    Args:
        lines: the runs.
        keys: the columns, and how each is dashed.
        name: of the chart.
        title: what they are, and in what unit.
        factor: of the values.
    """
    given = [(line, key) for line in lines for key in keys if any(row.get(key) is not None for row in line.rows)]
    if not given:
        return None
    figure, axes = _figure(len({line.group for line, _ in given}))
    handles: dict[str, Any] = {}
    for line, key in given:
        values = [math.nan if (value := row.get(key)) is None else factor * value for row in line.rows]
        style = _style(line.group) | ({"linestyle": keys[key]} if len(keys) > 1 else {})
        dots: dict[str, Any] = {"marker": "o", "markersize": 3} if len(line.rows) < _DOTS_BELOW else {}
        (drawn,) = axes.plot(range(1, len(values) + 1), values, linewidth=1.2, alpha=0.85, **style, **dots)
        handles.setdefault(line.label, drawn)
    axes.set_xlabel("epoch")
    axes.set_ylabel(title)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    _legend(figure, handles)
    return Chart(name, title, figure)


@_drawing()
def draw_sharpness(teacher: Tensor, students: Sequence[tuple[int, str, Tensor]], name: str, title: str) -> Chart:
    """Sharpness of students against the teacher's: means over twentieths of the rows.

    Args:
        teacher: [R].
        students: (number, label, [R]) of each group.
        name: of the chart.
        title: what sharpness is.
    """
    figure, axes = _figure(len(students) + 1)
    parts = torch.tensor_split(teacher.argsort(stable=True), min(_PARTS, len(teacher)))
    across = [float(teacher[part].mean()) for part in parts]
    (even,) = axes.plot(across, across, color=_GRAY, linestyle="--", linewidth=1)
    handles: dict[str, Any] = {"as sharp as the teacher": even}
    for group, label, sharpness in students:
        means = [float(sharpness[part].mean()) for part in parts]
        (handles[label],) = axes.plot(across, means, marker="o", markersize=3, linewidth=1.2, **_style(group))
    axes.set_xlabel(f"teacher: {title}")
    axes.set_ylabel(f"student: {title}")
    _legend(figure, handles)
    return Chart(name, f"{title} of student against teacher", figure)


@_drawing()
def draw_reliability(found: Reliability, group: int, label: str, name: str) -> Chart:
    """Accuracy by confidence, and, behind it, how many rows have that confidence."""
    figure, axes = _figure(1)
    width = 1 / len(found.rows)
    left = [place * width for place in range(len(found.rows))]
    shares = (found.rows / found.rows.sum()).tolist()
    here = found.rows > 0
    accuracy = torch.where(here, found.correct / found.rows.clamp_min(1), 0).tolist()
    shown = axes.bar(left, shares, width, align="edge", color=_GRAY, alpha=0.35)
    inner = [place + 0.15 * width for place in left]
    right = axes.bar(inner, accuracy, 0.7 * width, align="edge", color=_style(group)["color"], alpha=0.75)
    axes.plot([0, 1], [0, 1], color=_GRAY, linestyle="--", linewidth=1)
    axes.set_xlim(0, 1)
    axes.set_ylim(0, 1)
    axes.set_xlabel("confidence")
    axes.set_title(_short(label), fontsize=9)
    _legend(figure, {"accuracy": right, "share of the images": shown}, 2)
    return Chart(name, f"reliability of {label}", figure)


@_drawing()
def draw_classes(accuracies: Sequence[tuple[int | None, str, Tensor]], names: Sequence[str], name: str) -> Chart:
    """Accuracy of each class; of many classes, from the worst to the best, each line by itself.

    Args:
        accuracies: (number, or None for the teacher; label; [C]) of each line; NaN for a class without images.
        names: of the classes.
        name: of the chart.
    """
    figure, axes = _figure(len(accuracies), 2.9)
    few = len(names) <= _NAMED
    handles = {}
    for group, label, values in accuracies:
        percent = 100 * (values if few else values[~values.isnan()].sort().values)
        style = {"color": "black", "linestyle": "--"} if group is None else _style(group)
        # Of few classes each is by itself, and a line between two means nothing but which dots belong together.
        drawn: dict[str, Any] = {"marker": "o", "markersize": 4, "linewidth": 0.5} if few else {"linewidth": 1.2}
        (handles[label],) = axes.plot(range(len(percent)), percent.tolist(), **style, **drawn)
    if few:
        _name_columns(axes, [_short(each, _LONGEST_CLASS) for each in names])
    else:
        axes.set_xlabel("classes, from the worst to the best")
    axes.set_ylabel("accuracy, %")
    _legend(figure, handles)
    return Chart(name, "accuracy by class", figure)


@_drawing()
def draw_verdicts(verdicts: Sequence[tuple[str, tuple[int, int, int]]], name: str) -> Chart:
    """What students say where the teacher is wrong: shares of (the label, the teacher's class, another), a bar each."""
    figure, axes = _figure(3, 0.9 + 0.26 * len(verdicts))
    start = [0.0] * len(verdicts)
    handles = {}
    for kind, color in enumerate(("C2", "C3", _GRAY)):
        shares = [100 * counts[kind] / max(sum(counts), 1) for _, counts in verdicts]
        bars = axes.barh(range(len(verdicts)), shares, 0.7, start, color=color, alpha=0.8)
        handles[("the label", "the teacher's class", "another class")[kind]] = bars
        start = [before + share for before, share in zip(start, shares, strict=True)]
    axes.set_yticks(range(len(verdicts)), [_short(label, 26) for label, _ in verdicts], fontsize=8)
    axes.invert_yaxis()
    axes.set_xlim(0, 100)
    axes.set_xlabel("share of these rows, %")
    _legend(figure, handles)
    return Chart(name, "what students say where the teacher is wrong", figure)


@_drawing()
def draw_disagreement(counts: Tensor, names: Sequence[str], label: str, name: str) -> Chart:
    """Rows by the teacher's class and the student's, [M, M]; what they agree on is not colored."""
    figure, axes = _figure(0, 1.6 + 0.27 * len(names))
    most = max(int((counts - counts.diag().diag()).max()), 1)
    for row, line in enumerate(counts.tolist()):
        for column, count in enumerate(line):
            if row != column and count:
                shade = 0.1 + 0.6 * count / most
                axes.add_patch(Rectangle((column - 0.5, row - 0.5), 1, 1, facecolor="C1", alpha=shade, linewidth=0))
            if count:
                color = _GRAY if row == column else "black"
                axes.text(column, row, str(count), ha="center", va="center", color=color, fontsize=7)
    ticks = [_short(each, _LONGEST_CLASS) for each in names]
    _name_columns(axes, ticks)
    axes.set_yticks(range(len(names)), ticks)
    axes.set_xlim(-0.5, len(names) - 0.5)
    axes.set_ylim(len(names) - 0.5, -0.5)
    axes.spines[:].set_visible(False)
    axes.tick_params(length=0)
    axes.set_xlabel("student")
    axes.set_ylabel("teacher")
    axes.set_title(_short(label), fontsize=9)
    return Chart(name, f"disagreement of {label} and the teacher", figure)

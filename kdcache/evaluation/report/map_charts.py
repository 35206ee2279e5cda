"""Pictures of label maps: an image, its classes, what teacher and students say, and where they differ."""

from __future__ import annotations

import colorsys
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from torch import Tensor
from torch.nn import functional

from kdcache.evaluation.report.charts import Chart, drawing, short

_SIDE = 256
"""Maximum side of a picture, pixels; larger ones are reduced."""

_WIDTH, _PANEL, _TITLE, _LINE = 3.9, 1.85, 0.3, 0.17
"""Sizes in inches: of a chart, of a picture in it, and heights of a title and of a line of the legend."""

_TALLEST = 2.0
"""Largest height of a picture, in its width."""

_NAMED = 21
"""Maximum number of classes in a legend."""

_COLUMNS, _NAME_LENGTH, _TITLE_LENGTH = 3, 15, 27

_SAME = (232, 232, 232)
"""Color of pixels where both say the same."""

_STRIPES = ((110, 110, 110), (165, 165, 165))
"""Colors of the stripes of ignored pixels."""

Pixels = npt.NDArray[np.uint8]


class SaidMap(NamedTuple):
    """What a network says of an image.

    Attributes:
        label: of the network.
        classes: [H, W] int64.
    """

    label: str
    classes: Tensor


class MapPicture(NamedTuple):
    """An image and its maps of classes, all of one size.

    Attributes:
        title: what image it is.
        image: [3, H, W] uint8.
        labels: [H, W] int64, -1 where it is ignored.
        teacher: [H, W] int64; None without a teacher.
        students: what the networks say.
    """

    title: str
    image: Tensor
    labels: Tensor
    teacher: Tensor | None
    students: Sequence[SaidMap]


def class_color(label: int) -> tuple[int, int, int]:
    """Return the color of a class, RGB from 0 to 255: the same in every picture, and never gray, black or white.

    Hues follow one another by the golden angle, so that they are far apart however many classes there are; brightness
    and saturation change every few classes.
    """
    hue = (0.02 + label * 0.618033988749895) % 1
    saturation, value = ((0.75, 0.9), (0.95, 0.6), (0.45, 0.95), (0.6, 0.7))[label // 5 % 4]
    red, green, blue = colorsys.hsv_to_rgb(hue, saturation, value)
    return round(255 * red), round(255 * green), round(255 * blue)


def share_of_difference(one: Tensor, other: Tensor) -> float | None:
    """Return the share of the pixels [H, W] where two maps differ; those ignored (-1) in `other` do not count.

    None if all are ignored.
    """
    known = other >= 0
    return float((one != other)[known].double().mean()) if known.any() else None


def colored(classes: Tensor) -> Pixels:
    """Return a map [H, W] in the colors of its classes, [H, W, 3]; ignored pixels (-1) are striped in gray."""
    values = classes.numpy()
    colors = np.array([class_color(label) for label in range(max(int(values.max()), 0) + 1)], np.uint8)
    rows, columns = np.indices(values.shape)
    stripes = np.array(_STRIPES, np.uint8)[(rows + columns) // 3 % 2]
    shown: Pixels = np.where((values >= 0)[..., None], colors[values.clip(0)], stripes)
    return shown


def difference(one: Tensor, other: Tensor) -> Pixels:
    """Return where a map [H, W] differs from another one, in colors; light gray elsewhere, striped where ignored."""
    shown = colored(torch.where(other >= 0, one, other))
    shown[((one == other) & (other >= 0)).numpy()] = _SAME
    return shown


@drawing()
def draw_maps(picture: MapPicture, names: Sequence[str], name: str) -> Chart:
    """Draw an image with its label map, and a line for each network: what it says, and where that differs.

    A student is compared with the teacher if there is one, else with the label map; the teacher with the label map.

    Args:
        picture: the image and its maps.
        names: names of the classes.
        name: name of the chart.
    """
    lines: list[_Line] = []
    if picture.teacher is not None:
        lines.append(_compared(SaidMap("teacher", picture.teacher), picture.labels, "labels"))
    reference, of_what = (picture.labels, "labels") if picture.teacher is None else (picture.teacher, "teacher")
    lines += [_compared(each, reference, of_what) for each in picture.students]
    labels = _reduced(picture.labels)
    shown = [classes for line in lines for classes in line.shown]
    legend = _legend_of([labels, *shown])
    ratio = min(picture.image.shape[1] / picture.image.shape[2], _TALLEST)
    rows, of_legend = 1 + len(lines), -(-len(legend) // _COLUMNS)
    figure = Figure(figsize=(_WIDTH, rows * (_PANEL * ratio + _TITLE) + _LINE * of_legend + 0.1), layout="constrained")
    panels = figure.subplots(rows, 2, squeeze=False)
    _show(panels[0, 0], _reduced_image(picture.image), picture.title)
    _show(panels[0, 1], colored(labels), "label map")
    for row, line in enumerate(lines, 1):
        _show(panels[row, 0], colored(line.shown[0]), line.label)
        _show(panels[row, 1], difference(*line.shown), line.differs)
    handles = [_swatch(label) for label in legend]
    named = [short(_name(label, names), _NAME_LENGTH) for label in legend]
    figure.legend(handles, named, loc="outside lower left", frameon=False, ncols=_COLUMNS)
    said = "; ".join(f"{line.label}: {line.differs} of the pixels" for line in lines)
    return Chart(name, f"{picture.title}, its label map and the map of each network. {said}", figure)


class _Line(NamedTuple):
    """A line of the picture: a map and what it is compared with, reduced, and the share of all pixels that differ."""

    label: str
    shown: tuple[Tensor, Tensor]
    differs: str


def _compared(said: SaidMap, reference: Tensor, of_what: str) -> _Line:
    share = share_of_difference(said.classes, reference)
    differs = "no pixel has a label" if share is None else f"other than {of_what}, {share:.1%}"
    return _Line(said.label, (_reduced(said.classes), _reduced(reference)), differs)


def _legend_of(maps: Sequence[Tensor]) -> list[int]:
    """Return the classes in some maps, those with most pixels if they are many, and -1 if pixels are ignored."""
    labels, counts = np.unique(torch.cat([each.flatten() for each in maps]).numpy(), return_counts=True)
    most = labels[np.argsort(-counts, kind="stable")].tolist()
    known = sorted([label for label in most if label >= 0][:_NAMED])
    return [*known, *([-1] if -1 in most else [])]


def _name(label: int, names: Sequence[str]) -> str:
    if label < 0:
        return "ignored"
    return names[label] if label < len(names) else str(label)


def _swatch(label: int) -> Rectangle:
    if label < 0:
        light, dark = (f"#{red:02x}{green:02x}{blue:02x}" for red, green, blue in reversed(_STRIPES))
        return Rectangle((0, 0), 1, 1, facecolor=light, edgecolor=dark, hatch="/////", linewidth=0)
    return Rectangle((0, 0), 1, 1, facecolor=[value / 255 for value in class_color(label)], linewidth=0)


def _show(axes: Axes, pixels: Pixels, title: str) -> None:
    # "none" keeps the pixels of the array in an SVG, which the browser then enlarges without blurring them.
    axes.imshow(pixels, interpolation="none")
    axes.set_axis_off()
    axes.set_title(short(title, _TITLE_LENGTH), fontsize=8, loc="left", pad=2)


def _step(size: tuple[int, ...]) -> float:
    return max(1.0, max(size) / _SIDE)


def _reduced(classes: Tensor) -> Tensor:
    """Return a map [H, W] of at most the size of a picture: some of its pixels."""
    step = _step((classes.shape[0], classes.shape[1]))
    rows, columns = (((torch.arange(int(side / step)) + 0.5) * step).long() for side in classes.shape)
    return classes[rows][:, columns]


def _reduced_image(image: Tensor) -> Pixels:
    """Return an image [3, H, W] uint8 of at most the size of a picture, [H', W', 3]."""
    step = _step((image.shape[1], image.shape[2]))
    if step > 1:
        size = [int(side / step) for side in image.shape[1:]]
        image = functional.interpolate(image[None].float(), size, mode="area")[0].round().to(torch.uint8)
    return np.ascontiguousarray(image.permute(1, 2, 0).numpy())

"""The parts of a report, and the page made of them: one HTML file that loads nothing and escapes all text."""

from __future__ import annotations

import base64
import io
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import ClassVar

import jinja2
import numpy as np
import torch
from PIL import Image
from torch import Tensor

from kdcache.data.images import Picture
from kdcache.evaluation.report.charts import Chart, as_svg, color_of
from kdcache.evaluation.runs import Group

CLASSES_SHOWN = 20
"""Maximum number of rows of a table by class."""

_TEMPLATE = "template.html.j2"
_THUMBNAIL = 192
"""Maximum side of a sample's image, pixels."""
_LONGEST_FIGURE = 24
"""Letters of the longest figure in a table cell; longer text is a name, and may be broken into lines."""


@dataclass(frozen=True)
class Heading:
    """The heading of a section."""

    kind: ClassVar = "heading"
    text: str


@dataclass(frozen=True)
class Paragraph:
    """A paragraph; `style` is empty, `faint` or `note`."""

    kind: ClassVar = "paragraph"
    text: str
    style: str = ""


@dataclass(frozen=True)
class GroupLabel:
    """The label of a group after a swatch of its color in the charts."""

    text: str
    color: str

    @classmethod
    def of(cls, group: Group) -> GroupLabel:
        """Return the label of a group."""
        return cls(group.label, color_of(group.index))


@dataclass(frozen=True)
class Table:
    """A table: the first column is text, the others are figures.

    Attributes:
        columns: column headings.
        rows: first cell, and the others.
    """

    kind: ClassVar = "table"
    columns: Sequence[str | GroupLabel]
    rows: Sequence[tuple[str | GroupLabel, *tuple[str, ...]]]


@dataclass(frozen=True)
class Pictures:
    """Charts side by side."""

    kind: ClassVar = "pictures"
    charts: Sequence[Chart]

    @classmethod
    def of(cls, charts: Iterable[Chart | None]) -> Pictures:
        """Return the charts that are not None."""
        return cls([chart for chart in charts if chart is not None])


@dataclass(frozen=True)
class Sample:
    """An image, if it is available, with some lines of text below."""

    picture: Picture | None
    lines: Sequence[str]

    @property
    def image(self) -> str | None:
        """A thumbnail of the image, as a data URI of a PNG."""
        return None if self.picture is None else _data_uri(self.picture)


@dataclass(frozen=True)
class SampleGrid:
    """Samples in a grid."""

    kind: ClassVar = "samples"
    samples: Sequence[Sample]


Part = Heading | Paragraph | Table | Pictures | SampleGrid


def render(title: str, parts: Sequence[Part]) -> str:
    """Return the HTML file."""
    return _template().render(title=title, parts=parts, longest_figure=_LONGEST_FIGURE)


@cache
def _template() -> jinja2.Template:
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters["as_svg"] = as_svg
    return environment.get_template(_TEMPLATE)


def _data_uri(picture: Picture) -> str:
    image = _as_pil(picture) if isinstance(picture, Tensor) else picture.convert("RGB")
    image.thumbnail((_THUMBNAIL, _THUMBNAIL))
    file = io.BytesIO()
    image.save(file, "PNG")
    return f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}"


def _as_pil(picture: Tensor) -> Image.Image:
    """Convert pixels [channels, H, W]: uint8 as they are, other types scaled from their minimum to their maximum.

    The mean over the channels is shown unless there are one or three.
    """
    pixels = picture.detach().cpu()
    if len(pixels) not in (1, 3):
        pixels = pixels.double().mean(dim=0, keepdim=True)
    if pixels.dtype != torch.uint8:
        pixels = pixels.double().nan_to_num()
        low, high = pixels.min(), pixels.max()
        pixels = (255 * (pixels - low) / (high - low).clamp_min(1e-12)).round().to(torch.uint8)
    array = np.ascontiguousarray(pixels.permute(1, 2, 0).numpy())
    return Image.fromarray(array.squeeze(2) if array.shape[2] == 1 else array)

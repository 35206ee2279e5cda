"""A report as one HTML file: nothing in it is fetched from anywhere, and all that others have named is escaped."""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Iterable, Sequence

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from kdcache.data.images import Picture
from kdcache.evaluation.report.charts import Chart, as_svg, color_of
from kdcache.evaluation.runs import Group

Part = str | Sequence[Chart | None]
"""What a chapter is made of: text, escaped unless it is markup already, and pictures, some of which may be lacking."""

CLASSES_SHOWN = 20
"""Rows of a table by class; it has the most telling ones where there are more."""

_LARGEST = 192
_FIGURE = 24
"""Letters of the longest figure in a table; what is longer is a name, and may have several lines."""
_LONG = ' class="name"'

STYLE = """
:root { color-scheme: light dark; --text: #1b1f23; --back: #ffffff; --faint: #59636e; --line: #d1d9e0; --mark: #f3f5f7 }
@media (prefers-color-scheme: dark) {
  :root { --text: #e6edf3; --back: #14181d; --faint: #9aa5b1; --line: #343c45; --mark: #1d232a }
}
* { box-sizing: border-box }
body { margin: 0 auto; max-width: 76rem; padding: 1rem; color: var(--text); background: var(--back);
  font: 16px/1.5 system-ui, sans-serif; overflow-wrap: anywhere }
h1 { font-size: 1.6rem; line-height: 1.2; margin: .5rem 0 }
h2 { font-size: 1.2rem; margin: 2.2rem 0 .4rem; padding-top: .8rem; border-top: 1px solid var(--line) }
p { margin: .4rem 0; max-width: 46rem }
.note { border-left: 3px solid #bf8700; background: var(--mark); padding: .4rem .7rem }
.faint { color: var(--faint); font-size: .875rem }
.scroll { overflow-x: auto; margin: .7rem 0 }
table { border-collapse: collapse; font-size: .875rem; font-variant-numeric: tabular-nums }
th, td { padding: .25rem .7rem .25rem 0; text-align: right; border-bottom: 1px solid var(--line); white-space: nowrap }
th:first-child { text-align: left; font-weight: 400; white-space: normal; min-width: 9rem }
thead th, thead th:first-child { color: var(--faint); font-weight: 600; vertical-align: bottom; white-space: normal;
  min-width: 5.5rem }
td.name { white-space: normal; min-width: 12rem }
.swatch { display: inline-block; width: .7rem; height: .7rem; border-radius: 2px; margin-right: .45rem }
.pictures { display: flex; flex-wrap: wrap; gap: 1rem 1.5rem; align-items: flex-start; margin: .7rem 0 }
.pictures svg { max-width: 100%; height: auto }
.samples { display: grid; grid-template-columns: repeat(auto-fill, minmax(8.5rem, 1fr)); gap: 1rem; margin: .7rem 0 }
figure { margin: 0; font-size: .8rem }
figure img { display: block; width: 6rem; height: 6rem; object-fit: contain; image-rendering: pixelated;
  background: var(--mark); margin-bottom: .3rem }
"""

# No browser fetches anything for the page, whatever is in it.
_POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"


class Html(str):
    """Text that is markup already; any other is escaped."""

    __slots__ = ()


def markup(text: str) -> str:
    """A text as it may stand in the page."""
    return text if isinstance(text, Html) else html.escape(text)


def document(title: str, parts: Iterable[str]) -> str:
    """The whole file."""
    body = "\n".join(markup(part) for part in parts)
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{markup(title)}</title>\n<style>{STYLE}</style>\n</head>\n<body>\n<h1>{markup(title)}</h1>\n"
        f"{body}\n</body>\n</html>\n"
    )


def heading(text: str) -> Html:
    """Of a section."""
    return Html(f"<h2>{markup(text)}</h2>")


def paragraph(text: str, kind: str = "") -> Html:
    """A paragraph: as it is, `faint`, or a `note`."""
    return Html(f'<p class="{kind}">{markup(text)}</p>' if kind else f"<p>{markup(text)}</p>")


def named(group: Group) -> Html:
    """The label of a group, with its color in the pictures before it."""
    return Html(f'<span class="swatch" style="background: {color_of(group.number)}"></span>{markup(group.label)}')


def table(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> Html:
    """A table that scrolls sideways where it is too wide; its first column is text, the others are figures."""
    head = "".join(f'<th scope="col">{markup(column)}</th>' for column in columns)
    lines = []
    for first, *others in rows:
        cells = "".join(f"<td{_LONG if len(cell) > _FIGURE else ''}>{markup(cell)}</td>" for cell in others)
        lines.append(f'<tr><th scope="row">{markup(first)}</th>{cells}</tr>')
    return Html(
        f'<div class="scroll" tabindex="0"><table>\n<thead><tr>{head}</tr></thead>\n<tbody>\n'
        + "\n".join(lines)
        + "\n</tbody>\n</table></div>"
    )


def pictures(charts: Iterable[Chart]) -> Html:
    """Pictures beside one another, as many as there is room for."""
    return Html('<div class="pictures">\n' + "\n".join(map(as_svg, charts)) + "\n</div>")


def samples(pictured: Iterable[tuple[Picture | None, Sequence[str]]]) -> Html:
    """Images in a grid, each with some lines below it."""
    figures = []
    for picture, lines in pictured:
        image = "" if picture is None else f'<img alt="{markup(lines[0])}" src="{_data(picture)}">'
        said = "<br>".join(map(markup, lines))
        figures.append(f"<figure>{image}<figcaption>{said}</figcaption></figure>")
    return Html('<div class="samples">\n' + "\n".join(figures) + "\n</div>")


def _data(picture: Picture) -> str:
    """A PNG as a URI; a large picture is made smaller."""
    image = _image(picture) if isinstance(picture, Tensor) else picture.convert("RGB")
    image.thumbnail((_LARGEST, _LARGEST))
    held = io.BytesIO()
    image.save(held, "PNG")
    return f"data:image/png;base64,{base64.b64encode(held.getvalue()).decode()}"


def _image(picture: Tensor) -> Image.Image:
    """Of pixels [channels, H, W]: as they are if they are bytes, otherwise from their least to their largest.

    Of neither one nor three channels, such as those of a satellite, the mean is shown.
    """
    pixels = picture.detach().cpu()
    if len(pixels) not in (1, 3):
        pixels = pixels.double().mean(dim=0, keepdim=True)
    if pixels.dtype != torch.uint8:
        pixels = pixels.double().nan_to_num()
        least, most = pixels.min(), pixels.max()
        pixels = (255 * (pixels - least) / (most - least).clamp_min(1e-12)).round().to(torch.uint8)
    array = np.ascontiguousarray(pixels.permute(1, 2, 0).numpy())
    return Image.fromarray(array.squeeze(2) if array.shape[2] == 1 else array)

"""Draw the picture of a cache's card: histograms of sharpness and confidence."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from kdcache.runtime.atomic_write import open_atomic

_BINS = 50


def draw_census(sharpness: Mapping[float, int], confidence: Sequence[int], path: Path) -> None:
    """Write a PNG with histograms of the teacher's sharpness and confidence.

    Args:
        sharpness: lower bound of each bin, in nats -> rows; fine bins are merged.
        confidence: rows per bin of the largest probability, in equal bins from 0 to 1.
        path: PNG file.
    """
    figure = Figure(figsize=(8, 2.8), layout="constrained")
    FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2)
    left.hist(list(sharpness), bins=_BINS, weights=list(sharpness.values()), color="C0")
    left.set_xlabel("sharpness: logsumexp of the logits")
    left.set_ylabel("rows")
    edges = [index / len(confidence) for index in range(len(confidence))]
    right.bar(edges, confidence, width=1 / len(confidence), align="edge", color="C1")
    right.set_xlabel("confidence: largest probability")
    right.set_xlim(0, 1)
    for axes in (left, right):
        axes.spines[["top", "right"]].set_visible(False)
        axes.yaxis.set_major_locator(MaxNLocator(nbins=4, integer=True))
    # Without matplotlib's version in the metadata, the file depends on the rows only.
    with open_atomic(path) as file:
        figure.savefig(file, format="png", dpi=100, metadata={"Software": None})

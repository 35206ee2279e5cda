"""Pictures of what was found."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure


def draw_accuracies(by_loss: Mapping[str, Sequence[float]], teacher: float, title: str, path: Path) -> None:
    """A PNG of test accuracies: a dot a seed, a bar at the mean of each loss, a line for the teacher.

    Args:
        by_loss: accuracies in [0, 1], one a seed.
        teacher: its accuracy on the same split.
        title: one line.
        path: of the PNG.
    """
    figure = Figure(figsize=(7, 4), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    axes.axhline(100 * teacher, color="0.4", linestyle="--", linewidth=1, label=f"teacher, {teacher:.1%}")
    for place, accuracies in enumerate(by_loss.values()):
        percent = [100 * accuracy for accuracy in accuracies]
        # Dots of one loss stand side by side, so that equal accuracies can be told apart.
        offsets = [0.1 * (i - (len(percent) - 1) / 2) for i in range(len(percent))]
        axes.plot([place + offset for offset in offsets], percent, "o", color=f"C{place}", alpha=0.7)
        mean = statistics.mean(percent)
        axes.hlines(mean, place - 0.35, place + 0.35, color=f"C{place}", linewidth=2.5)
        axes.annotate(f"{mean:.1f}", (place + 0.38, mean), va="center", fontsize=9)
    axes.set_xticks(range(len(by_loss)), list(by_loss))
    axes.set_xlim(-0.6, len(by_loss) - 0.3)
    axes.set_xlabel("loss of the student")
    axes.set_ylabel("test accuracy, %")
    axes.set_title(title, fontsize=10)
    axes.legend(loc="lower right", frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=150)

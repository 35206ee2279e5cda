"""The results of a sweep: `sweep.json`, and a picture of the test accuracies."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from kdcache.runtime.atomic_write import write_file
from kdcache.train.plots import draw_accuracies
from kdcache.train.sweep import SweepSummary

TABLE, PICTURE = "sweep.json", "sweep.png"


def as_record(summaries: Sequence[SweepSummary]) -> dict[str, Any]:
    """Return the content of `sweep.json`: of each combination the mean accuracies, and its students."""
    return {
        "points": [
            {
                "point": summary.point,
                "test_mean": summary.mean,
                "test_spread": summary.spread,
                "validation_mean": summary.validation,
                "seconds": summary.seconds,
                "students": [asdict(student) for student in summary.students],
            }
            for summary in summaries
        ]
    }


def write_results(summaries: Sequence[SweepSummary], dataset: str, out: Path) -> tuple[Path, Path | None]:
    """Write the table and the picture of a sweep, and return their paths.

    Args:
        summaries: one per combination.
        dataset: name for the title of the picture.
        out: folder of the sweep.

    Returns:
        (`sweep.json`, `sweep.png`); None for the picture if there is no test accuracy to show.
    """
    table, picture = out / TABLE, out / PICTURE
    write_file(table, json.dumps(as_record(summaries), indent=2) + "\n")
    accuracies = {summary.point: summary.accuracies for summary in summaries}
    if not any(accuracies.values()):
        return table, None
    seeds = max(len(summary.students) for summary in summaries)
    draw_accuracies(accuracies, None, f"{dataset}, {seeds} {'seed' if seeds == 1 else 'seeds'}", picture, "student")
    return table, picture

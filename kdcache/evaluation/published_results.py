"""The last column of docs/RESULTS.md: what runs of the recipes came to, beside what others have published."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence

from kdcache.config.loader import load_pipeline
from kdcache.config.recipes import recipes
from kdcache.config.schema import Pipeline, TeacherSpec
from kdcache.errors import UsageError
from kdcache.evaluation.runs import Mean, RunRecord

_ROW = re.compile(r"^\| `([^`|]+)` \|.*\|$")


def fill_results(text: str, runs: Sequence[RunRecord]) -> tuple[str, list[str]]:
    """A table with the runs' test accuracies in the last cell of the rows of their recipes.

    A run is of a recipe if data set, teacher and student are; whatever else was set is for its folder to say, which
    stands beside the figure. Students of one loss are put together.

    Args:
        text: Markdown with rows that begin with the name of a recipe in backticks.
        runs: of students; others are passed over.

    Returns:
        The text, and the names of the recipes whose cells were filled.

    Raises:
        UsageError: if no run is of a recipe that the text has a row for.
    """
    names = [found[1] for line in text.splitlines() if (found := _ROW.match(line))]
    known = {name: load_pipeline(path) for name, path in recipes().items() if name in names}
    cells = {name: _cell([run for run in runs if _is_of(run, pipeline)]) for name, pipeline in known.items()}
    filled = [name for name, cell in cells.items() if cell]
    if not filled:
        raise UsageError(
            "none of the runs is a student of one of the table's recipes", "see `kdcache pipelines list` for them"
        )

    def row(line: str) -> str:
        found = _ROW.match(line)
        if found is None or found[1] not in filled:
            return line
        return f"{line[: line[:-1].rindex('|')]}| {cells[found[1]]} |"

    return "\n".join(row(line) for line in text.split("\n")), filled


def _is_of(run: RunRecord, recipe: Pipeline) -> bool:
    return run.trained.network == "student" and _pair(run.pipeline) == _pair(recipe)


def _pair(pipeline: Pipeline) -> tuple[str, str | None, str | None]:
    teacher = pipeline.teacher.model if isinstance(pipeline.teacher, TeacherSpec) else None
    return pipeline.dataset.name, teacher, pipeline.student.model if pipeline.student else None


def _cell(runs: Sequence[RunRecord]) -> str:
    by_loss: dict[str, list[RunRecord]] = {}
    for run in runs:
        if run.accuracy is not None:
            by_loss.setdefault(run.pipeline.loss.name, []).append(run)
    return "; ".join(_figure(loss, of_loss) for loss, of_loss in by_loss.items())


def _figure(loss: str, runs: Sequence[RunRecord]) -> str:
    mean = Mean.of(run.accuracy for run in runs)
    assert mean is not None, "the accuracy of each is known"  # noqa: S101  # and the type checker must be told
    spread = "" if mean.spread is None else f" ± {100 * mean.spread:.2f}"
    folder = os.path.commonpath([run.trained.name for run in runs])
    over = f"{len(runs)} seeds, " if len(runs) > 1 else ""
    return f"{loss} {100 * mean.mean:.2f}{spread} ({over}`{folder}`)"

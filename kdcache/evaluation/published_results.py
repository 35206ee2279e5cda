"""The last column of docs/RESULTS.md: test accuracies of own runs of the recipes, next to published figures."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from pathlib import Path

from kdcache.config.loader import load_pipeline
from kdcache.config.recipes import recipes
from kdcache.config.schema import Pipeline, TeacherSpec
from kdcache.errors import MismatchError, UsageError
from kdcache.evaluation.runs import Group, Mean, RunRecord, group_runs
from kdcache.runtime.atomic_write import open_atomic

_ROW = re.compile(r"^\| `([^`|]+)` \|.*\|$")


def read_results(path: Path) -> str:
    """Return the text of a file of results, its line endings as they are."""
    return path.read_bytes().decode("utf-8")


def write_results(path: Path, text: str) -> None:
    """Replace a file of results atomically; a link is followed, and the mode stays."""
    with open_atomic(path.resolve(), f".{os.getpid()}.partial") as file:
        file.write(text.encode("utf-8"))


def fill_results(text: str, runs: Sequence[RunRecord]) -> tuple[str, list[str]]:
    """Write the test accuracies of runs into the last cells of the table rows of their recipes.

    A run belongs to a recipe if data set, teacher and student are the same. Runs with identical settings and caches are
    averaged over their seeds; runs with other settings get a figure of their own, with the settings that differ. Two
    runs of one seed count once if their results are equal.

    Args:
        text: Markdown with table rows that begin with the name of a recipe in backticks.
        runs: runs of students; runs of teachers and runs without a test split are ignored.

    Returns:
        The new text, and the names of the recipes whose cells were filled.

    Raises:
        UsageError: if no run belongs to a recipe of the table.
        MismatchError: if two runs with identical settings and seed have different results.
    """
    lines = text.splitlines(keepends=True)
    names = [match[1] for line in lines if (match := _ROW.match(line.rstrip("\r\n")))]
    known = {name: load_pipeline(path) for name, path in recipes().items() if name in names}
    cells = {name: _cell([run for run in runs if _belongs_to(run, pipeline)]) for name, pipeline in known.items()}
    filled = [name for name, cell in cells.items() if cell]
    if not filled:
        raise UsageError(
            "none of the runs is a student of one of the table's recipes", "see `kdcache pipelines list` for them"
        )
    return "".join(_filled(line, cells) for line in lines), filled


def _filled(line: str, cells: dict[str, str]) -> str:
    content = line.rstrip("\r\n")
    match = _ROW.match(content)
    if match is None or not cells.get(match[1]):
        return line
    return f"{content[: content[:-1].rindex('|')]}| {cells[match[1]]} |{line[len(content) :]}"


def _belongs_to(run: RunRecord, recipe: Pipeline) -> bool:
    return run.network_ref.network == "student" and _names(run.pipeline) == _names(recipe)


def _names(pipeline: Pipeline) -> tuple[str, str | None, str | None]:
    """Return the names of data set, teacher and student."""
    teacher = pipeline.teacher.model if isinstance(pipeline.teacher, TeacherSpec) else None
    return pipeline.dataset.name, teacher, pipeline.student.model if pipeline.student else None


def _cell(runs: Sequence[RunRecord]) -> str:
    tested = [run for run in runs if run.accuracy is not None]
    figures = [
        _figure(group, _one_per_seed([tested[index] for index in group.members])) for group in group_runs(tested)
    ]
    return "; ".join(figures).replace("|", r"\|")


def _one_per_seed(runs: Sequence[RunRecord]) -> list[RunRecord]:
    """Drop further runs of a seed.

    Raises:
        MismatchError: if their results are different.
    """
    by_seed: dict[int, RunRecord] = {}
    for run in runs:
        first = by_seed.setdefault(run.seed, run)
        if first.accuracy != run.accuracy:
            raise MismatchError(
                f"{first.network_ref.name} and {run.network_ref.name} have the same settings and seed {run.seed}, "
                f"but different test accuracies, {first.accuracy:.2%} and {run.accuracy:.2%}",
                "pass only one of them",
            )
    return [*by_seed.values()]


def _figure(group: Group, runs: Sequence[RunRecord]) -> str:
    """Return loss, differing settings, mean ± standard deviation in percent, number of seeds, and folder."""
    mean = Mean.of(run.accuracy for run in runs)
    assert mean is not None, "runs without a test accuracy are ignored"  # noqa: S101
    spread = "" if mean.spread is None else f" ± {100 * mean.spread:.2f}"
    settings = ", ".join([group.loss, *(f"{key} {value}" for key, value in group.differences.items())])
    seeds = f"{len(runs)} seeds, " if len(runs) > 1 else ""
    return f"{settings} {100 * mean.mean:.2f}{spread} ({seeds}`{_folder([run.network_ref.name for run in runs])}`)"


def _folder(names: Sequence[str]) -> str:
    """Return the deepest folder that contains all runs."""
    return os.path.commonpath(names if not any(map(os.path.isabs, names)) else map(os.path.abspath, names)) or "."

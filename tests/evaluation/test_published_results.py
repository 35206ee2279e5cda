"""Runs of recipes find their cells in a table of results, and touch no other."""

from __future__ import annotations

import json
import statistics
from pathlib import Path

import pytest
from helpers.cli import ok, refused
from helpers.paths import ROOT

import kdcache
from kdcache.errors import UsageError
from kdcache.evaluation.published_results import fill_results
from kdcache.evaluation.runs import read_run

RECIPE = ROOT / "pipelines" / "digits.yaml"
RESULTS = ROOT / "docs" / "RESULTS.md"
TABLE = """# Results

| recipe | teacher | kdcache |
|---|---|---|
| `digits` | 93.4 | |
| `cifar100-vgg13-vgg8` | 74.64 | as it was |

No `digits` | here.
"""


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Two seeds of a student of the digits."""
    folder = tmp_path_factory.mktemp("runs") / "loss=ce"
    for seed in range(2):
        chosen = [f"student.train.seed={seed}", "student.train.epochs=2"]
        kdcache.train_student(kdcache.load_pipeline(RECIPE, chosen, "ce"), None, folder / f"seed{seed}")
    return [folder / f"seed{seed}" for seed in range(2)]


def test_the_cell_says_mean_spread_and_where_it_comes_from(runs: list[Path]) -> None:
    text, filled = fill_results(TABLE, [read_run(run) for run in runs])
    assert filled == ["digits"]
    accuracies = [100 * json.loads((run / "metrics.json").read_text())["test"]["accuracy"] for run in runs]
    figure = f"ce {statistics.mean(accuracies):.2f} ± {statistics.stdev(accuracies):.2f}"
    expected = f"| `digits` | 93.4 | {figure} (2 seeds, `{runs[0].parent}`) |"
    assert text.split("\n") == [expected if "93.4" in line else line for line in TABLE.split("\n")]
    one, _ = fill_results(text, [read_run(runs[1])])
    assert f"| `digits` | 93.4 | ce {accuracies[1]:.2f} (`{runs[1]}`) |" in one


def test_runs_of_no_recipe_are_refused(runs: list[Path]) -> None:
    other = [read_run(run) for run in runs]
    with pytest.raises(UsageError, match="none of the runs is a student of one of the table's recipes"):
        fill_results(RESULTS.read_text(encoding="utf-8"), other)
    student = other[0].pipeline.section("student").model_copy(update={"model": "small:cnn"})
    changed = other[0]._replace(pipeline=other[0].pipeline.model_copy(update={"student": student}))
    with pytest.raises(UsageError):
        fill_results(TABLE, [changed])


def test_the_command_fills_a_table(runs: list[Path], tmp_path: Path) -> None:
    table = tmp_path / "RESULTS.md"
    table.write_text(TABLE, encoding="utf-8")
    said = ok("report", *runs, "--results", table, "-o", tmp_path / "report.html")
    assert f"{table}: digits" in said
    assert "(2 seeds, " in table.read_text(encoding="utf-8")
    table.write_text("nothing", encoding="utf-8")
    refused(2, "report", *runs, "--results", table, "-o", tmp_path / "other.html")
    assert table.read_text(encoding="utf-8") == "nothing"
    assert not (tmp_path / "other.html").exists()


def test_every_row_of_the_published_results_is_a_recipe() -> None:
    from kdcache.config.recipes import recipes

    rows = [line.split("`")[1] for line in RESULTS.read_text(encoding="utf-8").splitlines() if line.startswith("| `")]
    assert len(rows) == 14
    assert set(rows) <= set(recipes())

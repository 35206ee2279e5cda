"""`kdcache report --results`: runs of recipes fill their cells in a table of results, and change nothing else."""

from __future__ import annotations

import json
import os
import statistics
from pathlib import Path
from typing import Any

import pytest
from helpers.cli import ok, refused
from helpers.paths import ROOT

import kdcache
from kdcache.errors import MismatchError, UsageError
from kdcache.evaluation.published_results import fill_results, read_results, write_results
from kdcache.evaluation.runs import RunRecord, read_run

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


def test_a_cell_has_mean_spread_seeds_and_folder(runs: list[Path]) -> None:
    text, filled = fill_results(TABLE, [read_run(run) for run in runs])
    assert filled == ["digits"]
    accuracies = [100 * json.loads((run / "metrics.json").read_text())["test"]["accuracy"] for run in runs]
    figure = f"ce {statistics.mean(accuracies):.2f} ± {statistics.stdev(accuracies):.2f}"
    expected = f"| `digits` | 93.4 | {figure} (2 seeds, `{runs[0].parent}`) |"
    assert text.split("\n") == [expected if "93.4" in line else line for line in TABLE.split("\n")]
    one, _ = fill_results(text, [read_run(runs[1])])
    assert f"| `digits` | 93.4 | ce {accuracies[1]:.2f} (`{runs[1]}`) |" in one


def changed(run: RunRecord, seed: int, accuracy: float, **train: Any) -> RunRecord:
    """A run with another seed, test accuracy and training options."""
    student = run.pipeline.section("student")
    options = student.train.model_copy(update={**train, "seed": seed})
    student = student.model_copy(update={"train": options})
    ref = run.network_ref
    return run._replace(
        network_ref=type(ref)(f"runs/{'-'.join(map(str, train.values()))}/seed{seed}", ref.pipeline, ref.network),
        pipeline=run.pipeline.model_copy(update={"student": student}),
        seed=seed,
        accuracy=accuracy,
    )


def cell(runs: list[RunRecord]) -> str:
    text, _ = fill_results(TABLE, runs)
    return next(line for line in text.splitlines() if line.startswith("| `digits`")).split(" | ", 2)[2]


def test_runs_with_different_settings_are_not_averaged(runs: list[Path]) -> None:
    run = read_run(runs[0])
    short = [changed(run, seed, accuracy, epochs=2) for seed, accuracy in ((0, 0.03), (1, 0.05))]
    long = [changed(run, seed, accuracy, epochs=9) for seed, accuracy in ((0, 0.93), (1, 0.94), (2, 0.95))]
    low = changed(run, 0, 0.5, epochs=2, lr=0.001)
    expected = "ce, epochs 9 94.00 ± 1.00 (3 seeds, `runs/9`) |"
    assert cell(long).replace("ce ", "ce, epochs 9 ") == expected
    assert cell([*short, *long]) == f"ce, epochs 2 4.00 ± 1.41 (2 seeds, `runs/2`); {expected}"
    assert cell([low, short[0]]) == (
        f"ce, lr 0.001 50.00 (`runs/2-0.001/seed0`); ce, lr {short[0].pipeline.section('student').train.lr} 3.00 "
        "(`runs/2/seed0`) |"
    )
    halved = run.pipeline.dataset.model_copy(update={"validation_fraction": 0.5})
    other = run._replace(pipeline=run.pipeline.model_copy(update={"dataset": halved}), accuracy=0.25)
    assert "ce, validation_fraction 0.5 25.00" in cell([run, other])


def test_a_seed_counts_once(runs: list[Path]) -> None:
    run = read_run(runs[0])
    first, second = changed(run, 0, 0.9), changed(run, 1, 0.92)
    copy = first._replace(network_ref=second.network_ref)
    assert cell([first, second, copy]) == "ce 91.00 ± 1.41 (2 seeds, `runs`) |"
    assert cell([first, copy]) == "ce 90.00 (`runs//seed0`) |".replace("//", "/")
    with pytest.raises(MismatchError, match="the same settings and seed 0, but different test accuracies"):
        fill_results(TABLE, [first, second, first._replace(accuracy=0.8)])


def test_runs_in_several_folders_and_names_with_bars(runs: list[Path]) -> None:
    run = read_run(runs[0])

    def at(name: str, seed: int) -> RunRecord:
        ref = run.network_ref
        return run._replace(network_ref=type(ref)(name, ref.pipeline, ref.network), seed=seed)

    assert "(2 seeds, `.`)" in cell([at("one/s", 0), at("two/s", 1)])
    assert f"(2 seeds, `{Path.cwd()}`)" in cell([at("one/s", 0), at(str(Path("two/s").absolute()), 1)])
    assert r"(`a\|b`)" in cell([at("a|b", 0)])


@pytest.mark.parametrize("newline", ["\n", "\r\n"])
def test_the_file_is_replaced_atomically_and_keeps_its_line_endings_and_mode(
    newline: str, runs: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file, link = tmp_path / "RESULTS.md", tmp_path / "link.md"
    file.write_bytes(TABLE.replace("\n", newline).encode())
    file.chmod(0o640)
    link.symlink_to(file)
    text, _ = fill_results(read_results(link), [read_run(runs[0])])

    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", interrupted)
        with pytest.raises(KeyboardInterrupt):
            write_results(link, text)
    assert file.read_bytes() == TABLE.replace("\n", newline).encode()
    write_results(link, text)
    assert link.is_symlink()
    assert file.stat().st_mode & 0o777 == 0o640
    lines, before = file.read_bytes().split(newline.encode()), TABLE.encode().split(b"\n")
    assert [line for line in lines if line not in before] == [lines[4]]
    assert b"\r" not in lines[4]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["RESULTS.md", "link.md"]


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
    output = ok("report", *runs, "--results", table, "-o", tmp_path / "report.html")
    assert f"{table}: digits" in output
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

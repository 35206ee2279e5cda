"""Processes of torchrun that share the steps of a language model."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch
from helpers.language_training import (
    ALL,
    LOSSES,
    WAYS,
    by_the_trainer,
    cache_of,
    check_same,
    loss_of,
    taught,
    text_pipeline,
)
from helpers.processes import exit_code
from helpers.ranks import run_with_torchrun
from helpers.trainers import meeting_place, together

from kdcache import open_cache

SHARED = ["kd", "ka+dtd", "cwsm", "ctkd", "ce"]


def as_a_rank(rank: int, environment: dict[str, str], out: Path, which: list[int], names: list[str]) -> None:
    os.environ.update(environment)
    teacher = open_cache(out / "t.kdcache").sequences()
    found = {
        (name, way): tuple(by_the_trainer(teacher, which, loss_of(**LOSSES[name]), **WAYS[way]))
        for name in names
        for way in ("packed", "micro-batches")
    }
    torch.save(found, out / f"{rank}.pt")


@pytest.mark.parametrize(("count", "which", "names"), [(2, ALL, SHARED), (3, [0, 3], ["kd", "ka+dtd"])])
def test_processes_that_share_a_step_give_what_one_gives(
    count: int, which: list[int], names: list[str], tmp_path: Path
) -> None:
    """Also where one of them has no sequences of the step, or sequences without a taught position."""
    teacher = cache_of(taught(), tmp_path / "t.kdcache", top_k=8, tail="lowrank", rank=6, pilot_rows=60).sequences()
    store = meeting_place()
    processes = together(store, count, as_a_rank, tmp_path, which, names)
    assert [exit_code(process) for process in processes] == [0] * count
    for name in names:
        expected = by_the_trainer(teacher, which, loss_of(**LOSSES[name]))
        for rank in range(count):
            found = torch.load(tmp_path / f"{rank}.pt", weights_only=True)
            for way in ("packed", "micro-batches"):
                check_same(type(expected)(*found[name, way]), expected)


def test_processes_of_torchrun_write_one_run(tmp_path: Path) -> None:
    cache_of(taught(), tmp_path / "t.kdcache")
    (tmp_path / "text.yaml").write_text(text_pipeline(train={"held_out_fraction": 0.2}).to_yaml())
    arguments = [tmp_path / "text.yaml", "--cache", tmp_path / "t.kdcache", "-o", tmp_path / "run"]
    done = run_with_torchrun(2, ["train-student", *arguments, "--device", "cpu", "--json"])
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["best"]["epoch"] >= 1
    assert json.loads((tmp_path / "run" / "metrics.json").read_text())["epochs"] == 2
    assert sorted(path.name for path in tmp_path.iterdir()) == ["run", "t.kdcache", "text.yaml"]

"""Caches of which only some views were pulled: every command works on these, or says which others it needs."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch
from helpers.cli import kdcache, npz_recipe, ok, refused

from kdcache import open_cache
from kdcache.cache.inspect.diff import compare
from kdcache.cache.inspect.self_fidelity import measure_itself
from kdcache.cache.inspect.summary import take_census
from kdcache.cache.push_pull import pull
from kdcache.cache.remote.mirror import PULLING
from kdcache.curate.select import select
from kdcache.errors import CorruptError, IncompleteError

FLOAT = "ToImage: {}, ToDtype: {dtype: float32, scale: true}"
"""Steps that turn the pixels into numbers from 0 to 1."""


class Work(NamedTuple):
    """A cache of three views, what was pulled of it, and a cache of other samples."""

    recipe: Path
    whole: Path
    first: Path
    last: Path
    other: Path


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Work:
    folder = tmp_path_factory.mktemp("partial")
    recipe = npz_recipe(folder)
    recipe.write_text(
        recipe.read_text()
        + "cache: {views: 3, top_k: 1, tail: uniform, shard_rows: 16, pilot_rows: 16}\n"
        + f"transform: [RandomHorizontalFlip: {{p: 0.5}}, {FLOAT}]\neval_transform: [{FLOAT}]\n"
    )
    ok("train-teacher", recipe, "-o", folder / "t")
    whole, other = folder / "whole.kdcache", folder / "other.kdcache"
    ok("dump-teacher", recipe, "-o", whole)
    select(open_cache(whole), other, samples=np.arange(20))
    for name, views in (("first", "0"), ("last", "2")):
        ok("pull", f"file://{whole}", folder / name, "--views", views)
    return Work(recipe, whole, folder / "first", folder / "last", other)


Command = Callable[[Work, Path, Path], list[object]]
"""(all caches, the partial one, a new name) -> arguments of a command."""

WORKS: dict[str, Command] = {
    "info": lambda work, part, out: ["info", part],
    "info --fidelity": lambda work, part, out: ["info", part, "--fidelity"],
    "summarize": lambda work, part, out: ["summarize", part],
    "diff with the whole": lambda work, part, out: ["diff", part, work.whole],
    "diff with itself": lambda work, part, out: ["diff", work.whole, part],
    "diff with other views": lambda work, part, out: ["diff", work.first, work.last],
    "card": lambda work, part, out: ["card", part],
}
NEEDS_ALL: dict[str, Command] = {
    "verify": lambda work, part, out: ["verify", part],
    "verify with the data": lambda work, part, out: ["verify", part, work.recipe, "--replay", "--teacher"],
    "convert": lambda work, part, out: ["convert", part, "-o", f"{out}.npz"],
    "convert --to": lambda work, part, out: ["convert", part, "--to", "tinyvit", "-o", out],
    "select": lambda work, part, out: ["select", part, "--classes", "0,1", "-o", out],
    "merge": lambda work, part, out: ["merge", part, work.other, "-o", out],
    "push": lambda work, part, out: ["push", part, f"file://{out}"],
    "extend": lambda work, part, out: [
        "dump-teacher", work.recipe, "--extend", part, "-o", out, "--set", "cache.views=4"
    ],
}  # fmt: skip
NEEDS_THE_FIRST: dict[str, Command] = {
    "select --views": lambda work, part, out: ["select", part, "--views", "0", "-o", out],
    "select --samples": lambda work, part, out: ["select", part, "--views", "0", "--samples", "0-9", "-o", out],
    "train-student": lambda work, part, out: ["train-student", work.recipe, "--cache", part, "-o", out],
}


@pytest.mark.parametrize("command", WORKS)
@pytest.mark.parametrize("which", ["first", "last"])
def test_what_looks_at_rows_looks_at_those_that_are_here(work: Work, which: str, command: str, tmp_path: Path) -> None:
    assert ok(*WORKS[command](work, getattr(work, which), tmp_path / "new"))


@pytest.mark.parametrize("command", [*NEEDS_ALL, *NEEDS_THE_FIRST])
@pytest.mark.parametrize("which", ["first", "last"])
def test_what_needs_other_views_names_them_and_the_pull(work: Work, which: str, command: str, tmp_path: Path) -> None:
    part, out = getattr(work, which), tmp_path / "new"
    arguments = (NEEDS_ALL | NEEDS_THE_FIRST)[command](work, part, out)
    if command in NEEDS_THE_FIRST and which == "first":
        ok(*arguments)
        return
    done = kdcache(*arguments)
    assert done.exit_code == 3, done.output
    assert "Traceback" not in done.output
    assert "delete" not in done.stderr
    assert "kdcache pull URL" in done.stderr
    missing = "view 0" if command in NEEDS_THE_FIRST else "views 1, 2" if which == "first" else "views 0, 1"
    assert missing in done.stderr
    assert not out.exists()


def test_a_relative_path_is_printed_as_it_was_given(
    work: Work, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert re.search(r"cache +new\.kdcache\n", ok("select", work.whole, "--views", "0", "-o", "new.kdcache"))
    assert refused(2, "select", work.whole, "--views", "0", "-o", "new.kdcache").startswith("error: new.kdcache is")


def test_the_views_that_are_here_are_compared_with_data_and_teacher(work: Work) -> None:
    done = kdcache("verify", work.last, work.recipe, "--replay", "--teacher", "--json")
    found = json.loads(done.stdout)
    assert done.exit_code == 3
    assert found["problems"] == []
    assert found["replay"]["checked"] > 0
    assert {one["view"] for one in found["teacher"]} == {2}


def test_the_figures_are_those_of_the_views(work: Work) -> None:
    whole, last = open_cache(work.whole), open_cache(work.last)
    of_last, of_two = take_census(last), take_census(open_cache(work.whole, views=[0, 1]))
    together = take_census(whole)
    assert of_last.rows + of_two.rows == together.rows
    assert np.array_equal(np.add(of_last.confidence, of_two.confidence), together.confidence)
    for one, two, both in zip(of_last.classes, of_two.classes, together.classes, strict=True):
        assert one.samples == two.samples == both.samples
        assert (one.sharpness or 0) + 2 * (two.sharpness or 0) == pytest.approx(3 * (both.sharpness or 0))
    assert measure_itself(last) == [one for one in measure_itself(whole) if one.view == 2]
    agreement = compare(last, whole).agreement
    assert agreement is not None
    assert (agreement.rows, agreement.same_class, {row.view for row in agreement.worst}) == (len(last), 1, {2})


@pytest.mark.parametrize("left", ["commits/1/0.json", "data.zarr/logsumexp/c/1/0"])
def test_an_interrupted_pull_of_more_views_leaves_those_that_were_here(work: Work, left: str, tmp_path: Path) -> None:
    part = tmp_path / "part"
    shutil.copytree(work.first, part)
    (part / PULLING).write_text(f"{open_cache(part).manifest.digest}\n")
    (part / left).parent.mkdir(parents=True)
    shutil.copy(work.whole / left, part / left)
    assert open_cache(part).views == (0,)
    assert "views 1, 2" in refused(3, "push", part, f"file://{tmp_path}/pushed")
    assert pull(f"file://{work.whole}", part, views=[0, 1]).views == (0, 1)
    assert not (part / PULLING).exists()
    assert open_cache(part).views == (0, 1)


def test_a_file_that_is_gone_is_damage(work: Work, tmp_path: Path) -> None:
    part = tmp_path / "part"
    shutil.copytree(work.first, part)
    (part / "data.zarr/logsumexp/c/0/1").unlink()
    with pytest.raises(CorruptError, match=r"logsumexp/c/0/1 is missing"):
        open_cache(part)
    refused(5, "summarize", part)


@pytest.mark.parametrize(
    "views", [0, -1, True, False, "0", b"0", [], [-1], [3], [0, 3], [True, 7], [0.0], ["0"], [None], 1.0, {"a": 1}]
)
def test_odd_views_are_refused(work: Work, views: object) -> None:
    done = kdcache_error(lambda: open_cache(work.whole, views=views))  # type: ignore[arg-type]
    assert done is not None
    assert "Traceback" not in done


def kdcache_error(function: Callable[[], object]) -> str | None:
    from kdcache.errors import UsageError

    with pytest.raises(UsageError) as raised:
        function()
    return f"{raised.value.what} {raised.value.fix}"


@pytest.mark.parametrize(("views", "there"), [(1, (0,)), (99, (0, 1, 2)), (np.int64(1), (0,)), ([2, 0, 2], (0, 2)),
                                              (np.array([1]), (1,)), (range(2), (0, 1)), ({2}, (2,)),
                                              (torch.tensor([1, 2]), (1, 2))])  # fmt: skip
def test_views_of_any_kind_of_integers(work: Work, views: object, there: tuple[int, ...]) -> None:
    assert open_cache(work.whole, views=views).views == there  # type: ignore[arg-type]


def test_a_view_that_was_not_pulled(work: Work) -> None:
    with pytest.raises(IncompleteError, match=r"holds view 0 of 3, not view 1"):
        open_cache(work.first, views=[0, 1])
    with pytest.raises(IncompleteError, match=r"holds view 2 of 3, not view 0"):
        open_cache(work.last, views=1)

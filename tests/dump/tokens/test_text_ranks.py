"""A dump of texts by one process or several, whole or killed: the same cache, to the byte."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest
from helpers.cli import ok
from helpers.processes import exit_code
from helpers.ranks import contents, ranks
from helpers.texts import RECORDS, write_lines

from kdcache import Cache


def test_two_processes_make_the_cache_of_one(pipeline: Path, cache: Cache, tmp_path: Path) -> None:
    out = tmp_path / "c.kdcache"
    with ranks(2, pipeline, out) as processes:
        assert [exit_code(process) for process in processes] == [0, 0]
    assert contents(out) == contents(cache.path)


@pytest.mark.parametrize(
    ("commit", "after"),
    [(".partial", True), ("/commits/0/1.json.partial", False), ("/manifest.json.partial", False)],
)
def test_killed_at_a_commit_it_is_resumed(
    commit: str, after: bool, pipeline: Path, cache: Cache, tmp_path: Path
) -> None:
    out = tmp_path / "c.kdcache"
    with ranks(1, pipeline, out, (commit, after)) as (process,):
        assert exit_code(process) == -signal.SIGKILL
    with ranks(2, pipeline, out) as processes:
        assert [exit_code(process) for process in processes] == [0, 0]
    assert contents(out) == contents(cache.path)


def test_a_rank_that_is_killed_ends_the_other_and_is_resumed(pipeline: Path, cache: Cache, tmp_path: Path) -> None:
    out = tmp_path / "c.kdcache"
    with ranks(2, pipeline, out, ("/commits/0/1.json.partial", False)) as processes:
        assert sorted(exit_code(process) for process in processes) == [-signal.SIGKILL, 3]
    ok("dump-teacher", pipeline, "-o", out, "--device", "cpu")
    assert contents(out) == contents(cache.path)


def test_a_rank_with_other_texts_is_refused(pipeline: Path, tmp_path: Path) -> None:
    other = write_lines(tmp_path / "texts.jsonl", [*RECORDS[:-1], {"text": "another one"}])
    mine = tmp_path / "mine.yaml"
    mine.write_text(pipeline.read_text().replace(str(pipeline.parent / "texts.jsonl"), "${TEXTS}"))
    out = tmp_path / "c.kdcache"
    environments = {0: {"TEXTS": str(pipeline.parent / "texts.jsonl")}, 1: {"TEXTS": str(other)}}
    with ranks(2, mine, out, environments=environments) as processes:
        assert [exit_code(process) for process in processes] == [3, 4]
    assert "this rank's sequences have the digest sha256:" in (tmp_path / "said-1").read_text()

"""One process or several, whole or killed at any moment: the same cache, to the byte; and no rank is left waiting."""

from __future__ import annotations

import os
import random
import signal
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from subprocess import CompletedProcess

import pytest
from click.testing import CliRunner
from helpers.processes import command_line, exit_code, in_a_process, recipe, until
from helpers.ranks import as_rank, contents, ranks, real_torchrun, torchrun
from torch.distributed import TCPStore  # type: ignore[attr-defined]  # torch does not list it

from kdcache import Cache, open_cache
from kdcache.cache.planner import pilot_ids
from kdcache.cli import main
from kdcache.errors import IncompleteError
from kdcache.runtime.distributed import Ranks

SHARDS = [(view, shard) for view in (0, 1) for shard in (0, 1)]
KILL = "os.kill(os.getpid(), signal.SIGKILL)"


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return recipe(tmp_path_factory.mktemp("recipe"))


@pytest.fixture(scope="module")
def whole(pipeline: Path, tmp_path_factory: pytest.TempPathFactory) -> Cache:
    """The cache of one process that was never interrupted."""
    out = tmp_path_factory.mktemp("whole") / "whole.kdcache"
    assert alone(pipeline, out) == 0
    cache = open_cache(out)
    assert {(v, s) for v in range(2) for s in range(cache.manifest.plan.shards)} == set(SHARDS)
    assert cache.manifest.plan.encoding.rank == 2
    return cache


def alone(pipeline: Path, out: Path) -> int:
    """The exit code of one process, this one."""
    return CliRunner().invoke(main, ["dump-teacher", str(pipeline), "-o", str(out), "--device", "cpu"]).exit_code


def check_goes_on(out: Path, pipeline: Path, whole: Cache, count: int) -> None:
    """Check that what a kill left is not a cache unless it is sealed, and that `count` processes complete it."""
    if out.exists() and not (out / "manifest.json").exists():
        with pytest.raises(IncompleteError):
            open_cache(out)
    if count == 1:
        assert alone(pipeline, out) == 0
    else:
        with ranks(count, pipeline, out) as processes:
            assert [exit_code(process) for process in processes] == [0] * count
    assert contents(out) == contents(whole.path)
    assert open_cache(out).manifest.digest == whole.manifest.digest
    assert [path.name for path in out.parent.iterdir() if not path.name.startswith("said")] == [out.name]


MANIFEST = "/manifest.json.partial"
COMMITS = [".partial", *(f"/commits/{view}/{shard}.json.partial" for view, shard in SHARDS), MANIFEST, "/plan.json"]
MOMENTS = [(commit, after) for commit in COMMITS for after in (False, True)]
"""Just before and just after something is renamed or removed that settles the plan, a shard or the cache."""


def test_killed_at_every_commit_one_after_the_other_it_ends_with_the_same_cache(
    pipeline: Path, whole: Cache, tmp_path: Path
) -> None:
    out = tmp_path / "again" / "c.kdcache"
    out.parent.mkdir()
    for commit, after in MOMENTS:
        with ranks(1, pipeline, out, (commit, after)) as (process,):
            assert exit_code(process) == -signal.SIGKILL, (commit, after)
        assert settled(out, commit) == after
        if (commit, after) != MOMENTS[-1]:
            (out / "manifest.json").unlink(missing_ok=True)  # with it there is nothing to go on with
    check_goes_on(out, pipeline, whole, 2)


def test_a_rank_or_all_of_them_killed_at_any_commit_it_goes_on_to_the_same_cache(
    pipeline: Path, whole: Cache, tmp_path: Path
) -> None:
    for number, (commit, after) in enumerate(MOMENTS):
        out = tmp_path / str(number) / "c.kdcache"
        out.parent.mkdir()
        together = number % 3 == 0
        with ranks(2, pipeline, out, (commit, after)) as processes:
            if together:
                until(lambda: not all(process.is_alive() for process in processes))
                for process in processes:
                    process.kill()
            codes = [exit_code(process) for process in processes]
        sealed = {0} if (commit, after) == MOMENTS[-1] else set()
        assert -signal.SIGKILL in codes
        assert set(codes) <= {-signal.SIGKILL, 3} | sealed, "those that are left say that another one has ended"
        assert settled(out, commit) == after
        check_goes_on(out, pipeline, whole, 1 + number % 2)


def settled(out: Path, commit: str) -> bool:
    """Whether something was renamed, or removed, that had its name before it was settled."""
    path = Path(f"{out}{commit}")
    return not path.exists() if path.suffix == ".json" else path.with_suffix("").exists()


@pytest.mark.parametrize("count", [1, 2])
def test_killed_at_any_moment_it_goes_on_to_the_same_cache(
    count: int, pipeline: Path, whole: Cache, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    began = time.monotonic()
    with ranks(count, pipeline, tmp_path / "first.kdcache") as processes:
        assert [exit_code(process) for process in processes] == [0] * count
    a_run = time.monotonic() - began
    draw = random.Random(count)  # noqa: S311
    for attempt in range(request.config.getoption("--kills")):
        out = tmp_path / str(attempt) / "c.kdcache"
        out.parent.mkdir()
        with ranks(count, pipeline, out) as processes:
            time.sleep(draw.uniform(0, a_run))
            victims = draw.choice([processes, *([process] for process in processes)])
            for victim in victims:
                victim.kill()
            for process in processes:
                if process not in victims:
                    process.terminate()  # as torchrun does
            codes = [exit_code(process) for process in processes]
        assert set(codes) <= {-signal.SIGKILL, -signal.SIGTERM, 3, 0}, (out.parent / "said-0").read_text()
        check_goes_on(out, pipeline, whole, 1 + (count + attempt) % 2)


# One of them cannot go on.


def ended(pipeline: Path, out: Path, environments: dict[int, dict[str, str]], count: int = 2) -> list[tuple[int, str]]:
    """Of each rank: its exit code, and what it said."""
    with ranks(count, pipeline, out, environments=environments) as processes:
        codes = [exit_code(process) for process in processes]
    return [(code, (out.parent / f"said-{rank}").read_text()) for rank, code in enumerate(codes)]


def message(said: str) -> str:
    return said[said.index("error: ") :]


def test_what_the_first_refuses_all_of_them_say(pipeline: Path, tmp_path: Path) -> None:
    out = tmp_path / "letters"
    out.mkdir()
    (out / "letter").write_text("Dear")
    first, *others = ended(pipeline, out, {}, count=3)
    assert first[0] == 2
    assert "exists and is not a cache" in message(first[1])
    assert [(code, message(said)) for code, said in others] == [(2, message(first[1]))] * 2


def test_a_pilot_with_nan_ends_all_of_them_and_leaves_nothing(pipeline: Path, tmp_path: Path) -> None:
    spoilt = {"SAMPLE": "9", "HAPPENS": "logits[here] = float('nan')"}
    assert 9 in pilot_ids(12, 8)
    (code, said), other = ended(pipeline, tmp_path / "c.kdcache", {0: spoilt})
    assert code == 5
    assert "for sample 9 (1 of the" in message(said)
    assert (other[0], message(other[1])) == (5, message(said))
    assert not list(tmp_path.glob("c.kdcache*"))


def test_a_crash_of_the_first_before_the_others_begin_ends_them_too(pipeline: Path, tmp_path: Path) -> None:
    crash = {"SAMPLE": "9", "HAPPENS": "raise RuntimeError('out of memory')"}
    first, *others = ended(pipeline, tmp_path / "c.kdcache", {0: crash}, count=3)
    assert first[0] == 1
    assert "out of memory" in first[1]
    assert [code for code, _ in others] == [3, 3]
    assert all("another rank has ended" in message(said) for _, said in others)


def test_nan_in_the_shard_of_one_ends_the_others_and_can_be_gone_on_with(
    pipeline: Path, whole: Cache, tmp_path: Path
) -> None:
    # Of (view 0, shard 0), (0, 1), (1, 0), (1, 1) the second rank has the second and the last: samples 8 to 11. It ends
    # in the second, and the first rank makes the last.
    out = tmp_path / "c.kdcache"
    spoilt = {"SAMPLE": "10", "HAPPENS": "logits[here] = float('nan')"}
    assert 10 not in pilot_ids(12, 8)
    (first, said_first), (second, said_second) = ended(pipeline, out, {1: spoilt})
    assert (first, second) == (3, 5)
    assert "for sample 10 (1 of the" in message(said_second)
    assert "another rank has ended" in message(said_first)
    with pytest.raises(IncompleteError, match="1 of its 4 shards"):
        open_cache(out)
    check_goes_on(out, pipeline, whole, 1)


def test_a_rank_with_another_teacher_is_refused(pipeline: Path, whole: Cache, tmp_path: Path) -> None:
    out = tmp_path / "c.kdcache"
    (first, _), (second, said) = ended(pipeline, out, {1: {"SEED": "2"}})
    assert (first, second) == (3, 4)
    assert whole.manifest.plan.teacher.weights_digest in message(said)
    check_goes_on(out, pipeline, whole, 2)


def impatient(said: Path, environment: dict[str, str], *arguments: object) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("kdcache.runtime.distributed._START_TIMEOUT", timedelta(seconds=1))
        command_line(said, environment, *arguments)


def test_a_rank_that_never_comes_is_not_waited_for_for_ever(pipeline: Path, tmp_path: Path) -> None:
    store = TCPStore("localhost", 0, is_master=True, wait_for_workers=False)
    said, out = tmp_path / "said", tmp_path / "c.kdcache"
    process = in_a_process(impatient, said, as_rank(0, 2, store), "dump-teacher", pipeline, "-o", out)
    assert exit_code(process) == 3
    assert "another rank has ended or did not start" in message(said.read_text())


def test_ctrl_c_ends_all_of_them(pipeline: Path, whole: Cache, tmp_path: Path) -> None:
    out = tmp_path / "c.kdcache"
    slow = {"SAMPLE": "10", "HAPPENS": "time.sleep(3600)"}
    with ranks(2, pipeline, out, environments={1: slow}) as processes:
        until(lambda: len(list(out.glob("commits/*/0.json"))) == 2)
        for process in processes:
            os.kill(process.pid or 0, signal.SIGINT)
        assert exit_code(processes[1]) == 130
        assert exit_code(processes[0]) in (3, 130)
    check_goes_on(out, pipeline, whole, 1)


# torchrun.


@pytest.mark.parametrize(("run", "count"), [(torchrun, 3), (real_torchrun, 2)])
def test_processes_of_torchrun_make_the_same_cache(
    run: Callable[..., CompletedProcess[str]], count: int, pipeline: Path, whole: Cache, tmp_path: Path
) -> None:
    done = run(count, pipeline, tmp_path / "c.kdcache")
    assert done.returncode == 0, done.stderr
    assert done.stdout.count(whole.manifest.digest) == 1, "the first one alone prints the result"
    assert contents(tmp_path / "c.kdcache") == contents(whole.path)


def test_two_processes_of_torchrun_go_on_when_one_was_killed(pipeline: Path, whole: Cache, tmp_path: Path) -> None:
    out = tmp_path / "c.kdcache"
    # The first rank has shard 0 of both views, the second shard 1 of both, and is killed in the first one it makes.
    killed = torchrun(2, pipeline, out, SAMPLE="10", HAPPENS=KILL)
    assert killed.returncode == 1
    with pytest.raises(IncompleteError, match=r"[2-4] of its 4 shards are missing"):
        open_cache(out)
    done = torchrun(2, pipeline, out)
    assert done.returncode == 0, done.stderr
    assert contents(out) == contents(whole.path)


def test_shards_are_dealt_out_evenly_and_each_to_one() -> None:
    for count in (1, 2, 3, 7):
        shares = [Ranks(rank, count).share(range(20)) for rank in range(count)]
        assert sorted(shard for share in shares for shard in share) == list(range(20))
        assert max(map(len, shares)) - min(map(len, shares)) <= 1

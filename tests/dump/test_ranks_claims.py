"""Shards are made by the ranks that are free: a slow rank holds up one shard, and a dead one those that it began."""

from __future__ import annotations

import signal
import threading
from pathlib import Path

import pytest
from click.testing import CliRunner
from helpers.processes import exit_code, recipe
from helpers.ranks import contents, ranks, torchrun
from torch.distributed import TCPStore  # type: ignore[attr-defined]  # torch does not list it

from kdcache import Cache, open_cache
from kdcache.cli import main
from kdcache.errors import IncompleteError
from kdcache.runtime.distributed import Ranks

SAMPLES, COUNT = 72, 4
SHARDS = 2 * SAMPLES // 8
KILL = "os.kill(os.getpid(), signal.SIGKILL)"
OF_SECOND, OF_LAST = "9", "30"
"""A sample of the first shard of the second rank, and one of that of the last rank."""


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return recipe(tmp_path_factory.mktemp("recipe"), SAMPLES)


@pytest.fixture(scope="module")
def whole(pipeline: Path, tmp_path_factory: pytest.TempPathFactory) -> Cache:
    """The cache of one process that was never interrupted."""
    out = tmp_path_factory.mktemp("whole") / "whole.kdcache"
    done = CliRunner().invoke(main, ["dump-teacher", str(pipeline), "-o", str(out), "--device", "cpu"])
    assert done.exit_code == 0, done.output
    return open_cache(out)


def slow(out: Path, others: int) -> dict[str, str]:
    """Environment of a rank that waits in its first shard until the others have committed so many."""
    made = f"len(list(__import__('pathlib').Path({str(out)!r}).glob('commits/*/*.json')))"
    return {"SAMPLE": OF_SECOND, "HAPPENS": f"while {made} < {others}: time.sleep(0.01)"}


def test_a_slow_and_a_dying_rank_and_the_same_command_again(pipeline: Path, whole: Cache, tmp_path: Path) -> None:
    out = tmp_path / "c.kdcache"
    dying = {"SAMPLE": OF_LAST, "HAPPENS": KILL}
    # All shards but those that these two have begun are made by the other two, or the slow rank would wait for ever.
    with ranks(COUNT, pipeline, out, environments={1: slow(out, SHARDS - 2), 3: dying}) as processes:
        assert [exit_code(process) for process in processes] == [3, 3, 3, -signal.SIGKILL]
    with pytest.raises(IncompleteError, match=f"1 of its {SHARDS} shards"):
        open_cache(out)
    with ranks(COUNT, pipeline, out) as processes:
        assert [exit_code(process) for process in processes] == [0] * COUNT
    assert contents(out) == contents(whole.path)


def test_a_slow_rank_makes_one_shard_and_the_others_the_rest(pipeline: Path, whole: Cache, tmp_path: Path) -> None:
    out = tmp_path / "c.kdcache"
    with ranks(COUNT, pipeline, out, environments={1: slow(out, SHARDS - 1)}) as processes:
        assert [exit_code(process) for process in processes] == [0] * COUNT
    assert contents(out) == contents(whole.path)
    assert open_cache(out).manifest.digest == whole.manifest.digest


def test_torchrun_starts_all_ranks_again_after_one_has_died(pipeline: Path, whole: Cache, tmp_path: Path) -> None:
    once = f"os.environ['TORCHELASTIC_RESTART_COUNT'] == '0' and {KILL}"
    out = tmp_path / "c.kdcache"
    done = torchrun(3, pipeline, out, "--max-restarts=1", SAMPLE="20", HAPPENS=once)
    assert done.returncode == 0, done.stderr
    assert "resuming" in done.stderr
    assert contents(out) == contents(whole.path)


@pytest.mark.parametrize("count", [1, 2, 5])
@pytest.mark.parametrize("n_items", [0, 3, 40])
def test_every_item_is_claimed_by_one_rank(count: int, n_items: int) -> None:
    server = TCPStore("localhost", 0, is_master=True, wait_for_workers=False)
    claimed: dict[int, list[int]] = {}

    def rank(number: int) -> None:
        store = TCPStore("localhost", server.port, is_master=False)
        claimed[number] = list(Ranks(number, count, store=store).claim(range(n_items), "work"))

    threads = [threading.Thread(target=rank, args=(number,)) for number in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(item for of_rank in claimed.values() for item in of_rank) == list(range(n_items))
    for number, of_rank in claimed.items():
        assert of_rank[:1] == list(range(n_items))[number : number + 1], "its first shard stays with a rank"


def test_a_rank_claims_no_more_than_it_has_begun() -> None:
    store = TCPStore("localhost", 0, is_master=True, wait_for_workers=False)
    slow, fast = (Ranks(number, 2, store=store).claim(range(10), "work") for number in range(2))
    assert [next(slow), next(slow)] == [0, 2]
    assert list(fast) == [1, 3, 5, 7, 9, 8, 6, 4]
    assert list(slow) == []


def test_work_with_another_name_is_claimed_anew() -> None:
    store = TCPStore("localhost", 0, is_master=True, wait_for_workers=False)
    ranks = Ranks(0, 2, store=store)
    assert list(ranks.claim(range(4), "first")) == [0, 2, 3]
    assert list(ranks.claim(range(4), "second")) == [0, 2, 3]


def test_without_a_store_each_rank_makes_its_share() -> None:
    assert [list(Ranks(rank, 3).claim(range(8), "work")) for rank in range(3)] == [[0, 3, 6], [1, 4, 7], [2, 5]]

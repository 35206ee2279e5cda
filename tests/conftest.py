"""What several files of tests share: a tiny data set in memory, and a tiny teacher whose logits are exact.

Pixels and weights are small multiples of 1/8: every product and every sum of them is exact in float32, so that a logit
has the same bits in whatever batch it is computed.
"""

from __future__ import annotations

import os

# Networks as small as these are slower on several threads, many times so where the cores are busy with other tests.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
from helpers.processes import FORKS
from helpers.tiny import TinyTeacher, tiny_samples

from kdcache.data.samples import Samples


@pytest.fixture
def samples() -> Samples:
    """37 images of 10 classes."""
    return tiny_samples()


@pytest.fixture
def teacher() -> TinyTeacher:
    """A teacher of 10 classes."""
    return TinyTeacher()


@pytest.fixture(autouse=True, scope="session")
def home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder for what kdcache keeps between runs, so that no test meets what the user's own runs have left."""
    folder = tmp_path_factory.mktemp("home")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("KDCACHE_HOME", str(folder))
        yield folder


SLOW = (
    "test_benchmarks",
    "test_docs",
    "test_ranks",
    "test_remote",
    "test_placement",
    "test_parallel",
    "test_dump_options",
    "test_faults",
    "test_examples",
)
"""Files that take longest, begun with, so that no process is left with one of them in the end."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: SLOW.index(item.path.stem) if item.path.stem in SLOW else len(SLOW))


def pytest_configure() -> None:
    # Each shard that is dumped waits for the disk some thirty times: most of the time that a small cache takes. Whether
    # all is flushed, and in order, test_faults.py sees from the calls; no kill of a process depends on it.
    if _has_room("/dev/shm"):  # noqa: S108
        os.environ.setdefault("PYTEST_DEBUG_TEMPROOT", "/dev/shm")  # noqa: S108


def _has_room(folder: str) -> bool:
    """For what three runs of the tests leave; programs are among it, and are started there."""
    try:
        there = os.statvfs(folder)
    except OSError:
        return False
    return there.f_bavail * there.f_frsize > 8 * 2**30 and not there.f_flag & os.ST_NOEXEC


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--kills", type=int, default=5, help="how often dump-teacher is killed at random moments")


if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    # As a shell has it in the background; all that tests start and then interrupt would be deaf as well.
    signal.signal(signal.SIGINT, signal.default_int_handler)

# One server serves all tests of a process, and the last list that it is given is the one that counts.
FORKS.set_forkserver_preload(
    [
        "pytest",
        "hypothesis",
        "click.testing",
        "aiohttp",
        "zarr",
        "accelerate",
        "torch.distributed",
        "kdcache.cache.parallel",
        "kdcache.cli",
        "kdcache.cli.dump_teacher",
        "kdcache.dump.dump",
        "kdcache.train.plots",
        "kdcache.train.sweep",
        "kdcache.train.train",
    ]
)

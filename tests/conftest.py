"""Fixtures that several test files use, markers, and the environment of all tests.

The pixels and weights of the tiny data set and teacher are small multiples of 1/8: every product and every sum of them
is exact in float32, so that a logit has the same bits in any batch.
"""

from __future__ import annotations

import os

# Networks as small as these are slower on several threads, by many times if the cores are busy with other tests.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
from helpers import measurements
from helpers.markers import markers_of
from helpers.pictures import drawn
from helpers.texts import write_teacher
from helpers.tiny import TinyTeacher, tiny_samples

from kdcache.data.samples import Samples


@pytest.fixture(scope="session")
def text_teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a tiny language model and its tokenizer."""
    return write_teacher(tmp_path_factory.mktemp("language_model") / "teacher")


@pytest.fixture
def samples() -> Samples:
    """Return 37 images of 10 classes."""
    return tiny_samples()


@pytest.fixture
def teacher() -> TinyTeacher:
    """Return a teacher of 10 classes."""
    return TinyTeacher()


@pytest.fixture(autouse=True, scope="session")
def home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Set the local folder of kdcache, so that tests do not see the files of the user's runs."""
    folder = tmp_path_factory.mktemp("home")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("KDCACHE_HOME", str(folder))
        yield folder


@pytest.fixture(autouse=True, scope="session")
def small_pictures() -> Iterator[None]:
    """Draw small pictures in place of those of caches and runs, of which there are thousands that nobody looks at."""
    with drawn(small=True):
        yield


@pytest.fixture(autouse=True, scope="session")
def brief_measurements() -> None:
    """Measure the speed of networks for a moment."""
    measurements.shorten()


@pytest.fixture
def real_pictures() -> Iterator[None]:
    """Draw the pictures that users get, in this process and in those that it forks."""
    with drawn(small=False):
        yield


_FIRST = (
    "test_benchmarks",
    "test_docs",
    "test_ranks",
    "test_sweep_cluster",
    "test_faults",
    "test_recipes",
    "test_remote",
    "test_resume",
    "test_parallel",
    "test_sweep",
    "test_identity",
    "test_dense_logits",
    "test_dump_outputs",
    "test_together",
    "test_examples",
    "test_same_rows",
    "test_boxes",
    "test_planner",
    "test_report",
    "test_dump_options",
    "test_records",
    "test_wheel",
)
"""Files that take longest, in the order in which they begin, so that no process is left with one of them at the end."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: _FIRST.index(item.path.stem) if item.path.stem in _FIRST else len(_FIRST))
    for item in items:
        for name in markers_of(item.path.stem, getattr(item, "originalname", item.name)):
            item.add_marker(name)


def pytest_configure() -> None:
    # Each shard of a dump is flushed about thirty times, which takes most of the time of a small cache. test_faults.py
    # checks from the calls that all is flushed, in order; no test that kills a process depends on it.
    if _has_room("/dev/shm"):  # noqa: S108
        os.environ.setdefault("PYTEST_DEBUG_TEMPROOT", "/dev/shm")  # noqa: S108


def _has_room(folder: str) -> bool:
    """Return whether a folder has space for what three test runs leave, and can hold programs."""
    try:
        found = os.statvfs(folder)
    except OSError:
        return False
    return found.f_bavail * found.f_frsize > 8 * 2**30 and not found.f_flag & os.ST_NOEXEC


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--kills", type=int, default=5, help="number of times dump-teacher is killed at random moments")


if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    # A shell sets this for processes in the background, and processes that tests start and interrupt would inherit it.
    signal.signal(signal.SIGINT, signal.default_int_handler)

"""What several files of tests share: a tiny data set in memory, and a tiny teacher whose logits are exact.

Pixels and weights are small multiples of 1/8: every product and every sum of them is exact in float32, so that a logit
has the same bits in whatever batch it is computed.
"""

from __future__ import annotations

import os

# Networks as small as these are slower on several threads, many times so where the cores are busy with other tests.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import multiprocessing
import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from multiprocessing.process import BaseProcess
from pathlib import Path
from threading import get_ident
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from kdcache.pipeline import Transform
from kdcache.samples import ArrayImages, Samples

FLIP: Transform = [{"RandomHorizontalFlip": {"p": 0.5}}]
"""A random transform, for more than one view."""


def tiny_samples(count: int = 37, num_classes: int = 10, labels: Sequence[int] | None = None) -> Samples:
    """`count` images [1, 4, 4]; pixel (0, 0) is the sample's id / 8, by which a teacher can tell what it was shown."""
    pixels = torch.randint(-8, 9, (count, 1, 4, 4), generator=torch.Generator().manual_seed(0)) / 8
    pixels[:, 0, 0, 0] = torch.arange(count) / 8
    if labels is None:
        labels = [(3 * i + 1) % num_classes for i in range(count)]
    names = tuple(f"class {c}" for c in range(num_classes))
    return Samples("tiny", "train", ArrayImages(pixels), np.array(labels, np.int32), names, [])


class TinyTeacher(nn.Module):
    """Linear in the pixels, but for pixel (0, 0), which it does not look at."""

    weight: Tensor

    def __init__(self, num_classes: int = 10, seed: int = 1) -> None:
        super().__init__()
        weight = torch.randint(-8, 9, (16, num_classes), generator=torch.Generator().manual_seed(seed)) / 8
        weight[0] = 0
        self.register_buffer("weight", weight)

    def forward(self, images: Tensor) -> Tensor:
        """[B, 1, 4, 4] -> logits [B, C]."""
        return images.flatten(1) @ self.weight


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
    "test_readme",
    "test_ranks",
    "test_remote",
    "test_places",
    "test_operations",
    "test_stage_one",
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


# Stage one as people start it: from files, in processes forked from a server that has imported everything, so that one
# costs a tenth of a second.

TEACHER = """
import os, signal, time, torch

class Teacher(torch.nn.Module):
    # Its logits depend on the batch. Where the environment names a sample, something happens to it there.
    def __init__(self, num_classes):
        super().__init__()
        seed = torch.Generator().manual_seed(int(os.environ.get("SEED", "1")))
        weight = torch.randint(-8, 9, (16, num_classes), generator=seed) / 8
        weight[0] = weight[3] = 0
        self.register_buffer("weight", weight)

    def forward(self, images):
        logits = images.flatten(1) @ self.weight - images.mean()
        here = images[:, 0, 0, 0] == int(os.environ.get("SAMPLE", "-1"))
        if here.any():
            exec(os.environ["HAPPENS"])
        return logits
"""


def recipe(folder: Path, count: int = 12) -> Path:
    """A pipeline over `count` images of 10 classes in shards of 8; both upper corners of an image hold its number."""
    images = np.random.default_rng(0).integers(0, 9, (count, 4, 4), np.uint8)
    images[:, 0, 0] = images[:, 0, 3] = np.arange(count)
    np.savez(folder / "tiny.npz", images=images, labels=np.arange(count) % 10)
    (folder / "teacher.py").write_text(TEACHER)
    (folder / "tiny.yaml").write_text(
        f"dataset: {{name: npz, root: {folder / 'tiny.npz'}, validation: 0, test: 0}}\n"
        "transform: [RandomHorizontalFlip: {p: 0.5}, ToDtype: {dtype: float32}]\n"
        f"teacher: {{model: '{folder / 'teacher.py'}:Teacher'}}\n"
        "cache: {top_k: 3, rank: 2, pilot_rows: 8, shard_rows: 8, batch_size: 5, views: 2, seed: 3}\n"
    )
    return folder / "tiny.yaml"


if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    # As a shell has it in the background; all that tests start and then interrupt would be deaf as well.
    signal.signal(signal.SIGINT, signal.default_int_handler)

FORKS = multiprocessing.get_context("forkserver")
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
        "kdcache.cache.operations",
        "kdcache.cli",
        "kdcache.cli.stage_one",
        "kdcache.dump",
        "kdcache.report",
        "kdcache.sweep",
        "kdcache.train",
    ]
)


def in_a_process(target: Callable[..., None], *args: object) -> BaseProcess:
    process = FORKS.Process(target=_as_ever, args=(target, *args))
    process.start()
    return process


def _as_ever(target: Callable[..., None], *args: object) -> None:
    multiprocessing.set_start_method("fork", force=True)  # a server of its own would cost seconds
    torch.set_num_threads(1)  # as torchrun has it
    target(*args)


def command_line(said: Path, environment: dict[str, str], *arguments: object) -> None:
    """`kdcache` in this process, made the leader of its group, as a terminal's job is; what it says goes to a file."""
    from kdcache.cli import main

    os.setpgrp()
    os.environ.update(environment)
    file = os.open(said, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(file, 1)
    os.dup2(file, 2)
    main([str(argument) for argument in arguments])


def exit_code(process: BaseProcess, seconds: float = 60) -> int:
    """Of a process that is to end by itself, and soon."""
    process.join(seconds)
    if process.exitcode is None:
        process.kill()
        pytest.fail(f"{process} hangs")
    return process.exitcode


def until(happened: Callable[[], object], seconds: float = 60) -> None:
    """Wait for what is to happen soon."""
    late = time.monotonic() + seconds
    while not happened():
        assert time.monotonic() < late, "it does not happen"
        time.sleep(0.002)


def kill_at(out: Path, commit: str, after: bool) -> None:
    """Kill this process just before a rename or removal that commits something, or as soon as that is done."""
    committing = None

    def hook(event: str, args: tuple[Any, ...]) -> None:
        nonlocal committing
        if committing == get_ident():  # the thread that does it is already about something else
            committing = None
            os.kill(os.getpid(), signal.SIGKILL)
        if event in ("os.rename", "os.remove") and str(args[0]) == f"{out}{commit}":
            if not after:
                os.kill(os.getpid(), signal.SIGKILL)
            committing = get_ident()

    sys.addaudithook(hook)

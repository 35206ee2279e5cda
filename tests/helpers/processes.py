"""Run commands and functions in new processes, forked from a server that has imported everything."""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import time
from collections.abc import Callable
from multiprocessing import forkserver
from multiprocessing.process import BaseProcess
from pathlib import Path
from threading import get_ident
from typing import Any

import numpy as np
import pytest
import torch

from helpers import measurements, pictures
from helpers.paths import TESTS

TEACHER = """
import os, signal, time, torch

class Teacher(torch.nn.Module):
    # Its logits depend on the batch. At the sample named in the environment, the statement in HAPPENS is executed.
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
    """Write a pipeline of `count` images, 10 classes, shards of 8; both upper corners of an image hold its index."""
    images = np.random.default_rng(0).integers(0, 9, (count, 4, 4), np.uint8)
    images[:, 0, 0] = images[:, 0, 3] = np.arange(count)
    np.savez(folder / "tiny.npz", images=images, labels=np.arange(count) % 10)
    (folder / "teacher.py").write_text(TEACHER)
    (folder / "tiny.yaml").write_text(
        f"dataset: {{name: npz, root: {folder / 'tiny.npz'}, validation_fraction: 0, test_fraction: 0}}\n"
        "transform: [RandomHorizontalFlip: {p: 0.5}, ToDtype: {dtype: float32}]\n"
        f"teacher: {{model: '{folder / 'teacher.py'}:Teacher'}}\n"
        "cache: {top_k: 3, rank: 2, pilot_rows: 8, shard_rows: 8, batch_size: 5, views: 2, seed: 3}\n"
    )
    return folder / "tiny.yaml"


PATIENCE = 900
"""Seconds after which a test gives up on a condition. Only a hang takes so long, also on a machine that is busy."""

FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(["helpers.preloaded"])
"""One fork server serves all tests of a process."""

_connect = forkserver.connect_to_new_process


def start_server() -> None:
    """Start the fork server if it does not run, which is otherwise done by the first process that is asked for.

    Before Python 3.13 it has the path of modules from the environment alone, and does not say what it cannot import.
    """
    with pytest.MonkeyPatch.context() as patch:
        paths = [str(TESTS), str(TESTS.parent), os.environ.get("PYTHONPATH")]
        patch.setenv("PYTHONPATH", os.pathsep.join(filter(None, paths)))
        forkserver.ensure_running()


def _new_process(descriptors: Any) -> Any:
    start_server()
    return _connect(descriptors)


forkserver.connect_to_new_process = _new_process  # type: ignore[assignment]  # typeshed has a method of a class there


def in_a_process(target: Callable[..., None], *args: object) -> BaseProcess:
    process = FORKS.Process(target=_as_usual, args=(pictures.are_small(), target, *args))
    process.start()
    return process


def _as_usual(small_pictures: bool, target: Callable[..., None], *args: object) -> None:
    pictures.set_small(small_pictures)
    measurements.shorten()
    multiprocessing.set_start_method("fork", force=True)  # another fork server would take seconds to start
    torch.set_num_threads(1)  # as torchrun has it
    target(*args)


def command_line(log: Path, environment: dict[str, str], *arguments: object) -> None:
    """Run `kdcache` as the leader of a process group, like a job of a terminal; its output goes to a file."""
    from kdcache.cli import main

    os.setpgrp()
    os.environ.update(environment)
    file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(file, 1)
    os.dup2(file, 2)
    main([str(argument) for argument in arguments])


def exit_code(process: BaseProcess) -> int:
    """Return the exit code of a process that ends by itself."""
    process.join(PATIENCE)
    if process.exitcode is None:
        process.kill()
        pytest.fail(f"{process} hangs")
    return process.exitcode


def until(condition: Callable[[], object]) -> None:
    """Wait until a condition is true."""
    deadline = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < deadline, "the condition does not become true"
        time.sleep(0.002)


def kill_at(out: Path, commit: str, after: bool) -> None:
    """Kill this process just before a rename or removal that commits something, or just after it."""
    committing = None

    def hook(event: str, args: tuple[Any, ...]) -> None:
        nonlocal committing
        if committing == get_ident():  # the thread has finished the commit
            committing = None
            os.kill(os.getpid(), signal.SIGKILL)
        if event in ("os.rename", "os.remove") and str(args[0]) == f"{out}{commit}":
            if not after:
                os.kill(os.getpid(), signal.SIGKILL)
            committing = get_ident()

    sys.addaudithook(hook)

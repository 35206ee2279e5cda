"""Ranks as torchrun starts them: with its variables in the environment, and a store for them that outlives each."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

from torch.distributed import TCPStore  # type: ignore[attr-defined]  # torch does not list it

from helpers import forked
from helpers.forked import captured
from helpers.processes import PATIENCE, command_line, in_a_process, kill_at


def contents(folder: Path) -> dict[str, bytes]:
    """Every file below a folder, but a card: it is made of a cache that is sealed, and covered by no digest."""
    files = (p for p in folder.rglob("*") if p.is_file() and not p.name.startswith(("README.md", "card.")))
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in files}


def as_rank(rank: int, count: int, store: TCPStore) -> dict[str, str]:
    return {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(count),
        "MASTER_ADDR": "localhost",
        "MASTER_PORT": str(store.port),
        "TORCHELASTIC_USE_AGENT_STORE": "True",
    }


def dump_as_a_rank(said: Path, environment: dict[str, str], pipeline: Path, out: Path, kill: Any) -> None:
    if kill is not None:
        kill_at(out, *kill)
    command_line(said, environment, "dump-teacher", pipeline, "-o", out, "--device", "cpu")


@contextmanager
def ranks(
    count: int, pipeline: Path, out: Path, kill: Any = None, environments: dict[int, dict[str, str]] | None = None
) -> Iterator[list[BaseProcess]]:
    """`count` processes that dump together; those that are still there in the end are killed."""
    store = TCPStore("localhost", 0, is_master=True, wait_for_workers=False)
    processes = []
    try:
        for rank in range(count):
            environment = as_rank(rank, count, store) | (environments or {}).get(rank, {})
            said = out.parent / f"said-{rank}"
            processes.append(in_a_process(dump_as_a_rank, said, environment, pipeline, out, kill))
        yield processes
    finally:
        for process in processes:
            process.kill()
            process.join()


def torchrun(
    count: int, pipeline: Path, out: Path, *options: str, **environment: str
) -> subprocess.CompletedProcess[str]:
    """Dump with torchrun, forked."""
    return run_with_torchrun(count, ["dump-teacher", pipeline, "-o", out, "--device", "cpu"], *options, **environment)


def run_with_torchrun(
    count: int, command: Sequence[object], *options: str, **environment: str
) -> subprocess.CompletedProcess[str]:
    """Run a command of kdcache with torchrun: its agent, and the processes that it starts, are forks."""
    launch = [f"--nproc-per-node={count}", *options, "-m", "kdcache", *command]
    return captured(forked.torchrun, *launch, environment=environment)


def real_torchrun(count: int, pipeline: Path, out: Path) -> subprocess.CompletedProcess[str]:
    """Dump with torchrun, all in new interpreters."""
    command = ["-m", "kdcache", "dump-teacher", pipeline, "-o", out, "--device", "cpu"]
    return subprocess.run(
        ["torchrun", "--standalone", f"--nproc-per-node={count}", *map(str, command)],
        timeout=PATIENCE,
        capture_output=True,
        text=True,
        check=False,
    )

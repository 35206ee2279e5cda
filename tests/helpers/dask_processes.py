"""A dask cluster as its commands start it: a scheduler and workers in processes of their own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from multiprocessing.process import BaseProcess
from pathlib import Path

from dask import config
from distributed import Client

from helpers.forked import fork_pythons
from helpers.processes import PATIENCE, in_a_process, until


class DaskFork:
    """What a `subprocess.Popen` of a command of dask is, of a fork."""

    def __init__(self, process: BaseProcess) -> None:
        self._process = process

    def poll(self) -> int | None:
        return self._process.exitcode

    def wait(self, timeout: float | None = None) -> int:
        self._process.join(timeout)
        if self._process.exitcode is None:
            raise subprocess.TimeoutExpired("dask", timeout or 0)
        return self._process.exitcode

    def terminate(self) -> None:
        self._process.terminate()

    def kill(self) -> None:
        self._process.kill()


DaskProcess = DaskFork | subprocess.Popen[bytes]


def dask(log: Path, environment: Mapping[str, str], words: Sequence[str]) -> None:
    """Run a command of dask, whose workers are forks of it, as are the processes in which they train."""
    from dask import cli

    os.environ.clear()
    os.environ.update(environment)
    output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    for number in (1, 2):
        os.dup2(output, number)
    fork_pythons()
    config.set({"distributed.worker.multiprocessing-method": "fork"})
    sys.argv = ["dask", *words]
    cli.run_cli()  # type: ignore[no-untyped-call]


class DaskProcesses:
    """The processes of a cluster.

    Args:
        folder: for the output of the processes, and for files of dask.
        environment: added to that of the processes.
        forked: whether they, the workers that they start, and the processes in which these train are forks; otherwise
            each of them is a new interpreter.
    """

    def __init__(self, folder: Path, environment: Mapping[str, str], forked: bool = True) -> None:
        self.folder, self.forked, self.environment = folder, forked, environment
        self.processes: list[DaskProcess] = []
        told = folder / "scheduler.json"
        self.scheduler = self._start("scheduler", "--port", "0", "--scheduler-file", told)
        until(lambda: (told.exists() and told.read_text().endswith("}")) or self.scheduler.poll() is not None)
        self.address = str(json.loads(told.read_text())["address"])

    def _start(self, *arguments: object) -> DaskProcess:
        path = self.folder / f"{arguments[0]}-{len(self.processes)}.log"
        words, environment = [*map(str, arguments), "--no-dashboard"], {**os.environ, **self.environment}
        process: DaskProcess
        if self.forked:
            process = DaskFork(in_a_process(dask, path, environment, words))
        else:
            with path.open("wb") as log:
                command = [sys.executable, "-m", "dask", *words]
                process = subprocess.Popen(command, env=environment, stdout=log, stderr=subprocess.STDOUT)
        self.processes.append(process)
        return process

    def add_worker(self, *options: object) -> DaskProcess:
        """Start a worker; return at once."""
        given = ["--nthreads", 1, "--local-directory", self.folder / "local"]
        return self._start("worker", self.address, *given, *options)

    def wait_for_workers(self, count: int) -> None:
        with Client(self.address, set_as_default=False) as client:  # type: ignore[no-untyped-call]
            client.wait_for_workers(count, timeout=PATIENCE)

    def workers(self) -> set[str]:
        """Return the addresses of the workers."""
        with Client(self.address, set_as_default=False) as client:  # type: ignore[no-untyped-call]
            return set(client.nthreads())

    def end(self) -> None:
        for process in reversed(self.processes):
            # A worker that is a fork takes seconds to end by itself; without its nanny it ends at once.
            process.kill() if self.forked else process.terminate()
        for process in self.processes:
            try:
                process.wait(60)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()

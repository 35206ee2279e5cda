"""A dask cluster as its commands start it: a scheduler and workers in processes of their own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

from distributed import Client

from helpers.processes import PATIENCE, until


class DaskProcesses:
    """The processes of a cluster.

    Args:
        folder: for the output of the processes, and for files of dask.
        environment: added to that of the processes.
    """

    def __init__(self, folder: Path, **environment: str) -> None:
        self.folder, self.environment = folder, environment
        self.processes: list[subprocess.Popen[bytes]] = []
        told = folder / "scheduler.json"
        self.scheduler = self._start("scheduler", "--port", "0", "--scheduler-file", told)
        until(lambda: (told.exists() and told.read_text().endswith("}")) or self.scheduler.poll() is not None)
        self.address = str(json.loads(told.read_text())["address"])

    def _start(self, *arguments: object) -> subprocess.Popen[bytes]:
        with (self.folder / f"{arguments[0]}-{len(self.processes)}.log").open("wb") as log:
            process = subprocess.Popen(
                [sys.executable, "-m", "dask", *map(str, arguments), "--no-dashboard"],
                env={**os.environ, **self.environment},
                stdout=log,
                stderr=subprocess.STDOUT,
            )
        self.processes.append(process)
        return process

    def add_worker(self, *options: object) -> subprocess.Popen[bytes]:
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
            process.terminate()
        for process in self.processes:
            try:
                process.wait(60)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()

"""Train the students of a sweep in a worker of a cluster: it starts processes for them, and keeps these.

See `sweep_trainer.py`, which is what runs in them.
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from multiprocessing import Pipe
from pathlib import Path
from threading import Lock
from typing import Any

from kdcache.cache.format.schema import MANIFEST
from kdcache.cache.parallel import CallInWorker
from kdcache.errors import IncompleteError, UsageError
from kdcache.runtime.versions import versions
from kdcache.train.sweep_messages import Place, Request, Trained, Unfit

_SECONDS_BETWEEN_CHECKS = 0.5

_idle: list[TrainerProcess] = []
"""Processes of this worker that wait for students."""

_guard = Lock()


class TrainerDied(IncompleteError):
    """A process that trained students died (exit code 3)."""


class TrainerProcess:
    """A process that trains.

    Args:
        sweep: whose students it trains.
        folder: its current folder.
        threads: number of processes that this worker lets train at the same time.
    """

    def __init__(self, sweep: str, folder: str, threads: int) -> None:
        self.sweep = sweep
        self._connection, theirs = Pipe()
        with theirs:
            descriptor = theirs.fileno()
            command = [sys.executable, "-P", "-m", "kdcache.train.sweep_trainer", str(descriptor), str(threads)]
            self._process = subprocess.Popen(
                command,
                cwd=folder,
                env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
                stdin=subprocess.DEVNULL,
                pass_fds=[descriptor],
                start_new_session=True,  # Ctrl-C is for the worker, which ends this process
            )

    def train(self, call: CallInWorker, request: Request) -> Trained | Unfit | None:
        """Train a group of students, and pass on the progress; None if the process had ended before.

        Raises:
            TrainerDied: if the process ends.
        """
        accepted = False
        try:
            self._connection.send(request)
            while True:
                call.check_wanted()
                if self._connection.poll(_SECONDS_BETWEEN_CHECKS):
                    kind, *content = self._connection.recv()
                    accepted = True
                    if kind == "end":
                        return content[0]  # type: ignore[no-any-return]  # as `sweep_trainer.py` sends it
                    if kind != "accepted":
                        call.send(kind, *content)
                elif self._process.poll() is not None:
                    raise EOFError
        except (EOFError, OSError):
            code = self._process.wait()
            if not accepted:
                return None
            how = f"by {signal.Signals(-code).name}" if code < 0 else f"with exit code {code}"
            raise TrainerDied(
                f"the process that trained it died, {how}, on {socket.gethostname()}",
                "read the output of the worker, and run the same command again",
            ) from None

    def end(self) -> None:
        """End the process."""
        self._process.kill()
        self._process.wait()
        self._connection.close()


def train_in_worker(call: CallInWorker, request: Request) -> Trained | Unfit:
    """Train a group of students in a process of this worker.

    Raises:
        TrainerDied: if the process ends.
    """
    found = examine(request.place)
    if isinstance(found, Unfit):
        return found
    trainer = _take(request.sweep)
    outcome = None if trainer is None else _trained_by(trainer, call, request)
    if outcome is None:  # there was none, or it has ended since, as one without work does
        outcome = _trained_by(TrainerProcess(request.sweep, request.place.current, call.threads), call, request)
    if outcome is None:
        raise TrainerDied(f"no process could be started on {socket.gethostname()}", "read the output of the worker")
    return outcome


def _trained_by(trainer: TrainerProcess, call: CallInWorker, request: Request) -> Trained | Unfit | None:
    """Train a group of students in a process, and keep it for others, unless it has ended or is to end."""
    try:
        outcome = trainer.train(call, request)
    except BaseException:
        trainer.end()
        raise
    if outcome is None:
        trainer.end()
        return None
    with _guard:
        _idle.append(trainer)
    return outcome


def _take(sweep: str) -> TrainerProcess | None:
    """Return a process that has loaded the inputs of a sweep, if one is idle; end those of other sweeps."""
    with _guard:
        found = next((trainer for trainer in _idle if trainer.sweep == sweep), None)
        others = [trainer for trainer in _idle if trainer.sweep != sweep]
        _idle[:] = [trainer for trainer in _idle if trainer is not found and trainer not in others]
    for trainer in others:
        trainer.end()
    return found


def examine(place: Place) -> dict[str, str] | Unfit:
    """Return the versions of this worker, or why it cannot train the students of a sweep."""
    own: Any = versions()
    worker = f"the worker {os.getpid()} on {socket.gethostname()}"
    if place.versions is not None:
        differ = [f"{name} {own[name]}, not {wanted}" for name, wanted in place.versions.items() if own[name] != wanted]
        if differ:
            return Unfit(UsageError(f"{worker} has {'; '.join(differ)}", "install the same versions on all workers"))
    shared = "start the workers on machines that see this folder under the same path, such as on a shared file system"
    if not Path(place.current).is_dir():
        return Unfit(UsageError(f"{worker} does not see the current folder, {place.current}", shared))
    for file in (place.lock, *(f"{cache.path}/{MANIFEST}" for cache in place.caches)):
        try:
            content = Path(file).read_bytes()
        except OSError as error:
            return Unfit(UsageError(f"{worker} does not see {Path(file).parent}: {error.strerror}", shared))
        if file == place.lock and content.decode(errors="replace") != place.holder:
            return Unfit(UsageError(f"{worker} sees another folder as {Path(file).parent}", shared))
    return own  # type: ignore[no-any-return]  # the versions

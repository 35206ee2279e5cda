"""A process that trains students for a worker of a cluster: `python -m kdcache.train.sweep_trainer FD THREADS`.

A worker runs its calls in threads, and may not start processes with multiprocessing. Students need what belongs to a
process: random generators, signals, torch's threads, processes that load images. So the worker starts this one, which
loads the inputs once and trains one group of students after the other. It ends with the worker, however that ends, and
with it the locks on run folders are free.
"""

from __future__ import annotations

import os
import socket
import sys
import threading
import traceback
from contextlib import suppress
from multiprocessing.connection import Connection
from queue import Empty, SimpleQueue
from typing import Any

from kdcache.cache.reader import open_cache
from kdcache.errors import KdcacheError, UsageError
from kdcache.runtime.devices import chosen_device
from kdcache.runtime.folder_lock import locked
from kdcache.runtime.progress import Silent
from kdcache.train.sweep_context import SweepContext
from kdcache.train.sweep_groups import Job
from kdcache.train.sweep_messages import Request, Trained, Unfit
from kdcache.train.sweep_results import StudentResult
from kdcache.train.sweep_worker import reporters, share_machine

_IDLE = 30
"""Seconds after which a process without work ends, and frees its memory."""

_LEASE = 150
"""Seconds to wait for the lock on a run folder: a file server keeps that of a machine that died for a minute or two."""


class _LoadingNotes(Silent):
    """A progress reporter that sends what is said while inputs are loaded."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection

    def say(self, message: str) -> None:
        """Send a message; each process of the cluster sends the same."""
        self._connection.send(("note", message))


class _Trainer:
    """Trains groups of students of one sweep.

    Args:
        connection: to the worker.
    """

    def __init__(self, connection: Connection) -> None:
        self._connection = connection
        self._context: SweepContext | None = None
        self._epochs = 0

    def train(self, request: Request) -> Trained | Unfit:
        """Train a group of students, and send the number of epochs that are finished as they are."""
        try:
            context = self._loaded(request)
        except KdcacheError as error:
            return Unfit(type(error)(f"on {socket.gethostname()}: {error.what}", error.fix))
        self._epochs = 0
        students: list[tuple[int, StudentResult]] = []
        places = {job.folder: index for index, job in enumerate(request.group)}

        def on_end(job: Job, student: StudentResult) -> None:
            students.append((places[job.folder], student))

        for job in request.group:
            # If the lock is not free then, training says by whom it is held.
            with suppress(UsageError), locked(job.folder, patience=_LEASE):
                pass
        try:
            context.train(request.group, reporters(request.group, self._advance, self._say), on_end)
        except Exception:  # noqa: BLE001  # of the user's code, for example, which the caller may not have
            return Trained(students, traceback.format_exc())
        return Trained(students, None)

    def _loaded(self, request: Request) -> SweepContext:
        """Return what the students share, opened at the first call, with the inputs of these."""
        if self._context is None:
            caches = [open_cache(cache.path, cache.views, cache.digest) for cache in request.place.caches]
            self._context = SweepContext(caches, chosen_device(request.device), request.options, {})
        self._context.load(request.group, _LoadingNotes(self._connection))
        return self._context

    def _advance(self, epochs: int, note: str) -> None:
        self._epochs += epochs
        self._connection.send(("epochs", self._epochs, note))

    def _say(self, message: str) -> None:
        self._connection.send(("say", message))


def _receive(connection: Connection, requests: SimpleQueue[Request]) -> None:
    """Receive requests, and end this process at once when the worker has ended: no one would read the results."""
    while True:
        try:
            requests.put(connection.recv())
        except (EOFError, OSError):
            os._exit(1)


def main(descriptor: int, threads: int) -> None:
    """Serve the worker at the other end of a connection.

    Args:
        descriptor: of the connection.
        threads: number of processes that the worker lets train at the same time.
    """
    connection, requests = Connection(descriptor), SimpleQueue[Request]()
    threading.Thread(target=_receive, args=(connection, requests), daemon=True).start()
    share_machine(threads)
    trainer = _Trainer(connection)
    while True:
        try:
            request: Any = requests.get(timeout=_IDLE)
        except Empty:
            return
        connection.send(("accepted",))
        connection.send(("end", trainer.train(request)))


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))

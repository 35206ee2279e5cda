"""The teacher's pass: images in, encoded shards out, with loading, teacher, encoding and writing side by side.

Images are loaded by worker processes, the device works on what was launched, and a thread compresses, writes and
flushes what is done. On a GPU nothing is waited for within a shard: its rows are encoded there and come over together.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from itertools import groupby
from typing import NamedTuple

import torch
from torch import Tensor

from kdcache.cache.format.codec import Rows, encode_finite
from kdcache.cache.format.fingerprints import Inputs, inputs_of
from kdcache.cache.format.schema import Plan
from kdcache.cache.format.tail_basis import TailBasis
from kdcache.data.loader import batches, cut_range, report_lost_workers
from kdcache.data.views import Batch, View
from kdcache.models.inference import InferenceModel, refuse_not_finite
from kdcache.runtime.progress import Task

_WAITING_TO_BE_WRITTEN = 2

Write = Callable[[int, int, Rows, Inputs], None]
"""(view, shard, rows, inputs): put a shard on the disk."""


class Shard(NamedTuple):
    """A shard that is to be made."""

    view: int
    number: int


class PhaseTimer:
    """Where the time of the main thread goes."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextmanager
    def on(self, what: str) -> Iterator[None]:
        """Count what happens inside as time for `what`."""
        began = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[what] = self.seconds.get(what, 0.0) + time.perf_counter() - began

    def __str__(self) -> str:
        total = sum(self.seconds.values())
        shares = (f"{what} {seconds / max(total, 1e-9):.0%}" for what, seconds in self.seconds.items())
        return f"{total:.1f} s: {', '.join(shares)}"


class WriterThread:
    """A thread that does one thing after the other; who gives it too much has to wait."""

    def __init__(self) -> None:
        self._pool = ThreadPoolExecutor(max_workers=1, thread_name_prefix="kdcache-writer")
        self._given: deque[Future[None]] = deque()

    def __enter__(self) -> WriterThread:
        return self

    def __exit__(self, *_: object) -> None:
        # What was made is written, after a mistake or Ctrl-C too: it was the dear part.
        self._pool.shutdown(wait=True)

    def give(self, work: Callable[[], None]) -> None:
        """Have something done; raises what went wrong with things given before."""
        self.wait(_WAITING_TO_BE_WRITTEN - 1)
        self._given.append(self._pool.submit(work))

    def wait(self, left: int = 0) -> None:
        """Until no more than so many things are left to do."""
        while len(self._given) > left:
            self._given.popleft().result()

    def check(self) -> None:
        """Raise what went wrong so far, without waiting."""
        while self._given and self._given[0].done():
            self._given.popleft().result()


def run_pass(
    teacher: InferenceModel,
    view_of: Callable[[int], View],
    plan: Plan,
    basis: TailBasis | None,
    shards: list[Shard],
    workers: int,
    write: Write,
    task: Task,
    clock: PhaseTimer,
) -> None:
    """Run the teacher over some shards, in order, and write each as soon as it is whole.

    Args:
        teacher: on its device.
        view_of: the images of a view, by its number.
        plan: of the cache.
        basis: of the tail, on the teacher's device.
        shards: what is to be made.
        workers: processes that load images.
        write: called in another thread, one shard after the other.
        task: is told of every batch.
        clock: is told where the time goes.

    Raises:
        MismatchError: if the teacher does not return [B, C].
        CorruptError: if it returns NaN or infinities; names the sample.
        IncompleteError: if a process that loads images dies.
    """
    with report_lost_workers(), WriterThread() as background:
        for view, group in groupby(shards, key=lambda shard: shard.view):
            numbers = [shard.number for shard in group]
            cuts = {number: cut_range(plan.shard_ids(number), plan.batch_size) for number in numbers}
            every = [cut for number in numbers for cut in cuts[number]]
            loaded = batches(view_of(view), every, workers, teacher.device)
            for number in numbers:
                made = ShardBuilder(teacher, plan, basis)
                for _ in cuts[number]:
                    background.check()  # a full disk is told of before the teacher has made more for nothing
                    with clock.on("waiting for data"):
                        batch = next(loaded)
                    with clock.on("teacher"):
                        made.add(batch)
                    task.advance(len(batch.ids))
                with clock.on("teacher"):
                    rows, inputs = made.whole()
                with clock.on("waiting for the writer"):
                    background.give(_writing(write, view, number, rows, inputs))
        with clock.on("waiting for the writer"):
            background.wait()


def _writing(write: Write, view: int, number: int, rows: Rows, inputs: Inputs) -> Callable[[], None]:
    return lambda: write(view, number, rows, inputs)


class ShardBuilder:
    """A shard in the making: its rows stay on the teacher's device until it is whole."""

    def __init__(self, teacher: InferenceModel, plan: Plan, basis: TailBasis | None) -> None:
        self._teacher, self._plan, self._basis = teacher, plan, basis
        self._rows: list[Rows] = []
        self._inputs: list[Inputs] = []
        self._finite: list[Tensor] = []
        self._ids: list[Tensor] = []

    def add(self, batch: Batch) -> None:
        """Run the teacher on a batch; on a GPU the work is launched, and not waited for."""
        device = self._teacher.device
        self._inputs.append(inputs_of(batch.images[batch.ids % self._plan.shape.fingerprint_stride == 0]))
        logits = self._teacher(batch.images)
        self._finite.append(logits.isfinite().all(dim=1))
        self._ids.append(batch.ids)
        labels = batch.labels.to(device, non_blocking=True)
        self._rows.append(encode_finite(logits, labels, self._plan.encoding, self._basis))
        if device.type == "cpu":
            self._check()

    def _check(self) -> None:
        refuse_not_finite(torch.cat(self._finite).cpu(), torch.cat(self._ids))
        self._finite, self._ids = [], []

    def whole(self) -> tuple[Rows, Inputs]:
        """The rows of the shard on the CPU, and the fingerprints of some of its images."""
        if self._finite:
            self._check()
        return Rows.concatenate(self._rows).to("cpu"), Inputs.concatenate(self._inputs)

"""The teacher pass: images in, encoded shards out; loading, inference, encoding and writing overlap.

Images are loaded by worker processes, the device runs asynchronously, and a thread compresses, writes and flushes
finished shards. On a GPU there is no synchronization within a shard: its rows are encoded there and copied together.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from kdcache.cache.format.codec import Rows, encode_finite
from kdcache.cache.format.fingerprints import Inputs, inputs_of
from kdcache.cache.format.output_records import DEFAULT_OUTPUT
from kdcache.cache.format.schema import Plan
from kdcache.cache.format.stored_bases import Bases
from kdcache.cache.format.tail_basis import TailBasis
from kdcache.cache.format.vector_rows import EncodedRows
from kdcache.data.loader import Loader, cut_range, report_lost_workers
from kdcache.data.views import Batch, View
from kdcache.dump.outputs import encode_outputs
from kdcache.models.inference import InferenceModel, refuse_not_finite
from kdcache.runtime.progress import Task

_MAX_QUEUED_SHARDS = 2


class MadeShard(NamedTuple):
    """What a shard holds.

    Attributes:
        rows: of the class logits; None if they are not kept.
        outputs: rows of the other outputs, by name.
        inputs: fingerprints of some images.
    """

    rows: Rows | None
    outputs: dict[str, EncodedRows]
    inputs: Inputs


Write = Callable[[int, int, MadeShard], None]
"""(view, shard, made): write a shard to disk."""


class Shard(NamedTuple):
    """A shard of a view."""

    view: int
    shard: int


class PhaseTimer:
    """The wall-clock time of the main thread, by phase."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Add the time of a `with` block to a phase."""
        start = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - start

    def __str__(self) -> str:
        total = sum(self.seconds.values())
        shares = (f"{name} {seconds / max(total, 1e-9):.0%}" for name, seconds in self.seconds.items())
        return f"{total:.1f} s: {', '.join(shares)}"


class WriterThread:
    """A thread that runs tasks one after the other; `submit` blocks while too many are queued."""

    def __init__(self) -> None:
        self._pool = ThreadPoolExecutor(max_workers=1, thread_name_prefix="kdcache-writer")
        self._queue: deque[Future[None]] = deque()

    def __enter__(self) -> WriterThread:
        return self

    def __exit__(self, *_: object) -> None:
        # Finished shards are written after an error or Ctrl-C too: the teacher's time is the expensive part.
        self._pool.shutdown(wait=True)

    def submit(self, work: Callable[[], None]) -> None:
        """Queue a task; raises the error of an earlier task."""
        self.wait(_MAX_QUEUED_SHARDS - 1)
        self._queue.append(self._pool.submit(work))

    def wait(self, left: int = 0) -> None:
        """Wait until at most `left` tasks are queued; raises the error of a task."""
        while len(self._queue) > left:
            self._queue.popleft().result()

    def check(self) -> None:
        """Raise the error of a finished task, without waiting."""
        while self._queue and self._queue[0].done():
            self._queue.popleft().result()


def run_pass(
    teacher: InferenceModel,
    images: View,
    plan: Plan,
    bases: Bases,
    shards: Iterable[Shard],
    num_workers: int,
    write: Write,
    task: Task,
    timer: PhaseTimer,
) -> None:
    """Run the teacher over some shards, in order, and write each as soon as it is complete.

    Args:
        teacher: on its device.
        images: of all views.
        plan: of the cache.
        bases: of the outputs, on the teacher's device.
        shards: to be made; each is taken from the iterator when its first batch is requested from the loader.
        num_workers: number of processes that load images.
        write: called in another thread, one shard after the other.
        task: progress of the rows.
        timer: measures the phases of the main thread.

    Raises:
        MismatchError: if the teacher does not return [B, C].
        CorruptError: if it returns NaN or infinities, or an image cannot be read; names the sample or the file.
        IncompleteError: if a process that loads images dies.
    """
    requested: deque[tuple[Shard, int]] = deque()

    def requests() -> Iterator[tuple[int, range]]:
        for shard in shards:
            cuts = cut_range(plan.shard_ids(shard.shard), plan.batch_size)
            requested.append((shard, len(cuts)))
            yield from ((shard.view, cut) for cut in cuts)

    with report_lost_workers(), WriterThread() as background:
        loaded = Loader(images, num_workers, teacher.device).requested(requests())
        remaining = 0
        while True:
            background.check()  # a full disk is reported before the teacher runs any further
            with timer.phase("waiting for data"):
                batch = next(loaded, None)
            if batch is None:
                break
            if not remaining:
                (view, index), remaining = requested.popleft()
                builder = ShardBuilder(teacher, plan, bases, view)
            with timer.phase("teacher"):
                builder.add(batch)
            task.advance(len(batch.ids))
            remaining -= 1
            if not remaining:
                with timer.phase("teacher"):
                    made = builder.finish()
                with timer.phase("waiting for the writer"):
                    background.submit(partial(write, view, index, made))
        with timer.phase("waiting for the writer"):
            background.wait()


class ShardBuilder:
    """A shard that is being made: its rows stay on the teacher's device until it is complete."""

    def __init__(self, teacher: InferenceModel, plan: Plan, bases: Bases, view: int = 0) -> None:
        self._teacher, self._plan, self._bases, self._view = teacher, plan, bases, view
        basis = bases.get(DEFAULT_OUTPUT)
        self._basis = basis if isinstance(basis, TailBasis) else None
        self._rows: list[Rows] = []
        self._outputs: list[dict[str, EncodedRows]] = []
        self._inputs: list[Inputs] = []
        self._finite: list[Tensor] = []
        self._ids: list[Tensor] = []
        self._names: list[str] = []

    def add(self, batch: Batch) -> None:
        """Run the teacher on a batch; on a GPU this does not wait for the result."""
        device = self._teacher.device
        self._inputs.append(inputs_of(batch.images[batch.ids % self._plan.shape.fingerprint_stride == 0]))
        said = self._teacher.run(batch.images, batch.ids, self._view)
        self._finite.append(said.finite())
        self._names = said.names
        self._ids.append(batch.ids)
        labels = batch.labels.to(device, non_blocking=True)
        if said.logits is not None:
            self._rows.append(encode_finite(said.logits, labels, self._plan.encoding, self._basis))
        self._outputs.append(encode_outputs(said.outputs, labels, self._plan, self._bases))
        if device.type == "cpu":
            self._check()

    def _check(self) -> None:
        refuse_not_finite(torch.cat(self._finite).cpu(), torch.cat(self._ids), self._names)
        self._finite, self._ids = [], []

    def finish(self) -> MadeShard:
        """Return the rows of the shard, on the CPU, and the fingerprints of some of its images."""
        if self._finite:
            self._check()
        outputs = {
            name: type(first).concatenate([part[name] for part in self._outputs]).to("cpu")
            for name, first in self._outputs[0].items()
        }
        rows = Rows.concatenate(self._rows).to("cpu") if self._rows else None
        return MadeShard(rows, outputs, Inputs.concatenate(self._inputs))

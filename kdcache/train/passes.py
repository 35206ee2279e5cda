"""Passes over a data set that several networks share: each batch is loaded, moved and decoded once for all of them.

The training of a network is a generator (`Work`): it yields the `Pass` over the data that it needs, and is sent the
micro-batches of each step, one step at a time. A single network is a group of one.

Networks of a group take turns in one process. Each has its own states of the random generators, its own clock, and its
own failure: an error of one network ends that network alone.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Generic, Literal, NamedTuple, TypeVar

import torch
from torch import Tensor

from kdcache.cache.teacher import Teacher, TeacherWithOutputs
from kdcache.data.loader import Loader, report_lost_workers
from kdcache.data.views import Batch, View
from kdcache.losses.batch import MixedLabels
from kdcache.train.random_states import SeparateRandomStates

T = TypeVar("T")

TRAINING, VALIDATION, TEST = range(3)
"""Stages of an epoch, in their order."""


class MicroBatch(NamedTuple):
    """A part of a batch, for one forward pass.

    Attributes:
        images: [B, channels, H, W].
        labels: [B] int64.
        mixed: labels of the partners, if images are mixed.
        teacher_logits: [B, C]; None for a network that does not need them.
        targets: other outputs of the teacher, [B, D] each, by name.
        maps: [B, H, W] int64, the class of each pixel; None without label maps. The teacher's logits are then
            [B, C, h, w].
    """

    images: Tensor
    labels: Tensor
    mixed: MixedLabels | None
    teacher_logits: Tensor | None
    targets: Mapping[str, Tensor] = MappingProxyType({})
    maps: Tensor | None = None

    @property
    def tensors(self) -> list[Tensor]:
        """All tensors."""
        optional = [self.teacher_logits, *(self.mixed or ()), *self.targets.values(), self.maps]
        return [self.images, self.labels, *(value for value in optional if value is not None)]

    def clone(self) -> MicroBatch:
        """Return a copy of all tensors."""
        mixed = None if self.mixed is None else MixedLabels(*(value.clone() for value in self.mixed))
        logits = None if self.teacher_logits is None else self.teacher_logits.clone()
        targets = {name: values.clone() for name, values in self.targets.items()}
        maps = None if self.maps is None else self.maps.clone()
        return MicroBatch(self.images.clone(), self.labels.clone(), mixed, logits, targets, maps)

    @staticmethod
    def joined(micro_batches: Sequence[MicroBatch]) -> MicroBatch:
        """Concatenate micro-batches, with the images of the first one only."""
        images, labels, mixed, teacher_logits, targets, maps = zip(*micro_batches, strict=True)
        return MicroBatch(
            images[0],
            torch.cat(labels),
            MixedLabels(*(torch.cat(parts) for parts in zip(*mixed, strict=True))) if mixed[0] is not None else None,
            torch.cat(teacher_logits) if teacher_logits[0] is not None else None,
            {name: torch.cat([part[name] for part in targets]) for name in targets[0]},
            torch.cat(maps) if maps[0] is not None else None,
        )


MicroBatches = list[MicroBatch]
"""Those of a step of one process."""

Loaders = dict[tuple[int, int | str], Loader]
"""Loaders whose processes stay for another pass."""


@dataclass(frozen=True, eq=False)
class Pass:
    """A pass over a data set that a network asks for.

    Attributes:
        data: images and labels.
        view: index of the view.
        cuts: ids [B] int64 of each micro-batch.
        micro_batches: number of micro-batches per step.
        when: (epoch, stage); of the passes that networks wait for, the earliest comes first.
        device: to which batches are moved.
        num_workers: processes that load images.
        teacher: source of the logits; None for a network that does not need them.
        memory_format: of the images.
        stays: whether the loading processes stay for another pass.
    """

    data: View
    view: int
    cuts: Sequence[Tensor]
    micro_batches: int
    when: tuple[int, int]
    device: torch.device
    num_workers: int | Literal["auto"] = 0
    teacher: Teacher | None = None
    memory_format: torch.memory_format = torch.preserve_format
    stays: bool = True

    def serves(self, other: Pass) -> bool:
        """Return whether the batches of this pass are those that another one asks for."""
        if other is self:
            return True
        return (
            self.data is other.data
            and (other.teacher is None or other.teacher is self.teacher)
            and self._settings == other._settings
            and len(self.cuts) == len(other.cuts)
            and all(map(torch.equal, self.cuts, other.cuts))
        )

    @property
    def _settings(self) -> tuple[object, ...]:
        return self.view, self.micro_batches, self.when, self.device, self.num_workers, self.memory_format

    @property
    def steps(self) -> range:
        """Indices of the steps."""
        return range(len(self.cuts) // self.micro_batches)

    def loading(self, loader: Loader) -> Callable[[], MicroBatches]:
        """Begin to load, and return a function that returns the next step, and does not hold it."""
        if self.teacher is not None:
            self.teacher.prefetch(self.cuts, self.view)
        loaded = loader.batches([ids.tolist() for ids in self.cuts], self.view)
        return lambda: [self._micro_batch(batch) for batch in itertools.islice(loaded, self.micro_batches)]

    def load_again(self, step: int) -> MicroBatches:
        """Return the micro-batches of a step, counted from 0, loaded in this process."""
        cuts = self.cuts[step * self.micro_batches : (step + 1) * self.micro_batches]
        return [self._micro_batch(self.data.batch(ids.tolist(), self.view)) for ids in cuts]

    def _micro_batch(self, batch: Batch) -> MicroBatch:
        layout = self.memory_format if batch.images.ndim == 4 else torch.preserve_format
        images = batch.images.to(self.device, non_blocking=True, memory_format=layout)
        mixed = batch.mixed.to(self.device) if batch.mixed is not None else None
        teacher, targets = self.teacher, {}
        if isinstance(teacher, TeacherWithOutputs):
            targets = {name: of(batch.ids, self.view).to(self.device) for name, of in teacher.outputs.items()}
            teacher = teacher.logits
        logits = teacher(batch.ids, self.view).to(self.device) if teacher is not None else None
        maps = None if batch.maps is None else batch.maps.to(self.device, non_blocking=True)
        return MicroBatch(images, batch.labels.to(self.device, non_blocking=True), mixed, logits, targets, maps)


Work = Generator[Pass, Any, T]
"""Something that needs passes over data: it yields a pass once for each of its steps, and is sent the micro-batches."""

Clock = Callable[[], float]
"""Returns the seconds that a network has used: its own work, and the loading of batches that it waited for."""


class _WorkClock:
    def __init__(self) -> None:
        self._seconds, self._began = 0.0, 0.0
        self._running = False

    def __call__(self) -> float:
        return self._seconds + (time.perf_counter() - self._began if self._running else 0.0)

    def start(self) -> None:
        self._began, self._running = time.perf_counter(), True

    def stop(self) -> None:
        self._seconds, self._running = self(), False

    def add(self, seconds: float) -> None:
        self._seconds += seconds


class _Member(Generic[T]):
    """A network of a group; `wanted` is the pass that it waits for, None once it has ended with `outcome`."""

    def __init__(self, index: int, start: Callable[[Clock], Work[T]]) -> None:
        self.index, self.clock = index, _WorkClock()
        self.wanted: Pass | None = None
        self.outcome: T | Exception | None = None
        self._work: Work[T] | None = start(self.clock)
        self._changes_inputs = False

    def resume(self, sent: MicroBatches | Exception | None, *, shared: bool = False) -> bool:
        """Continue the work, and return whether it changed the tensors of a step that other networks use, too."""
        assert self._work is not None, "it has not ended"  # noqa: S101  # for the type checker
        if shared and isinstance(sent, list) and self._changes_inputs:
            sent, shared = [micro_batch.clone() for micro_batch in sent], False
        before = _versions(sent) if shared else []
        self.clock.start()
        try:
            with report_lost_workers():
                try:
                    self.wanted = self._work.throw(sent) if isinstance(sent, Exception) else self._work.send(sent)
                except StopIteration as end:
                    self._end(end.value)
        except Exception as error:  # noqa: BLE001  # it ends this network alone
            self._end(error)
        finally:
            self.clock.stop()
        changed = shared and _versions(sent) != before
        self._changes_inputs |= changed
        return changed

    def _end(self, outcome: T | Exception) -> None:
        self.wanted, self.outcome, self._work = None, outcome, None

    def stop(self, interrupt: KeyboardInterrupt | None = None) -> None:
        """End the work where it is, silently or by Ctrl-C."""
        work, self._work = self._work, None
        if work is not None and interrupt is not None:
            work.throw(interrupt)
        elif work is not None:
            work.close()


def _versions(sent: MicroBatches | Exception | None) -> list[int]:
    """Return a number for each tensor of a step that every change in place increases."""
    return [tensor._version for part in sent for tensor in part.tensors] if isinstance(sent, list) else []


def run_together(
    starts: Sequence[Callable[[Clock], Work[T]]],
    on_end: Callable[[int, T | Exception], None],
    device: torch.device | str = "cpu",
    loaders: Loaders | None = None,
) -> None:
    """Run the work of several networks; those that want the same pass are sent the same batches.

    Args:
        starts: each returns the work of a network, given its clock.
        on_end: called with the index of a network and its result, or the error that ended it, as soon as it has ended.
        device: on which the networks are.
        loaders: loaders that stay, kept for another call; None to end them with this one.

    Raises:
        IncompleteError: if a process that loads images dies while no network works.
    """
    random_states = SeparateRandomStates(len(starts), torch.device(device))
    members = [_Member(index, start) for index, start in enumerate(starts)]
    active = list(members)

    def resume(member: _Member[T], sent: MicroBatches | Exception | None, shared: bool = False) -> bool:
        random_states.enter(member.index)
        changed = member.resume(sent, shared=shared)
        if member.wanted is None:
            active.remove(member)
            outcome, member.outcome = member.outcome, None
            on_end(member.index, outcome)  # type: ignore[arg-type]  # not None: it has ended
        return changed

    loaders = {} if loaders is None else loaders
    try:
        with report_lost_workers():
            for member in members:
                resume(member, None)
            while active:
                first = min((member.wanted for member in active if member.wanted), key=lambda wanted: wanted.when)
                asked = [member.wanted for member in active if member.wanted and member.wanted.when == first.when]
                lead = next((wanted for wanted in asked if wanted.teacher and wanted.serves(first)), first)
                served = [member for member in active if member.wanted and lead.serves(member.wanted)]
                _serve(lead, served, resume, loaders)
    except KeyboardInterrupt as interrupt:
        raised = interrupt
        for member in members:
            random_states.enter(member.index)
            try:
                member.stop(interrupt)
            except KeyboardInterrupt as own:  # says what is kept
                raised = own
        if raised is interrupt:
            raise
        raise raised from None
    finally:
        for member in members:
            random_states.enter(member.index)
            member.stop()
        random_states.leave()


def _serve(
    lead: Pass,
    served: list[_Member[T]],
    resume: Callable[[_Member[T], MicroBatches | Exception | None, bool], bool],
    loaders: Loaders,
) -> None:
    """Load a pass, and send its steps to the members that it serves; an error of loading is an error of each."""
    asked = {member.index: member.wanted for member in served}
    load: Callable[[], MicroBatches] | None = None
    for number in lead.steps:
        began = time.perf_counter()
        try:
            load = load or lead.loading(_loader(lead, loaders))
            step = load()
        except Exception as error:  # noqa: BLE001  # each of them raises it
            for member in served:
                resume(member, error, False)
            return
        for member in served:
            member.clock.add(time.perf_counter() - began)
        for position, member in enumerate(served, 1):
            if resume(member, step, len(served) > 1) and position < len(served):
                step = lead.load_again(number)
        del step
        # Those that have ended, by an error or because they have all they need, are not served any more.
        served = [member for member in served if member.wanted is asked[member.index]]
        if not served:
            return


def _loader(wanted: Pass, loaders: Loaders) -> Loader:
    """Return the loader of a pass; one that stays is found again, and holds the data set whose address is its key."""
    key = id(wanted.data), wanted.num_workers
    if key in loaders:
        return loaders[key]
    loader = Loader(wanted.data, wanted.num_workers, wanted.device)
    if wanted.stays:
        loaders[key] = loader
    return loader


def run_alone(
    start: Callable[[Clock], Work[T]],
    device: torch.device | str = "cpu",
    loaders: Loaders | None = None,
) -> T:
    """Run the work of one network, and return its result or raise its error."""
    outcomes: list[T | Exception] = []
    run_together([start], lambda _, outcome: outcomes.append(outcome), device, loaders)
    outcome = outcomes.pop()
    if isinstance(outcome, Exception):
        raise outcome
    return outcome

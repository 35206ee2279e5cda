"""A network in training with all that goes with it, on one process or on many (accelerate), step by step."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from datetime import timedelta
from typing import Any, NamedTuple

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import InitProcessGroupKwargs, broadcast
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from kdcache.cache.teacher import Teacher
from kdcache.config.schema import TrainSpec
from kdcache.data.loader import batches, report_lost_workers
from kdcache.data.views import Batch, View
from kdcache.errors import UsageError
from kdcache.losses import Loss, LossParts, distillation_loss, learned_temperature
from kdcache.losses.batch import BatchTotals, MixedLabels, labeled_shares, of_all_ranks, of_these
from kdcache.train.optim import make_optimizer, make_schedule

_LONGEST_WAIT = timedelta(hours=12)
_PRECISION = {"fp32": "no", "bf16": "bf16", "fp16": "fp16"}


class MicroBatch(NamedTuple):
    """What a process goes through at once: images [B, channels, H, W], labels [B], the teacher's logits [B, C]."""

    images: Tensor
    labels: Tensor
    mixed: MixedLabels | None
    teacher_logits: Tensor | None


def join_processes(device: torch.device | str, precision: str) -> Accelerator:
    """This process among those that torchrun or `accelerate launch` has started; alone where there are none.

    Raises:
        UsageError: for fp16 without a GPU.
    """
    device, mixed = torch.device(device), _PRECISION[precision]
    if precision == "fp16" and device.type == "cpu":
        raise UsageError("fp16 needs a GPU: its gradients underflow without a scaler", "take precision bf16 or fp32")
    # What accelerate knows is one for the whole process; a second run in it may be on another device or precision.
    if PartialState._shared_state and PartialState().device.type != device.type:
        AcceleratorState._reset_state(reset_partial_state=True)
    elif AcceleratorState._shared_state and AcceleratorState().mixed_precision != mixed:
        AcceleratorState._reset_state()
    if device.type == "cuda" and device.index is not None:
        torch.cuda.set_device(device)
    # While the first process validates, the others wait.
    patient = InitProcessGroupKwargs(timeout=_LONGEST_WAIT)
    return Accelerator(cpu=device.type == "cpu", mixed_precision=mixed, kwargs_handlers=[patient])


class _Network(nn.Module):
    """The network, and what the loss learns beside it: what accelerate wraps, so that the network stays as it is."""

    def __init__(self, model: nn.Module, theta: nn.Parameter | None) -> None:
        super().__init__()
        self.model, self.theta = model, theta

    def forward(self, images: Tensor) -> Tensor:
        """[B, channels, H, W] -> logits [B, C]."""
        logits: Tensor = self.model(images)
        return logits


class Trainer:
    """A network, its optimizer, schedule and average, and what the loss learns itself.

    Args:
        model: moved to the device.
        spec: how it is trained; batches are shared out among the processes.
        loss: what is minimized.
        count: N, the images of an epoch.
        device: where to train.

    Attributes:
        accelerator: this process among all.
        steps: an epoch.

    Raises:
        UsageError: if a batch is too small to be shared out.
    """

    def __init__(
        self, model: nn.Module, spec: TrainSpec, loss: Loss, count: int, device: torch.device | str = "cpu"
    ) -> None:
        self.model, self.spec, self.loss = model, spec, loss
        self.accelerator = join_processes(device, spec.precision)
        self.device, self.ranks = self.accelerator.device, self.accelerator.num_processes
        self.steps = len(self._cuts(torch.arange(count)))
        self._layout = torch.channels_last if spec.channels_last else torch.preserve_format
        model.to(self.device, memory_format=self._layout)  # type: ignore[call-overload]  # torch lists it for tensors
        self.theta = learned_temperature(loss, self.device)
        optimizer = make_optimizer(model, spec, self.theta)
        self.schedule = make_schedule(optimizer, spec, self.steps)
        self.optimizer = self.accelerator.prepare_optimizer(optimizer)
        self.average: AveragedModel | None = None
        if spec.ema_decay is not None:
            self.average = AveragedModel(model, multi_avg_fn=_average_step(spec.ema_decay), use_buffers=True)
        if spec.compile:
            model.compile()
        self._network = self.accelerator.prepare_model(_Network(model, self.theta))
        if self.accelerator.process_index:
            # What is drawn in a network is drawn anew by each; the first goes on as one alone would.
            torch.manual_seed(spec.seed + 1_000_003 * self.accelerator.process_index)

    @property
    def shown(self) -> nn.Module:
        """The network that is validated and kept: the average, where there is one."""
        return self.average.module if self.average is not None else self.model

    def _cuts(self, order: Tensor) -> list[tuple[Tensor, ...]]:
        """The batches of an order of ids [N], each in the pieces that the processes go through one after the other."""
        pieces = self.ranks * self.spec.gradient_accumulation_steps
        cuts = list(torch.split(order, self.spec.batch_size))
        if len(cuts) > 1 and len(cuts[-1]) < min(2 * pieces, len(cuts[0])):
            # Batch norm cannot be trained on a batch of one; the next epoch's order leaves out other samples.
            cuts = cuts[:-1]
        if len(cuts[0]) < pieces:
            raise UsageError(
                f"a batch of {len(cuts[0])} images cannot be shared out in {pieces} pieces ({self.ranks} processes, "
                f"gradient_accumulation_steps {self.spec.gradient_accumulation_steps})",
                "raise train.batch_size (images per step over all processes), or lower "
                "train.gradient_accumulation_steps",
            )
        return [torch.tensor_split(cut, pieces) for cut in cuts]

    def epoch(
        self,
        train: View,
        number: int,
        teacher: Teacher | None = None,
        on_step: Callable[[], None] | None = None,
        *,
        view: int | None = None,
    ) -> list[LossParts]:
        """One epoch of training, and the loss of each of its steps, of all processes together.

        Args:
            train: images and labels.
            number: counted from 1; the order of the samples follows from (seed, number).
            teacher: where the teacher's logits come from; None for a loss without one.
            on_step: called after each step but the last.
            view: index of the view of this epoch; None for `train.view`.

        Raises:
            IncompleteError: if a process that loads images dies.
        """
        view = train.view if view is None else view
        generator = torch.Generator().manual_seed(self.spec.seed * 1_000_003 + number)
        order = teacher.order(generator) if teacher is not None else torch.randperm(len(train), generator=generator)
        if self.ranks > 1:
            # Of a cache that is held otherwise by each, the first one's.
            order = broadcast(order.to(self.device)).cpu()
        cuts = self._cuts(order)
        own = [cut[self.accelerator.process_index :: self.ranks] for cut in cuts]
        mine = [piece for cut in own for piece in cut]
        if teacher is not None:
            teacher.prefetch(mine, view)
        labeled = [int((train.labels[torch.cat(cut)] >= 0).sum()) for cut in cuts]
        self.model.train()
        loaded = batches(train, [piece.tolist() for piece in mine], self.spec.num_workers, self.device, view)
        parts = []
        with report_lost_workers():
            for cut, known in zip(cuts, labeled, strict=True):
                pieces = [
                    self._piece(batch, teacher, view)
                    for batch in itertools.islice(loaded, self.spec.gradient_accumulation_steps)
                ]
                whole = self._whole(sum(map(len, cut)), known, pieces)
                parts.append(self._step(pieces, whole, number))
                if on_step and len(parts) < len(cuts):
                    on_step()
        return self._of_all(parts)

    def _piece(self, batch: Batch, teacher: Teacher | None, view: int) -> MicroBatch:
        images = batch.images.to(self.device, non_blocking=True, memory_format=self._layout)
        mixed = batch.mixed.to(self.device) if batch.mixed is not None else None
        logits = teacher(batch.ids, view).to(self.device) if teacher is not None else None
        return MicroBatch(images, batch.labels.to(self.device, non_blocking=True), mixed, logits)

    def _whole(self, rows: int, labeled: int, pieces: Sequence[MicroBatch]) -> BatchTotals:
        """What the batch of all pieces of all processes holds."""
        shares: Tensor | int = labeled
        if pieces[0].mixed is not None:  # with partners who may lie anywhere in the data set, and have no label
            here = torch.stack([labeled_shares(piece.labels, piece.mixed).sum() for piece in pieces]).sum()
            shares = self.accelerator.reduce(here, "sum")
        return BatchTotals(rows, labeled, shares, of_all_ranks if self.ranks > 1 else of_these)

    def _step(self, pieces: Sequence[MicroBatch], whole: BatchTotals, epoch: int) -> LossParts:
        self.optimizer.zero_grad()
        if len(pieces) > 1 and self.loss.is_of_the_batch:
            parts = self._logits_first(pieces, whole, epoch)
        else:
            each = []
            for piece, reduced in self._reduced_with_the_last(pieces):
                with reduced:
                    step = self._loss(self._network(piece.images), piece, whole, epoch)
                    self._backward(step.total)
                each.append(step)
            parts = LossParts(
                *(torch.stack([value.detach() for value in values]).sum() for values in zip(*each, strict=True))
            )
        if self.spec.max_grad_norm is not None:
            self.accelerator.clip_grad_norm_(self._network.parameters(), self.spec.max_grad_norm)
        self.optimizer.step()
        if not self.accelerator.optimizer_step_was_skipped:
            self.schedule.step()
        if self.average is not None:
            self.average.update_parameters(self.model)
        return parts

    def _loss(self, logits: Tensor, piece: MicroBatch, whole: BatchTotals, epoch: int) -> LossParts:
        return distillation_loss(
            logits,
            piece.teacher_logits,
            piece.labels,
            self.loss,
            epoch,
            piece.mixed,
            self.theta,
            whole,
            self.spec.label_smoothing,
        )

    def _reduced_with_the_last(self, pieces: Sequence[MicroBatch]) -> Iterator[tuple[MicroBatch, Any]]:
        """The pieces, each with the context in which its gradients are kept here, or, the last, brought together."""
        for number, piece in enumerate(pieces, 1):
            yield piece, nullcontext() if number == len(pieces) else self.accelerator.no_sync(self._network)

    def _backward(self, total: Tensor) -> None:
        # Gradients of several processes are averaged, and those of their losses add up to the whole batch's.
        self.accelerator.backward(total * self.ranks if self.ranks > 1 else total)

    def _logits_first(self, pieces: Sequence[MicroBatch], whole: BatchTotals, epoch: int) -> LossParts:
        """A step of a loss that needs the logits of all pieces at once, in the memory of one.

        The logits of all come first, without a graph; then the loss's gradient with respect to them; then each piece
        once more, with its part of that gradient (GradCache: Gao et al. 2021, 2101.06983). It costs a forward pass.
        """
        buffers = {name: value.clone() for name, value in self.model.named_buffers()}
        devices = [self.device] if self.device.type == "cuda" else []
        with torch.no_grad(), torch.random.fork_rng(devices):
            logits = torch.cat([self._network(piece.images) for piece in pieces])
        for name, value in self.model.named_buffers():
            value.copy_(buffers[name])
        logits.requires_grad_()
        parts = self._loss(logits, _joined(pieces), whole, epoch)
        of_logits, *of_theta = torch.autograd.grad(parts.total, [logits, *([] if self.theta is None else [self.theta])])
        slopes = iter(torch.split(of_logits, [len(piece.images) for piece in pieces]))
        for piece, reduced in self._reduced_with_the_last(pieces):
            with reduced:
                along = (self._network(piece.images) * next(slopes)).sum()
                if piece is pieces[-1] and self.theta is not None:
                    along = along + (self.theta * of_theta[0]).sum()
                self._backward(along)
        return LossParts(*(value.detach() for value in parts))

    def _of_all(self, parts: Sequence[LossParts]) -> list[LossParts]:
        """The losses of steps, from what each process has of them."""
        values = torch.stack([torch.stack(list(step)) for step in parts])
        if self.ranks > 1:
            values = self.accelerator.reduce(values, "sum")
        return [LossParts(*step) for step in values]

    def state_dict(self) -> dict[str, Any]:
        """Everything that goes on with the next step, as tensors and plain values."""
        return {
            "model": self.model.state_dict(),
            "theta": None if self.theta is None else self.theta.detach(),
            "optimizer": self.optimizer.state_dict(),
            "schedule": self.schedule.state_dict(),
            "scaler": None if self.accelerator.scaler is None else self.accelerator.scaler.state_dict(),
            "average": None if self.average is None else self.average.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where `state_dict` was taken."""
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.schedule.load_state_dict(state["schedule"])
        if self.theta is not None:
            self.theta.data.copy_(state["theta"])
        if self.accelerator.scaler is not None:
            self.accelerator.scaler.load_state_dict(state["scaler"])
        if self.average is not None:
            self.average.load_state_dict(state["average"])


def _average_step(keep: float) -> Callable[[Any, Any, Any], None]:
    """How an exponential moving average goes on; whole numbers, such as a network's tables of indices, are copied."""
    of_floats = get_ema_multi_avg_fn(keep)  # type: ignore[no-untyped-call]  # torch's is not typed

    def step(averages: Any, now: Any, count: Any) -> None:
        if averages[0].is_floating_point() or averages[0].is_complex():
            of_floats(averages, now, count)
        else:
            # Torch's mean of two equal integers is, cut off, often one less.
            for average, value in zip(averages, now, strict=True):
                average.copy_(value)

    return step


def _joined(pieces: Sequence[MicroBatch]) -> MicroBatch:
    images, labels, mixed, teacher_logits = zip(*pieces, strict=True)
    return MicroBatch(
        images[0],
        torch.cat(labels),
        MixedLabels(*(torch.cat(parts) for parts in zip(*mixed, strict=True))) if mixed[0] is not None else None,
        torch.cat(teacher_logits) if teacher_logits[0] is not None else None,
    )

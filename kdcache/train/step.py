"""A network in training with its optimizer, schedule and average, on one process or on many (accelerate).

An optimizer step is of one batch, however many processes share it, and in however many micro-batches each goes through
its part: the losses of the micro-batches are divided by the totals of the whole batch, so that they, and their
gradients, add up to those of the batch.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from accelerate.utils import broadcast
from torch import Tensor, nn

from kdcache.cache.teacher import Teacher
from kdcache.config.schema import TrainSpec
from kdcache.data.views import View
from kdcache.errors import UsageError
from kdcache.losses import Loss, LossParts, distillation_loss, learned_temperature
from kdcache.losses.batch import OVER_ALL_RANKS, BatchTotals, labeled_shares
from kdcache.losses.dense import DenseTotals, dense_loss
from kdcache.losses.distillation import NO_CONTROL
from kdcache.train.accelerator import join_processes
from kdcache.train.batches import check_groups, cut_batches, epoch_order
from kdcache.train.controller import ComingStep
from kdcache.train.dense import totals_of_step
from kdcache.train.edges import BatchEdges
from kdcache.train.learned import CHANCES, NO_PARTS, LearnedParts, TrainedController, WholeNetwork
from kdcache.train.network_trainer import NetworkTrainer, sum_of_parts
from kdcache.train.passes import TRAINING, Loaders, MicroBatch, MicroBatches, Pass, Work, run_alone
from kdcache.train.student_outputs import LOGITS


@dataclass(frozen=True)
class StepContext:
    """An optimizer step of one process.

    Attributes:
        micro_batches: its part of the batch.
        totals: of the batch, over all processes.
        dense: totals of its label maps; None without.
        epoch: number of the epoch, from 1; schedules of the loss depend on it. None for their end.
    """

    micro_batches: Sequence[MicroBatch]
    totals: BatchTotals
    epoch: int | None
    dense: DenseTotals | None = None


class Trainer(NetworkTrainer):
    """A network with its optimizer, schedule, average of the weights, and the learned parameter of the loss.

    Args:
        model: network; moved to the device.
        spec: optimizer, schedule, batch size; batches are divided among the processes.
        loss: minimized.
        count: number of images per epoch.
        device: where to train.
        report: called once, with a warning about a gradient that is not finite or has exploded; in the first process.
        learned: what is trained beside the network.
        group_size: number of samples that are never divided.

    Attributes:
        accelerator: this process among all.
        steps: optimizer steps per epoch.
        gradients: their norms, and the warning.

    Raises:
        UsageError: if a batch has too few images to be divided, or cannot be divided into the groups of the loss or of
            the data set.
    """

    def __init__(
        self,
        model: nn.Module,
        spec: TrainSpec,
        loss: Loss,
        count: int,
        device: torch.device | str = "cpu",
        report: Callable[[str], None] | None = None,
        learned: LearnedParts = NO_PARTS,
        group_size: int = 1,
    ) -> None:
        self.spec, self.loss = spec, loss
        self.learned = learned
        outputs, gate, self.controller = learned
        accelerator = join_processes(device, spec.precision, uses_all=loss.uses_logits)
        cuts = cut_batches(torch.arange(count).reshape(-1, group_size), spec, accelerator.num_processes)
        check_groups(cuts, accelerator.num_processes, loss)
        self.steps = len(cuts)
        self._memory_format = torch.channels_last if spec.channels_last else torch.preserve_format
        model.to(accelerator.device, memory_format=self._memory_format)  # type: ignore[call-overload]  # torch lists it for tensors
        self.theta = learned_temperature(loss, accelerator.device)
        if outputs is not None:
            outputs.to(accelerator.device)
        beside = [
            *([] if self.theta is None else [("the temperature", self.theta)]),
            *([] if outputs is None else outputs.named_parameters()),
            *([] if gate is None else gate.named_parameters("gate")),
        ]
        self._loaders: Loaders = {}
        self._edges = BatchEdges(accelerator.device)
        alone = accelerator.num_processes == 1  # sums over processes are not compiled
        self._distillation_loss = torch.compile(distillation_loss) if spec.compile and alone else distillation_loss
        whole = WholeNetwork(model, self.theta, outputs, gate)
        super().__init__(whole, model, spec, accelerator, self.steps, beside, report=report)

    @property
    def selected(self) -> WholeNetwork:
        """The network that is validated and saved, and what is learned beside it: the average if there is one."""
        return super().selected  # type: ignore[no-any-return]  # the network that it was given, or a copy of it

    @torch.no_grad()
    def held_out_loss(self, ids: Tensor, held: View, micro_batch: MicroBatch) -> Tensor:
        """Return the loss [] of the selected network on a batch of the samples `ids` [B] that are held out.

        It is that of the end of all schedules, since epochs with other weights could not be compared.
        """
        labeled = int((held.labels[ids] >= 0).sum())
        edges = self._edges.among([micro_batch], held.samples) if self.loss.uses_edges else None
        context = StepContext([micro_batch], BatchTotals(len(ids), labeled, labeled)._replace(edges=edges), None)
        # A controller sets something for steps that are taken, and learns from them.
        return self._loss(self.selected(micro_batch.images), micro_batch, context, None).total

    def epoch(
        self,
        train: View,
        number: int,
        teacher: Teacher | None = None,
        on_step: Callable[[], None] | None = None,
        *,
        view: int | None = None,
    ) -> list[LossParts]:
        """Train for one epoch alone; see `epoch_work`. The processes that load images stay for the next.

        Raises:
            IncompleteError: if a process that loads images dies.
        """
        work = self.epoch_work(train, number, teacher, on_step, view=view)
        return run_alone(lambda _: work, self.device, self._loaders)

    def epoch_work(
        self,
        train: View,
        number: int,
        teacher: Teacher | None = None,
        on_step: Callable[[], None] | None = None,
        *,
        view: int | None = None,
    ) -> Work[list[LossParts]]:
        """Train for one epoch, and return the loss of each step, over all processes.

        Args:
            train: images and labels.
            number: of the epoch, from 1; the order of the samples is a function of (seed of the order, number).
            teacher: source of the teacher's logits; None for a loss without a teacher.
            on_step: called after each step but the last.
            view: index of the view of this epoch; None for `train.view`.
        """
        view = train.view if view is None else view
        generator = torch.Generator().manual_seed(self.spec.seed_of_data * 1_000_003 + number)
        order = epoch_order(train.samples, teacher, generator)
        if self.ranks > 1:
            # Processes may hold the cache in different placements, which have different orders.
            order = broadcast(order.to(self.device)).cpu()
        cuts = cut_batches(order, self.spec, self.ranks)
        own = [ids for cut in cuts for ids in cut[self.accelerator.process_index :: self.ranks]]
        wanted = Pass(
            train,
            view,
            own,
            self.spec.gradient_accumulation_steps,
            (number, TRAINING),
            self.device,
            self.spec.num_workers,
            teacher,
            self._memory_format,
        )
        self.model.train()
        parts: list[LossParts] = []
        self._labeled_pixels = torch.zeros((), dtype=torch.int64)
        for cut in cuts:
            # No name here holds the micro-batches while the next are loaded.
            parts.append(self._step_of((yield wanted), torch.cat(cut), train, number))
            if on_step and len(parts) < len(cuts):
                on_step()
        self.gradients.check()
        if train.samples.maps is not None and not self.loss.uses_cache and not int(self._labeled_pixels):
            raise UsageError(
                f"no pixel of {train.samples.name}/{train.samples.split} has a label, and the loss uses no teacher",
                "check the masks, dataset.ignore and dataset.first_class",
            )
        return self.reduced(parts)

    def _step_of(self, micro_batches: MicroBatches, ids: Tensor, train: View, epoch: int) -> LossParts:
        over_ranks = partial(self.accelerator.reduce, reduction="sum") if self.ranks > 1 else None
        dense = totals_of_step(micro_batches, len(ids), over_ranks)
        if dense is not None:
            self._labeled_pixels = self._labeled_pixels + torch.as_tensor(dense.labeled)
        return self._step(StepContext(micro_batches, self._totals(ids, train, micro_batches), epoch, dense), epoch)

    def _totals(self, ids: Tensor, train: View, micro_batches: Sequence[MicroBatch]) -> BatchTotals:
        """Return the totals of the batch [B] that all micro-batches of all processes make up."""
        labeled = int((train.labels[ids] >= 0).sum())
        shares: Tensor | int = labeled
        if micro_batches[0].mixed is not None:  # partners are any samples of the data set, labeled or not
            own = torch.stack([labeled_shares(part.labels, part.mixed).sum() for part in micro_batches]).sum()
            shares = self.accelerator.reduce(own, "sum")
        edges = self._edges.among(micro_batches, train.samples) if self.loss.uses_edges else None
        totals = BatchTotals(len(ids), labeled, shares, *(OVER_ALL_RANKS if self.ranks > 1 else ()))
        return totals._replace(edges=edges)

    def _step(self, context: StepContext, epoch: int) -> LossParts:
        """Take an optimizer step of an epoch, and return this process's part of its loss."""
        self.optimizer.zero_grad()
        if self.controller is not None:
            lr, smoothing = float(self.schedule.get_last_lr()[0]), self.spec.label_smoothing
            coming = ComingStep(context.micro_batches, self.loss, epoch, lr, smoothing)
            self.controller.prepare(self.model, coming)
        if len(context.micro_batches) > 1 and self.loss.is_of_the_batch:
            parts = self._backward_in_two_passes(context)
        else:
            each = []
            for micro_batch, synchronization in self.synchronized_at_last(context.micro_batches):
                with synchronization:
                    loss = self._loss(self._network(micro_batch.images), micro_batch, context, self.controller)
                    self.backward(loss.total)
                # Without its graph, which would keep the logits of every micro-batch.
                each.append(LossParts(*(value.detach() for value in loss)))
            parts = sum_of_parts(each)
        self.update(parts.total, epoch)
        if self.controller is not None:
            self.controller.step(self.model)
        return parts

    def _loss(
        self,
        said: Mapping[str, Tensor],
        micro_batch: MicroBatch,
        context: StepContext,
        controller: TrainedController | None,
    ) -> LossParts:
        """Return the part of a micro-batch in the loss of its batch, with what a controller sets for it."""
        _, labels, mixed, teacher_logits, targets, maps = micro_batch
        if LOGITS in said and maps is not None:
            of_step = (context.epoch, self.theta, context.dense, self.spec.label_smoothing)
            parts = dense_loss(said[LOGITS], teacher_logits, maps, self.loss, *of_step)
        elif LOGITS in said:
            control = NO_CONTROL if controller is None else controller.control(said[LOGITS], micro_batch)
            smoothing, chances = self.spec.label_smoothing, said.get(CHANCES)
            parts = self._distillation_loss(
                said[LOGITS],
                teacher_logits,
                labels,
                self.loss,
                context.epoch,
                mixed,
                self.theta,
                context.totals,
                smoothing,
                control,
                chances,
            )
        else:
            parts = LossParts(*(torch.zeros((), device=self.device) for _ in LossParts._fields))
        if self.learned.outputs is None:
            return parts
        of_outputs = self.learned.outputs.loss(said, targets, context.totals, maps)
        return parts._replace(total=parts.total + of_outputs, distillation=parts.distillation + of_outputs.detach())

    def _backward_in_two_passes(self, context: StepContext) -> LossParts:
        """Backpropagate a loss that needs the logits of the whole batch at once, in the memory of one micro-batch.

        First the logits of all micro-batches are computed without a graph, and the gradient of the loss with respect
        to them; then each micro-batch once more, with its part of that gradient (GradCache: Gao et al. 2021,
        2101.06983). It costs one more forward pass.
        """
        micro_batches = context.micro_batches
        buffers = {name: value.clone() for name, value in self.model.named_buffers()}
        devices = [self.device] if self.device.type == "cuda" else []
        with torch.no_grad(), torch.random.fork_rng(devices):
            each = [self._network(micro_batch.images) for micro_batch in micro_batches]
            said = {name: torch.cat([part[name] for part in each]) for name in each[0]}
        for name, value in self.model.named_buffers():
            value.copy_(buffers[name])
        for values in said.values():
            values.requires_grad_()
        parts = self._loss(said, MicroBatch.joined(micro_batches), context, self.controller)
        learned = [] if self.theta is None else [self.theta]
        found = torch.autograd.grad(parts.total, [*said.values(), *learned])
        theta_gradient = found[len(said) :]
        sizes = [len(micro_batch.labels) for micro_batch in micro_batches]
        gradients = zip(*(torch.split(gradient, sizes) for gradient in found[: len(said)]), strict=True)
        for micro_batch, synchronization in self.synchronized_at_last(micro_batches):
            with synchronization:
                again = self._network(micro_batch.images).values()
                product = sum((part * of.to(part.dtype)).sum() for part, of in zip(again, next(gradients), strict=True))
                if micro_batch is micro_batches[-1] and self.theta is not None:
                    product = product + (self.theta * theta_gradient[0]).sum()
                self.backward(product)
        return LossParts(*(value.detach() for value in parts))

    def state_dict(self) -> dict[str, Any]:
        """Return all that the next step depends on, as tensors and plain values."""
        return {
            **super().state_dict(),
            **{name: part.state_dict() for name, part in self.learned.by_name.items()},
            "theta": None if self.theta is None else self.theta.detach(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what `state_dict` returned."""
        super().load_state_dict(state)
        for name, part in self.learned.by_name.items():
            part.load_state_dict(state[name])
        if self.theta is not None:
            self.theta.data.copy_(state["theta"])

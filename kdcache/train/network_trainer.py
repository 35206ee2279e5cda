"""What training any network has: optimizer, schedule, average and gradients, on one process or on many (accelerate)."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from typing import Any, TypeVar

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from kdcache.config.optimizer import OptimizerSpec
from kdcache.losses import LossParts
from kdcache.train.gradients import GradientMonitor
from kdcache.train.optim import average_update, make_optimizer, make_schedule

T = TypeVar("T")


class NetworkTrainer:
    """A network with its optimizer, schedule, average of the weights, and what is learned beside it.

    Args:
        whole: what is trained: the network, and what is learned beside it. On the device.
        model: the network, a part of `whole`.
        spec: optimizer, schedule, average and clipping.
        accelerator: this process among all.
        steps: optimizer steps per epoch; their mean, if it changes.
        learned: parameters beside the network, with their names.
        compiled: the part of the network that `spec.compile` compiles, and how.
        report: called once, with a warning about a gradient that is not finite or has exploded; in the first process.

    Attributes:
        accelerator: this process among all.
        device: of the network.
        ranks: number of processes.
        gradients: their norms, and the warning.
    """

    def __init__(
        self,
        whole: nn.Module,
        model: nn.Module,
        spec: OptimizerSpec,
        accelerator: Accelerator,
        steps: float,
        learned: Sequence[tuple[str, nn.Parameter]] = (),
        compiled: Callable[[], None] | None = None,
        report: Callable[[str], None] | None = None,
    ) -> None:
        self.model, self.accelerator, self._whole = model, accelerator, whole
        self.device, self.ranks = accelerator.device, accelerator.num_processes
        optimizer = make_optimizer(model, spec, [parameter for _, parameter in learned])
        self.schedule = make_schedule(optimizer, spec, steps)
        # Accelerate's own optimizer and backward look for further packages in each step, which takes 0.3 ms.
        self.optimizer = optimizer if accelerator.scaler is None else accelerator.prepare_optimizer(optimizer)
        self.average: AveragedModel | None = None
        if spec.ema_decay is not None:
            self.average = AveragedModel(whole, multi_avg_fn=average_update(spec.ema_decay), use_buffers=True)
        if spec.compile:
            (compiled or model.compile)()
        self.gradients = GradientMonitor(
            [*model.named_parameters(), *learned],
            spec.max_grad_norm,
            report if accelerator.is_main_process else None,
        )
        self._network = accelerator.prepare_model(whole)
        if accelerator.process_index:
            # Each process draws other numbers in the network; the first draws those of a single process.
            torch.manual_seed(spec.seed + 1_000_003 * accelerator.process_index)

    @property
    def selected(self) -> Any:
        """What is validated and saved: the average of `whole` if there is one."""
        return self._whole if self.average is None else self.average.module

    def synchronized_at_last(self, micro_batches: Sequence[T]) -> Iterator[tuple[T, Any]]:
        """Yield each micro-batch with a context: in the last one, gradients are summed over the processes."""
        for number, micro_batch in enumerate(micro_batches, 1):
            last = number == len(micro_batches)
            yield micro_batch, nullcontext() if last else self.accelerator.no_sync(self._network)

    def backward(self, total: Tensor) -> None:
        """Backpropagate a part of the loss of a step."""
        # Gradients are averaged over the processes, and the losses of the processes add up to the batch's.
        total = total * self.ranks if self.ranks > 1 else total
        scaler = self.accelerator.scaler
        (total if scaler is None else scaler.scale(total)).backward()

    def update(self, total: Tensor, epoch: int) -> None:
        """Change the weights by the gradients of a step.

        Args:
            total: loss of the step [], for a warning.
            epoch: number of its epoch, from 1.
        """
        if self.accelerator.scaler is not None:
            self.accelerator.unscale_gradients()
        self.gradients.measure()
        self.optimizer.step()
        # Of fp16, a step whose scaled gradient is not finite is skipped as a matter of course.
        if not self.accelerator.optimizer_step_was_skipped:
            self.schedule.step()
            self.gradients.add(total, epoch)
        if self.average is not None:
            self.average.update_parameters(self._whole)

    def reduced(self, parts: Sequence[LossParts]) -> list[LossParts]:
        """Sum the losses of each step over the processes."""
        values = torch.stack([torch.stack(list(step)) for step in parts])
        if self.ranks > 1:
            values = self.accelerator.reduce(values, "sum")
        return [LossParts(*step) for step in values]

    def state_dict(self) -> dict[str, Any]:
        """Return all that the next step depends on, as tensors and plain values."""
        return {
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "schedule": self.schedule.state_dict(),
            "scaler": None if self.accelerator.scaler is None else self.accelerator.scaler.state_dict(),
            "average": None if self.average is None else self.average.state_dict(),
            "gradients": self.gradients.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what `state_dict` returned."""
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.schedule.load_state_dict(state["schedule"])
        if self.accelerator.scaler is not None:
            self.accelerator.scaler.load_state_dict(state["scaler"])
        if self.average is not None:
            self.average.load_state_dict(state["average"])
        self.gradients.load_state_dict(state["gradients"])


def sum_of_parts(each: Sequence[LossParts]) -> LossParts:
    """Return the loss of a step from those of its micro-batches, without gradients."""
    return LossParts(*(torch.stack([value.detach() for value in values]).sum() for values in zip(*each, strict=True)))

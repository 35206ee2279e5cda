"""The training of a controller: what a step of the student does to its loss on the validation split.

With the training loss L of a batch, the weights w of the student, the parameters phi of the controller, and the loss V
on a batch of the validation split, a controller goes down the gradient

    d V(w - lr * dL(w, phi) / dw) / d phi  =  - lr * d / d phi <dL(w, phi) / dw, dV / dw'>

of a single plain step of gradient descent, whatever the optimizer of the student. It is exact: the second derivatives
are computed, not approximated by differences.

Source: DARTS (Liu et al. 2019, 1806.09055, eq. 6); Meta-Weight-Net (Shu et al. 2019, 1902.07379).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F

from kdcache.losses import Loss
from kdcache.losses.controllers import Control, Controller, HypergradientOptions
from kdcache.losses.distillation import distillation_loss
from kdcache.train.batches import LabeledBatches
from kdcache.train.passes import MicroBatch


class ComingStep(NamedTuple):
    """The step of the student that is about to be taken.

    Attributes:
        micro_batches: that make up its batch.
        loss: that the student minimizes.
        epoch: counted from 1.
        lr: learning rate of the student.
        label_smoothing: of the student's cross-entropy.
    """

    micro_batches: Sequence[MicroBatch]
    loss: Loss
    epoch: int
    lr: float
    label_smoothing: float = 0.0


class ControllerTraining:
    """A controller with its optimizer and the validation images that it is trained on.

    Args:
        controller: the network.
        options: learning rate, and how often it is trained.
        validation: images with labels.

    Attributes:
        controller: the network.
    """

    def __init__(self, controller: Controller, options: HypergradientOptions, validation: LabeledBatches) -> None:
        self.controller, self._options, self._validation, self._steps = controller, options, validation, 0
        self._optimizer = torch.optim.Adam(controller.parameters(), options.lr, weight_decay=options.weight_decay)

    def control(self, student_logits: Tensor, batch: MicroBatch) -> Control:
        """Return what is set for a batch of the student with logits [B, C], without a gradient."""
        with torch.no_grad():
            return self._control(student_logits, batch)

    def _control(self, student_logits: Tensor, batch: MicroBatch) -> Control:
        if batch.teacher_logits is None:
            raise TypeError("a controller needs the teacher's logits")
        control: Control = self.controller(student_logits, batch.teacher_logits, batch.labels)
        return control

    def prepare(self, model: nn.Module, coming: ComingStep) -> None:
        """Compute the gradient of the controller, before the step of the student, in one micro-batch."""
        self._steps += 1
        self._optimizer.zero_grad()
        if not self._options.is_trained or self._steps % self._options.every:
            return
        (batch,), loss, epoch, lr, smoothing = coming
        validation = self._validation.batch(self._steps // self._options.every - 1, batch.images.device)
        # Nothing of the student changes here, batch statistics included.
        buffers = {name: value.clone() for name, value in model.named_buffers()}
        weights = {name: value.detach().clone().requires_grad_() for name, value in model.named_parameters()}
        logits = functional_call(model, (weights, buffers), (batch.images,))
        control = self._control(logits, batch)
        total = distillation_loss(
            logits, batch.teacher_logits, batch.labels, loss, epoch, label_smoothing=smoothing, control=control
        ).total
        slopes = torch.autograd.grad(total, [*weights.values()], create_graph=True, materialize_grads=True)
        moved = {
            name: (weight - lr * slope).detach().requires_grad_()
            for (name, weight), slope in zip(weights.items(), slopes, strict=True)
        }
        held_out = functional_call(model, (moved, buffers), (validation.images,))
        of_moved = torch.autograd.grad(
            F.cross_entropy(held_out, validation.labels), [*moved.values()], materialize_grads=True
        )
        parameters = [*self.controller.parameters()]
        found = torch.autograd.grad(
            slopes, parameters, [-lr * slope for slope in of_moved], allow_unused=True, materialize_grads=True
        )
        for parameter, gradient in zip(parameters, found, strict=True):
            parameter.grad = gradient

    def step(self, model: nn.Module) -> None:
        """Take the step whose gradient was prepared, after that of the student `model`; without one, none."""
        self._optimizer.step()

    def state_dict(self) -> dict[str, Any]:
        """Return all that the next step depends on."""
        return {
            "controller": self.controller.state_dict(),
            "optimizer": self._optimizer.state_dict(),
            "steps": self._steps,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what `state_dict` returned."""
        self.controller.load_state_dict(state["controller"])
        self._optimizer.load_state_dict(state["optimizer"])
        self._steps = state["steps"]

"""The training of a controller: what a step of the student does to its loss on the validation split.

With the training loss L of a batch, the weights w of the student, the parameters phi of the controller, and the loss V
on a batch of the validation split, a controller goes down the gradient

    d V(w - lr * dL(w, phi) / dw) / d phi  =  - lr * d / d phi <dL(w, phi) / dw, dV / dw'>

of a single plain step of gradient descent, whatever the optimizer of the student. It is exact: the second derivatives
are computed, not approximated by differences.

Source: DARTS (Liu et al. 2019, 1806.09055, eq. 6); Meta-Weight-Net (Shu et al. 2019, 1902.07379).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F

from kdcache.cache.teacher import Teacher, class_logits_of
from kdcache.config.schema import TrainSpec
from kdcache.data.loader import cut_range
from kdcache.data.views import View
from kdcache.errors import UsageError
from kdcache.losses import Loss
from kdcache.losses.controllers import ClassMeans, Control, Controller, ControllerOptions
from kdcache.losses.distillation import distillation_loss
from kdcache.train.passes import MicroBatch

_ROWS_AT_ONCE = 4096


class ControllerTraining:
    """A controller with its optimizer and the validation images that it is trained on.

    Args:
        controller: the network.
        options: learning rate, and how often it is trained.
        validation: images with labels.
        batch_size: images of a step of the controller.
        seed: of the order of the validation images.

    Attributes:
        controller: the network.
    """

    def __init__(
        self, controller: Controller, options: ControllerOptions, validation: View, batch_size: int, seed: int
    ) -> None:
        self.controller, self._options, self._validation = controller, options, validation
        self._batch_size, self._seed, self._steps = min(batch_size, len(validation)), seed, 0
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

    def prepare(self, model: nn.Module, batch: MicroBatch, loss: Loss, epoch: int, lr: float, smoothing: float) -> None:
        """Compute the gradient of the controller, before the step of the student that it is about.

        Args:
            model: the student.
            batch: of the coming step.
            loss: that the student minimizes.
            epoch: counted from 1.
            lr: learning rate of the student.
            smoothing: label smoothing of the student's cross-entropy.
        """
        self._steps += 1
        self._optimizer.zero_grad()
        if not self._options.is_trained or self._steps % self._options.every:
            return
        validation = self._validation.__getitems__(self._next_ids())
        device = batch.images.device
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
        held_out = functional_call(model, (moved, buffers), (validation.images.to(device),))
        of_moved = torch.autograd.grad(
            F.cross_entropy(held_out, validation.labels.to(device), ignore_index=-1),
            [*moved.values()],
            materialize_grads=True,
        )
        parameters = [*self.controller.parameters()]
        found = torch.autograd.grad(
            slopes, parameters, [-lr * slope for slope in of_moved], allow_unused=True, materialize_grads=True
        )
        for parameter, gradient in zip(parameters, found, strict=True):
            parameter.grad = gradient

    def step(self) -> None:
        """Take the step whose gradient was prepared; without one, none."""
        self._optimizer.step()

    def _next_ids(self) -> list[int]:
        """Return the ids of a batch of validation images: random orders of all, one after the other."""
        per_pass = len(self._validation) // self._batch_size
        number, index = divmod(self._steps // self._options.every - 1, per_pass)
        generator = torch.Generator().manual_seed(self._seed * 1_000_003 + number)
        order = torch.randperm(len(self._validation), generator=generator)
        return order[index * self._batch_size :][: self._batch_size].tolist()

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


def make_controller(
    loss: Loss,
    spec: TrainSpec,
    train: View,
    validation: View | None,
    teacher: Teacher | None,
    processes: int,
    device: torch.device | str,
) -> ControllerTraining | None:
    """Return the controller of a loss, with the random weights that the present seed gives; None without one.

    Args:
        loss: of the run.
        spec: of the student's training.
        train: the training images.
        validation: images with labels that the student is not trained on.
        teacher: of the training images.
        processes: that share a batch.
        device: of the training.

    Raises:
        UsageError: if there are no labels to train it on, or training is divided, compiled or in mixed precision.
    """
    if loss.controller is None or teacher is None:
        return None
    name = f"the controller {loss.controller.kind}"
    if validation is None or not bool((validation.labels >= 0).any()):
        raise UsageError(
            f"{name} is trained on labeled validation images, and there are none", "set dataset.validation_fraction"
        )
    whole = {
        "train.gradient_accumulation_steps": spec.gradient_accumulation_steps == 1,
        "train.compile": not spec.compile,
        "train.precision": spec.precision == "fp32",
    }
    if divided := [key for key, is_default in whole.items() if not is_default]:
        raise UsageError(f"{name} needs second derivatives of a whole batch, and {divided[0]} is set", "remove it")
    if processes > 1:
        raise UsageError(f"{name} is trained in one process, and there are {processes}", "run it in one process")
    means = _class_means(train, teacher)
    controller = loss.controller.make(train.samples.num_classes, means).to(device)
    return ControllerTraining(controller, loss.controller, validation, spec.batch_size, spec.seed_of_data)


def _class_means(train: View, teacher: Teacher) -> Tensor:
    """Return the mean probabilities of the teacher over the training samples of each class, [C, C], in view 0."""
    logits = class_logits_of(teacher)
    means = ClassMeans(train.samples.num_classes)
    cuts = [torch.arange(cut.start, cut.stop) for cut in cut_range(range(len(train)), _ROWS_AT_ONCE)]
    logits.prefetch(cuts, 0)
    for cut in cuts:
        means.add(logits(cut, 0).cpu(), train.labels[cut])
    return means.result()

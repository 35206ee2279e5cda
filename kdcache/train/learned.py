"""What is trained beside the student: maps of its outputs, a gate over teachers, a controller of the loss."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

from kdcache.cache.teacher import Teacher, class_logits_of
from kdcache.config.schema import TrainSpec
from kdcache.data.loader import cut_range
from kdcache.data.views import View
from kdcache.errors import UsageError
from kdcache.losses import Loss
from kdcache.losses.controllers import ClassMeans, HypergradientOptions
from kdcache.losses.gate import Gate
from kdcache.losses.temperature_agent import ITKDOptions
from kdcache.models.checkpoints import save_weights
from kdcache.train.batches import LabeledBatches
from kdcache.train.controller import ControllerTraining
from kdcache.train.student_outputs import LOGITS, StudentOutputs
from kdcache.train.temperature_agent import AgentTraining

_ROWS_AT_ONCE = 4096

GATE, CONTROLLER = "gate.safetensors", "controller.safetensors"
"""Files of a run folder."""


CHANCES = "chances"
"""Key of the probabilities of a gate among the outputs of a forward pass."""

TrainedController = ControllerTraining | AgentTraining
"""A controller with what trains it: by a gradient, or by a reward."""


class LearnedParts(NamedTuple):
    """What is trained beside the student; None for what the loss does not have.

    Attributes:
        outputs: outputs beside the logits that the loss compares with those of the teacher.
        gate: chooses among several teachers.
        controller: sets the share or the temperature of each sample.
    """

    outputs: StudentOutputs | None = None
    gate: Gate | None = None
    controller: TrainedController | None = None

    @property
    def by_name(self) -> dict[str, nn.Module | TrainedController]:
        """Those that are there, by the names that they have in a state."""
        return {name: part for name, part in self._asdict().items() if part is not None}

    def load(self, states: Mapping[str, Mapping[str, Tensor]]) -> None:
        """Load what `WholeNetwork.learned_state` returned."""
        for name, state in states.items():
            self.by_name[name].load_state_dict(state)  # type: ignore[arg-type]  # no controller is among them

    def save(self, folder: Path) -> None:
        """Write what was learned into the run folder, beside the student."""
        if self.outputs is not None:
            self.outputs.save(folder)
        if self.gate is not None:
            save_weights(self.gate, folder / GATE)
        if self.controller is not None:
            save_weights(self.controller.controller, folder / CONTROLLER)


NO_PARTS = LearnedParts()
"""For a network that is trained alone."""


class WholeNetwork(nn.Module):
    """The network and what is learned beside it: accelerate wraps this, and leaves the network unchanged."""

    def __init__(
        self, model: nn.Module, theta: nn.Parameter | None, outputs: StudentOutputs | None, gate: Gate | None
    ) -> None:
        super().__init__()
        self.model, self.theta, self.outputs, self.gate = model, theta, outputs, gate

    def learned_state(self) -> dict[str, dict[str, Tensor]]:
        """Return the weights of what is learned beside the network and depends on its weights, by its name."""
        parts = {"outputs": self.outputs, "gate": self.gate}
        return {name: part.state_dict() for name, part in parts.items() if part is not None}

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """Return the logits [B, C] of images [B, channels, H, W], and other outputs [B, D], by name."""
        said: dict[str, Tensor]
        said = {LOGITS: self.model(images)} if self.outputs is None else self.outputs(self.model, images)
        if self.gate is not None:
            said[CHANCES] = self.gate(said[LOGITS])
        return said


def make_gate(loss: Loss, teacher: Teacher | None, num_classes: int, device: torch.device | str) -> Gate | None:
    """Return the gate of a loss, with the random weights that the present seed gives; None without one."""
    if loss.gate is None or teacher is None:
        return None
    n_teachers = class_logits_of(teacher)(torch.arange(1)).shape[1]
    return Gate(num_classes, n_teachers).to(device)


def make_controller(
    loss: Loss,
    spec: TrainSpec,
    train: View,
    validation: View | None,
    teacher: Teacher | None,
    processes: int,
    device: torch.device | str,
) -> TrainedController | None:
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
        UsageError: if there are no labels to train it on, or training is divided in a way that it does not allow.
    """
    options = loss.controller
    if options is None or teacher is None:
        return None
    name = f"the controller {options.kind}"
    if processes > 1:
        raise UsageError(f"{name} is trained in one process, and there are {processes}", "run it in one process")
    if isinstance(options, ITKDOptions):
        _check_agent(options, spec, train)
        judged_by = None if options.reward == "training" else _validation_batches(name, validation, spec)
        return AgentTraining(options.make().to(device), options, judged_by, spec.seed)
    if not isinstance(options, HypergradientOptions):
        raise TypeError(f"{type(options).__name__} is not known")
    batches = _validation_batches(name, validation, spec)
    whole = {
        "train.gradient_accumulation_steps": spec.gradient_accumulation_steps == 1,
        "train.compile": not spec.compile,
        "train.precision": spec.precision == "fp32",
    }
    if divided := [key for key, is_default in whole.items() if not is_default]:
        raise UsageError(f"{name} needs second derivatives of a whole batch, and {divided[0]} is set", "remove it")
    controller = options.make(train.samples.num_classes, _class_means(train, teacher)).to(device)
    return ControllerTraining(controller, options, batches)


def _validation_batches(name: str, validation: View | None, spec: TrainSpec) -> LabeledBatches:
    if validation is None or not bool((validation.labels >= 0).any()):
        raise UsageError(
            f"{name} is trained on labeled validation images, and there are none", "set dataset.validation_fraction"
        )
    return LabeledBatches(validation, spec.batch_size, spec.seed_of_data)


def _check_agent(options: ITKDOptions, spec: TrainSpec, train: View) -> None:
    """Check that an agent acts in the run, and gets a reward."""
    if options.start_epoch > spec.epochs:
        raise UsageError(
            f"the controller itkd begins in epoch {options.start_epoch}, and the run has {spec.epochs}",
            "lower loss.controller.start_epoch, or train longer",
        )
    if options.reward == "training" and not bool((train.labels >= 0).any()):
        raise UsageError(
            "the reward of the controller itkd is the accuracy on labeled training images, and there are none",
            "set loss.controller.reward=validation",
        )


def _class_means(train: View, teacher: Teacher) -> Tensor:
    """Return the mean probabilities of the teacher over the training samples of each class, [C, C], in view 0."""
    logits = class_logits_of(teacher)
    means = ClassMeans(train.samples.num_classes)
    cuts = [torch.arange(cut.start, cut.stop) for cut in cut_range(range(len(train)), _ROWS_AT_ONCE)]
    logits.prefetch(cuts, 0)
    for cut in cuts:
        means.add(logits(cut, 0).cpu(), train.labels[cut])
    return means.result()

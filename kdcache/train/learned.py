"""What is trained beside the student: maps of its outputs, a gate over teachers, a controller of the loss."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

from kdcache.cache.teacher import Teacher, class_logits_of
from kdcache.losses import Loss
from kdcache.losses.gate import Gate
from kdcache.models.checkpoints import save_weights
from kdcache.train.controller import ControllerTraining
from kdcache.train.student_outputs import LOGITS, StudentOutputs

GATE, CONTROLLER = "gate.safetensors", "controller.safetensors"
"""Files of a run folder."""


CHANCES = "chances"
"""Key of the probabilities of a gate among the outputs of a forward pass."""


class LearnedParts(NamedTuple):
    """What is trained beside the student; None for what the loss does not have.

    Attributes:
        outputs: outputs beside the logits that the loss compares with those of the teacher.
        gate: chooses among several teachers.
        controller: sets the share or the temperature of each sample.
    """

    outputs: StudentOutputs | None = None
    gate: Gate | None = None
    controller: ControllerTraining | None = None

    @property
    def by_name(self) -> dict[str, nn.Module | ControllerTraining]:
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

"""A gate that chooses among several teachers for each sample, learned with the student."""

from __future__ import annotations

import math
from typing import Annotated, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from kdcache.losses.batch import BatchSum, of_these
from kdcache.losses.options import LossSection, NotNegative


class GateOptions(LossSection):
    """Options of a gate over the teachers of several caches."""

    choose: Literal["top", "mean"] = "top"
    """`top`: the mean distillation loss of the most probable teachers; `mean`: the loss of the mean logits, weighted by
    the probabilities."""
    top: Annotated[int, Field(ge=1)] = 1
    """How many teachers `top` takes for each sample."""
    balance: NotNegative = 1.0
    """Weight of the KL divergence of the mean probabilities of the batch from uniform ones."""

    @model_validator(mode="after")
    def _top_has_an_effect(self) -> GateOptions:
        if self.choose == "mean" and self.top > 1:
            raise ValueError(f"top {self.top} has no effect with choose: mean, which is of all teachers")
        return self


class Gate(nn.Module):
    """The probability of each teacher for a sample, from the student's logits: [B, C] -> [B, K].

        softmax(W2 (W1 v + b1) + b2), with W1 [2C, C] and W2 [K, 2C]

    There is no nonlinearity between the layers in the published code, and none here.

    Source: Gray-OREO/MST-Distill@093b2fe, KD_methods/MST.py, GateNet.
    """

    def __init__(self, num_classes: int, teachers: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(num_classes, 2 * num_classes), nn.Linear(2 * num_classes, teachers))

    def forward(self, student_logits: Tensor) -> Tensor:
        """Return the probabilities [B, K] for student logits [B, C]."""
        probabilities: Tensor = self.layers(student_logits).softmax(dim=1)
        return probabilities


def chosen_logits(teacher_logits: Tensor, probabilities: Tensor, options: GateOptions) -> list[Tensor]:
    """Return the logits [B, C] of the teachers that a student learns from; its loss is the mean over the list.

    HAZARD. The choice of the most probable teachers has no gradient: with `top`, the published form, the gate learns
    from the balance alone, which asks for equal use of all teachers. `mean` gives it a gradient of the distillation.

    Args:
        teacher_logits: [B, K, C].
        probabilities: [B, K].
        options: of the gate.

    Source: Gray-OREO/MST-Distill@093b2fe, KD_methods/MST.py, k_ways_MTGdistillation_detached and
    weighted_MTGdistillation_detached.
    """
    if options.choose == "mean":
        return [(probabilities.unsqueeze(2) * teacher_logits).sum(dim=1)]
    best = probabilities.topk(options.top, dim=1).indices
    rows = torch.arange(len(best), device=best.device)
    return [teacher_logits[rows, best[:, rank]] for rank in range(options.top)]


def imbalance(probabilities: Tensor, batch_sum: BatchSum = of_these) -> Tensor:
    """Return KL(uniform || mean probabilities of the batch) = -log K - mean_k log g_k, a scalar.

    ERRATUM. The published code divides it by the number of teachers K once more: `KLDivLoss("batchmean")` takes the
    first dimension of a vector [K] for the batch. A `balance` of 1 / K is its weight 1.

    Args:
        probabilities: [B, K].
        batch_sum: sum over the whole batch, part of which may be in other processes.

    Source: Gray-OREO/MST-Distill@093b2fe, KD_methods/MST.py, load_balancing_loss.
    """
    mean = batch_sum(probabilities) / batch_sum(probabilities.new_ones(len(probabilities)))
    return -math.log(len(mean)) - mean.log().mean()

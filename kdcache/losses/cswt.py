"""A temperature from the similarity of the probabilities."""

from __future__ import annotations

from typing import ClassVar, Literal

import torch
from pydantic import model_validator
from torch import Tensor

from kdcache.losses.batch import BatchMax, BatchSum, batch_mean, max_of_these, of_these
from kdcache.losses.correlation import angle, over_classes
from kdcache.losses.options import Positive, Presets, TemperatureOptions
from kdcache.losses.temperatures import Temperatures

_FLAT = 64
"""Range of the similarities, in units of rounding, up to which they count as equal."""


def cswt(
    student_logits: Tensor,
    teacher_logits: Tensor,
    tau: float = 4.0,
    low: float = 2.0,
    high: float = 6.0,
    batch_sum: BatchSum = of_these,
    batch_max: BatchMax = max_of_these,
) -> Temperatures:
    """Lower the temperature of samples on which student and teacher agree (cosine similarity weighted temperature).

        T_i = low + (high - low) * (c_max - c_i) / (c_max - c_min)    c_i = cos(p_i, q_i) at T = 1

    c_min and c_max are those of the batch. The weight is the square of the mean temperature of the batch for all
    samples, as in the authors' code.

    GUARD. If c_max = c_min, as in a batch of one sample or between equal networks, the published code divides 0 by 0
    and the loss is NaN. All temperatures then are `low`, which is what the sample with c_max always gets.

    The authors' code multiplies some terms by a mask of half of the samples (or classes) after they have been averaged
    over the batch, so that the mask only halves their weight. It is left out here, as are its terms of products of the
    probabilities (cc_loss, bc_loss).

    Args:
        student_logits: [B, C]; detached, temperatures carry no gradient.
        teacher_logits: [B, C].
        tau: not used here; the temperature of `plain_kd_weight`.
        low: temperature of the most similar sample.
        high: temperature of the least similar one.
        batch_sum: sum over the whole batch, part of which may be in other processes.
        batch_max: maximum over it.

    Source: Ham, Kim, Lee & Kim 2023 (2311.14307); the authors' CSKD.py for mdistiller.
    """
    q, p = student_logits.detach().softmax(dim=1), teacher_logits.detach().softmax(dim=1)
    distance = angle(q, p, q, p, over_classes).squeeze(1)
    least, most = -batch_max(-distance), batch_max(distance)
    is_flat = most - least <= _FLAT * torch.finfo(q.dtype).eps
    share = torch.where(is_flat, 0.0, (distance - least) / torch.where(is_flat, 1.0, most - least))
    temperature = low + (high - low) * share
    of_rows = temperature.unsqueeze(1)
    return Temperatures(of_rows, of_rows, batch_mean(temperature, batch_sum).square().expand(len(temperature)))


class CSWT(TemperatureOptions):
    """Options of `cswt`."""

    compute = staticmethod(cswt)
    presets: ClassVar[Presets] = {"cswt": {}}
    uses_batch = True
    uses_batch_max = True
    refused_for_tokens = "its temperatures depend on the least and the most similar rows of the whole step"

    kind: Literal["cswt"] = "cswt"
    tau: Positive = 4.0
    low: Positive = 2.0
    high: Positive = 6.0

    @model_validator(mode="after")
    def _low_is_below_high(self) -> CSWT:
        if self.low >= self.high:
            raise ValueError(
                f"low, {self.low:g}, must be below high, {self.high:g}: for one temperature, take constant"
            )
        return self

"""Comparative distillation: differences between groups of samples."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

from pydantic import Field
from torch import Tensor

from kdcache.losses.batch import BatchSum, of_these
from kdcache.losses.options import AT_1, DivergenceOptions, Presets


def comparative(
    student_scaled: Tensor, teacher_scaled: Tensor, labels: Tensor, group_size: int = 1, batch_sum: BatchSum = of_these
) -> Tensor:
    """Return how far the student's differences between groups of samples are from the teacher's.

        mean over all pairs of groups g, h of mean_c ((mean_g v - mean_h v) - (mean_g u - mean_h u))^2

    A group is `group_size` consecutive samples of the batch, which training shuffles. The values of its samples are the
    group's part of the mean, which is computed without the pairs: with d_g = mean_g (v - u) and G groups it is
    2 / (G - 1) * sum_g (d_g - mean d)^2. It is 0 for a single group.

    A constant that is added to all rows changes nothing; one that is added to some rows does.

    Args:
        student_scaled: [B, C].
        teacher_scaled: [B, C].
        labels: [B]; not used.
        group_size: samples per group; B must be a multiple.
        batch_sum: sum over the whole batch, part of which may be in other processes.

    Raises:
        ValueError: if the samples cannot be divided into groups.

    Source: Wilf et al. 2023, Comparative knowledge distillation (2311.02253), with all pairs of groups of the batch.
    """
    count = len(student_scaled)
    if count % group_size:
        raise ValueError(f"{count} samples cannot be divided into groups of {group_size}")
    apart = (student_scaled - teacher_scaled).reshape(count // group_size, group_size, -1).mean(dim=1)
    groups = batch_sum(apart.new_ones(len(apart)))
    values = (apart - batch_sum(apart) / groups).square().mean(dim=1)
    return (2 * groups / (groups - 1).clamp_min(1) * values).repeat_interleave(group_size)


class Comparative(DivergenceOptions):
    """Options of `comparative`."""

    compute = staticmethod(comparative)
    presets: ClassVar[Presets] = {"comparative": {"ce_weight": 1.0, "kd_weight": 1.0, "temperature": AT_1}}
    uses_batch = True
    needs_level = True
    needs_logits = True
    ignores_shared_temperature = True
    needs_constant_temperature = True
    refused_for_tokens = "it compares a position with all others of the step"

    kind: Literal["comparative"] = "comparative"
    group_size: Annotated[int, Field(ge=1)] = 1

    @property
    def samples_per_group(self) -> int:
        """Return `group_size`."""
        return self.group_size

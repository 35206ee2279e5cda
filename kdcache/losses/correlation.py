"""Divergences that compare the directions of the probabilities, along the rows and the columns of a batch."""

from __future__ import annotations

from collections.abc import Iterator
from typing import ClassVar, Literal

import torch
from torch import Tensor

from kdcache.losses.batch import BatchSum, batch_mean, of_these
from kdcache.losses.options import AT_1, DivergenceOptions, NotNegative, Presets


def dist(
    student_scaled: Tensor,
    teacher_scaled: Tensor,
    labels: Tensor,
    beta: float = 1.0,
    gamma: float = 1.0,
    center: bool = True,
    batch_sum: BatchSum = of_these,
) -> Tensor:
    """Return 1 - Pearson's correlation of p and q, along each row and down each column of the batch (DIST).

        beta * (1 - r(p_i, q_i)) + gamma * mean_j (1 - r(p_.j, q_.j))

    The second term belongs to the batch and is the same for all its samples. A row or a column that does not vary has
    no correlation: the term is 0 if neither p nor q varies (as in a batch of one sample), 1/2 if one does, and has no
    gradient. A row or column counts as constant if its deviations are at most 1e-4 of its norm, or underflow.

    With `center=False` r is the cosine of the probabilities themselves, which is defined for rows and columns that do
    not vary. With beta = gamma = 2 at T = 4 it is the value term of R2KD; with beta = 0, gamma = 2 it is CSKD's.

    ERRATUM. R2KD adds a rank term, 1 - Spearman's correlation of the rows. Its ranks are those of two argsorts, which
    have no gradient: the published figures are of the value term alone, and there is no rank term here.

    Args:
        student_scaled: [B, C].
        teacher_scaled: [B, C].
        labels: [B]; not used.
        beta: weight of the rows, the relation between classes.
        gamma: weight of the columns, the relation between samples.
        center: subtract the means of rows and columns first.
        batch_sum: sum over the whole batch, part of which may be in other processes.

    Source: Huang et al. 2022 (2205.10536); code github.com/hunto/DIST_KD at 6d93ca0, without its 1e-8 beside the
    norms: at T = 4 it would change the seventh digit. R2KD: Kim, Ham, Cho & Kim 2024 (2311.13934); code
    github.com/Seonghak35/R2KD at ece240e, value_loss. CSKD: Ham, Kim, Lee & Kim 2023 (2311.14307); the authors'
    CSKD.py, cs_loss.
    """
    q, p = student_scaled.softmax(dim=1), teacher_scaled.softmax(dim=1)
    if center:
        rows = angle(q - q.mean(dim=1, keepdim=True), p - p.mean(dim=1, keepdim=True), q, p, over_classes)
    else:
        rows = angle(q, p, q, p, over_classes)
    if gamma == 0:
        return beta * rows.squeeze(1)
    if center:
        columns = angle(q - batch_mean(q, batch_sum), p - batch_mean(p, batch_sum), q, p, batch_sum)
    else:
        columns = angle(q, p, q, p, batch_sum)
    return beta * rows.squeeze(1) + gamma * columns.mean()


class DIST(DivergenceOptions):
    """Options of `dist`."""

    compute = staticmethod(dist)
    # The defaults of the authors' codes; CSKD's files leave its weights and temperatures open.
    presets: ClassVar[Presets] = {
        "dist": {"ce_weight": 1.0, "kd_weight": 1.0, "temperature": AT_1},
        "r2kd": {
            "ce_weight": 1.0,
            "kd_weight": 1.0,
            "temperature": {"kind": "constant", "tau": 4.0},
            "divergence": {"kind": "dist", "beta": 2.0, "gamma": 2.0, "center": False},
        },
        "cskd": {
            "ce_weight": 1.0,
            "kd_weight": 1.0,
            "plain_kd_weight": 1.0,
            "temperature": {"kind": "cswt"},
            "divergence": {"kind": "dist", "beta": 0.0, "gamma": 2.0, "center": False},
        },
    }
    uses_batch = True

    kind: Literal["dist"] = "dist"
    beta: NotNegative = 1.0
    gamma: NotNegative = 1.0
    center: bool = True

    def without_effect(self) -> Iterator[str]:
        """Yield an objection if both weights are 0."""
        if self.beta == self.gamma == 0:
            yield "beta and gamma of dist are both 0"

    @property
    def refused_for_tokens(self) -> str | None:  # type: ignore[override]  # a class variable of the others
        """Why the columns are refused; None if their weight is 0."""
        return "its columns are [tokens, V] of the whole step: set gamma to 0 for the rows" if self.gamma else None


def cosine(student_scaled: Tensor, teacher_scaled: Tensor, labels: Tensor) -> Tensor:
    """Return 1 - cos(p, q) of each sample: the rows of DIST, not centered.

    (The cosine of logits would not depend on the temperature.)

    Source: none; the cosine embedding loss of DistilBERT (Sanh et al. 2019, 1910.01108) applied to probabilities.
    """
    q, p = student_scaled.softmax(dim=1), teacher_scaled.softmax(dim=1)
    return angle(q, p, q, p, over_classes).squeeze(1)


class Cosine(DivergenceOptions):
    """Options of `cosine`."""

    compute = staticmethod(cosine)
    presets: ClassVar[Presets] = {"cosine": {}}

    kind: Literal["cosine"] = "cosine"


def over_classes(rows: Tensor) -> Tensor:
    """Return the sum of each row, [B, C] -> [B, 1]."""
    return rows.sum(dim=1, keepdim=True)


_FLAT = 1e-4
"""Norm of the deviations, as a fraction of the norm of the values, up to which a row or column counts as constant."""


def angle(a: Tensor, b: Tensor, a_values: Tensor, b_values: Tensor, total: BatchSum) -> Tensor:
    """Return 1 - cos(a, b), as half the squared distance of both at length 1: exactly 0 for equal ones, gradient too.

    Args:
        a: deviations of the student's probabilities, [B, C].
        b: of the teacher's.
        a_values: the probabilities that `a` deviates by: rounding makes deviations that are small beside them.
        b_values: of the teacher.
        total: sum over the axis that the vectors are along.
    """
    a, b = (_unit(z, values, total) for z, values in ((a, a_values), (b, b_values)))
    return total((a - b).square()) / 2


def _unit(z: Tensor, values: Tensor, total: BatchSum) -> Tensor:
    """Return vectors divided by their norms; 0, without a gradient, where the norm is 0 up to rounding."""
    squared = total(z.square())
    # Below this the squares lose digits, and then slopes overflow.
    smallest = torch.finfo(z.dtype).tiny / torch.finfo(z.dtype).eps
    is_flat = squared.detach() <= (_FLAT**2 * total(values.detach().square())).clamp_min(smallest)
    return torch.where(is_flat, 0.0, z / torch.where(is_flat, 1.0, squared).sqrt())

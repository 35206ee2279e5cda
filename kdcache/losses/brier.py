"""The Brier score: the squared difference of probabilities."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor
from torch.nn import functional as F

from kdcache.losses.options import AT_1, DivergenceOptions, Presets


def brier(student_scaled: Tensor, teacher_scaled: Tensor, labels: Tensor, alpha: float = 0.0) -> Tensor:
    """Return the mean over the classes of the squared difference of the probabilities.

        alpha * mean_c (q - onehot(y))^2 + (1 - alpha) * mean_c (q - p)^2

    A row labeled -1 has the second term alone. With alpha above 0 it is not 0 where student and teacher are equal.

    Args:
        student_scaled: [B, C].
        teacher_scaled: [B, C].
        labels: [B] int64, -1 where not known.
        alpha: weight of the labels, from 0 to 1; `best_alpha` estimates it.

    Source: Borup & Andersen 2021, Even your teacher needs guidance (2102.13088), at T = 1 and with the mean over the
    classes; code github.com/Kennethborup/self_distillation at cb20d6c, self_distiller.py.
    """
    q, p = student_scaled.softmax(dim=1), teacher_scaled.softmax(dim=1)
    of_teacher = (q - p).square().mean(dim=1)
    if alpha == 0:
        return of_teacher
    of_labels = (q - F.one_hot(labels.clamp_min(0), q.shape[1])).square().mean(dim=1)
    return alpha * torch.where(labels >= 0, of_labels, 0.0) + (1 - alpha) * of_teacher


class Brier(DivergenceOptions):
    """Options of `brier`."""

    compute = staticmethod(brier)
    # The labels have their place in the divergence itself.
    presets: ClassVar[Presets] = {"brier": {"ce_weight": 0.0, "kd_weight": 1.0, "temperature": AT_1}}

    kind: Literal["brier"] = "brier"
    alpha: Annotated[float, Field(ge=0, lt=1)] = 0.0

    @property
    def acts_on_label(self) -> bool:  # type: ignore[override]  # a class variable of the other divergences
        """Whether the labels have a weight."""
        return self.alpha > 0

    @property
    def positive_between_equals(self) -> bool:  # type: ignore[override]  # a class variable of the other divergences
        """Whether the labels have a weight, which draw the student away from the teacher."""
        return self.alpha > 0


def best_alpha(logits_at_0: Tensor, logits_at_1: Tensor, labels: Tensor) -> float:
    """Return the weight of the labels in `brier` that fits held-out data best, from two students.

        alpha* = <y - g, f - g> / |f - g|^2, limited to [0, 1]

    It is the least squares fit of alpha * f + (1 - alpha) * g to the one-hot labels y. For kernel ridge regression,
    whose fit is linear in its targets, that mixture is the student at alpha; for a network it is an approximation.

    Args:
        logits_at_0: [N, C], of the student that was trained with alpha = 0, by the teacher alone; g is their softmax.
        logits_at_1: [N, C], of the student that was trained on the labels alone; f is their softmax.
        labels: [N] int64; samples labeled -1 are left out.

    Raises:
        ValueError: if no sample has a label, or both students say the same of all of them.

    Source: Borup & Andersen 2021 (2102.13088), section 3.
    """
    known = labels >= 0
    g, f = (logits[known].double().softmax(dim=1) for logits in (logits_at_0, logits_at_1))
    y = F.one_hot(labels[known], g.shape[1])
    squared = (f - g).square().sum().item()
    if squared == 0:
        raise ValueError("alpha is not determined: no sample has a label, or both students say the same of all")
    return min(max(((y - g) * (f - g)).sum().item() / squared, 0.0), 1.0)

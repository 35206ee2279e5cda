"""Third axis: how the student's softened distribution is held against the teacher's.

Every divergence is a pure function of scaled logits `[B, C]` that returns one value a sample, `[B]`; it is given the
labels [B] too, for those that split the target class from the rest.
"""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F


def kl(student_scaled: Tensor, teacher_scaled: Tensor, labels: Tensor) -> Tensor:
    """KL(p || q) of each sample, p and q the softmax of teacher's and student's logits divided by their temperatures.

    Exactly 0, with a gradient of 0 to rounding, where both are equal; no term of it is NaN where p_j underflows to 0.

    Source: Hinton, Vinyals & Dean 2015 (1503.02531); mdistiller's KDLoss without the reduction.
    """
    log_q = student_scaled.log_softmax(dim=1)
    log_p = teacher_scaled.log_softmax(dim=1)
    return F.kl_div(log_q, log_p, reduction="none", log_target=True).sum(dim=1)

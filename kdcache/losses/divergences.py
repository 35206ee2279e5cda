"""Third axis: divergences between the student's and the teacher's softened distributions.

Every divergence is a pure function of scaled logits `[B, C]` that returns one value per sample, `[B]`. The third
argument are the labels [B], -1 where not known, for those that treat the true class apart. p and q are the softmax of
the teacher's and the student's logits divided by their temperatures. All but `plackett_luce` and `ofa` are 0 where both
are equal; all but `mse` are invariant to a constant that is added to a row. `correlation.py`, `brier.py` and
`comparative.py` have more of them.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Annotated, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor
from torch.nn import functional as F

from kdcache.losses.options import AT_1, DivergenceOptions, NotNegative, Presets
from kdcache.losses.rows import log_softmax


def kl(student_scaled: Tensor, teacher_scaled: Tensor, labels: Tensor) -> Tensor:
    """Return KL(p || q) of each sample.

    Exactly 0, with a gradient of 0 up to rounding, where both are equal; no term is NaN where p_j underflows to 0.

    Source: Hinton, Vinyals & Dean 2015 (1503.02531); mdistiller's KDLoss without the reduction.
    """
    log_q = log_softmax(student_scaled)
    log_p = log_softmax(teacher_scaled)
    return F.kl_div(log_q, log_p, reduction="none", log_target=True).sum(dim=1)


class KL(DivergenceOptions):
    """Options of `kl`."""

    compute = staticmethod(kl)
    has_closed_form = True

    kind: Literal["kl"] = "kl"


def reverse_kl(student_scaled: Tensor, teacher_scaled: Tensor, labels: Tensor) -> Tensor:
    """Return KL(q || p) of each sample, which penalizes the student's mass where the teacher has none.

    Source: Gu et al. 2024, MiniLLM (2306.08543); here class by class instead of by sampling.
    """
    return kl(teacher_scaled, student_scaled, labels)


class ReverseKL(DivergenceOptions):
    """Options of `reverse_kl`."""

    compute = staticmethod(reverse_kl)
    presets: ClassVar[Presets] = {"rkl": {}}
    infinite_at_zeros = True

    kind: Literal["reverse_kl"] = "reverse_kl"


def jensen_shannon(student_scaled: Tensor, teacher_scaled: Tensor, labels: Tensor) -> Tensor:
    """Return (KL(p || m) + KL(q || m)) / 2 with m = (p + q) / 2: symmetric, and never above log 2.

    For p close to q it is a quarter of KL(p || q). log m is computed from log q - log p, so that equal rows give 0 and
    no logarithm is taken of a probability that has underflowed.

    Source: Lin 1991, Divergence measures based on the Shannon entropy.
    """
    log_q = log_softmax(student_scaled)
    log_p = log_softmax(teacher_scaled)
    ratio = log_q - log_p
    kl_p = log_p.exp() * (math.log(2) + F.logsigmoid(-ratio))
    kl_q = log_q.exp() * (math.log(2) + F.logsigmoid(ratio))
    return (kl_p + kl_q).sum(dim=1) / 2


class JensenShannon(DivergenceOptions):
    """Options of `jensen_shannon`."""

    compute = staticmethod(jensen_shannon)
    presets: ClassVar[Presets] = {"js": {}}

    kind: Literal["jensen_shannon"] = "jensen_shannon"


def dkd(
    student_scaled: Tensor, teacher_scaled: Tensor, labels: Tensor, alpha: float = 1.0, beta: float = 8.0
) -> Tensor:
    """Return a weighted sum of the KL of (true class, all others) and the KL among the others (decoupled KD).

        alpha * KL((p_y, 1 - p_y) || (q_y, 1 - q_y)) + beta * KL(p without y || q without y)

    With beta = 1 - p_y it would be KD. 1 - q_y is computed as a logsumexp over the others, not as a difference, so that
    a student that is sure of the label does not lead to log 0. A row labeled -1 has no true class and gives 0.

    Args:
        student_scaled: [B, C], C at least 2.
        teacher_scaled: [B, C].
        labels: [B] int64, -1 where not known.
        alpha: weight of the true class against the others.
        beta: weight of the others among themselves.

    Source: Zhao et al. 2022 (2203.08679), equation 7; code github.com/megvii-research/mdistiller at e8c5bb3,
    mdistiller/distillers/DKD.py.
    """
    truth = labels.clamp_min(0).unsqueeze(1)
    others = torch.arange(student_scaled.shape[1] - 1, device=labels.device)
    others = others + (others >= truth)

    def decoupled(scaled: Tensor) -> tuple[Tensor, Tensor]:
        rest = scaled.gather(1, others)
        return torch.cat([scaled.gather(1, truth), rest.logsumexp(dim=1, keepdim=True)], dim=1), rest

    v_target, v_rest = decoupled(student_scaled)
    u_target, u_rest = decoupled(teacher_scaled)
    value = alpha * kl(v_target, u_target, labels) + beta * kl(v_rest, u_rest, labels)
    return torch.where(labels >= 0, value, 0.0)


class DKD(DivergenceOptions):
    """Options of `dkd`."""

    compute = staticmethod(dkd)
    # mdistiller's defaults for CIFAR-100.
    presets: ClassVar[Presets] = {"dkd": {"ce_weight": 1.0, "kd_weight": 1.0, "warmup_epochs": 20.0}}
    acts_on_label = True
    skips_unlabeled = True
    compares_other_classes = True

    kind: Literal["dkd"] = "dkd"
    alpha: NotNegative = 1.0
    beta: NotNegative = 8.0

    def without_effect(self) -> Iterator[str]:
        """Yield an objection if both weights are 0."""
        if self.alpha == self.beta == 0:
            yield "alpha and beta of dkd are both 0"


def plackett_luce(student_scaled: Tensor, teacher_scaled: Tensor, labels: Tensor) -> Tensor:
    """Return the weighted likelihood of the teacher's order of the classes, the true class first (Plackett-Luce).

        sum_k p_(k) * (logsumexp of v over the k-th and all later classes - v_(k))

    (k) is the true class for k = 1, then the others by descending teacher logit; a row labeled -1 has the teacher's
    order. Not 0 where student and teacher are equal: no finite logits make the order certain.

    Args:
        student_scaled: [B, C], v.
        teacher_scaled: [B, C].
        labels: [B] int64, -1 where not known.

    Source: Bassam, Zhu & Bian 2025 (2506.12542), section 4.2.
    """
    known = (labels >= 0).unsqueeze(1)
    first = teacher_scaled.detach().scatter(1, labels.clamp_min(0).unsqueeze(1), math.inf)
    order = torch.where(known, first, teacher_scaled.detach()).argsort(dim=1, descending=True)
    v = student_scaled.gather(1, order)
    later = v.flip(1).logcumsumexp(dim=1).flip(1)
    return (teacher_scaled.softmax(dim=1).gather(1, order) * (later - v)).sum(dim=1)


class PlackettLuce(DivergenceOptions):
    """Options of `plackett_luce`."""

    compute = staticmethod(plackett_luce)
    # The paper, whose first rank is the cross-entropy.
    presets: ClassVar[Presets] = {"pld": {"ce_weight": 0.0, "kd_weight": 1.0, "temperature": AT_1}}
    acts_on_label = True
    needs_order = True
    positive_between_equals = True
    refused_for_tokens = "it sorts all V classes of each position"

    kind: Literal["plackett_luce"] = "plackett_luce"


def ofa(student_scaled: Tensor, teacher_scaled: Tensor, labels: Tensor, eps: float = 1.5) -> Tensor:
    """Return the cross-entropy with the teacher, with a larger weight on the true class (one-for-all KD).

        -sum_j ((p_j + [j = y])^eps - [j = y]) * log q_j

    With eps = 1 it is KD's cross-entropy; for a row labeled -1 it is that of p^eps. Not 0 where student and teacher are
    equal.

    Args:
        student_scaled: [B, C].
        teacher_scaled: [B, C].
        labels: [B] int64, -1 where not known.
        eps: exponent, at least 1; a larger one puts more weight on the true class.

    Source: Hao et al. 2023 (2310.19444); code github.com/Hao840/OFAKD at 12eeba8, distillers/ofa.py.
    """
    known = (labels >= 0).to(teacher_scaled.dtype).unsqueeze(1)
    truth = torch.zeros_like(teacher_scaled).scatter(1, labels.clamp_min(0).unsqueeze(1), known)
    target = (teacher_scaled.softmax(dim=1) + truth).pow(eps) - truth
    return -(target * log_softmax(student_scaled)).sum(dim=1)


class OFA(DivergenceOptions):
    """Options of `ofa`."""

    compute = staticmethod(ofa)
    # The defaults of the authors' code.
    presets: ClassVar[Presets] = {"ofa": {"ce_weight": 1.0, "kd_weight": 1.0, "temperature": AT_1}}
    acts_on_label = True
    positive_between_equals = True

    kind: Literal["ofa"] = "ofa"
    eps: Annotated[float, Field(ge=1, allow_inf_nan=False)] = 1.5


def mse(student_scaled: Tensor, teacher_scaled: Tensor, labels: Tensor) -> Tensor:
    """Return the mean over the classes of the squared difference of the logits.

    For centered logits it is twice the limit of T^2 * KL for T to infinity. A constant that is added to a row changes
    it, unlike any divergence of softmaxes.

    Source: Ba & Caruana 2014 (1312.6184); Kim et al. 2021 (2105.08919).
    """
    return (student_scaled - teacher_scaled).square().mean(dim=1)


class MSE(DivergenceOptions):
    """Options of `mse`."""

    compute = staticmethod(mse)
    # At T = 1, since T cancels out.
    presets: ClassVar[Presets] = {"mse": {"temperature": AT_1}}
    needs_level = True
    needs_logits = True
    ignores_shared_temperature = True
    needs_tail_shape = True

    kind: Literal["mse"] = "mse"

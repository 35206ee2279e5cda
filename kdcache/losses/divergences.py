"""Third axis: how the student's softened distribution is held against the teacher's.

Every divergence is a pure function of scaled logits `[B, C]` that returns one value a sample, `[B]`; it is given the
labels [B] too, -1 where not known, for those that treat the true class apart. p and q are the softmax of the teacher's
and the student's logits divided by their temperatures. All but `plackett_luce` and `ofa` are 0 where both are equal,
and all but `mse` are blind to a shift of a row.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from kdcache.losses.batch import BatchSum, batch_mean, of_these


def kl(student_scaled: Tensor, teacher_scaled: Tensor, labels: Tensor) -> Tensor:
    """KL(p || q) of each sample.

    Exactly 0, with a gradient of 0 to rounding, where both are equal; no term of it is NaN where p_j underflows to 0.

    Source: Hinton, Vinyals & Dean 2015 (1503.02531); mdistiller's KDLoss without the reduction.
    """
    log_q = student_scaled.log_softmax(dim=1)
    log_p = teacher_scaled.log_softmax(dim=1)
    return F.kl_div(log_q, log_p, reduction="none", log_target=True).sum(dim=1)


def reverse_kl(student_scaled: Tensor, teacher_scaled: Tensor, labels: Tensor) -> Tensor:
    """KL(q || p) of each sample: the student is told where not to put mass, rather than where to put some.

    Source: Gu et al. 2024, MiniLLM (2306.08543); here class by class instead of by sampling.
    """
    return kl(teacher_scaled, student_scaled, labels)


def jensen_shannon(student_scaled: Tensor, teacher_scaled: Tensor, labels: Tensor) -> Tensor:
    """(KL(p || m) + KL(q || m)) / 2 with m = (p + q) / 2: symmetric, and never above log 2.

    Near p = q it is a quarter of KL(p || q). log m is taken from log q - log p, so that equal rows give exactly 0 and
    no logarithm meets a probability that has underflown.

    Source: Lin 1991, Divergence measures based on the Shannon entropy.
    """
    log_q = student_scaled.log_softmax(dim=1)
    log_p = teacher_scaled.log_softmax(dim=1)
    apart = log_q - log_p
    to_p = log_p.exp() * (math.log(2) + F.logsigmoid(-apart))
    to_q = log_q.exp() * (math.log(2) + F.logsigmoid(apart))
    return (to_p + to_q).sum(dim=1) / 2


def dkd(
    student_scaled: Tensor, teacher_scaled: Tensor, labels: Tensor, alpha: float = 1.0, beta: float = 8.0
) -> Tensor:
    """Decoupled KD: KL of (true class, all others), and KL among the others, each with a weight of its own.

        alpha * KL((p_y, 1 - p_y) || (q_y, 1 - q_y)) + beta * KL(p without y || q without y)

    With beta = 1 - p_y it would be KD. 1 - q_y is a logsumexp over the others and no difference, so that a student who
    is sure of the label gives no log 0. A row labeled -1 has no true class to treat apart: it gives 0.

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


def dist(
    student_scaled: Tensor,
    teacher_scaled: Tensor,
    labels: Tensor,
    beta: float = 1.0,
    gamma: float = 1.0,
    batch_sum: BatchSum = of_these,
) -> Tensor:
    """DIST: 1 - Pearson's correlation of p and q, along each row and down each column of the batch.

        beta * (1 - r(p_i, q_i)) + gamma * mean_j (1 - r(p_.j, q_.j))

    The second term is of the batch and the same for all its samples. Where a row or a column does not vary there is no
    correlation: none of both counts 0 (as in a batch of one sample), one of them 1/2.

    Args:
        student_scaled: [B, C].
        teacher_scaled: [B, C].
        labels: [B]; not looked at.
        beta: weight of the rows, the relation between classes.
        gamma: weight of the columns, the relation between samples.
        batch_sum: sums over the whole batch, if part of it is elsewhere.

    Source: Huang et al. 2022 (2205.10536); code github.com/hunto/DIST_KD at 6d93ca0, whose 1e-8
    beside the norms is left out: at T = 4 it would change the seventh figure.
    """
    q, p = student_scaled.softmax(dim=1), teacher_scaled.softmax(dim=1)
    rows = _angle(q - q.mean(dim=1, keepdim=True), p - p.mean(dim=1, keepdim=True), _over_classes)
    columns = _angle(q - batch_mean(q, batch_sum), p - batch_mean(p, batch_sum), batch_sum)
    return beta * rows.squeeze(1) + gamma * columns.mean()


def cosine(student_scaled: Tensor, teacher_scaled: Tensor, labels: Tensor) -> Tensor:
    """1 - cos(p, q) of each sample: DIST's rows, not centered. (Of logits a temperature would make no difference.)

    Source: none of its own; the cosine embedding loss of DistilBERT (Sanh et al. 2019, 1910.01108) on probabilities.
    """
    return _angle(student_scaled.softmax(dim=1), teacher_scaled.softmax(dim=1), _over_classes).squeeze(1)


def _over_classes(rows: Tensor) -> Tensor:
    return rows.sum(dim=1, keepdim=True)


def _angle(a: Tensor, b: Tensor, total: BatchSum) -> Tensor:
    """1 - cos(a, b), as half the squared distance of both at length 1: equal ones give exactly 0, gradient too."""
    shortest = torch.finfo(a.dtype).tiny
    a, b = (z / total(z.square()).clamp_min(shortest).sqrt() for z in (a, b))
    return total((a - b).square()) / 2


def plackett_luce(student_scaled: Tensor, teacher_scaled: Tensor, labels: Tensor) -> Tensor:
    """Plackett-Luce distillation: the student is to draw the classes in the teacher's order, the true class first.

        sum_k p_(k) * (logsumexp of v over the k-th and all later classes - v_(k))

    (k) is the true class for k = 1, then the others by falling teacher logit; a row labeled -1 has the teacher's order
    alone. Not 0 where student and teacher are equal: no finite logits make the order certain.

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


def ofa(student_scaled: Tensor, teacher_scaled: Tensor, labels: Tensor, eps: float = 1.5) -> Tensor:
    """One-for-all KD: cross-entropy with the teacher, whose belief in the true class counts for more than in others.

        -sum_j ((p_j + [j = y])^eps - [j = y]) * log q_j

    With eps = 1 it is KD's cross-entropy, and so it is, with p^eps, for a row labeled -1. Not 0 where student and
    teacher are equal.

    Args:
        student_scaled: [B, C].
        teacher_scaled: [B, C].
        labels: [B] int64, -1 where not known.
        eps: how much more, at least 1.

    Source: Hao et al. 2023 (2310.19444); code github.com/Hao840/OFAKD at 12eeba8, distillers/ofa.py.
    """
    known = (labels >= 0).to(teacher_scaled.dtype).unsqueeze(1)
    truth = torch.zeros_like(teacher_scaled).scatter(1, labels.clamp_min(0).unsqueeze(1), known)
    target = (teacher_scaled.softmax(dim=1) + truth).pow(eps) - truth
    return -(target * student_scaled.log_softmax(dim=1)).sum(dim=1)


def mse(student_scaled: Tensor, teacher_scaled: Tensor, labels: Tensor) -> Tensor:
    """Mean over the classes of the squared difference of the logits: twice what T^2 * KL of centered ones tends to.

    It sees a shift of the logits, which no softmax does.

    Source: Ba & Caruana 2014 (1312.6184); Kim et al. 2021 (2105.08919).
    """
    return (student_scaled - teacher_scaled).square().mean(dim=1)

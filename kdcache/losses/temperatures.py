"""Second axis: the temperatures of student and teacher, and the weight that keeps the gradient's size.

Every rule is a pure function `(student_logits [B, C], teacher_logits [B, C], options) -> Temperatures`.
"""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class Temperatures(NamedTuple):
    """Per-sample temperatures.

    Attributes:
        student: [B, 1], T_stu.
        teacher: [B, 1], T_tea.
        weight: [B], what the divergence of a sample is multiplied with (T^2 for a constant temperature).
    """

    student: Tensor
    teacher: Tensor
    weight: Tensor


def _same_for_both(tau: Tensor) -> Temperatures:
    return Temperatures(tau.unsqueeze(1), tau.unsqueeze(1), tau.square())


def constant(student_logits: Tensor, teacher_logits: Tensor, tau: float = 4.0) -> Temperatures:
    """One temperature for all: T_stu = T_tea = tau, weight tau^2 (Hinton, Vinyals & Dean 2015, 1503.02531)."""
    return _same_for_both(student_logits.new_full((len(student_logits),), tau))


def sharpness_max(logits: Tensor) -> Tensor:
    """The largest logit, [B, C] -> [B]: what the DTKD authors' code uses for the logsumexp of their paper."""
    return logits.amax(dim=1)


def sharpness_logsumexp(logits: Tensor) -> Tensor:
    """logsumexp of the raw logits, [B, C] -> [B]: the sharpness of the DTKD paper (2404.12711)."""
    return logits.logsumexp(dim=1)


SHARPNESS = {"max": sharpness_max, "logsumexp": sharpness_logsumexp}


def dtkd(
    student_logits: Tensor,
    teacher_logits: Tensor,
    tau: float = 4.0,
    sharpness: str = "max",
    centre: bool = False,
    detach: bool = False,
    sharpness_floor: float = 1e-3,
) -> Temperatures:
    """DTKD: the sharper of the two is softened more, so that both are about equally sharp.

        T_tea = 2 x tau / (x + y)    T_stu = 2 y tau / (x + y)    weight = T_tea * T_stu

    with x and y the teacher's and the student's sharpness.

    ERRATUM. The closed form does not follow from the paper's own definition: the authors' README (March 2025) says that
    formulas 4 and 5 are wrong, the right delta being max_i{(u_i - v_i) / (u_i + v_i)} * tau. They vouch for the
    published results all the same, which were trained with the form above; so it is what stands here.

    GUARD. The form is not shift-invariant and has no meaning where a sharpness is not positive: y <= 0 < x gives a
    negative T_stu and a negative weight (the KL would then be maximised), x + y = 0 divides by zero. Sharpness is
    therefore raised to `sharpness_floor` first, which changes nothing where x, y >= sharpness_floor and joins on
    continuously: a sharpness of no account gets a temperature near 0, two of them get tau each. With few classes
    (P(max <= 0) is about 2^-C) `centre=True` is the better remedy: the largest centred logit is never negative.

    Args:
        student_logits: [B, C] raw logits (log-probabilities would turn the sharpness upside down).
        teacher_logits: [B, C] raw logits.
        tau: reference temperature.
        sharpness: "max" (authors' code) or "logsumexp" (the paper).
        centre: subtract each row's mean first.
        detach: keep the temperatures out of the student's gradient; the authors' code does not.
        sharpness_floor: smallest sharpness that enters the form, in units of a logit.

    Source: Wei & Bai 2024 (2404.12711); code github.com/JinYu1998/DTKD at 9ebaa97, mdistiller/distillers/DTKD.py.
    """
    student, teacher = (student_logits.detach() if detach else student_logits), teacher_logits
    if centre:
        student, teacher = (z - z.mean(dim=1, keepdim=True) for z in (student, teacher))
    x = SHARPNESS[sharpness](teacher).clamp_min(sharpness_floor)
    y = SHARPNESS[sharpness](student).clamp_min(sharpness_floor)
    t_teacher = 2 * x * tau / (x + y)
    t_student = 2 * y * tau / (x + y)
    return Temperatures(t_student.unsqueeze(1), t_teacher.unsqueeze(1), t_teacher * t_student)


def dtd_flsw(
    student_logits: Tensor,
    teacher_logits: Tensor,
    tau: float = 4.0,
    beta: float = 40.0,
    gamma: float = 2.0,
    lowest: float = 1.0,
) -> Temperatures:
    """DTD with focal-loss-style weights: samples on which student and teacher disagree get a lower temperature.

        w_i = (1 - cos(v_i, u_i))^gamma    tau_i = tau + beta * (mean(w) - w_i)

    GUARD. Nothing in the paper keeps tau_i positive, and no published copy clamps it (beta = 40, gamma = 2 reaches -48
    on the reference rows): tau_i is raised to `lowest`.

    Args:
        student_logits: [B, C]; detached, temperatures carry no gradient.
        teacher_logits: [B, C].
        tau: tau_0, the mean temperature of a batch before the clamp.
        beta: how far temperatures spread.
        gamma: focus on the samples that disagree most.
        lowest: lower bound of tau_i.

    Source: Wen, Lai & Qian 2019 (1911.07471); norms + 1e-4 as in TextBrewer.
    """
    v, u = student_logits.detach(), teacher_logits.detach()
    v = v / (v.norm(dim=1, keepdim=True) + 1e-4)
    u = u / (u.norm(dim=1, keepdim=True) + 1e-4)
    # Rounding can carry the cosine of two equal rows past 1, and a negative base has no real power.
    w = (1 - (v * u).sum(dim=1)).clamp_min(0).pow(gamma)
    return _same_for_both((tau + beta * (w.mean() - w)).clamp_min(lowest))


def dtd_cwsm(
    student_logits: Tensor,
    teacher_logits: Tensor,
    tau: float = 4.0,
    beta: float = 0.5,
    lowest: float = 1.0,
) -> Temperatures:
    """DTD with confidence weights: samples on which the student is unsure get a lower temperature.

        w_i = 1 / (max softmax(v_i) + 1e-3)    tau_i = tau + beta * (mean(w) - w_i)

    GUARD. w reaches C, so tau_i goes far below 0 with many classes (C = 100, beta = 1, tau_0 = 8 gives -35), and no
    published copy clamps it: tau_i is raised to `lowest`.

    Args: as `dtd_flsw`, of which this takes no `gamma`.

    Source: Wen, Lai & Qian 2019 (1911.07471).
    """
    w = 1 / (student_logits.detach().softmax(dim=1).amax(dim=1) + 1e-3)
    return _same_for_both((tau + beta * (w.mean() - w)).clamp_min(lowest))

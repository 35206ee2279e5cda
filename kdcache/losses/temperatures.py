"""Second axis: the temperatures of student and teacher, and the weight that keeps the gradient's size.

Every rule is a pure function `(student_logits [B, C], teacher_logits [B, C], options) -> Temperatures`.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from kdcache.losses.batch import BatchSum, batch_mean, of_these


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
    of_each = student_logits.new_full((len(student_logits), 1), tau)
    return Temperatures(of_each, of_each, student_logits.new_full((len(student_logits),), tau**2))


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
    center: bool = False,
    detach: bool = False,
    equalize: str = "published",
    sharpness_floor: float = 1e-3,
) -> Temperatures:
    """DTKD: the sharper of the two is softened more, so that both are about equally sharp.

        T_tea = 2 x tau / (x + y)    T_stu = 2 y tau / (x + y)    weight = T_tea * T_stu

    with x and y the teacher's and the student's sharpness.

    ERRATUM. The closed form does not follow from the paper's own definition: the authors' README (March 2025) says that
    formulas 4 and 5 are wrong, the right delta being max_i{(u_i - v_i) / (u_i + v_i)} * tau. They vouch for the
    published results all the same, which were trained with the form above; so it is what stands here.

    GUARD. The form is not shift-invariant and has no meaning where a sharpness is not positive: y <= 0 < x gives a
    negative T_stu and a negative weight (the KL would then be maximized), x + y = 0 divides by zero. Sharpness is
    therefore raised to `sharpness_floor` first, which changes nothing where x, y >= sharpness_floor and joins on
    continuously: a sharpness of no account gets a temperature near 0, two of them get tau each. With few classes
    (P(max <= 0) is about 2^-C) `center=True` is the better remedy: the largest centered logit is never negative.

    EXACT. The published form does make the largest logits equal, x / T_tea = y / T_stu. It does not make the logsumexps
    equal, which are not proportional to 1 / T; `equalize="exact"` solves for the delta of T_tea = tau + delta,
    T_stu = tau - delta that does.

    Args:
        student_logits: [B, C] raw logits (log-probabilities would turn the sharpness upside down).
        teacher_logits: [B, C] raw logits.
        tau: reference temperature.
        sharpness: "max" (authors' code) or "logsumexp" (the paper).
        center: subtract each row's mean first.
        detach: keep the temperatures out of the student's gradient; the authors' code does not.
        equalize: "published", or "exact", which is for the logsumexps of centered logits.
        sharpness_floor: smallest sharpness that enters the form, in units of a logit. For "exact": where at tau neither
            logsumexp is so far above that of even logits, both get tau.

    Source: Wei & Bai 2024 (2404.12711); code github.com/JinYu1998/DTKD at 9ebaa97, mdistiller/distillers/DTKD.py.
    """
    student, teacher = (student_logits.detach() if detach else student_logits), teacher_logits
    if center:
        student, teacher = (z - z.mean(dim=1, keepdim=True) for z in (student, teacher))
    if equalize == "exact":
        delta = _equalizing_shift(student, teacher, tau, sharpness_floor)
        return Temperatures((tau - delta).unsqueeze(1), (tau + delta).unsqueeze(1), (tau + delta) * (tau - delta))
    x = SHARPNESS[sharpness](teacher).clamp_min(sharpness_floor)
    y = SHARPNESS[sharpness](student).clamp_min(sharpness_floor)
    t_teacher = 2 * x * tau / (x + y)
    t_student = 2 * y * tau / (x + y)
    return Temperatures(t_student.unsqueeze(1), t_teacher.unsqueeze(1), t_teacher * t_student)


_COLDEST = 1e-3
"""Of tau: the min_temperature temperature that `equalize="exact"` looks at, met where one of the two is flat."""


def _equalizing_shift(v: Tensor, u: Tensor, tau: float, floor: float) -> Tensor:
    """[B], the delta with logsumexp(u / (tau + delta)) = logsumexp(v / (tau - delta)), u and v with rows of mean 0.

    The mean of a centered row under any of its own softmaxes is at least 0, so its logsumexp falls as its temperature
    rises: the difference of both falls with delta, and bisection finds its one zero. A Newton step from there adds the
    last figures and, by the implicit function theorem, the derivative.
    """
    bound = tau * (1 - _COLDEST)
    even = math.log(u.shape[1]) + floor
    with torch.no_grad():
        flat = torch.maximum((u / tau).logsumexp(dim=1), (v / tau).logsumexp(dim=1)) < even
        low, high = u.new_full((len(u),), -bound), u.new_full((len(u),), bound)
        for _ in range(30):
            middle = (low + high) / 2
            teacher_is_sharper = _sharpness_at(u, tau + middle) > _sharpness_at(v, tau - middle)
            low, high = torch.where(teacher_is_sharper, middle, low), torch.where(teacher_is_sharper, high, middle)
        found = (low + high) / 2
        slope = _fall(u, tau + found) + _fall(v, tau - found)
        slope = torch.where(flat, 1.0, slope)  # an unused 0 / 0 would still spoil the gradient
    apart = _sharpness_at(u, tau + found) - _sharpness_at(v, tau - found)
    return torch.where(flat, 0.0, (found + apart / slope).clamp(-bound, bound))


def _sharpness_at(z: Tensor, temperature: Tensor) -> Tensor:
    return (z / temperature.unsqueeze(1)).logsumexp(dim=1)


def _fall(z: Tensor, temperature: Tensor) -> Tensor:
    """-d/dT logsumexp(z / T), [B]."""
    return ((z / temperature.unsqueeze(1)).softmax(dim=1) * z).sum(dim=1) / temperature.square()


def dtd_flsw(
    student_logits: Tensor,
    teacher_logits: Tensor,
    tau: float = 4.0,
    beta: float = 40.0,
    gamma: float = 2.0,
    min_temperature: float = 1.0,
    batch_sum: BatchSum = of_these,
) -> Temperatures:
    """DTD with focal-loss-style weights: samples on which student and teacher disagree get a lower temperature.

        w_i = (1 - cos(v_i, u_i))^gamma    tau_i = tau + beta * (mean(w) - w_i)

    GUARD. Nothing in the paper keeps tau_i positive, and no published copy clamps it (beta = 40, gamma = 2 reaches -48
    on the reference rows): tau_i is raised to `min_temperature`.

    Args:
        student_logits: [B, C]; detached, temperatures carry no gradient.
        teacher_logits: [B, C].
        tau: tau_0, the mean temperature of a batch before the clamp.
        beta: how far temperatures spread.
        gamma: focus on the samples that disagree most.
        min_temperature: lower bound of tau_i.
        batch_sum: sums over the whole batch, if part of it is elsewhere.

    Source: Wen, Lai & Qian 2019 (1911.07471); norms + 1e-4 as in TextBrewer.
    """
    v, u = student_logits.detach(), teacher_logits.detach()
    v = v / (v.norm(dim=1, keepdim=True) + 1e-4)
    u = u / (u.norm(dim=1, keepdim=True) + 1e-4)
    # Rounding can carry the cosine of two equal rows past 1, and a negative base has no real power.
    w = (1 - (v * u).sum(dim=1)).clamp_min(0).pow(gamma)
    return _same_for_both((tau + beta * (batch_mean(w, batch_sum) - w)).clamp_min(min_temperature))


def dtd_cwsm(
    student_logits: Tensor,
    teacher_logits: Tensor,
    tau: float = 4.0,
    beta: float = 0.5,
    min_temperature: float = 1.0,
    batch_sum: BatchSum = of_these,
) -> Temperatures:
    """DTD with confidence weights: samples on which the student is unsure get a lower temperature.

        w_i = 1 / (max softmax(v_i) + 1e-3)    tau_i = tau + beta * (mean(w) - w_i)

    GUARD. w reaches C, so tau_i goes far below 0 with many classes (C = 100, beta = 1, tau_0 = 8 gives -35), and no
    published copy clamps it: tau_i is raised to `min_temperature`.

    Args: as `dtd_flsw`, of which this takes no `gamma`.

    Source: Wen, Lai & Qian 2019 (1911.07471).
    """
    w = 1 / (student_logits.detach().softmax(dim=1).amax(dim=1) + 1e-3)
    return _same_for_both((tau + beta * (batch_mean(w, batch_sum) - w)).clamp_min(min_temperature))


def ctkd(
    student_logits: Tensor,
    teacher_logits: Tensor,
    theta: Tensor,
    epoch: int,
    min_temperature: float = 1.0,
    span: float = 20.0,
    ramp_epochs: float = 10.0,
) -> Temperatures:
    """CTKD: one temperature that is learned with the student, against it: ever harder, as in a curriculum.

        tau = min_temperature + span * sigmoid(theta)
        d loss / d theta is multiplied by -(1 - cos(pi * min(epoch / ramp_epochs, 1))) / 2

    Args:
        student_logits: [B, C].
        teacher_logits: [B, C].
        theta: [1], a parameter that the optimizer of the student moves too; begins at 1.
        epoch: counted from 1.
        min_temperature: lower bound of tau.
        span: how far tau can rise above it.
        ramp_epochs: epochs until theta's gradient is reversed in full.

    Source: Li et al. 2023 (2211.16231), global temperature; code github.com/zhengli97/CTKD at 8ca3ce8, train_student.py
    and models/temp_global.py.
    """
    reversal = (1 - math.cos(math.pi * min(epoch / ramp_epochs, 1.0))) / 2
    reversed_theta = theta.detach() - reversal * (theta - theta.detach())
    tau = min_temperature + span * reversed_theta.to(student_logits.dtype).sigmoid()
    return _same_for_both(tau.expand(len(student_logits)))

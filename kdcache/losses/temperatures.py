"""Second axis: the temperatures of student and teacher, and the weight that keeps the scale of the gradient.

Every rule is a pure function `(student_logits [B, C], teacher_logits [B, C], options) -> Temperatures`.
"""

from __future__ import annotations

import math
from typing import ClassVar, Literal, NamedTuple

import torch
from pydantic import model_validator
from torch import Tensor

from kdcache.losses.batch import BatchSum, batch_mean, of_these
from kdcache.losses.closed_form import equalizing_temperatures
from kdcache.losses.options import NotNegative, Positive, Presets, TemperatureOptions


class Temperatures(NamedTuple):
    """Per-sample temperatures.

    Attributes:
        student: [B, 1], T_stu.
        teacher: [B, 1], T_tea.
        weight: [B], factor of a sample's divergence (T^2 for a constant temperature).
    """

    student: Tensor
    teacher: Tensor
    weight: Tensor

    def shared(self, share: Tensor | None) -> Temperatures:
        """Return the same temperatures with weights multiplied by a share [B]; None for 1."""
        return self if share is None else self._replace(weight=self.weight * share)


def same_for_both(tau: Tensor) -> Temperatures:
    """Return the same temperatures [B] for student and teacher, with the weight tau^2."""
    of_rows = tau.unsqueeze(1)
    return Temperatures(of_rows, of_rows, tau.square())


def constant(student_logits: Tensor, teacher_logits: Tensor, tau: float = 4.0) -> Temperatures:
    """Return one temperature for all samples: T_stu = T_tea = tau, weight tau^2.

    Source: Hinton, Vinyals & Dean 2015 (1503.02531).
    """
    temperature = student_logits.new_full((len(student_logits), 1), tau)
    return Temperatures(temperature, temperature, student_logits.new_full((len(student_logits),), tau**2))


class ConstantTemperature(TemperatureOptions):
    """Options of `constant`."""

    compute = staticmethod(constant)
    presets: ClassVar[Presets] = {"kd": {}}
    is_constant = True

    kind: Literal["constant"] = "constant"
    tau: Positive = 4.0


def sharpness_max(logits: Tensor) -> Tensor:
    """Return the largest logit, [B, C] -> [B]: what the DTKD authors' code uses for the logsumexp of their paper."""
    return logits.amax(dim=1)


def sharpness_logsumexp(logits: Tensor) -> Tensor:
    """Return the logsumexp of the raw logits, [B, C] -> [B]: the sharpness of the DTKD paper (2404.12711)."""
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
    """Soften the sharper one of student and teacher more, so that both are about equally sharp (DTKD).

        T_tea = 2 x tau / (x + y)    T_stu = 2 y tau / (x + y)    weight = T_tea * T_stu

    with x and y the teacher's and the student's sharpness.

    ERRATUM. The closed form does not follow from the paper's own definition: the authors' README (March 2025) says that
    formulas 4 and 5 are wrong, the right delta being max_i{(u_i - v_i) / (u_i + v_i)} * tau. They confirm the published
    results, which were trained with the form above. It is therefore the default here.

    GUARD. The form is not shift-invariant and has no meaning where a sharpness is not positive: y <= 0 < x gives a
    negative T_stu and a negative weight (the KL would then be maximized), x + y = 0 divides by zero. Sharpness is
    therefore raised to `sharpness_floor` first. That changes nothing where x, y >= sharpness_floor, and is continuous:
    if one sharpness is at the floor its temperature is close to 0, if both are each temperature is tau. With few
    classes (P(max <= 0) is about 2^-C) `center=True` is the better remedy: the largest centered logit is not negative.

    EXACT. The published form does make the largest logits equal, x / T_tea = y / T_stu. It does not make the logsumexps
    equal, which are not proportional to 1 / T; `equalize="exact"` solves for the delta of T_tea = tau + delta,
    T_stu = tau - delta that does.

    Args:
        student_logits: [B, C] raw logits (the sharpness of log-probabilities is meaningless).
        teacher_logits: [B, C] raw logits.
        tau: reference temperature.
        sharpness: "max" (authors' code) or "logsumexp" (the paper).
        center: subtract each row's mean first.
        detach: treat the temperatures as constants in the gradient; the authors' code does not.
        equalize: "published", or "exact", which needs sharpness "logsumexp" and centered logits.
        sharpness_floor: smallest sharpness that enters the form, in units of a logit. For "exact": if at tau neither
            logsumexp exceeds that of equal logits by more than this, both temperatures are tau.

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
    return Temperatures(*equalizing_temperatures(y, x, tau))


class DTKD(TemperatureOptions):
    """Options of `dtkd`."""

    compute = staticmethod(dtkd)
    # The authors' code: alpha 3, beta 1, 20 epochs of warm-up, full cross-entropy.
    presets: ClassVar[Presets] = {
        "dtkd": {"ce_weight": 1.0, "kd_weight": 3.0, "plain_kd_weight": 1.0, "warmup_epochs": 20.0}
    }
    is_shared = False

    kind: Literal["dtkd"] = "dtkd"
    tau: Positive = 4.0
    sharpness: Literal["max", "logsumexp"] = "max"
    center: bool = False
    detach: bool = False
    equalize: Literal["published", "exact"] = "published"
    sharpness_floor: Positive = 1e-3

    @property
    def needs_level(self) -> bool:
        """Whether a constant that is added to a row of the teacher's logits changes the temperatures."""
        return not self.center

    @property
    def has_gradient(self) -> bool:
        """Whether the loss is differentiated through the temperatures."""
        return not self.detach

    @property
    def needs_tail_shape(self) -> bool:  # type: ignore[override]  # a class variable of the other rules
        """Whether the mean of a row enters the sharpness."""
        return self.center

    @model_validator(mode="after")
    def _exact_needs_centered_logsumexps(self) -> DTKD:
        if self.equalize == "exact" and not (self.sharpness == "logsumexp" and self.center):
            raise ValueError(
                "equalize: exact is for the logsumexps of centered logits (the published form does make the largest "
                "logits equal): set sharpness: logsumexp and center: true with it"
            )
        return self


_COLDEST = 1e-3
"""Lowest temperature that `equalize="exact"` considers, as a fraction of tau; reached if one of the two is flat."""


def _equalizing_shift(v: Tensor, u: Tensor, tau: float, floor: float) -> Tensor:
    """Return the delta [B] with logsumexp(u / (tau + delta)) = logsumexp(v / (tau - delta)); rows of u, v have mean 0.

    The mean of a centered row under any of its own softmaxes is at least 0, so its logsumexp falls as its temperature
    rises. The difference of both then falls with delta, and bisection finds its only zero. A Newton step from there
    adds the last digits and, by the implicit function theorem, the derivative.
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
        delta = (low + high) / 2
        slope = _fall(u, tau + delta) + _fall(v, tau - delta)
        slope = torch.where(flat, 1.0, slope)  # an unused 0 / 0 would still spoil the gradient
    difference = _sharpness_at(u, tau + delta) - _sharpness_at(v, tau - delta)
    return torch.where(flat, 0.0, (delta + difference / slope).clamp(-bound, bound))


def _sharpness_at(z: Tensor, temperature: Tensor) -> Tensor:
    return (z / temperature.unsqueeze(1)).logsumexp(dim=1)


def _fall(z: Tensor, temperature: Tensor) -> Tensor:
    """Return -d/dT logsumexp(z / T), [B]."""
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
    """Lower the temperature of samples on which student and teacher disagree (DTD, focal-loss-style weights).

        w_i = (1 - cos(v_i, u_i))^gamma    tau_i = tau + beta * (mean(w) - w_i)

    GUARD. Nothing in the paper keeps tau_i positive, and no published copy clamps it (beta = 40, gamma = 2 reaches -48
    on the reference rows): tau_i is raised to `min_temperature`.

    Args:
        student_logits: [B, C]; detached, temperatures carry no gradient.
        teacher_logits: [B, C].
        tau: tau_0, the mean temperature of a batch before the clamp.
        beta: spread of the temperatures.
        gamma: exponent that favors the samples that disagree most.
        min_temperature: lower bound of tau_i.
        batch_sum: sum over the whole batch, part of which may be in other processes.

    Source: Wen, Lai & Qian 2019 (1911.07471); norms + 1e-4 as in TextBrewer.
    """
    v, u = student_logits.detach(), teacher_logits.detach()
    norms = (v.norm(dim=1) + 1e-4) * (u.norm(dim=1) + 1e-4)
    # Rounding can carry the cosine of two equal rows past 1, and a negative base has no real power.
    w = (1 - (v * u).sum(dim=1) / norms).clamp_min(0).pow(gamma)
    return same_for_both((tau + beta * (batch_mean(w, batch_sum) - w)).clamp_min(min_temperature))


class DTDFocal(TemperatureOptions):
    """Options of `dtd_flsw`."""

    compute = staticmethod(dtd_flsw)
    presets: ClassVar[Presets] = {"dtd": {}}
    uses_batch = True
    needs_tail_shape = True

    kind: Literal["dtd_flsw"] = "dtd_flsw"
    tau: Positive = 4.0
    beta: NotNegative = 40.0
    gamma: Positive = 2.0
    min_temperature: Positive = 1.0

    @property
    def needs_level(self) -> bool:
        """Return True: the cosine of two rows of raw logits changes with a constant that is added to one."""
        return True


def dtd_cwsm(
    student_logits: Tensor,
    teacher_logits: Tensor,
    tau: float = 4.0,
    beta: float = 0.5,
    min_temperature: float = 1.0,
    batch_sum: BatchSum = of_these,
) -> Temperatures:
    """Lower the temperature of samples on which the student is unsure (DTD, confidence weights).

        w_i = 1 / (max softmax(v_i) + 1e-3)    tau_i = tau + beta * (mean(w) - w_i)

    GUARD. w reaches C, so tau_i goes far below 0 with many classes (C = 100, beta = 1, tau_0 = 8 gives -35), and no
    published copy clamps it: tau_i is raised to `min_temperature`.

    Args: as `dtd_flsw`, without `gamma`.

    Source: Wen, Lai & Qian 2019 (1911.07471).
    """
    w = 1 / (student_logits.detach().softmax(dim=1).amax(dim=1) + 1e-3)
    return same_for_both((tau + beta * (batch_mean(w, batch_sum) - w)).clamp_min(min_temperature))


class DTDConfidence(TemperatureOptions):
    """Options of `dtd_cwsm`."""

    compute = staticmethod(dtd_cwsm)
    presets: ClassVar[Presets] = {"cwsm": {}}
    uses_batch = True

    kind: Literal["dtd_cwsm"] = "dtd_cwsm"
    tau: Positive = 4.0
    beta: NotNegative = 0.5
    min_temperature: Positive = 1.0


def ctkd(
    student_logits: Tensor,
    teacher_logits: Tensor,
    theta: Tensor,
    epoch: float | None = None,
    min_temperature: float = 1.0,
    span: float = 20.0,
    ramp_epochs: float = 10.0,
) -> Temperatures:
    """Learn one temperature adversarially with the student, so that the task gets harder, as in a curriculum (CTKD).

        tau = min_temperature + span * sigmoid(theta)
        d loss / d theta is multiplied by -(1 - cos(pi * min(epoch / ramp_epochs, 1))) / 2

    Args:
        student_logits: [B, C].
        teacher_logits: [B, C].
        theta: [1], a parameter that the optimizer of the student updates too; initially 1.
        epoch: counted from 1; None for the full reversal.
        min_temperature: lower bound of tau.
        span: range of tau above it.
        ramp_epochs: epochs until theta's gradient is fully reversed.

    Source: Li et al. 2023 (2211.16231), global temperature; code github.com/zhengli97/CTKD at 8ca3ce8, train_student.py
    and models/temp_global.py.
    """
    ramp = 1.0 if epoch is None else min(epoch / ramp_epochs, 1.0)
    reversal = (1 - math.cos(math.pi * ramp)) / 2
    reversed_theta = theta.detach() - reversal * (theta - theta.detach())
    tau = min_temperature + span * reversed_theta.to(student_logits.dtype).sigmoid()
    return same_for_both(tau.expand(len(student_logits)))


class CTKD(TemperatureOptions):
    """Options of `ctkd`."""

    compute = staticmethod(ctkd)
    presets: ClassVar[Presets] = {"ctkd": {}}
    is_learned = True

    kind: Literal["ctkd"] = "ctkd"
    min_temperature: Positive = 1.0
    span: Positive = 20.0
    ramp_epochs: Positive = 10.0

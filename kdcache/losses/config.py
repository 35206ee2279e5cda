"""Which loss: the options of the axes, and which of them cannot stand together."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from kdcache.losses.presets import settings_of_name

Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
NotNegative = Annotated[float, Field(ge=0, allow_inf_nan=False)]


class _Options(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, use_attribute_docstrings=True)

    def arguments(self) -> dict[str, Any]:
        """The options as keyword arguments of the function that `kind` names."""
        return {name: value for name, value in self if name != "kind"}


class NoAdjustment(_Options):
    """`losses.adjustments.none`: the teacher as it is."""

    kind: Literal["none"] = "none"


class ProbabilityShift(_Options):
    """`losses.adjustments.probability_shift`."""

    kind: Literal["probability_shift"] = "probability_shift"


class LabelSmoothing(_Options):
    """`losses.adjustments.label_smoothing`."""

    kind: Literal["label_smoothing"] = "label_smoothing"
    smoothing: Annotated[float, Field(gt=0, lt=1)] = 0.1


class Truncation(_Options):
    """`losses.adjustments.truncation`."""

    kind: Literal["truncation"] = "truncation"
    top: Annotated[int, Field(ge=1)] = 16


class ConstantTemperature(_Options):
    """`losses.temperatures.constant`."""

    kind: Literal["constant"] = "constant"
    tau: Positive = 4.0


class DTKD(_Options):
    """`losses.temperatures.dtkd`."""

    kind: Literal["dtkd"] = "dtkd"
    tau: Positive = 4.0
    sharpness: Literal["max", "logsumexp"] = "max"
    center: bool = False
    detach: bool = False
    equalize: Literal["published", "exact"] = "published"
    sharpness_floor: Positive = 1e-3

    @model_validator(mode="after")
    def _exact_is_of_centered_logsumexps(self) -> DTKD:
        if self.equalize == "exact" and not (self.sharpness == "logsumexp" and self.center):
            raise ValueError(
                "equalize: exact is for the logsumexps of centered logits (the published form does make the largest "
                "logits equal): set sharpness: logsumexp and center: true with it"
            )
        return self


class DTDFocal(_Options):
    """`losses.temperatures.dtd_flsw`."""

    kind: Literal["dtd_flsw"] = "dtd_flsw"
    tau: Positive = 4.0
    beta: NotNegative = 40.0
    gamma: Positive = 2.0
    min_temperature: Positive = 1.0


class DTDConfidence(_Options):
    """`losses.temperatures.dtd_cwsm`."""

    kind: Literal["dtd_cwsm"] = "dtd_cwsm"
    tau: Positive = 4.0
    beta: NotNegative = 0.5
    min_temperature: Positive = 1.0


class CTKD(_Options):
    """`losses.temperatures.ctkd`."""

    kind: Literal["ctkd"] = "ctkd"
    min_temperature: Positive = 1.0
    span: Positive = 20.0
    ramp_epochs: Positive = 10.0


class KL(_Options):
    """`losses.divergences.kl`."""

    kind: Literal["kl"] = "kl"


class ReverseKL(_Options):
    """`losses.divergences.reverse_kl`."""

    kind: Literal["reverse_kl"] = "reverse_kl"


class JensenShannon(_Options):
    """`losses.divergences.jensen_shannon`."""

    kind: Literal["jensen_shannon"] = "jensen_shannon"


class DKD(_Options):
    """`losses.divergences.dkd`."""

    kind: Literal["dkd"] = "dkd"
    alpha: NotNegative = 1.0
    beta: NotNegative = 8.0


class DIST(_Options):
    """`losses.divergences.dist`."""

    kind: Literal["dist"] = "dist"
    beta: NotNegative = 1.0
    gamma: NotNegative = 1.0


class PlackettLuce(_Options):
    """`losses.divergences.plackett_luce`."""

    kind: Literal["plackett_luce"] = "plackett_luce"


class OFA(_Options):
    """`losses.divergences.ofa`."""

    kind: Literal["ofa"] = "ofa"
    eps: Annotated[float, Field(ge=1, allow_inf_nan=False)] = 1.5


class MSE(_Options):
    """`losses.divergences.mse`."""

    kind: Literal["mse"] = "mse"


class Cosine(_Options):
    """`losses.divergences.cosine`."""

    kind: Literal["cosine"] = "cosine"


Adjustment = Annotated[NoAdjustment | ProbabilityShift | LabelSmoothing | Truncation, Field(discriminator="kind")]
Temperature = Annotated[ConstantTemperature | DTKD | DTDFocal | DTDConfidence | CTKD, Field(discriminator="kind")]
Divergence = Annotated[
    KL | ReverseKL | JensenShannon | DKD | DIST | PlackettLuce | OFA | MSE | Cosine, Field(discriminator="kind")
]


class Loss(_Options):
    """A whole loss; `losses/distillation.py` has the sum that it describes.

    `plain_kd_weight` is the beta of the DTKD authors' code, which adds ordinary KD at `tau` beside its own term.
    """

    name: str = "kd"
    """`ce`, or parts joined by `+`, one an axis: `zscore`; `ka`, `lsr`, `truncated`; `kd`, `dtkd`, `dtd`, `cwsm`,
    `ctkd`; `rkl`, `js`, `dkd`, `dist`, `pld`, `ofa`, `mse`, `cosine`. Sets the defaults of the keys below."""
    ce_weight: NotNegative
    """Of the cross-entropy with the labels."""
    kd_weight: NotNegative
    """Of the teacher's term."""
    plain_kd_weight: NotNegative = 0.0
    """Of the same divergence at a constant temperature, beside a dynamic one."""
    warmup_epochs: NotNegative = 0.0
    """Epochs over which the teacher's weight grows to its full size."""
    normalization: Literal["none", "z_score"] = "none"
    """Of both logits, in front of all else: `none`, or `z_score` (logit standardization)."""
    adjustment: Adjustment
    """`kind: none`, `probability_shift`, `label_smoothing` (`smoothing`) or `truncation` (`top`)."""
    temperature: Temperature
    """`kind: constant` (`tau`), `dtkd` (`tau`, `sharpness`, `center`, `detach`, `equalize`, `sharpness_floor`),
    `dtd_flsw` (`tau`, `beta`, `gamma`, `min_temperature`), `dtd_cwsm` (`tau`, `beta`, `min_temperature`) or
    `ctkd` (`min_temperature`, `span`, `ramp_epochs`)."""
    divergence: Divergence
    """`kind: kl`, `reverse_kl`, `jensen_shannon`, `dkd` (`alpha`, `beta`), `dist` (`beta`, `gamma`), `plackett_luce`,
    `ofa` (`eps`), `mse` or `cosine`."""

    @model_validator(mode="before")
    @classmethod
    def _name_fills_in(cls, given: Any) -> Any:
        if not isinstance(given, dict) or not isinstance(given.get("name", "kd"), str):
            return given
        return _overlaid(settings_of_name(given.get("name", "kd")), given)

    @model_validator(mode="after")
    def _makes_sense(self) -> Loss:
        if objections := [*self._without_effect(), *self._at_odds()]:
            raise ValueError("; ".join(objections))
        return self

    def _without_effect(self) -> Iterator[str]:
        if not self.uses_teacher:
            if self.ce_weight == 0:
                yield "ce_weight and the kd weights are all 0: there is nothing to learn"
            axes = (self.normalization, self.adjustment, self.temperature, self.divergence)
            if axes != ("none", NoAdjustment(), ConstantTemperature(), KL()) or self.warmup_epochs:
                yield (
                    "the kd weights are 0, so normalization, adjustment, temperature, divergence and warmup_epochs "
                    "would have no effect"
                )
        if self.plain_kd_weight and self.temperature.kind == "constant":
            yield "plain_kd_weight adds constant-temperature KD to itself here: raise kd_weight instead"
        if isinstance(self.divergence, DKD) and self.divergence.alpha == self.divergence.beta == 0:
            yield "alpha and beta of dkd are both 0"
        if isinstance(self.divergence, DIST) and self.divergence.beta == self.divergence.gamma == 0:
            yield "beta and gamma of dist are both 0"

    def _at_odds(self) -> Iterator[str]:
        """Choices on two axes that make no sense together."""
        adjustment, temperature, divergence = self.adjustment, self.temperature, self.divergence
        if isinstance(temperature, CTKD) and self.plain_kd_weight:
            yield "plain_kd_weight needs the tau of dtkd or dtd, and ctkd has none"
        if divergence.kind == "mse":
            if isinstance(adjustment, LabelSmoothing | Truncation):
                yield f"mse compares logits, and {adjustment.kind} leaves probabilities alone: take kl"
            if not isinstance(temperature, DTKD) and self.uses_teacher and temperature != ConstantTemperature(tau=1.0):
                yield "a temperature that both share cancels out of mse: take kind: constant with tau: 1, or dtkd"
        if divergence.kind == "reverse_kl" and isinstance(adjustment, Truncation):
            yield "reverse_kl is infinite where truncation leaves the teacher no probability: take kl"
        if divergence.kind == "plackett_luce" and isinstance(adjustment, LabelSmoothing):
            yield "plackett_luce needs the teacher's order, and label_smoothing leaves none"
        if divergence.kind == "dkd" and isinstance(adjustment, Truncation) and adjustment.top == 1:
            yield "dkd compares the classes beside the true one, and truncation to top: 1 may leave none"
        if isinstance(divergence, PlackettLuce | OFA):
            learns = isinstance(temperature, CTKD) or (isinstance(temperature, DTKD) and not temperature.detach)
            if learns:
                yield (
                    f"{divergence.kind} is above 0 even where the student is the teacher, so the gradient through the "
                    f"temperatures of {temperature.kind} would move their weight, not the student: take "
                    "dtkd with detach: true, dtd or a constant one"
                )

    @property
    def uses_teacher(self) -> bool:
        """Whether any term needs the teacher's logits."""
        return self.kd_weight > 0 or self.plain_kd_weight > 0

    @property
    def tau(self) -> float:
        """The reference temperature, of `plain_kd_weight`'s term."""
        return 1.0 if isinstance(self.temperature, CTKD) else self.temperature.tau

    @property
    def skips_unlabeled(self) -> bool:
        """Whether the teacher's term leaves out samples without a label."""
        return self.divergence.kind == "dkd"

    @property
    def is_of_the_batch(self) -> bool:
        """Whether what a sample gives depends on the other samples of its batch."""
        return isinstance(self.temperature, DTDFocal | DTDConfidence) or isinstance(self.divergence, DIST)

    @property
    def needs_level(self) -> str | None:
        """What of it changes with a constant that is added to a row of the teacher's logits, if anything does."""
        if not self.uses_teacher or self.normalization == "z_score":
            return None
        temperature = self.temperature
        if (isinstance(temperature, DTKD) and not temperature.center) or isinstance(temperature, DTDFocal):
            return f"the temperature {temperature.kind}"
        return "the divergence mse" if isinstance(self.divergence, MSE) else None

    @property
    def acts_on_label(self) -> str | None:
        """The adjustment or divergence that acts on the one true class of an image, if there is one."""
        if isinstance(self.adjustment, ProbabilityShift | LabelSmoothing):
            return f"the adjustment {self.adjustment.kind}"
        if isinstance(self.divergence, DKD | PlackettLuce | OFA):
            return f"the divergence {self.divergence.kind}"
        return None


def _overlaid(base: dict[str, Any], given: dict[str, Any]) -> dict[str, Any]:
    """`given` over `base`; an axis whose kind is given anew keeps no option of the kind that the name stood for."""
    merged = {**base, **given}
    for axis in ("adjustment", "temperature", "divergence"):
        options = given.get(axis)
        if isinstance(options, dict) and "kind" not in options:
            merged[axis] = {**base[axis], **options}
    return merged

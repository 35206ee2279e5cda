"""Which loss: the options of the three axes, and the names that choose points in their grid.

A name is one to three parts joined by `+`, in any order; each part sets one axis, and what no part sets stays plain:

    ce                      the labels alone, no teacher
    kd                      constant temperature, KL
    dtkd | dtd              the temperature axis
    ka                      the adjustment axis
    ka+dtd, dtkd+ka, ...    their product
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
NotNegative = Annotated[float, Field(ge=0, allow_inf_nan=False)]


class _Options(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, use_attribute_docstrings=True)

    def arguments(self) -> dict[str, Any]:
        """The options as keyword arguments of the function that `kind` names."""
        return self.model_dump(exclude={"kind"})


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


class ConstantTemperature(_Options):
    """`losses.temperatures.constant`."""

    kind: Literal["constant"] = "constant"
    tau: Positive = 4.0


class DTKD(_Options):
    """`losses.temperatures.dtkd`."""

    kind: Literal["dtkd"] = "dtkd"
    tau: Positive = 4.0
    sharpness: Literal["max", "logsumexp"] = "max"
    centre: bool = False
    detach: bool = False
    sharpness_floor: Positive = 1e-3


class DTDFocal(_Options):
    """`losses.temperatures.dtd_flsw`."""

    kind: Literal["dtd_flsw"] = "dtd_flsw"
    tau: Positive = 4.0
    beta: NotNegative = 40.0
    gamma: Positive = 2.0
    lowest: Positive = 1.0


class DTDConfidence(_Options):
    """`losses.temperatures.dtd_cwsm`."""

    kind: Literal["dtd_cwsm"] = "dtd_cwsm"
    tau: Positive = 4.0
    beta: NotNegative = 0.5
    lowest: Positive = 1.0


class KL(_Options):
    """`losses.divergences.kl`."""

    kind: Literal["kl"] = "kl"


Adjustment = Annotated[NoAdjustment | ProbabilityShift | LabelSmoothing, Field(discriminator="kind")]
Temperature = Annotated[ConstantTemperature | DTKD | DTDFocal | DTDConfidence, Field(discriminator="kind")]


class Loss(_Options):
    """A whole loss; `losses/distillation.py` has the sum that it describes.

    `plain_kd_weight` is the beta of the DTKD authors' code, which adds ordinary KD at `tau` beside its own term.
    """

    name: str = "kd"
    """`ce`, or parts of `kd`, `dtkd`, `dtd` and `ka` joined by `+`; sets the defaults of the keys below."""
    ce_weight: NotNegative
    """Of the cross-entropy with the labels."""
    kd_weight: NotNegative
    """Of the teacher's term."""
    plain_kd_weight: NotNegative = 0.0
    """Of constant-temperature KD beside a dynamic one."""
    warmup_epochs: NotNegative = 0.0
    """Epochs over which the teacher's weight grows to its full size."""
    adjustment: Adjustment
    """`kind: none`, `probability_shift` or `label_smoothing` (`smoothing`)."""
    temperature: Temperature
    """`kind: constant` (`tau`), `dtkd` (`tau`, `sharpness`, `centre`, `detach`, `sharpness_floor`), `dtd_flsw` (`tau`,
    `beta`, `gamma`, `lowest`) or `dtd_cwsm` (`tau`, `beta`, `lowest`)."""
    divergence: KL = KL()
    """`kind: kl`."""

    @model_validator(mode="before")
    @classmethod
    def _name_fills_in(cls, given: Any) -> Any:
        if not isinstance(given, dict) or not isinstance(given.get("name", "kd"), str):
            return given
        return _overlaid(settings_of_name(given.get("name", "kd")), given)

    @model_validator(mode="after")
    def _makes_sense(self) -> Loss:
        if not self.uses_teacher and self.ce_weight == 0:
            raise ValueError("ce_weight and the kd weights are all 0: there is nothing to learn")
        idle = self.adjustment != NoAdjustment() or self.temperature != ConstantTemperature() or self.warmup_epochs
        if not self.uses_teacher and idle:
            raise ValueError("the kd weights are 0, so adjustment, temperature and warmup_epochs would have no effect")
        if self.plain_kd_weight and self.temperature.kind == "constant":
            raise ValueError("plain_kd_weight adds constant-temperature KD to itself here: raise kd_weight instead")
        return self

    @property
    def uses_teacher(self) -> bool:
        """Whether any term needs the teacher's logits."""
        return self.kd_weight > 0 or self.plain_kd_weight > 0


# Weights of kd: mdistiller's CIFAR-100 default. Of dtkd: the authors' code (alpha 3, beta 1, 20 epochs of warm-up,
# cross-entropy in full). A pipeline file may set every one of them otherwise.
_PLAIN: dict[str, Any] = {"adjustment": {"kind": "none"}, "temperature": {"kind": "constant"}}
_PARTS: dict[str, dict[str, Any]] = {
    "kd": {"ce_weight": 0.1, "kd_weight": 0.9},
    "ka": {"adjustment": {"kind": "probability_shift"}},
    "dtkd": {
        "ce_weight": 1.0,
        "kd_weight": 3.0,
        "plain_kd_weight": 1.0,
        "warmup_epochs": 20.0,
        "temperature": {"kind": "dtkd"},
    },
    "dtd": {"temperature": {"kind": "dtd_flsw"}},
}
_TEMPERATURE_PARTS = {"kd", "dtkd", "dtd"}


def settings_of_name(name: str) -> dict[str, Any]:
    """The settings that a loss name stands for, as a pipeline file would spell them.

    Raises:
        ValueError: for a name that is not known, or whose parts choose the same axis twice.
    """
    if name == "ce":
        return {**_PLAIN, "name": name, "ce_weight": 1.0, "kd_weight": 0.0}
    parts = name.split("+")
    if not set(parts) <= _PARTS.keys():
        raise ValueError(f"unknown loss {name!r}: its parts are {', '.join(_PARTS)}, joined by '+'; or 'ce' alone")
    if len(parts) != len(set(parts)) or len(_TEMPERATURE_PARTS.intersection(parts)) > 1:
        raise ValueError(f"loss {name!r} chooses the same thing twice: take one of kd, dtkd, dtd, and ka at most once")
    settings = {**_PLAIN, **_PARTS["kd"], "name": name}
    for part in parts:
        settings.update(_PARTS[part])
    return settings


def _overlaid(base: dict[str, Any], given: dict[str, Any]) -> dict[str, Any]:
    """`given` over `base`; an axis whose kind is given anew keeps no option of the kind that the name stood for."""
    merged = {**base, **given}
    for axis in ("adjustment", "temperature"):
        options = given.get(axis)
        if isinstance(options, dict) and "kind" not in options:
            merged[axis] = {**base[axis], **options}
    return merged

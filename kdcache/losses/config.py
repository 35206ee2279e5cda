"""The loss section of a pipeline file: the options of the axes, and which of them are inconsistent with each other."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Annotated, Any, Literal, Union

from pydantic import BaseModel, Field, ValidationInfo, field_validator, model_validator

from kdcache.losses.adjustments import NoAdjustment
from kdcache.losses.controllers import ControllerOptions, InstanceTemperatureOptions, TGeoOptions
from kdcache.losses.custom import CustomDivergence
from kdcache.losses.divergences import KL
from kdcache.losses.gate import GateOptions
from kdcache.losses.map_options import OutputLoss
from kdcache.losses.options import (
    AdjustmentOptions,
    DivergenceOptions,
    LossSection,
    NotNegative,
    Options,
    TemperatureOptions,
)
from kdcache.losses.presets import is_custom, settings_of_name
from kdcache.losses.registry import ADJUSTMENTS, DIVERGENCES, NORMALIZATIONS, TEMPERATURES
from kdcache.losses.temperature_agent import ITKDOptions
from kdcache.losses.temperatures import ConstantTemperature

_CONTROLLERS = (TGeoOptions, InstanceTemperatureOptions, ITKDOptions)

if TYPE_CHECKING:
    Normalization = str
    Adjustment = AdjustmentOptions
    Temperature = TemperatureOptions
    Divergence = DivergenceOptions
    ControllerChoice = ControllerOptions
else:
    ControllerChoice = Annotated[Union[_CONTROLLERS], Field(discriminator="kind")]  # noqa: UP007
    Normalization = Literal[tuple(NORMALIZATIONS)]
    Adjustment = Annotated[Union[tuple(ADJUSTMENTS.values())], Field(discriminator="kind")]  # noqa: UP007
    Temperature = Annotated[Union[tuple(TEMPERATURES.values())], Field(discriminator="kind")]  # noqa: UP007
    Divergence = Annotated[Union[(*DIVERGENCES.values(), CustomDivergence)], Field(discriminator="kind")]


class Loss(LossSection):
    """A whole loss; `losses/distillation.py` has the sum that it describes.

    `plain_kd_weight` is the beta of the DTKD authors' code, which adds ordinary KD at `tau` to its own term.
    """

    name: str = "kd"
    """`ce`, or parts joined by `+`, one per axis: `zscore`; `ka`, `lsr`, `truncated`, `noisy`; `kd`, `dtkd`, `dtd`,
    `cwsm`, `ctkd`, `cswt`; `rkl`, `js`, `dkd`, `dist`, `r2kd`, `cskd`, `pld`, `ofa`, `mse`, `cosine`, `brier`,
    `comparative`, `ff_g2m`. Or `path/file.py:function`, with the function's keyword arguments as further keys. Sets the
    defaults of the keys below."""
    ce_weight: NotNegative
    """Weight of the cross-entropy with the labels."""
    kd_weight: NotNegative
    """Weight of the distillation term."""
    plain_kd_weight: NotNegative = 0.0
    """Weight of the same divergence at a constant temperature, in addition to a dynamic one."""
    warmup_epochs: NotNegative = 0.0
    """Epochs over which the weights of the distillation terms grow linearly to their full value."""
    normalization: Normalization = "none"
    """Normalization of both logits, before everything else: `none` or `z_score` (logit standardization)."""
    adjustment: Adjustment
    """`kind: none`, `probability_shift`, `label_smoothing` (`smoothing`), `truncation` (`top`) or `noise` (`sigma`,
    `share`)."""
    temperature: Temperature
    """`kind: constant` (`tau`), `dtkd` (`tau`, `sharpness`, `center`, `detach`, `equalize`, `sharpness_floor`),
    `dtd_flsw` (`tau`, `beta`, `gamma`, `min_temperature`), `dtd_cwsm` (`tau`, `beta`, `min_temperature`),
    `ctkd` (`min_temperature`, `span`, `ramp_epochs`) or `cswt` (`tau`, `low`, `high`)."""
    divergence: Divergence
    """`kind: kl`, `reverse_kl`, `jensen_shannon`, `dkd` (`alpha`, `beta`), `dist` (`beta`, `gamma`, `center`),
    `plackett_luce`, `ofa` (`eps`), `mse`, `cosine`, `brier` (`alpha`), `comparative` (`group_size`), `ff_g2m`
    (`edge_tau`) or `function` (`function`: `path/file.py:function`, `options`)."""

    tail: Literal["stored", "student"] = Field(default="stored", exclude_if=lambda tail: tail == "stored")
    """For a teacher of tokens: `stored`, the tail of its probabilities as the cache has it; or `student`, its mass
    alone, in the student's own shape."""
    gate: GateOptions | None = Field(default=None, exclude_if=lambda gate: gate is None)
    """A learned choice among the teachers of several caches, for each sample: `choose`, `top`, `balance`."""
    controller: ControllerChoice | None = Field(default=None, exclude_if=lambda controller: controller is None)
    """A network that sets the share or the temperature of each sample, with `lr`, `weight_decay` and `every`. Trained
    for the loss on the validation split: `kind: tgeo` (`published`), `instance_temperature` (`low`, `high`). Trained by
    a reward: `itkd` (`low`, `high`, `reward`, `critic_lr`, `clip`, `updates`, `start_epoch`)."""
    outputs: dict[str, OutputLoss] = Field(default={}, exclude_if=lambda outputs: not outputs)
    """Losses of other outputs of the teacher, by name of the output, each with its `name`, `weight` and options."""

    @model_validator(mode="before")
    @classmethod
    def _name_fills_in(cls, given: Any) -> Any:
        given = _split_by_output(given, set(cls.model_fields))
        if not isinstance(given, dict) or not isinstance(given.get("name", "kd"), str):
            return given
        try:
            base = settings_of_name(given.get("name", "kd"))
        except ValueError:
            return {**settings_of_name("kd"), "name": given["name"]}  # `_is_known` reports the name
        if is_custom(base["name"]):
            given = _options_of_function(base, given)
        return _overlaid(base, given)

    @field_validator("name")
    @classmethod
    def _is_known(cls, name: str) -> str:
        settings_of_name(name)
        return name

    @field_validator("gate", "controller", mode="before")
    @classmethod
    def _has_keys(cls, given: Any, info: ValidationInfo) -> Any:
        if given is None or isinstance(given, dict | BaseModel):
            return given
        example = "{}" if info.field_name == "gate" else "{kind: tgeo}"
        kinds = [options.model_fields["kind"].default for options in _CONTROLLERS]
        if given in kinds and info.field_name == "controller":
            example = f"{{kind: {given}}}"
        raise ValueError(f"{given!r} is not a mapping, did you mean {example}?")

    @field_validator("adjustment", "temperature", "divergence", mode="before")
    @classmethod
    def _is_a_mapping(cls, given: Any, info: ValidationInfo) -> Any:
        if isinstance(given, dict | BaseModel) or info.field_name is None or "name" not in info.data:
            return given
        base = settings_of_name(info.data["name"])[info.field_name]
        raise ValueError(f"{given!r} {_not_a_mapping(info.field_name, base['kind'], given)}")

    @model_validator(mode="after")
    def _makes_sense(self) -> Loss:
        if objections := [*self._without_effect(), *self._at_odds()]:
            raise ValueError("; ".join(objections))
        return self

    def _without_effect(self) -> Iterator[str]:
        if not self.uses_teacher:
            if self.ce_weight == 0 and not any(output.weight for output in self.outputs.values()):
                yield "ce_weight, the kd weights and those of other outputs are all 0: there is nothing to learn"
            axes = (self.normalization, self.adjustment, self.temperature, self.divergence)
            if axes != ("none", NoAdjustment(), ConstantTemperature(), KL()) or self.warmup_epochs:
                yield (
                    "the kd weights are 0, so normalization, adjustment, temperature, divergence and warmup_epochs "
                    "would have no effect"
                )
            if self.gate is not None or self.controller is not None:
                yield "the kd weights are 0, so a gate or a controller would have no effect"
        if self.plain_kd_weight and self.temperature.is_constant:
            yield "plain_kd_weight adds constant-temperature KD to itself here: raise kd_weight instead"
        yield from self.divergence.without_effect()

    def _at_odds(self) -> Iterator[str]:
        """Yield what is wrong with choices on two axes that are valid one by one."""
        adjustment, temperature, divergence = self.adjustment, self.temperature, self.divergence
        kind = divergence.kind
        if temperature.reference_tau is None and self.plain_kd_weight:
            yield f"plain_kd_weight needs the tau of dtkd or dtd, and {temperature.kind} has none"
        if divergence.needs_logits and adjustment.gives_probabilities:
            yield f"{kind} compares logits, and {adjustment.kind} leaves probabilities alone: take kl"
        is_one = temperature == ConstantTemperature(tau=1.0)
        if divergence.ignores_shared_temperature and temperature.is_shared and self.uses_teacher and not is_one:
            yield f"a temperature that both share cancels out of {kind}: take kind: constant with tau: 1, or dtkd"
        if divergence.infinite_at_zeros and adjustment.gives_zeros:
            yield f"{kind} is infinite where {adjustment.kind} leaves the teacher no probability: take kl"
        if divergence.needs_order and adjustment.loses_order:
            yield f"{kind} needs the teacher's order, and {adjustment.kind} leaves none"
        if divergence.compares_other_classes and adjustment.classes_kept == 1:
            yield f"{kind} compares the classes beside the true one, and {adjustment.kind} to top: 1 may leave none"
        if divergence.positive_between_equals and temperature.has_gradient:
            yield (
                f"{kind} is above 0 even where the student is the teacher, so the gradient through the temperatures of "
                f"{temperature.kind} would move their weight, not the student: take dtkd with detach: true, dtd or a "
                "constant one"
            )
        if divergence.needs_constant_temperature and not temperature.is_constant:
            yield f"the divergence {kind} needs a constant temperature, and this one is {temperature.kind}"
        if self.controller is not None:
            yield from self._at_odds_with_controller(self.controller)

    def _at_odds_with_controller(self, controller: ControllerOptions) -> Iterator[str]:
        temperature, divergence = self.temperature, self.divergence
        if self.gate is not None:
            yield f"the controller {controller.kind} is for one teacher, and gate for several: take one of them"
        if temperature.is_learned:
            yield f"the temperature {temperature.kind} is learned, and the controller would be too: take one of them"
        if divergence.uses_edges:
            yield f"{controller.kind} sets something of each sample, and {divergence.kind} compares nodes: take kl"
        if not controller.sets_temperature:
            return
        if not temperature.is_constant:
            yield f"{controller.kind} sets the temperatures, and so does {temperature.kind}: take kind: constant"
        if divergence.ignores_shared_temperature or divergence.needs_constant_temperature:
            yield f"{controller.kind} sets temperatures, and {divergence.kind} has none of its own per sample: take kl"

    @property
    def title(self) -> str:
        """The losses of class logits and other outputs, for a person."""
        of_outputs = [f"{output}: {options.name}" for output, options in self.outputs.items()]
        return " + ".join([*([self.name] if self.uses_logits else []), *of_outputs])

    @property
    def uses_teacher(self) -> bool:
        """Whether any term needs the teacher's logits."""
        return self.kd_weight > 0 or self.plain_kd_weight > 0

    @property
    def uses_cache(self) -> bool:
        """Whether any term needs the teacher's logits or another output of it."""
        return self.uses_teacher or bool(self.outputs)

    @property
    def uses_logits(self) -> bool:
        """Whether any term needs the student's logits."""
        return self.uses_teacher or self.ce_weight > 0

    @property
    def learns_temperature(self) -> bool:
        """Whether the temperature is a parameter that is trained with the student."""
        return self.temperature.is_learned

    @property
    def tau(self) -> float:
        """The temperature of `plain_kd_weight`'s term."""
        return self.temperature.reference_tau or 1.0

    @property
    def skips_unlabeled(self) -> bool:
        """Whether the distillation term leaves out samples without a label."""
        return self.divergence.skips_unlabeled

    @property
    def is_of_the_batch(self) -> bool:
        """Whether the loss of a sample depends on the other samples of its batch."""
        of_logits = self.temperature.uses_batch or self.divergence.uses_batch or self.uses_edges
        return of_logits or self.gate is not None or any(output.uses_batch for output in self.outputs.values())

    @property
    def uses_edges(self) -> bool:
        """Whether the distillation term compares samples that an edge of a graph joins."""
        return self.uses_teacher and self.divergence.uses_edges

    @property
    def needs_level(self) -> str | None:
        """Which part changes with a constant that is added to a row of the teacher's logits; None if no part does."""
        if not self.uses_teacher or NORMALIZATIONS[self.normalization].removes_level:
            return None
        if self.temperature.needs_level:
            return f"the temperature {self.temperature.kind}"
        if self.adjustment.needs_level:
            return f"the adjustment {self.adjustment.kind}"
        return self.divergence.described("needs_level") if self.divergence.needs_level else None

    @property
    def acts_on_label(self) -> str | None:
        """What acts on the one true class of an image: adjustment, divergence or controller; None if nothing does."""
        if self.controller is not None and self.controller.acts_on_label:
            return f"the controller {self.controller.kind}"
        if self.adjustment.acts_on_label:
            return f"the adjustment {self.adjustment.kind}"
        return self.divergence.described("acts_on_label") if self.divergence.acts_on_label else None


def _not_a_mapping(axis: str, kind: str, given: Any) -> str:
    """Return what is wrong with a plain value for an axis, and the mapping that may be meant."""
    registries: dict[str, Mapping[str, type[Options]]] = {
        "adjustment": ADJUSTMENTS,
        "temperature": TEMPERATURES,
        "divergence": DIVERGENCES,
    }
    registry = registries[axis]
    if isinstance(given, str) and given in registry:
        return f"is not a mapping, did you mean {{kind: {given}}}?"
    options = [name for name in registry[kind].model_fields if name != "kind"] if kind in registry else []
    return f"is not a mapping, did you mean {{{options[0]}: {given!r}}}?" if options else "is not a mapping"


def _options_of_function(base: dict[str, Any], given: dict[str, Any]) -> dict[str, Any]:
    """Return the keys of a loss `path/file.py:function`; those that are not keys of a loss become the function's."""
    options = {key: value for key, value in given.items() if key not in Loss.model_fields}
    known = {key: value for key, value in given.items() if key in Loss.model_fields}
    if not options:
        return known
    divergence = known.get("divergence", {})
    if not isinstance(divergence, dict):
        return given
    own = divergence.get("options", {})
    return {**known, "divergence": {**base["divergence"], **divergence, "options": {**own, **options}}}


def _overlaid(base: dict[str, Any], given: dict[str, Any]) -> dict[str, Any]:
    """Return `base` updated with `given`; an axis whose kind is given drops the options of the kind of the name."""
    merged = {**base, **given}
    for axis in ("adjustment", "temperature", "divergence"):
        options = given.get(axis)
        if isinstance(options, dict) and "kind" not in options:
            merged[axis] = {**base[axis], **options}
    return merged


def _split_by_output(given: Any, known: set[str]) -> Any:
    """Return a mapping of losses by output, `{logits: {...}, features: {...}}`, as one loss with `outputs`.

    Without `logits`, they are trained with cross-entropy alone; `logits: false` leaves them out.
    """
    if not isinstance(given, dict) or "name" in given or "outputs" in given or not given.keys() - known:
        return given
    if not all(isinstance(of_output, dict) or name == "logits" for name, of_output in given.items()):
        return given
    of_logits = given.get("logits", {"name": "ce"})
    if of_logits is False:
        of_logits = {"name": "ce", "ce_weight": 0.0}
    if not isinstance(of_logits, dict):
        raise ValueError(f"logits is {of_logits!r}: give a mapping with the name of a loss, or false to leave it out")
    outputs = {name: of_output for name, of_output in given.items() if name != "logits"}
    return {**of_logits, **({"outputs": outputs} if outputs else {})}

"""Base classes of the options of a loss: values from a pipeline file, beside the function that takes them.

A subclass stands in the file of its function, names it in `compute`, and says in class variables ("traits") what the
function needs and what it does to its inputs. `losses/registry.py` lists the subclasses of each axis; everything else
reads the traits and knows no loss by name.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Annotated, Any, ClassVar

from pydantic import BaseModel, ConfigDict, Field

Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
NotNegative = Annotated[float, Field(ge=0, allow_inf_nan=False)]

Presets = dict[str, dict[str, Any]]
"""Loss names, each with what it sets beside its axis."""

AT_1: dict[str, Any] = {"kind": "constant", "tau": 1.0}
"""The temperature axis without a temperature, for presets."""


class LossSection(BaseModel):
    """A part of the `loss` section of a pipeline file: unknown keys and values of other types are refused."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, use_attribute_docstrings=True)


class Options(LossSection):
    """The options of one function of one axis.

    Attributes:
        compute: the function; it takes the options as keyword arguments.
        presets: loss names that choose this kind, each with what it sets beside it (weights, the other axes).
        uses_batch: whether a sample's result depends on the other samples of its batch; the function then takes
            `batch_sum`.
        uses_batch_max: whether it needs the maximum over the batch too; the function then takes `batch_max`.
        uses_edges: whether it compares samples that an edge of a graph joins; the function then takes `edges`.
        needs_tail_shape: whether it compares logits of all classes, so that the mass outside the head of a teacher of
            tokens is not enough.
        refused_for_tokens: why it is refused for the positions of a language model; None if it is not.
    """

    compute: ClassVar[Callable[..., Any]]
    presets: ClassVar[Presets] = {}
    uses_batch: ClassVar[bool] = False
    uses_batch_max: ClassVar[bool] = False
    uses_edges: ClassVar[bool] = False
    needs_tail_shape: ClassVar[bool] = False
    refused_for_tokens: ClassVar[str | None] = None

    kind: str

    def arguments(self) -> dict[str, Any]:
        """Return the options as keyword arguments of `compute`."""
        return {name: value for name, value in self if name != "kind"}

    def bind(self, **step: Any) -> Callable[..., Any]:
        """Return `compute` with the options and the values of the current step filled in."""
        return partial(type(self).compute, **self.arguments(), **step)

    def without_effect(self) -> Iterator[str]:
        """Yield what is wrong with values that are valid one by one but have no effect together."""
        yield from ()


class AdjustmentOptions(Options):
    """Options of an adjustment of the teacher's logits.

    Attributes:
        acts_on_label: whether it needs the one true class of each sample.
        needs_level: whether a constant that is added to a row of the teacher's logits changes more than a constant.
        gives_probabilities: whether its result is defined by its softmax only, so that comparing logits is meaningless.
        loses_order: whether the order of the teacher's classes is lost.
        gives_zeros: whether the softmax of its result has exact zeros.
        commutes_with_scale: whether A(u / T) = A(u) / T.
    """

    acts_on_label: ClassVar[bool] = False
    needs_level: ClassVar[bool] = False
    gives_probabilities: ClassVar[bool] = False
    loses_order: ClassVar[bool] = False
    gives_zeros: ClassVar[bool] = False
    commutes_with_scale: ClassVar[bool] = False

    @property
    def classes_kept(self) -> int | None:
        """How many classes of each row keep a probability above 0; None for all."""
        return None


class TemperatureOptions(Options):
    """Options of a temperature rule.

    Attributes:
        is_constant: whether all samples have the same temperature in every step.
        is_shared: whether student and teacher always have the same temperature.
        is_learned: whether it has a parameter that is trained with the student; the function then takes `theta` and
            `epoch`.
    """

    is_constant: ClassVar[bool] = False
    is_shared: ClassVar[bool] = True
    is_learned: ClassVar[bool] = False

    @property
    def reference_tau(self) -> float | None:
        """The temperature that the rule varies around; None where it has none."""
        return getattr(self, "tau", None)

    @property
    def needs_level(self) -> bool:
        """Whether a constant that is added to a row of the teacher's logits changes the temperatures."""
        return False

    @property
    def has_gradient(self) -> bool:
        """Whether the loss is differentiated through the temperatures."""
        return type(self).is_learned


class DivergenceOptions(Options):
    """Options of a divergence.

    Attributes:
        acts_on_label: whether it treats the one true class of each sample apart.
        skips_unlabeled: whether it is 0 for samples without a label; its mean is then over the labeled ones.
        needs_level: whether a constant that is added to a row of the teacher's logits changes it.
        needs_logits: whether it compares logits; log-probabilities cannot replace them.
        needs_order: whether it needs the order of the teacher's classes.
        compares_other_classes: whether it compares the classes beside the true one among themselves.
        ignores_shared_temperature: whether a temperature that student and teacher share cancels out of tau^2 * D.
        infinite_at_zeros: whether it is infinite where a probability of the teacher is 0.
        positive_between_equals: whether it is above 0 where student and teacher are equal.
        needs_constant_temperature: whether it is defined at a constant temperature only.
        has_closed_form: whether it is `kl`, whose weighted sum `closed_form.weighted_kl` computes.
    """

    acts_on_label: ClassVar[bool] = False
    skips_unlabeled: ClassVar[bool] = False
    needs_level: ClassVar[bool] = False
    needs_logits: ClassVar[bool] = False
    needs_order: ClassVar[bool] = False
    compares_other_classes: ClassVar[bool] = False
    ignores_shared_temperature: ClassVar[bool] = False
    infinite_at_zeros: ClassVar[bool] = False
    positive_between_equals: ClassVar[bool] = False
    needs_constant_temperature: ClassVar[bool] = False
    has_closed_form: ClassVar[bool] = False

    @property
    def samples_per_group(self) -> int:
        """How many consecutive samples belong together: a batch, and each process's part of it, has whole groups."""
        return 1

    def described(self, trait: str) -> str:
        """Return what the divergence is called in a message about one of its traits."""
        return f"the divergence {self.kind}"

"""Make a loss from its name and options, and load a loss from a file of the user."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor

from kdcache.config.section import validated
from kdcache.errors import UsageError, did_you_mean
from kdcache.losses.config import Loss
from kdcache.losses.custom import CustomDivergence
from kdcache.losses.loss_module import DistillationLoss
from kdcache.losses.map_options import ALL_LOSSES
from kdcache.losses.options import Options
from kdcache.losses.presets import is_custom, settings_of_name
from kdcache.losses.registry import ADJUSTMENTS, DIVERGENCES, TEMPERATURES
from kdcache.runtime import user_code

_AXES: dict[str, Mapping[str, type[Options]]] = {
    "adjustment": ADJUSTMENTS,
    "temperature": TEMPERATURES,
    "divergence": DIVERGENCES,
}
_SIGNATURE = (
    "function(student_logits [B, C], teacher_logits [B, C], labels [B], **options) -> one value per sample [B], or "
    "their mean []"
)


def loss(name: str = "kd", **options: Any) -> DistillationLoss:
    """Return a loss by name, such as `kdcache.loss("dtkd", tau=4)`.

    Args:
        name: `ce`, or parts joined by `+`, one per axis: `zscore`; `ka`, `lsr`, `truncated`; `kd`, `dtkd`, `dtd`,
            `cwsm`, `ctkd`; `rkl`, `js`, `dkd`, `dist`, `pld`, `ofa`, `mse`, `cosine`. docs/LOSSES.md has their formulas
            and sources. Or `path/file.py:function`, a function `(student_logits [B, C], teacher_logits [B, C],
            labels [B], **options)` that returns one value per sample [B], or their mean. By default it gets raw logits.
            With `tau=T` it gets logits divided by T, and its values are multiplied by T^2.
        options: keys of the `loss` section of a pipeline file (`ce_weight`, `kd_weight`, `plain_kd_weight`,
            `warmup_epochs`, `normalization`, and `adjustment`, `temperature`, `divergence` as mappings), or single
            options of the chosen temperature, adjustment or divergence (`tau`, `beta`, ...). For a function from a
            file, also its own keyword arguments.

    Raises:
        UsageError: for a name, an option or a value that is not known or has no effect.

    Example:
        >>> loss = kdcache.loss("dtkd+dkd", tau=2, ce_weight=0.5)
        >>> parts = loss(student_logits, teacher_logits, labels, epoch=1)
        >>> parts.total.backward()
    """
    try:
        base = settings_of_name(name)
    except ValueError as error:
        raise UsageError(str(error), "see docs/LOSSES.md for the names") from None
    given: dict[str, Any] = {"name": name}
    of_axes = {axis: _option_names(axis, base, options.get(axis)) for axis in _AXES}
    for key, value in options.items():
        axes = [axis for axis, names in of_axes.items() if key in names]
        if key in Loss.model_fields:
            given[key] = _merged(given.get(key), value)
        elif len(axes) == 1:
            given[axes[0]] = _merged(given.get(axes[0]), {key: value})
        elif axes:
            raise UsageError(
                f"{key} is an option of both the {' and the '.join(axes)} of {name!r}",
                f"say which is meant, such as {axes[0]}={{{key!r}: {value!r}}}",
            )
        elif is_custom(name):
            given[key] = value
        else:
            known = [option for names in of_axes.values() for option in names]
            keys = [key for key in Loss.model_fields if key != "name"]
            raise UsageError(
                f"the loss {name!r} has no option {key!r}{did_you_mean(key, [*known, *keys])}",
                f"it has: {', '.join([*known, *keys])}",
            )
    made = validated(Loss, given, f"the loss {name!r}")
    if made.gate is not None or made.controller is not None:
        raise UsageError(
            f"{'gate' if made.gate is not None else 'controller'} is trained by train-student",
            "train a student with `loss` of a pipeline file, or see kdcache/losses/gate.py and controllers.py",
        )
    return DistillationLoss(load_function(made))


def output_loss(name: str, **options: Any) -> Callable[[Tensor, Tensor], Tensor]:
    """Return a loss on vectors, scores, another head's logits or maps by name, such as `kdcache.output_loss("rkd")`.

    Args:
        name: `mse`, `l1`, `smooth_l1`, `cosine`, `leaf`, `rkd`, `sp` or `pkt` for vectors; `mse`, `l1`, `smooth_l1`,
            `margin_mse`, `list_kl` or `ccc` for scores; `kd` for the logits of another head; `pixel_kd`, `pixel_mse`,
            `cwd`, `at`, `theia` or `salt` for maps. docs/LOSSES.md has their formulas and sources.
        options: those of the loss, and `weight`.

    Returns:
        A function (student [B, D], teacher [B, D]) -> []: the mean over the samples, times the weight. For `rkd`, `sp`
        and `pkt` the lengths of the vectors may differ. Of a loss of maps (student [B, C, H, W], teacher [B, C, h, w]);
        for `at` the numbers of channels may differ.

    Raises:
        UsageError: for a name, an option or a value that is not known; from the function, for tensors of other shapes.

    Example:
        >>> loss = kdcache.output_loss("rkd", weight=0.1)
        >>> loss(student_features, teacher(ids)).backward()
    """
    if name not in ALL_LOSSES:
        raise UsageError(
            f"there is no loss {name!r} of vectors or scores{did_you_mean(name, ALL_LOSSES)}",
            f"use one of {', '.join(ALL_LOSSES)}",
        )
    made = validated(ALL_LOSSES[name], {"name": name, **options}, f"the loss {name!r}")

    def of_output(student: Tensor, teacher: Tensor) -> Tensor:
        shapes = [list(values.shape) for values in (student, teacher)]
        is_map = type(made).places == "grid"
        compared = [shape[:2] for shape in shapes] if is_map else shapes
        compared = compared if type(made).same_width else [shape[:1] for shape in shapes]
        if is_map and (student.ndim != 4 or teacher.ndim != 4 or compared[0] != compared[1]):
            raise UsageError(
                f"the student's maps are {shapes[0]}, the teacher's {shapes[1]}",
                "pass [B, C, h, w] of the same samples, with the same number of channels except for at",
            )
        if is_map:
            return made.weight * made.values(student, teacher).mean()
        if student.ndim != 2 or teacher.ndim != 2 or compared[0] != compared[1]:
            raise UsageError(
                f"the student's vectors are {shapes[0]}, the teacher's {shapes[1]}",
                "pass [B, D] of the same samples, of the same length except for rkd, sp and pkt",
            )
        if type(made).width not in (None, student.shape[1]):
            raise UsageError(
                f"the loss {name} compares {type(made).width} scores, and there are {student.shape[1]}",
                "pass [B, 2]: the scores of a positive and a negative passage",
            )
        return made.weight * made.values(student, teacher).mean()

    return of_output


def _option_names(axis: str, base: dict[str, Any], given: Any) -> list[str]:
    """Return the options of the kind that a name, or else the mapping that is given, chooses on an axis."""
    kind = given.get("kind", base[axis]["kind"]) if isinstance(given, dict) else base[axis]["kind"]
    options = _AXES[axis].get(kind)
    return [name for name in options.model_fields if name != "kind"] if options is not None else []


def _merged(before: Any, new: Any) -> Any:
    return {**before, **new} if isinstance(before, dict) and isinstance(new, dict) else new


def load_function(options: Loss) -> Loss:
    """Return a loss whose function from a file of the user is loaded; any other loss as it is.

    Raises:
        UsageError: if the file or the function is missing, or does not take the options.
    """
    divergence = options.divergence
    if not isinstance(divergence, CustomDivergence):
        return options
    code = user_code.load(divergence.function, "loss", _SIGNATURE)
    code.check_arguments(None, None, None, **divergence.options)
    return options.model_copy(update={"divergence": divergence.with_function(_checked(code))})


def code_digest(options: Loss) -> dict[str, str]:
    """Return the sha256 of the file of a loss from a file of the user, by its name; nothing for any other loss."""
    divergence = options.divergence
    if not isinstance(divergence, CustomDivergence):
        return {}
    return {divergence.function: user_code.digest_of(divergence.function)}


def _checked(code: user_code.UserCode) -> Callable[..., Tensor]:
    """Return a function that calls the user's and checks what it returns, with the user's traits."""

    def divergence(student_logits: Tensor, teacher_logits: Tensor, labels: Tensor, **options: Any) -> Tensor:
        values = code(student_logits, teacher_logits, labels, **options)
        size = len(student_logits)
        if not isinstance(values, Tensor):
            raise code.mistake(f"returned a {type(values).__name__}, not a tensor")
        if values.shape not in ((), (size,)) or not values.is_floating_point():
            raise code.mistake(f"returned {values.dtype} {list(values.shape)} for {size} samples")
        if student_logits.requires_grad and not values.requires_grad:
            raise code.mistake("returned values without a gradient with respect to student_logits")
        return values.expand(size)

    for trait in ("acts_on_label", "needs_level"):
        if hasattr(code.target, trait):
            setattr(divergence, trait, getattr(code.target, trait))
    return divergence

"""Why a checkpoint does not fit a network, as far as its keys and shapes tell, and how to fix it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor

from kdcache.errors import counted
from kdcache.models.state_dicts import Match, last_part

_CAUSES = {
    ("lora_",): "the checkpoint holds LoRA weights: merge them into the network (merge_and_unload) and save it again",
    ("_packed_params", "zero_point"): (
        "the checkpoint is of a quantized network: let `model:` return the same quantized network"
    ),
    ("weight_g", "parametrizations."): (
        "the checkpoint has parametrized weights: remove the parametrizations, and save it again"
    ),
}
"""Parts of unexpected keys, and the cause that they point to."""


_OF_ENCODER = "head.projections."
"""Part of the keys of `map_head.EncoderWithHead`."""


def likely_cause(
    match: Match,
    other_shapes: Mapping[str, tuple[list[int], list[int]]],
    given: Mapping[str, Any],
    expected: Mapping[str, Any],
) -> str:
    """Return the most likely reason why a checkpoint does not fit a network, and how to fix it.

    Args:
        match: of the keys.
        other_shapes: by key of the network, the shapes in the checkpoint and in the network, if they differ.
        given: the state dict of the checkpoint.
        expected: that of the network.
    """
    classes = {(theirs[0], ours[0]) for theirs, ours in other_shapes.values() if theirs and ours}
    only_first = all(theirs[1:] == ours[1:] for theirs, ours in other_shapes.values())
    if match.fits and len(classes) == 1 and only_first and len(other_shapes) <= 4:
        ((theirs, ours),) = classes
        return (
            f"the checkpoint is probably of {counted(theirs, 'class', 'classes')} and the network has {ours}: use the "
            "data set of those classes, or say in teacher.classes and teacher.outputs which outputs stand for the data "
            "set's classes"
        )
    if any(_OF_ENCODER in key for key in given) and not any(_OF_ENCODER in key for key in expected):
        return "the checkpoint is of an encoder of timm with a head: add `args: {features_only: true}`, and its others"
    unexpected = " ".join(match.unexpected)
    for marks, cause in _CAUSES.items():
        if any(mark in unexpected for mark in marks):
            return cause
    if not match.keys:
        return "the checkpoint is of another network: set `model:` and `args:` to what it was made with"
    return _cause_in_keys(match, given, expected)


def _cause_in_keys(match: Match, given: Mapping[str, Any], expected: Mapping[str, Any]) -> str:
    """Return why a checkpoint of much the same network lacks keys, or has others."""
    if match.missing and (other := _under_another_name(match, given, expected)) is not None:
        return f"the checkpoint has {other}: rename it in the checkpoint, or in the network"
    if match.missing and not match.unexpected:
        lacking = _parts(match.missing)
        if len(lacking) == 1 and match.missing[-1] == [*expected][-1]:
            return f"the checkpoint lacks {lacking[0]}, perhaps the head: give the checkpoint of the whole network"
        return (
            f"the checkpoint lacks {_listed(lacking)} of the network: set `model:` and `args:` to what it was made with"
        )
    if match.unexpected and not match.missing:
        extra = _listed(_parts(match.unexpected))
        return (
            f"the network has no {extra}: set `model:` and `args:` to what the checkpoint was made with; or, if the "
            "logits do not depend on it, remove it from the checkpoint"
        )
    return "set `model:` and `args:` to what the checkpoint was made with, and check the number of classes"


def _under_another_name(match: Match, given: Mapping[str, Any], expected: Mapping[str, Any]) -> str | None:
    """Return the part of the checkpoint with the names and shapes of the one that is missing, and the missing one."""
    lacking = _parts(match.missing)
    others = _parts([*match.unexpected, *match.ignored])
    if len(lacking) != 1:
        return None

    def shapes(state: Mapping[str, Any], keys: Iterable[str], part: str) -> dict[str, Any]:
        tensors = {last_part(key): state[key] for key in keys if key.rpartition(".")[0] == part}
        return {name: tuple(value.shape) for name, value in tensors.items() if isinstance(value, Tensor)}

    wanted = shapes(expected, match.missing, lacking[0])
    alike = [part for part in others if shapes(given, given, part) == wanted]
    return f"{alike[0]}, of the same shapes, in place of {lacking[0]}" if len(alike) == 1 else None


def _parts(keys: Iterable[str]) -> list[str]:
    """Return the modules that keys belong to, such as `layer1.0.conv1` of `layer1.0.conv1.weight`."""
    return list(dict.fromkeys(key.rpartition(".")[0] or key for key in keys))


def _listed(parts: list[str]) -> str:
    return parts[0] if len(parts) == 1 else f"{parts[0]} (and {len(parts) - 1} more)"

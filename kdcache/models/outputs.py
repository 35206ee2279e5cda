"""Select the logits in the output of a network: a tensor, or a part of a tuple, dictionary or record."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any

from torch import Tensor, nn

from kdcache.errors import MismatchError, did_you_mean

Part = int | str

_USUAL = "logits"
"""Name of the logits in the outputs of transformers."""


class TakePart:
    """A forward hook that replaces the output of a network by its logits; the network and its state do not change.

    Args:
        part: part that holds the logits; None for `logits`.
        who: name of the network in errors.
    """

    def __init__(self, part: Part | None, who: str) -> None:
        self.part, self.who = part, who

    def __call__(self, module: nn.Module, inputs: tuple[Any, ...], output: Any) -> Tensor:
        """Return the logits."""
        return logits_of(output, self.part, self.who)


def take_part(model: nn.Module, part: Part | None, who: str) -> None:
    """Let a network return its logits only, in evaluation and in training mode.

    A TorchScript module does not support hooks: its callers use `logits_of`, and a named part is refused.

    Raises:
        MismatchError: if a part of a TorchScript module is named.
    """
    try:
        model.register_forward_hook(TakePart(part, who))
    except RuntimeError:
        if part is not None:
            raise MismatchError(
                f"`output: {part}` cannot be taken of {who}, a TorchScript module",
                "return a torch.nn.Module that calls it, and returns that part",
            ) from None


def drop_selection(model: nn.Module) -> None:
    """Let a network return everything again, after `take_part`."""
    hooks = model._forward_hooks
    for key in [key for key, hook in hooks.items() if isinstance(hook, TakePart)]:
        del hooks[key]


def logits_of(output: object, part: Part | None = None, who: str = "network") -> Tensor:
    """Return the logits in the output of a network.

    A tensor is returned as it is, whatever `part` is: some networks return more than their logits in training mode
    only.

    Args:
        output: a tensor, tuple, list, mapping, or an object with attributes (a dataclass, a named tuple, a
            `ModelOutput` of transformers).
        part: index or name of the part that holds the logits; a nested part is written with dots. None for the part
            named `logits`.
        who: name of the network in errors.

    Raises:
        MismatchError: if the part does not exist, or is not a tensor.
    """
    if isinstance(output, Tensor):
        return output
    found = find_part(output, _USUAL if part is None else part)
    if isinstance(found, Tensor):
        return found
    parts = dict(_parts(output))
    listed = "; ".join(f"{name} {_described(value)}" for name, value in parts.items()) or "nothing that has a name"
    what = f"the {who} returned a {type(output).__name__}"
    if part is not None:
        reason = "has no such part" if found is None else f"has a {type(found).__name__} there"
        similar = did_you_mean(part, map(str, parts)) if part not in parts else ""
        raise MismatchError(f"{what}, and `output: {part}` {reason}{similar}: it holds {listed}", _advice(parts))
    raise MismatchError(f"{what}: {listed}", _advice(parts))


def find_part(output: object, part: Part) -> Any:
    """Return a part of what a network returned, written as in `logits_of`; None if there is no such part."""
    found: Any = output
    for name in _path(output, part):
        found = _part(found, name)
    return found


def listed_parts(output: object) -> dict[str, str]:
    """Return the parts of what a network returned, each with its shape or type; none of a tensor."""
    return {} if isinstance(output, Tensor) else {str(name): _described(value) for name, value in _parts(output)}


def _path(output: object, part: Part) -> list[Part]:
    """Return the path of a part: one name, or those between the dots."""
    if isinstance(part, int) or _part(output, part) is not None:
        return [part]
    return [int(name) if name.isdecimal() else name for name in part.split(".")]


def _part(output: object, name: Part) -> Any:
    """Return a part of a container; None if it does not have the part."""
    if isinstance(output, Tensor):
        return None
    if isinstance(output, Mapping):
        return output.get(name, output.get(str(name)))
    if isinstance(name, int):
        return output[name] if isinstance(output, tuple | list) and name < len(output) else None
    return getattr(output, name, None)


def _parts(output: object) -> Iterator[tuple[Part, Any]]:
    """Yield the parts of a container by name or index."""
    if isinstance(output, Mapping):
        yield from output.items()
    elif hasattr(output, "_fields"):
        yield from zip(output._fields, output, strict=True)  # type: ignore[call-overload]  # a named tuple
    elif isinstance(output, tuple | list):
        yield from enumerate(output)
    elif dataclasses.is_dataclass(output):
        yield from ((field.name, getattr(output, field.name, None)) for field in dataclasses.fields(output))
    elif hasattr(output, "__dict__"):
        yield from vars(output).items()


def _described(value: object) -> str:
    return str(list(value.shape)) if isinstance(value, Tensor) else f"a {type(value).__name__}"


def _advice(parts: Mapping[Part, Any]) -> str:
    """Return how to fix an output without the selected part."""
    tensors = {name: value for name, value in parts.items() if isinstance(value, Tensor)}
    rows = [name for name, value in tensors.items() if value.ndim == 2]
    if rows:
        return f"name the part that holds logits [B, C], such as `output: {rows[0]}`"
    if maps := [name for name, value in tensors.items() if value.ndim == 4]:
        return (
            f"it says a class of every pixel (segmentation): name the part, such as `output: {maps[0]}`, and keep maps "
            "of it: `places: grid` in cache.outputs"
        )
    return "let it return logits, a tensor [B, C], or name the part that holds them in `output:`"

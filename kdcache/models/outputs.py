"""The logits in what a network returns: a tensor, or a part of a tuple, dictionary or record."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from torch import Tensor, nn

from kdcache.errors import MismatchError

Part = int | str

_USUAL = "logits"
"""The name under which transformers, and torchvision in training mode, return them."""


class TakePart:
    """A forward hook that replaces what a network returns by its logits; the network and its state stay as they are.

    Args:
        part: which part holds the logits; None for the usual one.
        who: what to call the network in errors.
    """

    def __init__(self, part: Part | None, who: str) -> None:
        self.part, self.who = part, who

    def __call__(self, module: nn.Module, inputs: tuple[Any, ...], output: Any) -> Tensor:
        """Return the logits."""
        return logits_of(output, self.part, self.who)


def take_part(model: nn.Module, part: Part | None, who: str) -> None:
    """Let a network return its logits alone, whatever else it returns, in evaluation and in training mode.

    A TorchScript module takes no hooks: of it the usual part is taken where it is used, and another one is refused.

    Raises:
        MismatchError: if a part is named of a TorchScript module.
    """
    try:
        model.register_forward_hook(TakePart(part, who))
    except RuntimeError:
        if part is not None:
            raise MismatchError(
                f"`output: {part}` cannot be taken of {who}, a TorchScript module",
                "return a torch.nn.Module that calls it, and returns that part",
            ) from None


def logits_of(output: object, part: Part | None = None, who: str = "network") -> Tensor:
    """Return the logits in what a network returned.

    A tensor is taken as it is, whatever `part` says: some networks return more than their logits in training mode only.

    Args:
        output: what it returned: a tensor, tuple, list, mapping, or an object with attributes (a dataclass, a named
            tuple, a `ModelOutput` of transformers).
        part: index or name of the part that holds the logits; of parts within parts, names with dots between. None for
            the part that is called `logits`.
        who: what to call the network in errors.

    Raises:
        MismatchError: if there is no such part, or it is not a tensor.
    """
    if isinstance(output, Tensor):
        return output
    found = output
    for name in _path(output, _USUAL if part is None else part):
        found = _part(found, name)
    if isinstance(found, Tensor):
        return found
    parts = dict(_parts(output))
    listed = "; ".join(f"{name} {_described(value)}" for name, value in parts.items()) or "nothing that has a name"
    what = f"the {who} returned a {type(output).__name__}"
    if part is not None:
        reason = "has no such part" if found is None else f"has a {type(found).__name__} there"
        raise MismatchError(f"{what}, and `output: {part}` {reason}: it holds {listed}", _advice(parts))
    raise MismatchError(f"{what}: {listed}", _advice(parts))


def _path(output: object, part: Part) -> list[Part]:
    """Return the names that lead to a part: one, or those between the dots."""
    if isinstance(part, int) or _part(output, part) is not None:
        return [part]
    return [int(name) if name.isdecimal() else name for name in part.split(".")]


def _part(output: object, name: Part) -> Any:
    """Return a part of a container; None if it has none of that name."""
    if isinstance(output, Tensor):
        return None
    if isinstance(output, Mapping):
        return output.get(name)
    if isinstance(name, int):
        return output[name] if isinstance(output, tuple | list) and name < len(output) else None
    return vars(output).get(name) if hasattr(output, "__dict__") else getattr(output, name, None)


def _parts(output: object) -> Iterator[tuple[Part, Any]]:
    """Yield the parts of a container by name or index."""
    if isinstance(output, Mapping):
        yield from output.items()
    elif hasattr(output, "_fields"):
        yield from zip(output._fields, output, strict=True)  # type: ignore[call-overload]  # a named tuple
    elif isinstance(output, tuple | list):
        yield from enumerate(output)
    elif hasattr(output, "__dict__"):
        yield from vars(output).items()


def _described(value: object) -> str:
    return str(list(value.shape)) if isinstance(value, Tensor) else f"a {type(value).__name__}"


def _advice(parts: Mapping[Part, Any]) -> str:
    """Return what to do about an output without the part that is meant."""
    tensors = {name: value for name, value in parts.items() if isinstance(value, Tensor)}
    rows = [name for name, value in tensors.items() if value.ndim == 2]
    if rows:
        return f"name the part that holds logits [B, C], such as `output: {rows[0]}`"
    if any(value.ndim == 4 for value in tensors.values()):
        return (
            "it predicts every pixel (segmentation), and kdcache distills networks that return logits [B, C] for each "
            "image: take one of these, or a function of your own that reduces its output to [B, C]"
        )
    return "let it return logits, a tensor [B, C], or name the part that holds them in `output:`"

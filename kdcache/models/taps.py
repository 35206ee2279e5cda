"""Named outputs of a network: parts of what it returns, and the outputs of its modules, in one forward pass."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from kdcache.errors import MismatchError, UsageError, did_you_mean
from kdcache.models.graph_teacher import GraphTeacher
from kdcache.models.outputs import TakePart, find_part, listed_parts

FEATURES = "features"
"""Name of the input of the last linear layer, unless a part or a module has this name."""


@dataclass(frozen=True)
class Tap:
    """Where an output is taken.

    Attributes:
        source: index or name of a part of what the network returns, or name of a module; None: the name of the output.
        pool: how [B, D, H, W] or [B, L, D] becomes [B, D]: "mean" over the places, "first" of L, or "none".
        places: "one", or "grid" for an output that is a map, [B, C, h, w].
        of_one_number: whether a map may also be [B, h, w], of one number per place, or of true and false.
        patches: (h, w), if a map may also be [B, L, D], of whose tokens the last h * w are its places.
        fix: how to name another one, if it is not named by the `source` of an output.
    """

    source: str | int | None = None
    pool: Literal["none", "mean", "first"] = "none"
    places: Literal["one", "grid"] = "one"
    of_one_number: bool = False
    patches: tuple[int, int] | None = None
    fix: str | None = None


class Taps:
    """The outputs of a network beside what it returns; hooks are there during a forward pass only.

        taps = Taps(network, {"features": Tap("layer4", "mean")}, "teacher")
        with taps.collecting():
            returned = network(images)
        vectors = taps.outputs()["features"]           # [B, D]

    State dict and module names of the network do not change.

    Args:
        model: the network.
        taps: by name of the output.
        who: name of the network in errors.

    Attributes:
        returned: what the network returned in the last pass, before `output:` selected its logits.
    """

    def __init__(self, model: nn.Module, taps: Mapping[str, Tap], who: str) -> None:
        self._model, self._taps, self._who = model, dict(taps), who
        self._modules = {name: module for name, module in model.named_modules() if name}
        self._runs_once = any(isinstance(module, GraphTeacher) for module in model.modules())
        self._seen: dict[str, list[Any]] = {}
        self._whole = False
        self.returned: Any = None

    @contextmanager
    def collecting(self, *, whole: bool = False) -> Iterator[None]:
        """Collect the outputs of the forward pass inside.

        Args:
            whole: let the network return everything, even if it has no logits for `output:` to select; a tensor that
                it returns is then the output, if there is only one.

        Raises:
            MismatchError: if the network cannot be hooked.
        """
        self._seen, self.returned, self._whole = {name: [] for name in self._taps}, None, whole
        with ExitStack() as hooks:
            try:
                if whole:
                    hooks.enter_context(_without_selection(self._model))
                hooks.callback(self._model.register_forward_hook(self._keep_returned, prepend=True).remove)
                for name, tap in self._taps.items():
                    if (handle := self._hook(name, tap)) is not None:
                        hooks.callback(handle.remove)
            except RuntimeError as error:
                raise MismatchError(
                    f"outputs cannot be taken of the {self._who}: {error}",
                    "return a torch.nn.Module that calls it and returns all outputs, as a dictionary",
                ) from None
            yield

    def _keep_returned(self, module: nn.Module, given: tuple[Any, ...], returned: Any) -> None:
        self.returned = returned

    def _hook(self, name: str, tap: Tap) -> RemovableHandle | None:
        """Register the hook of the module of an output; None if there is no module of this name."""
        source = name if tap.source is None else tap.source
        if source in self._modules:

            def keep_output(module: nn.Module, given: tuple[Any, ...], returned: Any) -> None:
                self._seen[name].append(_unshared(_first_tensor(returned), tap))

            module: nn.Module = self._modules[str(source)]
            return module.register_forward_hook(keep_output)
        if source == FEATURES and (last := self._last_linear()) is not None:

            def keep_input(module: nn.Module, given: tuple[Any, ...]) -> None:
                self._seen[name].append(_unshared(given[0], tap))

            return last.register_forward_pre_hook(keep_input)
        return None

    def _last_linear(self) -> nn.Linear | None:
        linear = [module for module in self._modules.values() if isinstance(module, nn.Linear)]
        return linear[-1] if linear else None

    def outputs(self) -> dict[str, Tensor]:
        """Return the outputs [B, D] of the last pass, or maps [B, C, h, w], by name, as the network computed them.

        Raises:
            MismatchError: if there is no such output, a module ran more than once, or an output has another shape.
        """
        return {name: self._output(name, tap) for name, tap in self._taps.items()}

    def _output(self, name: str, tap: Tap) -> Tensor:
        """Return one output of the last pass."""
        source = name if tap.source is None else tap.source
        found = find_part(self.returned, source)
        if found is None and self._runs_once and (source in self._modules or source == FEATURES):
            raise MismatchError(
                f"the output {name} is of a module ({source}) inside the network of a whole graph, which runs once for "
                "all nodes",
                f'let the network return it beside its logits, as {{"logits": ..., "{name}": ...}}',
            )
        if found is None and len(self._seen[name]) > 1:
            raise MismatchError(
                f"the module {source} of the {self._who} ran {len(self._seen[name])} times in one forward pass, so "
                f"which of its outputs is {name} is not known",
                "return the output from the network's forward in a dictionary, and name that part",
            )
        if found is None and self._seen[name]:
            found = self._seen[name][0]
        elif found is None and tap.source is None and self._is_the_one(tap):
            found = self.returned if isinstance(self.returned, Tensor) else None
        if isinstance(found, np.ndarray):
            found = torch.from_numpy(found)
        if not isinstance(found, Tensor):
            raise self._missing(name, source, found, tap.fix)
        return _shaped(found, tap, f"the output {name} of the {self._who}")

    def _is_the_one(self, tap: Tap) -> bool:
        """Return whether an output without a source is the tensor that the network returns."""
        is_map = tap.places == "grid" and not tap.of_one_number and isinstance(self.returned, Tensor)
        grids = [one for one in self._taps.values() if one.places == "grid" and one.source is None]
        return (self._whole and len(self._taps) == 1) or (is_map and self.returned.ndim == 4 and len(grids) == 1)

    def _missing(self, name: str, source: str | int, found: Any, fix: str | None) -> MismatchError:
        """Return the error for an output that is not there, or that is not a tensor."""
        if source in self._modules and not self._seen[name] and found is None:
            what = f"its module {source} did not run in the forward pass"
        elif found is not None or self._seen[name]:
            kept = found if found is not None else self._seen[name][0]
            what = f"{source} is a {type(kept).__name__}, not a tensor"
        else:
            names = [*listed_parts(self.returned), *self._modules]
            what = f"it has no part or module {source!r}{did_you_mean(str(source), map(str, names))}"
        returned = listed_parts(self.returned)
        parts = ", ".join(f"{part} {shape}" for part, shape in returned.items()) or "a tensor"
        top = ", ".join(dict.fromkeys(module.split(".")[0] for module in self._modules))
        section = "student" if self._who == "student" else "cache"
        of_head = "; that of the logits is head.classifier" if "head.classifier" in self._modules else ""
        return MismatchError(
            f"the {self._who} does not give the output {name}: {what}; it returns {parts}"
            + (f"; its modules are {top}" if top else ""),
            fix
            or f"set {section}.outputs.{name}.source to a part of what it returns, or to a module "
            f"(model.named_modules()){of_head}",
        )


def grid_of(patches: Sequence[int] | None) -> tuple[int, int] | None:
    """Return the height and width of a grid of tokens, as settings have them."""
    return None if patches is None else (patches[0], patches[1])


def check_taps(taps: Mapping[str, Tap], model: nn.Module, who: str) -> None:
    """Check that outputs can be taken of a network.

    Raises:
        UsageError: if it is an ensemble, whose members have outputs of their own.
    """
    if taps and hasattr(model, "members"):
        raise UsageError(
            f"the {who} is an ensemble, which has logits only: its members have outputs of their own",
            "dump one network, or pass a torch.nn.Module of your own that joins the members' outputs",
        )


@contextmanager
def _without_selection(model: nn.Module) -> Iterator[None]:
    """Let a network return everything, without the hook that selects its logits."""
    hooks = model._forward_hooks
    selecting = {key: hook for key, hook in hooks.items() if isinstance(hook, TakePart)}
    for key in selecting:
        del hooks[key]
    try:
        yield
    finally:
        hooks.update(selecting)


def _first_tensor(returned: Any) -> Any:
    """Return the tensor that a module returned, or the first of a tuple, as the layers of transformers return one."""
    if isinstance(returned, tuple | list) and returned:
        return returned[0]
    return getattr(returned, "last_hidden_state", returned)


def _unshared(value: Any, tap: Tap) -> Any:
    """Return an output of a module, pooled or copied: a layer that works in place, as many ReLUs do, may change it."""
    if not isinstance(value, Tensor):
        return value
    taken = _maps(value, tap) if tap.places == "grid" else _vectors(value, tap.pool)
    if taken is None:
        return value  # which is refused, with its shape
    return taken if tap.pool == "mean" and value.ndim > 2 else taken.clone()


def _vectors(values: Tensor, pool: str) -> Tensor | None:
    """Return an output as [B, D]; None if it has places and this pooling does not apply."""
    if values.ndim == 1:
        return values.unsqueeze(1)
    if values.ndim == 2:
        return values
    if values.ndim in (3, 4) and pool == "mean" and values.is_floating_point():
        return values.mean(dim=(2, 3) if values.ndim == 4 else 1)
    return values[:, 0] if values.ndim == 3 and pool == "first" else None


def _maps(values: Tensor, tap: Tap) -> Tensor | None:
    """Return an output as maps [B, C, h, w]; None if it is something else."""
    if values.ndim == 3 and tap.patches is not None and math.prod(tap.patches) <= values.shape[1]:
        tokens = values[:, -math.prod(tap.patches) :].transpose(1, 2)
        return tokens.reshape(len(values), -1, *tap.patches)
    if values.ndim == 3 and tap.of_one_number:
        return values.unsqueeze(1)
    return values if values.ndim == 4 and values.shape[1:].numel() else None


def _shaped(values: Tensor, tap: Tap, what: str) -> Tensor:
    """Return an output as [B, D], or maps [B, C, h, w].

    Raises:
        MismatchError: if it has places and no pooling, or another number of dimensions, or is not floating point.
    """
    shape, pool = list(values.shape), tap.pool
    if tap.of_one_number and values.dtype == torch.bool:
        values = values.float()
    if not values.is_floating_point():
        raise MismatchError(f"{what} is {values.dtype} {shape}", tap.fix or "take an output of floating point numbers")
    if tap.places == "grid":
        if (maps := _maps(values, tap)) is not None:
            return maps
        raise MismatchError(
            f"{what} is {shape}, and places is grid: a map per sample is [B, C, h, w]"
            + (f", or has the {tap.patches[0]} x {tap.patches[1]} tokens of `patches`" if tap.patches else ""),
            tap.fix
            or "take an output of this shape; for tokens [B, L, D] of a transformer set `patches` to the height and "
            "width of their grid, such as [14, 14]",
        )
    vectors = _vectors(values, pool)
    if vectors is not None:
        return vectors
    fix = {
        3: "set `pool` to mean, or to first for a class token",
        4: "set `pool` to mean, the mean over all pixels, or `places: grid` to keep a map",
    }
    raise MismatchError(
        f"{what} is {shape}, and pool is {pool}: a vector per sample is [B, D]",
        fix.get(values.ndim, "take an output [B, D], [B, L, D] or [B, D, H, W]"),
    )

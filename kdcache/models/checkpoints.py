"""Read and write checkpoints; nothing but tensors is unpickled, and keys that do not fit are named."""

from __future__ import annotations

import json
from collections import OrderedDict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save
from torch import Tensor, nn

from kdcache.errors import CorruptError, MismatchError, UsageError
from kdcache.models.checkpoint_files import SAVE, first_line, read_file
from kdcache.models.digest import plain_state
from kdcache.models.misfits import likely_cause
from kdcache.models.state_dicts import Match, State, match_keys, part_of, state_dicts_in
from kdcache.runtime.atomic_write import write_file
from kdcache.runtime.paths import expand
from kdcache.runtime.progress import Progress, Silent

_SHOWN = 3

FOLDER_FILES = ("model.safetensors", "pytorch_model.bin")
"""Files of weights that `save_pretrained` writes into a folder; a run of kdcache writes the first."""


def load_weights(model: nn.Module, path: str | Path, progress: Progress | None = None) -> None:
    """Load a checkpoint into a network.

    Keys may have the prefixes of wrappers (`module.` of DataParallel, `_orig_mod.` of torch.compile, `model.` of
    Lightning and others), and a file may hold other objects besides the state dict, as training scripts write them.

    Args:
        model: the network.
        path: a safetensors file, a torch file (read with `weights_only`), a file of torch.export, or a folder of
            `save_pretrained`; `PATH#PART` selects one of several state dicts in it, such as `last.pth#state_dict_ema`.
        progress: progress reporter; names the state dict that was loaded if there are several. Silent if None.

    Raises:
        UsageError: if the file does not exist, or does not have the part.
        CorruptError: if it cannot be read as tensors.
        MismatchError: if it does not fit the network; names the first keys that do not.
    """
    path, part = _split(path)
    states = _read_states(path)
    if part is not None:
        chosen = part_of(states, part)
        if not chosen:
            raise UsageError(
                f"the checkpoint {path} has no part {part!r}",
                f"it has {', '.join(name for name in states if name) or 'one state dict: leave the # out'}",
            )
        states = chosen
    expected = model.state_dict()
    matches = {name: match_keys(state, expected) for name, state in states.items()}
    fitting = [name for name in states if _fits(matches[name], states[name], expected)]
    name = fitting[0] if fitting else min(states, key=lambda name: matches[name].distance)
    match, state = matches[name], states[name]
    if not fitting:
        raise _misfit(path, name, state, match, expected)
    if match.is_ambiguous:
        prefixes = sorted(prefix.removesuffix(".") for prefix in (match.prefix, *match.alternatives))
        raise MismatchError(
            f"the checkpoint {path} holds several networks of this kind: {', '.join(prefixes)}",
            f"choose one: `weights: {path}#{prefixes[0]}`",
        )
    _fill(model, path, state, match, expected)
    for remark in _remarks(path, name, fitting[1:], match, part):
        (progress or Silent()).say(remark)


def _split(given: str | Path) -> tuple[Path, str | None]:
    """Return the path of a checkpoint and the part of it that is selected, as in `last.pth#state_dict_ema`."""
    path = given = expand(given)
    if path.exists() or "#" not in str(given):
        return path, None
    name, _, part = str(given).rpartition("#")
    return Path(name), part


def _fits(match: Match, state: State, expected: Mapping[str, Any]) -> bool:
    return match.fits and not _other_shapes(match, state, expected) and not _other_types(match, state, expected)


def _other_shapes(match: Match, state: State, expected: Mapping[str, Any]) -> dict[str, tuple[list[int], list[int]]]:
    """Return the shapes in the checkpoint and in the network of the tensors whose shapes differ."""
    shapes = {}
    for ours, theirs in match.keys.items():
        one, other = state[theirs], expected[ours]
        if isinstance(one, Tensor) and isinstance(other, Tensor) and one.shape != other.shape:
            shapes[ours] = list(one.shape), list(other.shape)
    return shapes


def _other_types(match: Match, state: State, expected: Mapping[str, Any]) -> dict[str, tuple[str, str]]:
    """Return the types of the tensors that cannot be copied: floating point in one place and integer in the other."""
    types = {}
    for ours, theirs in match.keys.items():
        one, other = (_kind(value) for value in (state[theirs], expected[ours]))
        if one != other:
            types[ours] = _type_name(state[theirs]), _type_name(expected[ours])
    return types


def _kind(value: object) -> str:
    if not isinstance(value, Tensor):
        return "object"
    if value.is_quantized:
        return "quantized"
    return "fractional" if value.is_floating_point() or value.is_complex() else "integer"


def _type_name(value: object) -> str:
    return str(value.dtype).removeprefix("torch.") if isinstance(value, Tensor) else f"a {type(value).__name__}"


def _misfit(path: Path, name: str, state: State, match: Match, expected: Mapping[str, Any]) -> MismatchError:
    """Return the error of a checkpoint that does not fit, with the keys, shapes and types that differ."""
    shapes, types = _other_shapes(match, state, expected), _other_types(match, state, expected)
    problems = [
        *some("missing", match.missing),
        *some("unexpected", match.unexpected),
        *some(
            "of another shape",
            [f"{key} {theirs}, the network has {ours}" for key, (theirs, ours) in shapes.items()],
        ),
        *some("of another type", [f"{key} {theirs}, the network has {ours}" for key, (theirs, ours) in types.items()]),
    ]
    where = f" (its part {name})" if name else ""
    return MismatchError(
        "\n  ".join([f"the checkpoint {path}{where} does not fit the network:", *problems]),
        likely_cause(match, shapes, state, expected),
    )


def some(what: str, keys: list[str]) -> list[str]:
    """Return a line with the first of some keys, after what they are; an empty list without keys."""
    if not keys:
        return []
    more = f" and {len(keys) - _SHOWN} more" if len(keys) > _SHOWN else ""
    return [f"{what}: {'; '.join(keys[:_SHOWN])}{more}"]


def _fill(model: nn.Module, path: Path, state: State, match: Match, expected: Mapping[str, Any]) -> None:
    """Copy a state dict that fits into the network; counters of batches that it lacks do not change."""
    whole: OrderedDict[str, Any] = OrderedDict(
        (key, state[match.keys[key]] if key in match.keys else value) for key, value in expected.items()
    )
    # Modules read the version of their keys from it: those of quantization have changed them.
    if (metadata := getattr(state, "_metadata", None)) is not None and all(a == b for a, b in match.keys.items()):
        whole._metadata = metadata  # type: ignore[attr-defined]  # as torch stores it
    try:
        model.load_state_dict(whole)
    except Exception as error:  # modules with their own way to load their state raise errors of many types
        raise MismatchError(
            f"the checkpoint {path} cannot be loaded into the network: {first_line(error)}",
            "set `model:` and `args:` to those that the checkpoint was made with",
        ) from error


def _remarks(path: Path, name: str, others: list[str], match: Match, part: str | None) -> list[str]:
    """Return notes on the weights that were selected among several, and on those that were not loaded."""
    remarks = []
    if others and part is None:
        choices = " or ".join(f"`weights: {path}#{other}`" for other in others if other)
        remarks.append(f"note: the weights are {name or 'the top level'} of {path}; select another part with {choices}")
    if match.alternatives:
        prefix, other = (p.removesuffix(".") or "those without a prefix" for p in (match.prefix, match.alternatives[0]))
        remarks.append(f"note: the weights are {prefix} of {path}, which also has {other} (`weights: {path}#{other}`)")
    if match.renamed:
        ours, theirs = next(iter(match.renamed.items()))
        remarks.append(f"note: {ours} is {theirs} of {path}")
    if match.ignored:
        remarks.append(
            f"note: not part of the network, and not loaded from {path}: {'; '.join(_shortened(match.ignored))}"
        )
    return remarks


def _shortened(keys: list[str]) -> list[str]:
    return [*keys[:_SHOWN], *([f"and {len(keys) - _SHOWN} more"] if len(keys) > _SHOWN else [])]


def read_state(path: Path) -> Mapping[str, Tensor]:
    """Return the tensors of a checkpoint by name, of the preferred state dict in it; nothing else is unpickled.

    Raises:
        UsageError: if the file does not exist.
        CorruptError: if it cannot be read as tensors.
    """
    return next(iter(_read_states(path).values()))


def _read_states(path: Path) -> dict[str, State]:
    """Return the state dicts of a file or folder by their paths in it, preferred first.

    Raises:
        UsageError: if it does not exist, or is a TorchScript archive.
        CorruptError: if it cannot be read as tensors.
    """
    if path.is_dir():
        return {"": _read_folder(path)}
    states = state_dicts_in(read_file(path))
    if not states:
        raise CorruptError(f"the checkpoint {path} holds no state dict of tensors", SAVE)
    return states


def _read_folder(folder: Path) -> State:
    """Return the tensors of a folder that `save_pretrained` has written, in one file or in several shards."""
    for name in FOLDER_FILES:
        if (folder / name).is_file():
            return dict(next(iter(_read_states(folder / name).values())))
        index = folder / f"{name}.index.json"
        if not index.is_file():
            continue
        try:
            files = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
            outside = [file for file in files if Path(file).name != file]
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise CorruptError(f"cannot read {index}: {first_line(error)}", "get the folder again") from error
        lacking = [file for file in files if not (folder / file).is_file()]
        if outside or lacking or not files:
            raise CorruptError(
                f"{index} names {', '.join((outside or lacking)[:_SHOWN]) or 'no file'}, which "
                f"{'is not in the folder' if lacking else 'is not the name of a file in the folder'}",
                "get the folder again, with all its shards",
            )
        state: dict[str, Any] = {}
        for file in files:
            state.update(next(iter(_read_states(folder / file).values())))
        return state
    raise UsageError(
        f"checkpoint not found: {folder}; the folder has no {' and no '.join(FOLDER_FILES)}",
        "train one (`kdcache train-teacher`), or set `weights:` to the file of the weights",
    )


def save_weights(model: nn.Module, path: Path) -> None:
    """Write a network's parameters and buffers as safetensors, atomically.

    Raises:
        MismatchError: if the network has values that safetensors cannot hold; see `check_savable`.
    """
    check_savable(model, "network")
    state = {key: value.detach().cpu().clone().contiguous() for key, value in plain_state(model).items()}
    # Written by Python, so that a full disk is the OSError that it is everywhere else.
    write_file(path, save(state))


def check_savable(model: nn.Module, who: str) -> None:
    """Check that a network's state can be written as safetensors: dense tensors only.

    Raises:
        MismatchError: with the first value that is not a dense tensor.
    """
    for key, value in plain_state(model).items():
        if not isinstance(value, Tensor):
            kind = f"a {type(value).__name__}"
        elif value.is_quantized or value.layout != torch.strided:
            kind = f"a tensor that is {'quantized' if value.is_quantized else 'sparse'}"
        else:
            continue
        raise MismatchError(
            f"the {who}'s state has {key}, {kind}, which model.safetensors cannot hold",
            "store it as a dense tensor (register_buffer), or not in the state of the network (persistent=False)",
        )

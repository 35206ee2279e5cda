"""Read and write checkpoints; nothing but tensors is unpickled, and keys that do not fit are named."""

from __future__ import annotations

import hashlib
import pickle
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save
from torch import Tensor, nn

from kdcache.errors import CorruptError, MismatchError, UsageError
from kdcache.runtime.atomic_write import write_file

_WRAPPERS = ("state_dict", "model", "model_state_dict")
_PARALLEL = "module."
_SHOWN = 3


def load_weights(model: nn.Module, path: Path) -> None:
    """Load a checkpoint into a network: safetensors, or a torch file read with `weights_only`.

    Keys may carry the `module.` of DataParallel, and a torch file may hold its state under `state_dict` or `model`.

    Raises:
        UsageError: if the file does not exist.
        CorruptError: if it cannot be read as tensors.
        MismatchError: if it does not fit the network; names the first keys that do not.
    """
    if not path.is_file():
        raise UsageError(
            f"checkpoint not found: {path}", "train one (`kdcache train-teacher`), or set `weights:` to its path"
        )
    expected = model.state_dict()
    state = read_state(path)
    if not any(key.startswith(_PARALLEL) for key in expected):
        state = {key.removeprefix(_PARALLEL): value for key, value in state.items()}
    problems = [
        *_some("missing", [k for k in expected if k not in state]),
        *_some("unexpected", [k for k in state if k not in expected]),
        *_some(
            "of another shape",
            [
                f"{k} {list(state[k].shape)}, the network has {list(expected[k].shape)}"
                for k in expected
                if k in state and state[k].shape != expected[k].shape
            ],
        ),
    ]
    if problems:
        raise MismatchError(
            "\n  ".join([f"the checkpoint {path} does not fit the network:", *problems]),
            "set `model:` and `args:` to what the checkpoint was made with, and check the number of classes",
        )
    model.load_state_dict(state)


def _some(what: str, keys: list[str]) -> list[str]:
    if not keys:
        return []
    more = f" and {len(keys) - _SHOWN} more" if len(keys) > _SHOWN else ""
    return [f"{what}: {'; '.join(keys[:_SHOWN])}{more}"]


def read_state(path: Path) -> Mapping[str, Tensor]:
    """Return the tensors of a checkpoint by name; nothing else in it is unpickled.

    Raises:
        CorruptError: if it cannot be read as tensors.
    """
    fix = "give a safetensors file, or one written with torch.save(model.state_dict(), path)"
    held: Any
    try:
        held = load_file(path) if path.suffix == ".safetensors" else torch.load(path, "cpu", weights_only=True)
    except Exception as error:  # torch raises errors of many types for a damaged file
        raise CorruptError(f"cannot read the checkpoint {path}: {_why(error)}", fix) from error
    for wrapper in _WRAPPERS:
        if isinstance(held, Mapping) and isinstance(held.get(wrapper), Mapping):
            held = held[wrapper]
    tensors = isinstance(held, Mapping) and all(isinstance(k, str) and isinstance(v, Tensor) for k, v in held.items())
    if not tensors:
        raise CorruptError(f"the checkpoint {path} holds no state dict of tensors", fix)
    return held  # type: ignore[no-any-return]  # looked at just above


def _why(error: Exception) -> str:
    if isinstance(error, pickle.UnpicklingError):
        # torch's own message advises to unpickle everything.
        code = re.search(r"GLOBAL (\S+)", str(error))
        return f"it holds more than tensors ({code[1]}), which is not loaded" if code else "it is damaged"
    return " ".join([f"{type(error).__name__}:", *str(error).splitlines()[:1]])


def save_weights(model: nn.Module, path: Path) -> None:
    """Write a network's parameters and buffers as safetensors, atomically."""
    state = {key: value.detach().cpu().clone().contiguous() for key, value in model.state_dict().items()}
    # Written by Python, so that a full disk is the OSError that it is everywhere else.
    write_file(path, save(state))


def weights_digest(model: nn.Module) -> str:
    """Return the sha256 over names, types, shapes and bytes of a network's parameters and buffers.

    They are sorted by name, so that the digest depends on the weights only, not on their file.
    """
    sha = hashlib.sha256()
    for key, value in sorted(model.state_dict().items()):
        data = value.detach().cpu().contiguous()
        sha.update(f"{key}\0{data.dtype}\0{list(data.shape)}\0".encode())
        sha.update(data.flatten().view(torch.uint8).numpy().tobytes() if data.numel() else b"")
    return f"sha256:{sha.hexdigest()}"

"""Read the file of a checkpoint: safetensors, torch or torch.export, by its content, whatever its name ends with.

Nothing but tensors is unpickled, and a file that is something else is named by what it is.
"""

from __future__ import annotations

import pickle
import re
import zipfile
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load, load_file

from kdcache.errors import CorruptError, KdcacheError, UsageError
from kdcache.models.exported import is_exported, is_torchscript, members_of, read_exported
from kdcache.models.safe_globals import safe_globals

SAVE = "give a safetensors file, or one written with torch.save(model.state_dict(), path)"
_AGAIN = "copy or download it again"

_ZIP = b"PK\x03\x04"
_PICKLE = b"\x80"
_SHOWN = 12
"""Number of bytes or characters that an error shows of a file that is not a checkpoint."""

_KINDS = {
    b"version https://git-lfs": ("a pointer of Git LFS, not the file itself", "get the file with `git lfs pull`"),
    b"<!doctype html": ("a web page, perhaps the message of a failed download", "download it again"),
    b"<html": ("a web page, perhaps the message of a failed download", "download it again"),
    b"\x1f\x8b": ("compressed with gzip", "unpack it first"),
    b"\xfd7zxz": ("compressed with xz", "unpack it first"),
    b"\x89hdf": ("an HDF5 file, as Keras writes them", f"convert the weights to torch: {SAVE}"),
    b"\x93numpy": ("an array of NumPy", f"convert the weights to torch: {SAVE}"),
}
"""First bytes of files in lower case, what such a file is, and the fix."""


def read_file(path: Path) -> Any:
    """Return the content of a file: tensors by name, perhaps inside other containers.

    Raises:
        UsageError: if it does not exist, or is a TorchScript archive.
        CorruptError: if it cannot be read as tensors.
    """
    if not path.is_file():
        raise UsageError(
            f"checkpoint not found: {path}", "train one (`kdcache train-teacher`), or set `weights:` to its path"
        )
    try:
        with path.open("rb") as opened:
            start = opened.read(64)
        if _is_safetensors(start):
            # The library refuses to open a path that is not UTF-8.
            return load_file(path) if str(path).isprintable() else load(path.read_bytes())
        _refuse_others(path, start)
        members = members_of(path)
        if is_torchscript(members):
            raise _torchscript(path)
        if is_exported(members):
            return read_exported(path, _load)
        with path.open("rb") as opened:  # of a path torch looks at the suffix
            return _load(opened)
    except KdcacheError:
        raise
    except Exception as error:  # torch raises errors of many types for a damaged file
        raise CorruptError(f"cannot read the checkpoint {path}: {_why(error)}", _fix(error)) from error


def _load(file: Any) -> Any:
    with safe_globals():
        return torch.load(file, "cpu", weights_only=True)


def _is_safetensors(start: bytes) -> bool:
    """Whether a file begins with the length of a JSON header and its first brace."""
    return len(start) > 8 and start[8:9] == b"{" and int.from_bytes(start[:8], "little") < 1 << 32


def _refuse_others(path: Path, start: bytes) -> None:
    """Check that a file begins as torch's do.

    Raises:
        CorruptError: with what it is, or how it begins.
    """
    if not start:
        raise CorruptError(f"cannot read the checkpoint {path}: it is an empty file", _AGAIN)
    for begins, (what, fix) in _KINDS.items():
        if start.lower().startswith(begins):
            raise CorruptError(f"cannot read the checkpoint {path}: it is {what}", fix)
    if start.startswith(_ZIP):
        if not zipfile.is_zipfile(path):
            raise CorruptError(
                f"cannot read the checkpoint {path}: it begins as a torch file, and its end is missing", _AGAIN
            )
        members = members_of(path)
        if not is_exported(members) and not any(name.endswith("data.pkl") for name in members):
            raise CorruptError(
                f"cannot read the checkpoint {path}: it is a zip archive of {', '.join(members[:3]) or 'nothing'}", SAVE
            )
    elif not start.startswith(_PICKLE):
        text = start[:_SHOWN].decode("ascii", "replace")
        shown = f"the text {text!r}" if text.isascii() and text.isprintable() else f"the bytes {start[:8].hex(' ')}"
        raise CorruptError(f"cannot read the checkpoint {path}: it is not a checkpoint, and begins with {shown}", SAVE)


def _torchscript(path: Path) -> UsageError:
    return UsageError(
        f"the checkpoint {path} is a TorchScript archive, which holds code: it is not loaded as weights",
        "if you trust it, write its weights: torch.save(torch.jit.load(path, 'cpu').state_dict(), 'weights.pt'); or "
        "use the archive as a teacher: `model: file.py:function`, which returns torch.jit.load(path, 'cpu')",
    )


def _code(error: Exception) -> str | None:
    """Return the name of the object that a checkpoint holds besides tensors, from torch's error."""
    found = re.search(r"GLOBAL (\S+)", str(error)) if isinstance(error, pickle.UnpicklingError) else None
    return found[1] if found else None


def _why(error: Exception) -> str:
    if isinstance(error, pickle.UnpicklingError):
        # torch's own message advises to unpickle everything.
        return f"it holds more than tensors ({_code(error)}), which is not loaded" if _code(error) else "it is damaged"
    return f"{type(error).__name__}: {first_line(error)}"


def _fix(error: Exception) -> str:
    if _code(error) is None:
        return SAVE
    return f"{SAVE}: if you trust it, load it where it was made, and write its state dict only"


def first_line(error: BaseException) -> str:
    """Return the first line of an error's message."""
    return " ".join(str(error).splitlines()[:1])

"""Read weights from files of torch.export (.pt2) as plain bytes: no program is loaded."""

from __future__ import annotations

import io
import json
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

_CONFIG = "data/weights/model_weights_config.json"

_SINGLE_FILE = ("serialized_state_dict.pt", "serialized_state_dict.json")
"""Members with all weights in files of torch before 2.9, in the format of `torch.save`."""

_DTYPES = {
    1: torch.uint8, 2: torch.int8, 3: torch.int16, 4: torch.int32, 5: torch.int64, 6: torch.float16, 7: torch.float32,
    8: torch.float64, 9: torch.complex32, 10: torch.complex64, 11: torch.complex128, 12: torch.bool,
    13: torch.bfloat16, 28: torch.uint16,
}  # fmt: skip
"""torch's types by their numbers in the file (`ScalarType` of torch/_export/serde/schema.py)."""


def members_of(path: Path) -> list[str]:
    """Return the names of the files in a zip archive; an empty list if it is not one."""
    if not zipfile.is_zipfile(path):
        return []
    with zipfile.ZipFile(path) as archive:
        return archive.namelist()


def is_exported(members: list[str]) -> bool:
    """Return whether an archive with these members was written by `torch.export.save`."""
    return any(name.endswith((_CONFIG, *_SINGLE_FILE)) for name in members)


def is_torchscript(members: list[str]) -> bool:
    """Return whether an archive with these members was written by `torch.jit.save`."""
    return any(name.endswith("constants.pkl") for name in members) and any("/code/" in name for name in members)


def read_exported(path: Path, load: Callable[[Any], Any]) -> Any:
    """Return the state dict of an exported program.

    Args:
        path: the file.
        load: reads a file of `torch.save`, tensors only.

    Raises:
        Exception: of any type, for a file that is damaged or has pickled weights.
    """
    with zipfile.ZipFile(path) as archive:
        names = archive.namelist()
        single = next((name for name in names if name.endswith(_SINGLE_FILE)), None)
        if single is not None:
            return load(io.BytesIO(archive.read(single)))
        config_name = next(name for name in names if name.endswith(_CONFIG))
        folder = config_name.removesuffix("model_weights_config.json")
        config = json.loads(archive.read(config_name))["config"]
        return {key: _tensor(archive, folder, key, entry) for key, entry in config.items()}


def _tensor(archive: zipfile.ZipFile, folder: str, key: str, entry: dict[str, Any]) -> Tensor:
    """Return one tensor of the archive; torch checks its sizes and strides against the stored bytes."""
    meta = entry["tensor_meta"]
    if entry["use_pickle"] or meta is None:
        raise ValueError(f"{key} is not stored as a plain tensor")
    dtype = _DTYPES.get(meta["dtype"])
    if dtype is None:
        raise ValueError(f"{key} has an unknown type (number {meta['dtype']})")
    sizes, strides = ([int(side["as_int"]) for side in meta[name]] for name in ("sizes", "strides"))
    stored = bytearray(archive.read(folder + entry["path_name"]))
    flat = torch.frombuffer(stored, dtype=dtype) if stored else torch.empty(0, dtype=dtype)
    return flat.as_strided(sizes, strides, int(meta["storage_offset"]["as_int"])).clone()

"""Content keys stored on this machine, so that a large data set is read only once to compute them."""

from __future__ import annotations

import hashlib
import os
from contextlib import suppress
from pathlib import Path

import numpy as np
import numpy.typing as npt

from kdcache.runtime.atomic_write import SUFFIX, open_atomic
from kdcache.runtime.resources import home


def _path(stamp: str) -> Path:
    return home() / "keys" / stamp


def load_keys(stamp: str, count: int) -> npt.NDArray[np.uint64] | None:
    """Return the keys [N] uint64 that were stored under a stamp; None if they are missing or damaged."""
    try:
        data = _path(stamp).read_bytes()
    except OSError:
        return None
    body, digest = data[: 8 * count], data[8 * count :]
    return np.frombuffer(body, "<u8").astype(np.uint64) if hashlib.sha256(body).digest() == digest else None


def save_keys(stamp: str, keys: npt.NDArray[np.uint64]) -> None:
    """Store keys [N] uint64 under a stamp, with a digest; do nothing if the folder is not writable."""
    path, body = _path(stamp), keys.astype("<u8").tobytes()
    with suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        with open_atomic(path, suffix=f".{os.getpid()}{SUFFIX}") as file:
            file.write(body + hashlib.sha256(body).digest())

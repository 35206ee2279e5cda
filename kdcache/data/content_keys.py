"""Content keys, kept on this machine once they were computed: a large data set need not be read again for them."""

from __future__ import annotations

import hashlib
import os
from contextlib import suppress
from pathlib import Path

import numpy as np
import numpy.typing as npt

from kdcache.runtime.atomic_write import SUFFIX, open_atomic
from kdcache.runtime.resources import home


def _place(stamp: str) -> Path:
    return home() / "keys" / stamp


def kept_keys(stamp: str, count: int) -> npt.NDArray[np.uint64] | None:
    """The keys [N] uint64 that were kept under a stamp; None where there are none, or they are damaged."""
    try:
        data = _place(stamp).read_bytes()
    except OSError:
        return None
    body, digest = data[: 8 * count], data[8 * count :]
    return np.frombuffer(body, "<u8").astype(np.uint64) if hashlib.sha256(body).digest() == digest else None


def keep_keys(stamp: str, keys: npt.NDArray[np.uint64]) -> None:
    """Keep keys [N] uint64 under a stamp, with a digest behind them; a folder that cannot be written to keeps none."""
    path, body = _place(stamp), keys.astype("<u8").tobytes()
    with suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        with open_atomic(path, suffix=f".{os.getpid()}{SUFFIX}") as file:
            file.write(body + hashlib.sha256(body).digest())

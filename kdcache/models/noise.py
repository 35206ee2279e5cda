"""Noise on the logits of a teacher, as they leave the network, drawn from a secret key.

The noise of a row is a function of the key, of what the logits themselves are a function of (teacher, transform, seed,
image, view), and of the strength. So it is the same in every batch, process and order, and whenever a row is made
again; and rows that differ in anything have independent noise. Both matter: what could be drawn anew for the same
logits could be averaged away, and the same noise on two different rows could be subtracted.
"""

from __future__ import annotations

import hashlib
import json
import math
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

Purpose = Literal["rows", "probes"]

_WORD = 8
"""Bytes per random number."""


def key_of_noise(secret: bytes, context: dict[str, Any]) -> bytes:
    """Return the key of the noise of one teacher with one strength, 32 bytes.

    With one secret for two strengths, or for two teachers, the noise would otherwise be the same up to a factor, and
    two caches would be enough to take it away.

    Args:
        secret: random bytes.
        context: what all rows have in common, as JSON has it.
    """
    described = json.dumps(context, sort_keys=True, separators=(",", ":"), allow_nan=False).encode()
    hashed = hashlib.blake2b(digest_size=32, key=hashlib.blake2b(secret).digest(), person=b"kdcache noise")
    hashed.update(described)
    return hashed.digest()


def standard_normals(key: bytes, rows: list[bytes], count: int) -> Tensor:
    """Return independent standard normal numbers [len(rows), count] float64, each row a function of (key, its name).

    SHAKE-256 makes the uniform numbers, because a generator of simulations can be run backwards, and has few seeds:
    torch's on the CPU 2^32. They are odd multiples of 2^-53 between 0 and 1, and the inverse of the distribution makes
    them normal.

    Args:
        key: 32 bytes.
        rows: a name per row, all of one length.
        count: numbers per row.
    """
    stream = b"".join(hashlib.shake_256(key + row).digest(count * _WORD) for row in rows)
    words = np.frombuffer(stream, "<u8").reshape(len(rows), count) >> np.uint64(12)
    # 2 u - 1, which float64 represents exactly, and which is never -1 or 1.
    return math.sqrt(2) * torch.erfinv(torch.from_numpy((2 * words + 1) * 2.0**-52 - 1))


@dataclass(frozen=True)
class Noise:
    """Noise on the logits of the samples of a data set.

    The logits u [C] of a sample with privacy w become u / (1 + w (temperature - 1)) + sigma w z, with z standard
    normal.

    Attributes:
        key: 32 bytes, from `key_of_noise`.
        sigma: standard deviation, in nats, where w is 1.
        temperature: by which logits are divided where w is 1.
        content: [N] uint64, content keys of the samples.
        weights: [N] float64, w; None if all are 1.
        by_id: whether the images of a view depend on the ids of samples, and not on their content alone.
        purpose: "probes" have noise of their own: a single row is taken for logits where it may be probabilities.
    """

    key: bytes
    sigma: float
    temperature: float
    content: npt.NDArray[np.uint64]
    weights: npt.NDArray[np.float64] | None
    by_id: bool
    purpose: Purpose = "rows"

    def __call__(self, logits: Tensor, ids: Tensor, view: int) -> Tensor:
        """Return logits [B, C] float32 with noise, on their device; those of samples with w = 0 are unchanged.

        Args:
            logits: [B, C] float32.
            ids: [B] int64, ids of the samples, on the CPU.
            view: index of the view.
        """
        samples = ids.cpu().numpy()
        weights = np.ones(len(samples)) if self.weights is None else self.weights[samples]
        normals = standard_normals(self.key, [self._name(sample, view) for sample in samples.tolist()], logits.shape[1])
        scale = torch.from_numpy(weights)[:, None]
        divisors, added = 1 + scale * (self.temperature - 1), self.sigma * scale * normals
        return logits / _on(logits.device, divisors) + _on(logits.device, added)

    def _name(self, sample: int, view: int) -> bytes:
        numbers = (int(self.content[sample]), view, sample if self.by_id else 0)
        return self.purpose.encode() + b"".join(number.to_bytes(8, "little") for number in numbers)


def _on(device: torch.device, values: Tensor) -> Tensor:
    """Return values as float32 on a device, without waiting for what a GPU is computing."""
    values = values.float()
    return (values.pin_memory() if device.type == "cuda" else values).to(device, non_blocking=True)

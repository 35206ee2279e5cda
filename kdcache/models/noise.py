"""Noise on the logits of a teacher, as they leave the network, drawn from a secret key.

The noise of a row is a function of the key, of what the logits themselves are a function of (teacher, transform, seed,
image, view), and of the strength. So it is the same in every batch, process and order, and whenever a row is made
again; and rows that differ in anything have independent noise. Both matter: what could be drawn anew for the same
logits could be averaged away, and the same noise on two different rows could be subtracted.
"""

from __future__ import annotations

import hashlib
import json
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


def standard_normals(key: bytes, rows: list[bytes], count: int) -> npt.NDArray[np.float64]:
    """Return independent standard normal numbers [len(rows), count], each row a function of (key, its name) alone.

    SHAKE-256 makes the uniform numbers, because a generator of simulations can be run backwards, and has few seeds:
    torch's on the CPU 2^32. The method is that of Box & Muller 1958.

    Args:
        key: 32 bytes.
        rows: a name per row, all of one length.
        count: numbers per row.
    """
    pairs = -(-count // 2)
    stream = b"".join(hashlib.shake_256(key + row).digest(2 * pairs * _WORD) for row in rows)
    words = np.frombuffer(stream, "<u8").reshape(len(rows), 2, pairs)
    uniform = ((words >> np.uint64(11)).astype(np.float64) + 0.5) * 2.0**-53  # 53 bits, never 0
    radius = np.sqrt(-2 * np.log(uniform[:, 0]))
    angle = 2 * np.pi * uniform[:, 1]
    return np.concatenate([radius * np.cos(angle), radius * np.sin(angle)], axis=1)[:, :count]


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
        divisors = torch.from_numpy(1 + weights[:, None] * (self.temperature - 1))
        added = torch.from_numpy(self.sigma * weights[:, None] * normals)
        return logits / divisors.float().to(logits.device) + added.float().to(logits.device)

    def _name(self, sample: int, view: int) -> bytes:
        numbers = (int(self.content[sample]), view, sample if self.by_id else 0)
        return self.purpose.encode() + b"".join(number.to_bytes(8, "little") for number in numbers)

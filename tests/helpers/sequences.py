"""Sequences of tokens, and the logits of a teacher of them, for caches of tests."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from kdcache import Cache
from kdcache.cache.format.token_codec import mass_columns
from kdcache.cache.format.token_encoding import TokenEncoding
from kdcache.cache.format.token_rows import TokenRows
from kdcache.cache.token_spec import TokenCacheSpec
from kdcache.curate.token_cache import write_token_cache

Array = npt.NDArray[Any]


class Text(NamedTuple):
    """Sequences, the logits at all of their positions, and which positions are taught."""

    sequences: list[Array]
    logits: list[Tensor]
    taught: list[Array]
    vocabulary: list[bytes]

    def of_rows(self, index: int) -> Tensor:
        """Return the logits at the taught positions of a sequence, [n, V] float64."""
        return self.logits[index][torch.from_numpy(self.taught[index])].double()


def some_text(lengths: tuple[int, ...] = (5, 40, 9, 33, 2, 17, 80, 12, 60), size: int = 300, seed: int = 0) -> Text:
    """Return random sequences, whose logits lie near a subspace of six dimensions; most positions are taught."""
    generator = torch.Generator().manual_seed(seed)
    head = torch.randn(size, 6, generator=generator) * 1.5
    sequences = [torch.randint(0, size, (length,), generator=generator).numpy() for length in lengths]
    logits = [
        torch.randn(length, 6, generator=generator) @ head.T + 0.3 * torch.randn(length, size, generator=generator)
        for length in lengths
    ]
    taught = [np.arange(length) % 5 != 3 for length in lengths]
    for mask in taught:
        mask[-1] = False
    return Text(sequences, logits, taught, [f"<{token}>".encode() * (token % 3) for token in range(size)])


def write(text: Text, out: Path, **settings: Any) -> Cache:
    """Write a cache of a text with three shards, as a ghost of four tokens unless told otherwise."""
    spec = TokenCacheSpec(**{"top_k": 4, "rank": 6, "pilot_rows": 100, "shard_sequences": 4, **settings})
    return write_token_cache(
        text.sequences, text.logits, out, vocabulary=text.vocabulary, taught=text.taught, special={"eos": 1}, spec=spec
    )


def tail_log_mass_at(rows: TokenRows, encoding: TokenEncoding, temperature: float) -> Tensor:
    """Return the log of the mass outside the head at any T >= 1, [n] float64: section 12.4 of docs/FORMAT.md.

    log of the sum of exp(beta a) over the tail is convex and smooth in beta = 1 / T. It is known at the stored
    temperatures, relative to the head, and is log(V - k) at beta = 0: the polynomial through these points gives the
    mass within 0.003 (docs/FORMAT.md, section 12.4).
    """
    head, statistics = rows.part("log_probs").double(), rows.part("statistics").double()
    betas, points = [0.0], [torch.full_like(head[:, 0], math.log(encoding.num_classes - encoding.top_k))]
    for t, name in mass_columns(encoding).items():
        mass = statistics[:, encoding.statistics.index(name)].clamp_max(-(2.0**-24))
        betas.append(1 / t)
        points.append((head / t).logsumexp(dim=1) + mass - torch.log(-torch.expm1(mass)))
    beta, tail = 1 / temperature, torch.zeros_like(points[0])
    for i, point in enumerate(points):  # Lagrange's form: at a stored temperature exactly what is stored
        tail += point * math.prod((beta - other) / (betas[i] - other) for other in betas if other != betas[i])
    return tail - torch.logaddexp(tail, (head / temperature).logsumexp(dim=1))

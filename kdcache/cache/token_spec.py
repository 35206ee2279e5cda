"""How the rows of a cache of sequences are to be stored."""

from __future__ import annotations

from dataclasses import dataclass
from typing import get_args

from kdcache.cache.format.token_encoding import MOST_DRAWS, TokenEncoding, TokenTail
from kdcache.errors import UsageError


@dataclass(frozen=True)
class TokenCacheSpec:
    """How rows of tokens are stored.

    Attributes:
        top_k: k, tokens per row that are stored individually.
        tail: "lowrank", "ghost" for the mass alone, or "draws", which replace the head too.
        rank: R, coordinates of a `lowrank` tail.
        step: their quantization step in nats.
        draws: tokens that are drawn per row, at most 255, for `draws`.
        temperature: that they are drawn at; a student can be taught at this one only.
        dtype: of the log-probabilities, float16 or float32.
        pilot_rows: rows that the basis is fitted to.
        shard_sequences: sequences per shard; None to choose them by bytes.
        license: of the cache.
        notes: anything.
    """

    top_k: int = 16
    tail: TokenTail = "ghost"
    rank: int = 32
    step: float = 0.4
    draws: int = 50
    temperature: float = 1.0
    dtype: str = "float16"
    pilot_rows: int = 1024
    shard_sequences: int | None = None
    license: str = ""
    notes: str = ""


def encoding_of(spec: TokenCacheSpec, size: int, level_known: bool, temperatures: tuple[float, ...]) -> TokenEncoding:
    """Return the encoding of rows.

    Args:
        spec: how they are stored.
        size: V.
        level_known: whether the level of the logits is known.
        temperatures: at which the distributions are known.

    Raises:
        UsageError: if it is impossible for a vocabulary of this size.
    """
    if spec.tail not in get_args(TokenTail):
        raise UsageError(f"unknown tail {spec.tail!r}", f"use one of {', '.join(get_args(TokenTail))}")
    if spec.shard_sequences is not None and spec.shard_sequences < 1:
        raise UsageError(f"shard_sequences is {spec.shard_sequences}", "use 1 or more, or None to choose it")
    if spec.tail == "draws":
        return _encoding_of_draws(spec, size, temperatures)
    rank = spec.rank if spec.tail == "lowrank" else 0
    if not 0 < spec.top_k < size or rank > size or (spec.tail == "lowrank" and rank < 1) or spec.step <= 0:
        raise UsageError(
            f"top_k {spec.top_k}, rank {spec.rank}, step {spec.step} are impossible for {size:,} tokens",
            "use a top_k and a rank from 1 to fewer than these, and a step above 0",
        )
    if spec.dtype not in ("float16", "float32"):
        raise UsageError(f"log-probabilities cannot be {spec.dtype}", "use float16 or float32")
    return TokenEncoding.model_validate(
        {
            "num_classes": size,
            "top_k": spec.top_k,
            "tail": spec.tail,
            "rank": rank,
            "dtype": spec.dtype,
            "level": level_known,
            "temperatures": temperatures,
        }
    )


def _encoding_of_draws(spec: TokenCacheSpec, size: int, temperatures: tuple[float, ...]) -> TokenEncoding:
    """Return the encoding of rows of draws; raises UsageError if it is impossible."""
    if not 0 < spec.draws <= MOST_DRAWS or spec.temperature <= 0:
        raise UsageError(
            f"{spec.draws} draws at T = {spec.temperature}", f"use 1 to {MOST_DRAWS} draws, at a temperature above 0"
        )
    if len(temperatures) == 1 and spec.temperature not in temperatures:
        raise UsageError(
            f"draws at T = {spec.temperature} of distributions that are known at T = {temperatures[0]:g} only",
            "draw at that temperature",
        )
    return TokenEncoding(
        num_classes=size,
        top_k=0,
        tail="draws",
        draws=spec.draws,
        dtype="float16",
        level=False,
        temperatures=(float(spec.temperature),),
    )

"""Write a cache of sequences from arrays of logits, or from a function that returns them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from kdcache.cache.reader import Cache
from kdcache.cache.token_spec import TokenCacheSpec
from kdcache.curate.sequence_cache import Array, Origin, cache_of_sequences
from kdcache.errors import MismatchError
from kdcache.runtime.progress import Progress
from kdcache.runtime.terminal import reporter


class _Arrays:
    """Sequences and logits that are in memory, or returned by a function."""

    def __init__(
        self,
        sequences: Sequence[Any],
        logits: Sequence[Any] | Callable[[int], Any],
        taught: Sequence[Any] | None,
    ) -> None:
        self._sequences, self._logits, self._taught = sequences, logits, taught

    def __len__(self) -> int:
        return len(self._sequences)

    def tokens(self, index: int) -> tuple[Array, Array]:
        """Return the tokens of a sequence, and which of its positions are taught."""
        ids = np.asarray(self._sequences[index])
        if self._taught is not None:
            return ids, np.asarray(self._taught[index], bool)
        return ids, np.arange(len(ids)) < len(ids) - 1

    def logits(self, index: int) -> Tensor:
        """Return the logits at the taught positions of a sequence, [n, V]."""
        found = self._logits(index) if callable(self._logits) else self._logits[index]
        ids, taught = self.tokens(index)
        logits = torch.as_tensor(found)
        # Logits of all positions are cut to the taught ones; of these alone there are fewer than tokens.
        return logits[torch.from_numpy(taught)] if len(logits) == len(ids) else logits


def write_token_cache(
    sequences: Sequence[Any],
    logits: Sequence[Any] | Callable[[int], Any],
    out: str | Path,
    *,
    vocabulary: Sequence[bytes] | int,
    taught: Sequence[Any] | None = None,
    special: Mapping[str, int] | None = None,
    teacher: str = "teacher",
    dataset: str = "text",
    split: str = "train",
    level_known: bool = True,
    spec: TokenCacheSpec | None = None,
    progress: Progress | bool | None = None,
) -> Cache:
    """Write a cache of sequences of tokens, and of a language model's distribution of the next token.

    The logits of one sequence at a time are in memory. If interrupted at any moment, the same call resumes at the first
    unfinished shard.

    Args:
        sequences: of each its tokens, [L] integers: what the teacher attended to, with nothing left out.
        logits: of each sequence [L, V], of all of its positions, or [n, V], of the taught ones; position p is of the
            token p + 1. Or a function that returns them for the index of a sequence. Columns behind the vocabulary, the
            padding of a model's head, are cut off.
        out: folder of the cache.
        vocabulary: bytes of the token of each id; or their number V, if only that is known.
        taught: of each sequence, whether each position is taught, [L] bool, never the last; None for all others.
        special: name of a special token, such as eos, -> its id.
        teacher: name of the teacher.
        dataset: name of the data set.
        split: of the data set.
        level_known: False if `logits` are log-probabilities, or known up to a constant per row.
        spec: how rows are stored; the defaults if None.
        progress: True to show progress on stderr, or a progress reporter; silent if None.

    Raises:
        UsageError: if a sequence is not one of the vocabulary, or cannot be taught; names it.
        MismatchError: if the logits are not those of the sequences, or `out` was started with other settings.
        CorruptError: if a logit is NaN or infinite; names the sequence.
    """
    for name, given in (("logits", logits), ("taught", taught)):
        if given is not None and not callable(given) and len(given) != len(sequences):
            raise MismatchError(
                f"{len(given)} {name} are given for {len(sequences)} sequences", f"pass the {name} of each sequence"
            )
    source = _Arrays(sequences, logits, taught)
    origin = Origin(teacher, "given", dataset, split, level_known, arguments={"from": "arrays"})
    return cache_of_sequences(source, out, origin, vocabulary, special, spec, reporter(progress))

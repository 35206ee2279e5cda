"""Compare the sequences of a cache with those that a data set gives now, token by token."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from kdcache.cache.format import zarr_store
from kdcache.cache.format.output_records import TOKENS
from kdcache.cache.format.stored_sequences import read_counts, sequence_key
from kdcache.cache.reader import Cache
from kdcache.data.text import TokenizedText
from kdcache.data.text_formats import Array
from kdcache.errors import MismatchError, UsageError, counted
from kdcache.runtime.progress import Progress, Silent

_SAME = "use the texts, tokenizer, chat template and dataset settings that the teacher saw"


class TextReplay(NamedTuple):
    """What was compared: numbers of sequences and of their tokens."""

    sequences: int
    tokens: int


def check_same_text(cache: Cache, text: TokenizedText) -> None:
    """Check that a data set gives the sequences of a cache, by their keys, with the same tokenizer.

    Raises:
        UsageError: if the samples of the cache are not sequences.
        MismatchError: with the first token of the vocabularies, or the first sequence and token, that differs.
    """
    if not isinstance(text.vocabulary, int):
        cache.check_vocabulary(text.vocabulary.tokens, f"the tokenizer of {text.name}")
    elif cache.manifest.plan.sequences is None:
        raise UsageError(f"the samples of {cache.path} are not sequences", "name a pipeline of images")
    if len(text) != len(cache):
        raise MismatchError(
            f"the cache has {counted(len(cache), 'sequence')}, and {text.name} gives {len(text):,} now", _SAME
        )
    differ = (index for index in range(len(text)) if sequence_key(*text.tokens(index)) != int(cache.sample_keys[index]))
    if (first := next(differ, None)) is not None:
        _compare(cache, text, range(first, first + 1))


def replay_text(cache: Cache, text: TokenizedText, progress: Progress | None = None) -> TextReplay:
    """Compare all tokens of a cache, and which positions are taught, with those of a data set.

    Raises:
        MismatchError: with the first sequence and token that differs, and both tokens.
    """
    check_same_text(cache, text)
    plan, tokens = cache.manifest.plan, 0
    with (progress or Silent()).task("comparing tokens", len(cache), "sequences") as task:
        for shard in range(plan.shards):
            ids = plan.shard_ids(shard)
            tokens += _compare(cache, text, ids)
            task.advance(len(ids))
    return TextReplay(len(cache), tokens)


def _compare(cache: Cache, text: TokenizedText, ids: range) -> int:
    """Compare some sequences that follow one another, and return the number of their tokens."""
    plan = cache.manifest.plan
    lengths = read_counts(cache.path, plan)[0].astype(np.int64)
    begin = int(lengths[: ids.start].sum())
    of_ids = lengths[ids.start : ids.stop]
    stored = zarr_store.output_reader(cache.path, plan, TOKENS).read(0, range(begin, begin + int(of_ids.sum())))
    all_tokens, all_taught = stored.tokens.numpy().astype(np.int64), stored.taught.numpy().astype(bool)
    ends = np.cumsum(of_ids)
    for index, end, length in zip(ids, ends.tolist(), of_ids.tolist(), strict=True):
        span = slice(end - length, end)
        _check_sequence(cache, index, (all_tokens[span], all_taught[span]), text.tokens(index))
    return int(of_ids.sum())


def _check_sequence(cache: Cache, index: int, ours: tuple[Array, Array], now: tuple[Array, Array]) -> None:
    """Compare a sequence of a cache with that of the data set."""
    common = min(len(ours[0]), len(now[0]))
    if len(differ := np.flatnonzero(ours[0][:common] != now[0][:common])):
        at = int(differ[0])
        raise MismatchError(
            f"token {at} of sequence {index} is {_named(cache, int(ours[0][at]))} in the cache, and "
            f"{_named(cache, int(now[0][at]))} in the data set now",
            _SAME,
        )
    if len(ours[0]) != len(now[0]):
        raise MismatchError(
            f"sequence {index} has {len(ours[0]):,} tokens in the cache, and {len(now[0]):,} in the data set now", _SAME
        )
    if len(differ := np.flatnonzero(ours[1] != now[1])):
        at = int(differ[0])
        raise MismatchError(
            f"token {at} of sequence {index} is {'' if ours[1][at] else 'not '}taught in the cache, and "
            f"{'' if now[1][at] else 'not '}in the data set now",
            _SAME,
        )


def _named(cache: Cache, token: int) -> str:
    """Return a token's id, and its bytes if the cache has them."""
    tokens = cache.vocabulary
    return str(token) if tokens is None or token >= len(tokens) else f"{token} {tokens[token]!r}"

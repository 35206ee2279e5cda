"""What a cache stores of sequences beside their rows: their numbers of tokens and rows, and the vocabulary.

docs/FORMAT.md, section 12.1.
"""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from kdcache.cache.format.array_specs import sample_arrays, vocabulary_arrays
from kdcache.cache.format.output_records import TOKENS
from kdcache.cache.format.row_axes import axis_of
from kdcache.cache.format.schema import Plan
from kdcache.cache.format.sequence_records import VocabularyRecord
from kdcache.cache.format.store_files import check_common
from kdcache.cache.format.verified_files import AGAIN
from kdcache.cache.format.zarr_store import read_arrays
from kdcache.errors import CorruptError, MismatchError

_LENGTH = struct.Struct("<I")
"""Length of a token in bytes, before each token in the digest."""


def sequence_key(tokens: npt.NDArray[np.integer[Any]], taught: npt.NDArray[np.generic]) -> int:
    """Return the key of a sequence: 8 bytes of BLAKE2b of the ids as uint32, and of `taught` as bytes of 0 and 1."""
    content = tokens.astype("<u4").tobytes() + taught.astype(np.uint8).tobytes()
    return int.from_bytes(hashlib.blake2b(content, digest_size=8).digest(), "little")


def vocabulary_record(
    tokens: Sequence[bytes] | int,
    special: Mapping[str, int] | None = None,
    chat_template: str | None = None,
    tokenizer: bytes | None = None,
) -> VocabularyRecord:
    """Return the record of a vocabulary.

    Args:
        tokens: bytes of the token of each id; or their number V, if only that is known.
        special: name of a special token -> its id.
        chat_template: its text; None without one.
        tokenizer: content of the file of the tokenizer; None without one.
    """
    size, length, digest = (
        (tokens, 0, None)
        if isinstance(tokens, int)
        else (len(tokens), sum(len(token) for token in tokens), digest_of_tokens(tokens))
    )
    return VocabularyRecord(
        size=size,
        bytes=length,
        digest=digest,
        special=dict(special or {}),
        chat_template=None if chat_template is None else _digest(chat_template.encode()),
        tokenizer=None if tokenizer is None else _digest(tokenizer),
    )


def _digest(content: bytes) -> str:
    return f"sha256:{hashlib.sha256(content).hexdigest()}"


def digest_of_tokens(tokens: Sequence[bytes]) -> str:
    """Return the sha256 over the tokens in order of their ids, each after its length in 4 bytes, little-endian."""
    sha = hashlib.sha256()
    for token in tokens:
        sha.update(_LENGTH.pack(len(token)) + token)
    return f"sha256:{sha.hexdigest()}"


def arrays_of_vocabulary(tokens: Sequence[bytes] | int) -> dict[str, npt.NDArray[Any]]:
    """Return the arrays of the tokens of a vocabulary, by path in the store; none if only their number is known."""
    if isinstance(tokens, int):
        return {}
    joined = np.frombuffer(b"".join(tokens), np.uint8)
    return {"vocabulary": joined, "vocabulary_length": np.fromiter(map(len, tokens), np.uint32, len(tokens))}


def read_vocabulary(cache: Path, plan: Plan) -> list[bytes] | None:
    """Read the bytes of the token of each id; None if only their number is known.

    Raises:
        CorruptError: if they are not those of the digest.
    """
    if not (expected := vocabulary_arrays(plan)):
        return None
    check_common(cache, plan)
    joined, lengths = read_arrays(cache, expected).values()
    ends = np.cumsum(lengths, dtype=np.int64)
    data = joined.tobytes()
    tokens = [data[end - length : end] for end, length in zip(ends.tolist(), lengths.tolist(), strict=True)]
    if ends[-1] != len(data) or plan.sequences is None or digest_of_tokens(tokens) != plan.sequences.vocabulary.digest:
        raise CorruptError(f"the vocabulary of {cache} does not have the digest of its plan", AGAIN)
    return tokens


def read_counts(cache: Path, plan: Plan) -> tuple[npt.NDArray[np.uint32], npt.NDArray[np.uint32]]:
    """Read the numbers of tokens and of rows of sequences, both [N] uint32.

    Raises:
        CorruptError: if they are not those of the shards.
    """
    check_common(cache, plan)
    arrays = sample_arrays(plan)
    tokens, rows = read_arrays(cache, {name: arrays[name] for name in ("token_count", "row_count")}).values()
    begins = np.arange(0, plan.dataset.samples, plan.shape.shard_rows)
    for counts, output in ((tokens, TOKENS), (rows, next(iter(plan.named_outputs)))):
        if tuple(np.add.reduceat(counts.astype(np.int64), begins).tolist()) != axis_of(plan, output).counts:
            raise CorruptError(f"the sequences of {cache} do not have the {output} of its shards", AGAIN)
    return tokens, rows


def check_same_tokens(cache: Path, plan: Plan, other: Sequence[bytes], where: str) -> None:
    """Check that a student's vocabulary begins with that of the teacher; more tokens may follow.

    Args:
        cache: folder of the cache.
        plan: of its sequences.
        other: tokens of the student.
        where: what the student's tokens are of.

    Raises:
        MismatchError: with the first id that differs, and both tokens.
    """
    if plan.sequences is None:
        raise TypeError("only sequences have a vocabulary")
    ours, size = read_vocabulary(cache, plan) or [], plan.sequences.vocabulary.size
    for token, (first, second) in enumerate(zip(ours, other, strict=False)):
        if first != second:
            raise MismatchError(
                f"token {token} is {first!r} in the cache, and {second!r} in {where}",
                "train a student with the tokenizer of the teacher",
            )
    if len(other) < size:
        raise MismatchError(
            f"{where} has {len(other):,} tokens, and the vocabulary of the cache has {size:,}",
            "train a student with the tokenizer of the teacher",
        )

"""Plan a cache of sequences: their keys and numbers of tokens and rows, in shards of about the same bytes.

The tokens of all sequences are read once before the first row is written, one sequence at a time; what stays in memory
are 16 bytes per sequence.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple, Protocol

import numpy as np
import numpy.typing as npt

from kdcache.cache.format.array_specs import raw_bytes
from kdcache.cache.format.fingerprints import digest_of
from kdcache.cache.format.output_records import OutputRecord
from kdcache.cache.format.schema import DatasetRecord, Lineage, Plan, Sharding, TeacherRecord, ViewsRecord
from kdcache.cache.format.sequence_records import (
    LARGEST_ROW_CHUNK,
    LARGEST_TOKEN_CHUNK,
    SequencesRecord,
    VocabularyRecord,
)
from kdcache.cache.format.stored_sequences import sequence_key
from kdcache.cache.format.token_encoding import TokenEncoding, TokenRequest
from kdcache.cache.token_spec import TokenCacheSpec
from kdcache.errors import UsageError
from kdcache.runtime.versions import versions

OUTPUT = "next_token"
"""Name of the output of a language model in a cache."""

_LARGEST_CHUNK = 16_384
"""Sequences per chunk at most."""

_PILOT_SEQUENCES = 16
"""Sequences that the rows of a pilot are spread over, at least."""

_SHARD_BYTES = 2**28
"""Bytes of a shard before compression, about; it is held in memory before it is written."""

_MIN_SHARDS, _MIN_SHARD_BYTES = 8, 2**22
"""Shards of a cache at least, and bytes per shard at least, as far as both are possible."""

_LARGEST_SHARD = 2
"""Largest shard, in multiples of that size."""

_TOKEN_BYTES = 3
"""Bytes per token of ids and `taught`, of a vocabulary of up to 65,536 tokens."""


class Sequences(Protocol):
    """Sequences of tokens, some of whose positions are taught."""

    def __len__(self) -> int: ...

    def tokens(self, index: int) -> tuple[npt.NDArray[Any], npt.NDArray[Any]]:
        """Return the tokens of a sequence, [L] integers, and which of its positions are taught, [L] bool."""


class CountedSequences(NamedTuple):
    """What is known of sequences before their rows are written.

    Attributes:
        keys: [N] uint64, of the tokens and of which of them are taught.
        tokens: [N] uint32, their numbers of tokens.
        rows: [N] uint32, their numbers of taught positions.
    """

    keys: npt.NDArray[np.uint64]
    tokens: npt.NDArray[np.uint32]
    rows: npt.NDArray[np.uint32]

    @property
    def labels(self) -> npt.NDArray[np.int32]:
        """Labels of the sequences, [N]: they have none."""
        return np.full(len(self.keys), -1, np.int32)

    def arrays(self) -> dict[str, npt.NDArray[Any]]:
        """Return the arrays that the store has of them, by path."""
        return {"token_count": self.tokens, "row_count": self.rows}


def count_sequences(
    sequences: Iterable[tuple[npt.NDArray[np.integer[Any]], npt.NDArray[np.generic]]], vocabulary_size: int
) -> CountedSequences:
    """Count the tokens and rows of sequences, and check them.

    Args:
        sequences: of each its tokens [L], and whether each position is taught [L].
        vocabulary_size: V.

    Raises:
        UsageError: if one has no taught position, or its last token is taught, or an id is not in the vocabulary.
    """
    keys, tokens, rows = [], [], []
    for index, (ids, taught) in enumerate(sequences):
        _check_sequence(index, ids, taught, vocabulary_size)
        keys.append(sequence_key(ids, taught))
        tokens.append(len(ids))
        rows.append(int(np.count_nonzero(taught)))
    if not keys:
        raise UsageError("there are only sequences without tokens to write", "pass at least one sequence")
    return CountedSequences(np.array(keys, np.uint64), np.array(tokens, np.uint32), np.array(rows, np.uint32))


def _check_sequence(
    index: int, ids: npt.NDArray[np.integer[Any]], taught: npt.NDArray[np.generic], vocabulary_size: int
) -> None:
    """Check one sequence."""
    if ids.ndim != 1 or ids.shape != taught.shape or not np.issubdtype(ids.dtype, np.integer):
        raise UsageError(
            f"sequence {index} has tokens {ids.dtype} {list(ids.shape)} and taught {list(taught.shape)}",
            "pass integer tokens [L] and booleans [L]",
        )
    if not taught.any():
        raise UsageError(f"sequence {index} has no taught position", "leave it out: it would teach nothing")
    if taught[-1]:
        raise UsageError(
            f"sequence {index} is taught at its last token, {len(ids) - 1}, which no token follows",
            "teach positions whose next token is in the sequence",
        )
    if ids.min() < 0 or ids.max() >= vocabulary_size:
        raise UsageError(
            f"sequence {index} has tokens from {ids.min()} to {ids.max()}; the vocabulary has {vocabulary_size:,}",
            "pass the tokens of the teacher's tokenizer, and its number of tokens without padding",
        )


def sequences_per_shard(counted: CountedSequences, row_bytes: int) -> int:
    """Return the number of sequences per shard for shards of about 256 MB, and at least eight of them.

    Where sequences lie in order of their lengths, shards of one number of sequences differ much; then they are smaller,
    so that the largest one has at most twice the size.

    Args:
        counted: the sequences.
        row_bytes: bytes per row before compression.
    """
    sizes = counted.rows.astype(np.int64) * row_bytes + counted.tokens.astype(np.int64) * _TOKEN_BYTES
    wanted = min(max(int(sizes.sum()) // _MIN_SHARDS, _MIN_SHARD_BYTES), _SHARD_BYTES)
    number = max(min(int(wanted / sizes.mean()), len(sizes)), 1)
    while number > 1 and np.add.reduceat(sizes, np.arange(0, len(sizes), number)).max() > _LARGEST_SHARD * wanted:
        number = -(-number // 2)
    return number


def sequences_record(
    counted: CountedSequences, shard_sequences: int, row_bytes: int, vocabulary: VocabularyRecord
) -> SequencesRecord:
    """Return the record of sequences with so many of them per shard.

    Args:
        counted: the sequences.
        shard_sequences: sequences per shard.
        row_bytes: bytes per row before compression.
        vocabulary: of the tokens.
    """
    begins = np.arange(0, len(counted.keys), shard_sequences)
    tokens, rows = (
        tuple(np.add.reduceat(numbers.astype(np.int64), begins).tolist()) for numbers in (counted.tokens, counted.rows)
    )
    fitting = max(_SHARD_BYTES // row_bytes, 1)
    return SequencesRecord(
        tokens=tokens,
        rows=rows,
        token_chunk=min(LARGEST_TOKEN_CHUNK // 16, max(tokens)),
        row_chunk=min(LARGEST_ROW_CHUNK // 4, max(rows), fitting),
        vocabulary=vocabulary,
    )


def plan_of_sequences(
    counted: CountedSequences,
    encoding: TokenEncoding,
    spec: TokenCacheSpec,
    teacher: TeacherRecord,
    data: tuple[str, str],
    vocabulary: VocabularyRecord,
    batch_tokens: int = 1,
    lineage: Lineage | None = None,
    shard_sequences: int | None = None,
    libraries: tuple[str, ...] = (),
) -> Plan:
    """Return the plan of a cache of sequences.

    Args:
        counted: the sequences.
        encoding: of their rows.
        spec: how these are stored.
        teacher: its record; its level is that of the rows.
        data: name and split of the data set.
        vocabulary: of the tokens.
        batch_tokens: tokens per batch of a teacher that kdcache runs.
        lineage: of a cache that is made of other files.
        shard_sequences: sequences per shard; None: those of `spec`, or chosen by bytes.
        libraries: that the rows depend on, beside those of every cache.
    """
    per_shard = shard_sequences or spec.shard_sequences or sequences_per_shard(counted, raw_bytes(encoding))
    name, split = data
    request = TokenRequest(
        top_k=encoding.top_k,
        tail=spec.tail,
        rank=encoding.rank or None,
        step=spec.step if encoding.rank else None,
        pilot_rows=spec.pilot_rows if encoding.rank else 0,
    )
    record = OutputRecord(
        kind="classes",
        places="run",
        source=None,
        request=request,
        encoding=encoding,
        fidelity=None,
        level=teacher.level,
    )
    return Plan(
        teacher=teacher,
        dataset=DatasetRecord(
            name=name,
            split=split,
            samples=len(counted.keys),
            class_names=(),
            digest=digest_of(counted.keys, counted.labels),
        ),
        views=ViewsRecord(count=1, seed=0, transform=[]),
        fidelity=None,
        shape=Sharding(shard_rows=per_shard, chunk_rows=_chunk(per_shard), fingerprint_stride=per_shard),
        batch_size=batch_tokens,
        versions=versions(*libraries),
        licence=spec.license,
        notes=spec.notes,
        lineage=lineage,
        outputs={OUTPUT: record},
        sequences=sequences_record(counted, per_shard, raw_bytes(encoding), vocabulary),
    )


def _chunk(per_shard: int) -> int:
    """Return the largest number of sequences per chunk that a shard is a multiple of."""
    return next(size for size in range(min(per_shard, _LARGEST_CHUNK), 0, -1) if per_shard % size == 0)


class PilotRows(NamedTuple):
    """Rows of a sequence that are in a pilot: their numbers in the sequence, ascending."""

    sequence: int
    numbers: npt.NDArray[np.int64]


def pilot_rows(counted: CountedSequences, wanted: int) -> list[PilotRows]:
    """Return the rows of a pilot, spread over the sequences, as many as are wanted or all."""
    left = min(wanted, int(counted.rows.sum()))
    most = -(-wanted // _PILOT_SEQUENCES)
    while int(np.minimum(counted.rows, most).sum()) < left:
        most *= 2
    found = list[PilotRows]()
    for index in spread(len(counted.keys)):
        rows = int(counted.rows[index])
        count = min(rows, most, left)
        found.append(PilotRows(index, np.arange(count) * rows // count))
        left -= count
        if not left:
            break
    return found


def spread(count: int) -> Iterator[int]:
    """Yield all indices, the first of them spread over all."""
    step = max(count // 64, 1)
    for first in range(step):
        yield from range(first, count, step)


def check_rank(rank: int, rows: int) -> None:
    """Check that a basis can be fitted.

    Raises:
        UsageError: if there are fewer rows than coordinates.
    """
    if rows < rank:
        raise UsageError(
            f"a basis of rank {rank} needs as many rows, and there are {rows}", "use a lower rank, or ghost"
        )

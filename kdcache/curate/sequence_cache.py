"""Write a cache of sequences of tokens from a source of them, one sequence at a time, and of a teacher's rows."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol, runtime_checkable

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from kdcache.cache.format import stored_bases
from kdcache.cache.format.array_specs import raw_bytes
from kdcache.cache.format.fingerprints import digest_of
from kdcache.cache.format.output_records import TOKENS, OutputRecord
from kdcache.cache.format.read_records import read_plan
from kdcache.cache.format.schema import PLAN, DatasetRecord, Lineage, Plan, Sharding, TeacherRecord, ViewsRecord
from kdcache.cache.format.stored_sequences import arrays_of_vocabulary, sequence_key, vocabulary_record
from kdcache.cache.format.tail_basis import TailBasis
from kdcache.cache.format.token_codec import encode_tokens
from kdcache.cache.format.token_draws import encode_draws
from kdcache.cache.format.token_encoding import (
    TOKEN_TEMPERATURES,
    TokenEncoding,
    TokenRequest,
)
from kdcache.cache.format.token_rows import SequenceTokens, TokenRows
from kdcache.cache.format.token_top_k import TopK, encode_top_k
from kdcache.cache.preconditions import check_place
from kdcache.cache.reader import Cache
from kdcache.cache.sequence_plan import CountedSequences, count_sequences, sequences_per_shard, sequences_record
from kdcache.cache.token_basis import fit_token_basis
from kdcache.cache.writer import CacheWriter
from kdcache.curate.recode import finish
from kdcache.curate.token_spec import TokenCacheSpec, encoding_of
from kdcache.dump.plan import teacher_by_hearsay
from kdcache.errors import KdcacheError, MismatchError, UsageError
from kdcache.runtime.progress import Progress
from kdcache.runtime.versions import versions

OUTPUT = "next_token"
"""Name of the output in the cache."""

_LARGEST_CHUNK = 16_384
"""Sequences per chunk at most."""

Array = npt.NDArray[Any]


class Sequences(Protocol):
    """Sequences of tokens, some of whose positions are taught."""

    def __len__(self) -> int: ...

    def tokens(self, index: int) -> tuple[Array, Array]:
        """Return the tokens of a sequence, [L] integers, and which of its positions are taught, [L] bool."""


@runtime_checkable
class TopKSource(Sequences, Protocol):
    """Sequences of tokens, and the most probable tokens at their taught positions."""

    def top_k(self, index: int) -> TopK:
        """Return the rows at the taught positions of a sequence, without defects, of k tokens or more."""


class LogitSource(Sequences, Protocol):
    """Sequences of tokens, and a teacher's logits at their taught positions."""

    def logits(self, index: int) -> Tensor:
        """Return the logits at the taught positions of a sequence, [n, V]; columns behind the vocabulary are cut."""


class Origin(NamedTuple):
    """Where sequences and logits come from, for the records of a cache.

    Attributes:
        teacher: name of the teacher.
        precision: of its logits.
        dataset: name of the data set.
        split: of the data set.
        level_known: whether the logits are known, or up to a constant per row.
        temperatures: at which the distributions are known.
        arguments: of the lineage.
    """

    teacher: str
    precision: str
    dataset: str
    split: str = "train"
    level_known: bool = True
    temperatures: tuple[float, ...] = TOKEN_TEMPERATURES
    arguments: Mapping[str, Any] = {}

    @classmethod
    def of_files(
        cls, source: Path, layout: str, sha256: str, name: str | None, precision: str, **arguments: Any
    ) -> Origin:
        """Return the origin of log-probabilities at T = 1 in files of another project.

        Args:
            source: the file, or the folder of them.
            layout: of the files, as `convert --from` names it.
            sha256: of the files.
            name: of the teacher; None for that of the file or folder.
            precision: of the log-probabilities.
            arguments: further ones of the lineage.
        """
        return cls(
            teacher=name or source.stem,
            precision=precision,
            dataset=source.stem,
            level_known=False,
            temperatures=(1.0,),
            arguments={"from": layout, "file": source.name, "sha256": sha256, **arguments},
        )


def cache_of_sequences(
    source: LogitSource | TopKSource,
    out: str | Path,
    origin: Origin,
    vocabulary: Sequence[bytes] | int,
    special: Mapping[str, int] | None,
    spec: TokenCacheSpec | None,
    progress: Progress,
) -> Cache:
    """Write a cache of the sequences of a source, and its logits at their taught positions.

    If interrupted at any moment, the same call resumes at the first unfinished shard.

    Args:
        source: of the sequences.
        out: folder of the cache.
        origin: for the records.
        vocabulary: bytes of the token of each id; or their number V, if only that is known.
        special: name of a special token -> its id.
        spec: how rows are stored; the defaults if None.
        progress: progress reporter.

    Raises:
        As `write_token_cache`.
    """
    out, spec = Path(out), spec or TokenCacheSpec()
    check_place(out)
    out = out.absolute()
    size = vocabulary if isinstance(vocabulary, int) else len(vocabulary)
    encoding = encoding_of(spec, size, origin.level_known, origin.temperatures)
    counted = count_sequences((source.tokens(index) for index in range(len(source))), size)
    labels = np.full(len(counted.keys), -1, np.int32)
    basis = _basis(source, counted, out, spec, encoding, progress)
    per_shard = spec.shard_sequences or sequences_per_shard(counted, raw_bytes(encoding))
    request = TokenRequest(
        top_k=encoding.top_k,
        tail=spec.tail,
        rank=encoding.rank or None,
        step=spec.step if encoding.rank else None,
        pilot_rows=spec.pilot_rows if encoding.rank else 0,
    )
    plan = Plan(
        teacher=_teacher(origin),
        dataset=DatasetRecord(
            name=origin.dataset,
            split=origin.split,
            samples=len(counted.keys),
            class_names=(),
            digest=digest_of(counted.keys, labels),
        ),
        views=ViewsRecord(count=1, seed=0, transform=[]),
        fidelity=None,
        shape=Sharding(shard_rows=per_shard, chunk_rows=_chunk(per_shard), fingerprint_stride=per_shard),
        batch_size=1,
        versions=versions(),
        licence=spec.license,
        notes=spec.notes,
        lineage=Lineage(operation="convert", arguments=dict(origin.arguments), parents=[]),
        outputs={
            OUTPUT: OutputRecord(
                kind="classes",
                places="run",
                source=None,
                request=request,
                encoding=encoding,
                fidelity=None,
                level=None if origin.level_known else "unknown",
            )
        },
        sequences=sequences_record(counted, per_shard, raw_bytes(encoding), vocabulary_record(vocabulary, special)),
    )
    arrays = counted.arrays() | arrays_of_vocabulary(vocabulary)
    bases = {} if basis is None else {OUTPUT: basis}
    writer = CacheWriter.begin(out, plan, labels, counted.keys, bases, arrays=arrays)

    def write() -> None:
        with progress.task(f"writing {out.name}", plan.shards, "shards") as task:
            pending = writer.pending(0)
            task.advance(plan.shards - len(pending))
            for shard in pending:
                _write_shard(writer, shard, source, counted.keys, basis)
                task.advance(1)

    return finish(writer, write)


def _teacher(origin: Origin) -> TeacherRecord:
    return teacher_by_hearsay(origin.teacher, origin.precision, level=None if origin.level_known else "unknown")


def _chunk(per_shard: int) -> int:
    """Return the largest number of sequences per chunk that a shard is a multiple of."""
    return next(size for size in range(min(per_shard, _LARGEST_CHUNK), 0, -1) if per_shard % size == 0)


def _basis(
    source: LogitSource | TopKSource,
    counted: CountedSequences,
    out: Path,
    spec: TokenCacheSpec,
    encoding: TokenEncoding,
    progress: Progress,
) -> TailBasis | None:
    """Return the basis of the tails: that of the cache that is resumed, or one that is fitted to a pilot."""
    if isinstance(source, TopKSource):
        if encoding.tail != "ghost":
            raise UsageError(f"rows of which the top k is known cannot be stored as {encoding.tail}", "use ghost")
        return None
    if not encoding.rank:
        return None
    if (out / PLAN).exists():
        started = read_plan(out / PLAN)
        kept = stored_bases.read_output_basis(out, started, OUTPUT) if OUTPUT in started.named_outputs else None
        if isinstance(kept, TailBasis) and kept.basis.shape == (encoding.rank, encoding.num_classes):
            return kept
    parts, wanted = list[Tensor](), min(spec.pilot_rows, int(counted.rows.sum()))
    if wanted < encoding.rank:
        raise UsageError(
            f"a basis of rank {encoding.rank} needs as many rows, and there are {wanted}", "use a lower rank, or ghost"
        )
    with progress.task("reading the pilot", wanted, "rows") as task:
        for index in _spread(len(source)):
            found = _logits_of(source, index, int(counted.rows[index]), encoding.num_classes).float()
            # Of a long sequence some rows, so that several sequences are in the pilot.
            stride = max(len(found) * min(len(source), 8) // wanted, 1)
            parts.append(found[::stride][: wanted - sum(map(len, parts))].clone())
            task.advance(len(parts[-1]))
            if sum(map(len, parts)) >= wanted:
                break
    pilot = torch.cat(parts)
    return fit_token_basis(pilot, spec.top_k, encoding.rank, spec.step)


def _spread(count: int) -> Iterator[int]:
    """Yield all indices, the first of them spread over all."""
    step = max(count // 64, 1)
    for first in range(step):
        yield from range(first, count, step)


def _logits_of(source: LogitSource, index: int, rows: int, size: int) -> Tensor:
    """Return the logits of a sequence, [n, V].

    Raises:
        MismatchError: if they are not of its taught positions, or of fewer tokens than the vocabulary has.
    """
    logits = source.logits(index)
    if logits.ndim != 2 or len(logits) != rows or logits.shape[1] < size or not logits.is_floating_point():
        raise MismatchError(
            f"the logits of sequence {index} are {logits.dtype} {list(logits.shape)}, and it has {rows} taught "
            f"positions of {size:,} tokens",
            "pass [n, V] floating-point logits, one row per taught position, of the vocabulary that is named",
        )
    return logits[:, :size]


def _write_shard(
    writer: CacheWriter,
    shard: int,
    source: LogitSource | TopKSource,
    keys: npt.NDArray[np.uint64],
    basis: TailBasis | None,
) -> None:
    """Encode and write one shard."""
    encoding = writer.plan.named_outputs[OUTPUT].token_encoding
    parts: list[TokenRows] = []
    tokens: list[SequenceTokens] = []
    for index in writer.plan.shard_ids(shard):
        ids, taught = source.tokens(index)
        if sequence_key(ids, taught) != int(keys[index]):
            raise MismatchError(f"sequence {index} changed while it was read", "run the command again")
        of_ids, mask = torch.from_numpy(ids.astype(np.int64)), torch.from_numpy(taught.astype(bool))
        positions = mask.nonzero().squeeze(1)
        next_tokens = of_ids[positions + 1]
        if isinstance(source, TopKSource):
            parts.append(encode_top_k(source.top_k(index), next_tokens, encoding))
        else:
            logits = _logits_of(source, index, len(positions), encoding.num_classes)
            parts.append(_encoded(logits, index, next_tokens, encoding, basis, seed=int(keys[index]) >> 1))
        tokens.append(SequenceTokens(of_ids, mask.to(torch.uint8)))
    rows = {OUTPUT: TokenRows.concatenate(parts), TOKENS: SequenceTokens.concatenate(tokens)}
    writer.write(0, shard, None, None, outputs=rows)


def _encoded(
    logits: Tensor, index: int, next_tokens: Tensor, encoding: TokenEncoding, basis: TailBasis | None, seed: int
) -> TokenRows:
    """Return the rows of the logits of a sequence; an error names it."""
    try:
        if encoding.tail == "draws":
            return encode_draws(logits, encoding, seed=seed)
        return encode_tokens(logits, next_tokens, encoding, basis)
    except KdcacheError as error:
        raise type(error)(f"sequence {index}: {error.what}", error.fix) from None

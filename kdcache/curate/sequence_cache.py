"""Write a cache of sequences of tokens from a source of them, one sequence at a time, and of a teacher's rows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol, runtime_checkable

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from kdcache.cache.format import stored_bases
from kdcache.cache.format.output_records import TOKENS
from kdcache.cache.format.read_records import read_plan
from kdcache.cache.format.schema import PLAN, Lineage, TeacherRecord
from kdcache.cache.format.stored_sequences import arrays_of_vocabulary, sequence_key, vocabulary_record
from kdcache.cache.format.tail_basis import TailBasis
from kdcache.cache.format.token_codec import encode_tokens
from kdcache.cache.format.token_draws import encode_draws
from kdcache.cache.format.token_encoding import (
    TOKEN_TEMPERATURES,
    TokenEncoding,
)
from kdcache.cache.format.token_rows import SequenceTokens, TokenRows
from kdcache.cache.format.token_top_k import TopK, encode_top_k
from kdcache.cache.preconditions import check_place
from kdcache.cache.reader import Cache
from kdcache.cache.sequence_plan import (
    OUTPUT,
    CountedSequences,
    Sequences,
    check_rank,
    count_sequences,
    pilot_rows,
    plan_of_sequences,
)
from kdcache.cache.token_basis import fit_token_basis
from kdcache.cache.token_spec import TokenCacheSpec, encoding_of
from kdcache.cache.writer import CacheWriter
from kdcache.curate.recode import finish
from kdcache.dump.plan import teacher_by_hearsay
from kdcache.errors import KdcacheError, MismatchError, UsageError
from kdcache.runtime.progress import Progress

Array = npt.NDArray[Any]


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
    basis = _basis(source, counted, out, spec, encoding, progress)
    lineage = Lineage(operation="convert", arguments=dict(origin.arguments), parents=[])
    data, of_tokens = (origin.dataset, origin.split), vocabulary_record(vocabulary, special)
    plan = plan_of_sequences(counted, encoding, spec, _teacher(origin), data, of_tokens, lineage=lineage)
    arrays = counted.arrays() | arrays_of_vocabulary(vocabulary)
    bases = {} if basis is None else {OUTPUT: basis}
    writer = CacheWriter.begin(out, plan, counted.labels, counted.keys, bases, arrays=arrays)

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
    chosen = pilot_rows(counted, spec.pilot_rows)
    wanted = sum(len(each.numbers) for each in chosen)
    check_rank(encoding.rank, wanted)
    parts = list[Tensor]()
    with progress.task("reading the pilot", wanted, "rows") as task:
        for index, numbers in chosen:
            found = _logits_of(source, index, int(counted.rows[index]), encoding.num_classes)
            parts.append(found[torch.from_numpy(numbers)].float())
            task.advance(len(numbers))
    return fit_token_basis(torch.cat(parts), spec.top_k, encoding.rank, spec.step)


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

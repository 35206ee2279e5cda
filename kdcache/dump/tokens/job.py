"""A dump of a language model, and everything before its teacher pass: checks, the plan, and the cache."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import nn

from kdcache.cache.format import stored_bases
from kdcache.cache.format.array_specs import raw_bytes
from kdcache.cache.format.read_records import read_manifest, read_plan
from kdcache.cache.format.schema import MANIFEST, PLAN, Plan, TeacherRecord
from kdcache.cache.format.sequence_records import VocabularyRecord
from kdcache.cache.format.stored_sequences import arrays_of_vocabulary, vocabulary_record
from kdcache.cache.format.tail_basis import TailBasis
from kdcache.cache.format.token_encoding import TOKEN_TEMPERATURES, TokenEncoding
from kdcache.cache.preconditions import check_place, check_same_plan, check_sealed_plan, remove_leftovers
from kdcache.cache.reader import Cache, open_cache
from kdcache.cache.sequence_plan import (
    OUTPUT,
    CountedSequences,
    Sequences,
    count_sequences,
    plan_of_sequences,
    sequences_per_shard,
)
from kdcache.cache.token_spec import TokenCacheSpec, encoding_of
from kdcache.cache.writer import CacheWriter
from kdcache.config.text import TokenCacheSection
from kdcache.data.text_formats import Array
from kdcache.data.tokenizer import Vocabulary
from kdcache.dump.estimate import check_room
from kdcache.dump.job import pending_shards
from kdcache.dump.tokens.pilot import fit_basis, run_pilot
from kdcache.dump.tokens.running import RunningLanguageModel
from kdcache.errors import UsageError
from kdcache.errors import counted as number_of
from kdcache.models import weights_digest
from kdcache.models.causal_lm import CausalLM
from kdcache.models.language_teacher import check_context, check_vocabulary_size
from kdcache.models.teacher import TeacherIdentity
from kdcache.runtime.progress import Progress, Task, delayed_task

_SHORTER = "set dataset.max_length to that, or cut the sequences"

_CPU_OPERATIONS, _GPU_OPERATIONS = 1e13, 1e16
"""Operations per shard at most, about: some minutes of a processor's core, or of a slow GPU."""

_OPERATIONS_PER_COORDINATE = 400
"""Operations of encoding a row, per token of the vocabulary and coordinate of the tail: their fit reads it 20 times."""

_TOKEN_BYTES = 3
"""Bytes per token of a sequence before compression, about: its id, and whether it is taught."""


@dataclass(frozen=True)
class LanguageModelJob:
    """A language model, sequences, and the cache that is to be made of them.

    Attributes:
        model: the teacher, whose weights are in the precision of the section.
        identity: what distinguishes it from other teachers with the same weights.
        sequences: what it reads.
        data: name and split of the data set.
        vocabulary: of its tokens; or only their number, V.
        section: what the cache keeps.
        out: folder of the cache.
        device: where the teacher runs and rows are encoded.
        progress: progress reporter.
    """

    model: CausalLM
    identity: TeacherIdentity
    sequences: Sequences
    data: tuple[str, str]
    vocabulary: Vocabulary | int
    section: TokenCacheSection
    out: Path
    device: torch.device | str
    progress: Progress

    @property
    def vocabulary_size(self) -> int:
        """V."""
        return self.vocabulary if isinstance(self.vocabulary, int) else len(self.vocabulary.tokens)

    @property
    def spec(self) -> TokenCacheSpec:
        """How rows are stored."""
        return _spec_of(self.section)

    @property
    def encoding(self) -> TokenEncoding:
        """The encoding of rows; see `checked_encoding`."""
        return checked_encoding(self.section, self.model, self.vocabulary_size)

    def running(self) -> RunningLanguageModel:
        """Return the teacher on its device."""
        return RunningLanguageModel(self.model, self.vocabulary_size, self.section.precision, self.device)

    def count(self) -> CountedSequences:
        """Return the lengths and keys of the sequences, after checking that the teacher takes them.

        Raises:
            UsageError: for a sequence that cannot be taught.
            MismatchError: if the teacher's head or its context is too small.
        """
        check_vocabulary_size(self.model, self.vocabulary_size, "the vocabulary")
        with delayed_task(self.progress, "counting tokens", len(self.sequences), "sequences") as task:
            counted = count_sequences(self._counting(task), self.vocabulary_size)
        check_context(self.model, int(counted.tokens.max()), _SHORTER)
        return counted

    def _counting(self, task: Task) -> Iterator[tuple[Array, Array]]:
        """Yield all sequences, and report them."""
        for index in range(len(self.sequences)):
            yield self.sequences.tokens(index)
            task.advance(1)

    def plan(self, counted: CountedSequences) -> Plan:
        """Return the plan of the cache."""
        network = self.model.network
        teacher = TeacherRecord(
            **self.identity._asdict(),
            weights_digest=weights_digest(network),
            parameters=sum(parameter.numel() for parameter in network.parameters()),
            precision=self.section.precision,
        )
        return plan_of_sequences(
            counted,
            self.encoding,
            self.spec,
            teacher,
            self.data,
            record_of_vocabulary(self.vocabulary),
            self.section.batch_tokens,
            shard_sequences=self._shard_sequences(counted),
            libraries=_libraries(network),
        )

    def _shard_sequences(self, counted: CountedSequences) -> int:
        """Return the number of sequences per shard: that of the cache that exists, or one by bytes and by time.

        A killed run loses the shards in flight at most, so none should take longer than some minutes.
        """
        if self.section.shard_sequences is not None:
            return self.section.shard_sequences
        for name, read in ((PLAN, read_plan), (MANIFEST, lambda path: read_manifest(path).plan)):
            if (self.out / name).is_file():
                return read(self.out / name).shape.shard_rows
        encoding = self.encoding
        parameters = sum(parameter.numel() for parameter in self.model.network.parameters())
        per_row = _OPERATIONS_PER_COORDINATE * self.vocabulary_size * max(encoding.rank, 4)
        operations = 2 * parameters * float(counted.tokens.sum()) + per_row * float(counted.rows.sum())
        most = _CPU_OPERATIONS if torch.device(self.device).type == "cpu" else _GPU_OPERATIONS
        by_time = int(most / operations * len(counted.keys))
        return max(min(sequences_per_shard(counted, raw_bytes(encoding)), by_time), 1)


def _spec_of(section: TokenCacheSection) -> TokenCacheSpec:
    return TokenCacheSpec(**{name: getattr(section, name) for name in TokenCacheSpec.__dataclass_fields__})


def checked_encoding(section: TokenCacheSection, model: CausalLM, vocabulary_size: int) -> TokenEncoding:
    """Return the encoding of rows.

    Args:
        section: what the cache keeps.
        model: the teacher.
        vocabulary_size: V.

    Raises:
        UsageError: if it is impossible for a vocabulary or hidden states of this size.
    """
    encoding = encoding_of(_spec_of(section), vocabulary_size, True, TOKEN_TEMPERATURES)
    width = model.output.weight.shape[1]
    if encoding.rank > width and model.softcap is None:
        raise UsageError(
            f"a tail of rank {encoding.rank}, and the teacher's hidden states have a width of {width}",
            f"set cache.rank to {width} or less: the logits are a linear function of these",
        )
    return encoding


def _libraries(network: nn.Module) -> tuple[str, ...]:
    """Return the libraries that a network, or what a wrapper has inside, comes from."""
    inner: Any = network.get_base_model() if hasattr(network, "get_base_model") else network  # type: ignore[operator]
    modules = {kind.__module__.partition(".")[0] for kind in type(inner).__mro__}
    return tuple(modules & {"transformers"})


def record_of_vocabulary(vocabulary: Vocabulary | int) -> VocabularyRecord:
    """Return the record of a vocabulary for the plan of a cache."""
    return vocabulary_record(vocabulary) if isinstance(vocabulary, int) else vocabulary_record(*vocabulary)


def tokens_of(vocabulary: Vocabulary | int) -> Sequence[bytes] | int:
    """Return the tokens of a vocabulary; or only their number."""
    return vocabulary if isinstance(vocabulary, int) else vocabulary.tokens


class Prepared(NamedTuple):
    """A cache that can be written, or that is complete already.

    Attributes:
        writer: of the cache; None if it is complete.
        complete: the sealed cache with the settings of the job; None if there is something to do.
        keys: of the sequences, [N] uint64.
    """

    writer: CacheWriter | None
    complete: Cache | None
    keys: np.ndarray[tuple[int], np.dtype[np.uint64]]


def prepare(job: LanguageModelJob) -> Prepared:
    """Check the job, make the plan, and create or resume the cache.

    Raises:
        UsageError: if the settings are invalid, or `job.out` is something else or a sealed cache with other settings.
        MismatchError: if teacher, vocabulary and sequences do not fit, or settings differ from those of the cache.
        CorruptError: if the teacher returns NaN or infinities.
        IncompleteError: if the cache does not fit on the disk.
    """
    out = job.out
    is_sealed = (out / MANIFEST).is_file()
    if not is_sealed:
        check_place(out)
    encoding = job.encoding  # invalid settings are refused before sequences are read
    counted = job.count()
    plan = job.plan(counted)
    if is_sealed:
        check_sealed_plan(out, read_manifest(out / MANIFEST).plan, plan)
        cache = open_cache(out)
        remove_leftovers(out)
        job.progress.say(f"{out} is complete: nothing to do")
        return Prepared(None, cache, counted.keys)
    basis = _basis(job, counted, plan)
    if not (out / PLAN).exists():
        check_room(out, largest_size(plan, encoding))
    bases = {} if basis is None else {OUTPUT: basis.to("cpu")}
    arrays = counted.arrays() | arrays_of_vocabulary(tokens_of(job.vocabulary))
    writer = CacheWriter.begin(out, plan, counted.labels, counted.keys, bases, arrays=arrays)
    if not writer.created:
        n_pending = len(pending_shards(writer))
        remain = f"{n_pending} of {number_of(plan.shards, 'shard')}"
        job.progress.say(f"resuming {out}: {remain} {'remains' if n_pending == 1 else 'remain'}")
    return Prepared(writer, None, counted.keys)


def _basis(job: LanguageModelJob, counted: CountedSequences, plan: Plan) -> TailBasis | None:
    """Return the basis of the tails: that of the cache that is resumed, or one that is fitted to a pilot."""
    encoding = plan.named_outputs[OUTPUT].token_encoding
    if not encoding.rank:
        return None
    if (job.out / PLAN).exists():
        check_same_plan(job.out, read_plan(job.out / PLAN), plan)
        kept = stored_bases.read_output_basis(job.out, plan, OUTPUT)
        return kept if isinstance(kept, TailBasis) else None
    teacher, section = job.running(), job.section
    pilot = run_pilot(teacher, job.sequences, counted, section.pilot_rows, section.batch_tokens, job.progress)
    return fit_basis(teacher, pilot, job.spec, encoding)


def largest_size(plan: Plan, encoding: TokenEncoding) -> float:
    """Return the bytes of a cache before compression, which it does not exceed by much."""
    if plan.sequences is None:
        raise TypeError("only sequences have tokens")
    of = plan.sequences
    basis = encoding.rank * encoding.num_classes * 2 + (encoding.num_classes * 4 if encoding.rank else 0)
    return sum(of.rows) * raw_bytes(encoding) + sum(of.tokens) * _TOKEN_BYTES + basis + of.vocabulary.bytes

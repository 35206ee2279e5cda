"""Stage one of language models: run the teacher once over sequences of tokens, and leave a sealed cache."""

from __future__ import annotations

import secrets
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import nn

from kdcache.cache import summary
from kdcache.cache.format import stored_bases
from kdcache.cache.format.tail_basis import TailBasis
from kdcache.cache.inspect.card import CARD, write_card
from kdcache.cache.lock import release
from kdcache.cache.reader import Cache, open_sealed
from kdcache.cache.sequence_plan import OUTPUT, Sequences
from kdcache.cache.writer import CacheWriter
from kdcache.config.section import section_with
from kdcache.config.text import TokenCacheSection
from kdcache.data.text import TokenizedText
from kdcache.data.text_formats import Array
from kdcache.data.tokenizer import Vocabulary
from kdcache.dump.job import pending_shards
from kdcache.dump.shared_pass import (
    SAME,
    OwnShare,
    check_same_weights,
    interrupted,
    keeping_finished_shards,
    wait_for_files,
)
from kdcache.dump.teacher_pass import PhaseTimer, Shard, WriterThread
from kdcache.dump.tokens.job import LanguageModelJob, Prepared, prepare
from kdcache.dump.tokens.token_pass import make_shard
from kdcache.errors import KdcacheError, MismatchError, UsageError
from kdcache.models.causal_lm import CausalLM, split_causal_lm
from kdcache.models.teacher import TeacherIdentity
from kdcache.runtime.devices import check_device
from kdcache.runtime.distributed import Ranks
from kdcache.runtime.paths import expand
from kdcache.runtime.progress import Progress, Silent
from kdcache.runtime.terminal import reporter


class _FirstRank(NamedTuple):
    """What the first rank tells the others.

    Attributes:
        pending: shards that the ranks divide among themselves; None if the cache is complete.
        name: under which they claim them.
    """

    pending: list[Shard] | None
    name: str


class _Given:
    """Sequences that are in memory."""

    def __init__(self, sequences: Sequence[Any], taught: Sequence[Any] | None) -> None:
        if taught is not None and len(taught) != len(sequences):
            raise MismatchError(
                f"{len(taught)} taught are given for {len(sequences)} sequences", "pass the taught of each sequence"
            )
        self._sequences, self._taught = sequences, taught

    def __len__(self) -> int:
        return len(self._sequences)

    def tokens(self, index: int) -> tuple[Array, Array]:
        """Return the tokens of a sequence, and which of its positions are taught."""
        ids = np.asarray(self._sequences[index])
        if self._taught is not None:
            return ids, np.asarray(self._taught[index], bool)
        return ids, np.arange(len(ids)) < len(ids) - 1


def dump_language_model(
    model: CausalLM | nn.Module,
    sequences: TokenizedText | Sequence[Any],
    out: str | Path,
    *,
    vocabulary: Sequence[bytes] | int | None = None,
    taught: Sequence[Any] | None = None,
    dataset: str = "text",
    name: str | TeacherIdentity = "teacher",
    spec: TokenCacheSection | Mapping[str, Any] | None = None,
    ranks: Ranks | None = None,
    device: torch.device | str = "cpu",
    progress: Progress | bool | None = None,
    **options: Any,
) -> Cache:
    """Run a language model over sequences of tokens, and store its distributions of the next token.

    If it is killed at any moment, the same call resumes at the first unfinished shard. The sealed cache has the same
    root digest as one that was never interrupted, whatever the number of ranks: batches are cut inside shards, always
    in the same way. If the cache is complete already, it is checked and returned.

    The body of the network gives the hidden states of a batch; the head is applied to some rows at a time, and these
    are encoded at once. The logits of a batch, [B, T, V], never exist.

    Args:
        model: a causal language model of transformers, or its parts (`split_causal_lm`); moved to the device and put
            into evaluation mode.
        sequences: from `load_text`; or the tokens of each sequence, [L] integers: what the teacher is to attend to.
        out: folder of the cache, by convention `NAME.kdcache`.
        vocabulary: of sequences that are not from `load_text`: the bytes of the token of each id, or their number V,
            without the padding that the head has behind them.
        taught: of these sequences, whether each position is taught, [L] bool, never the last; None for all others.
        dataset: name of the data set of these sequences.
        name: the teacher's name in the manifest, or its full identity.
        spec: what to keep, as a mapping with the keys of the `cache` section of a pipeline of text.
        ranks: this process among several that make this call with the same arguments; None for a single process.
        device: where the teacher runs and rows are encoded.
        progress: True to show progress on stderr, or a progress reporter; silent if None.
        options: the keys of `spec` one by one, such as `top_k=32, precision="bf16"`.

    Returns:
        The sealed cache.

    Raises:
        UsageError: if the settings are invalid, a sequence cannot be taught, the head of the network is not linear, or
            `out` is something else or a cache with other settings.
        MismatchError: if the vocabulary or the sequences do not fit the network, or teacher or settings differ from
            those of an unsealed cache at `out`, or from those of another rank.
        CorruptError: if the teacher returns NaN or infinities; names the sequence.
        IncompleteError: if the cache does not fit on the disk, or another rank has ended.
        InterruptedRun: on Ctrl-C.
            After any of these errors finished shards are kept, and the same call resumes.
    """
    ranks = ranks or Ranks()
    check_device(device)
    source: Sequences = sequences if isinstance(sequences, TokenizedText) else _Given(sequences, taught)
    job = LanguageModelJob(
        model if isinstance(model, CausalLM) else split_causal_lm(model),
        name if isinstance(name, TeacherIdentity) else TeacherIdentity(name, {}, None),
        source,
        (sequences.name, sequences.split) if isinstance(sequences, TokenizedText) else (dataset, "train"),
        _vocabulary(sequences, vocabulary, taught),
        section_with(TokenCacheSection, spec, options, "the options of the cache"),
        expand(out),
        device,
        reporter(progress) if ranks.is_first else Silent(),
    )
    timer = PhaseTimer()
    try:
        cache = _dump(job, ranks, timer)
    except KeyboardInterrupt as interrupt:
        raise interrupted(interrupt, job.out) from None
    finally:
        release(job.out)
    job.progress.say(f"time: {timer}")
    return cache


def _vocabulary(
    sequences: TokenizedText | Sequence[Any], vocabulary: Sequence[bytes] | int | None, taught: Sequence[Any] | None
) -> Vocabulary | int:
    """Return the vocabulary: that of the text, or the one that is given for other sequences."""
    if isinstance(sequences, TokenizedText):
        if vocabulary is not None or taught is not None:
            raise UsageError("vocabulary and taught are given for a text that has its own", "leave them out")
        return sequences.vocabulary
    if vocabulary is None:
        raise UsageError(
            "the vocabulary of the sequences is not given",
            "pass vocabulary=, the bytes of the token of each id or their number, or sequences from load_text",
        )
    return vocabulary if isinstance(vocabulary, int) else Vocabulary(list(vocabulary), {}, None, None)


def _dump(job: LanguageModelJob, ranks: Ranks, timer: PhaseTimer) -> Cache:
    """Prepare, run this rank's share of the pass, and seal the cache."""
    with timer.phase("before the pass"):
        prepared, first = _prepare(job, ranks)
    if prepared.writer is None:
        cache = prepared.complete or open_sealed(job.out)
        if ranks.is_first and not (job.out / CARD).exists():
            write_card(cache)  # the run that sealed it was killed before it had written the card
        return cache
    writer = prepared.writer
    _run_pass(job, prepared, writer, first, ranks, timer)
    with timer.phase("waiting for other ranks") if ranks.count > 1 else nullcontext():
        ranks.gather(None)
    if ranks.is_first:
        with timer.phase("sealing"):
            wait_for_files(writer, ranks)
            writer.seal(summary.summary_of([], writer.plan))
    ranks.wait()
    with timer.phase("sealing"):
        cache = open_sealed(job.out)
        if ranks.is_first:
            write_card(cache)
    return cache


def _prepare(job: LanguageModelJob, ranks: Ranks) -> tuple[Prepared, _FirstRank]:
    """Prepare the job on the first rank, and return the shards that are to be made."""
    if ranks.is_first:
        try:
            prepared = prepare(job)
        except KdcacheError as error:
            ranks.tell(error)
            raise
        # A new name each time: what was claimed by a rank that has died is claimed again.
        pending = None if prepared.writer is None else pending_shards(prepared.writer)
        return prepared, ranks.tell(_FirstRank(pending, secrets.token_hex(8)))
    first = ranks.tell(_FirstRank([], ""))
    counted = job.count()
    if first.pending is None:
        return Prepared(None, None, counted.keys), first
    writer = CacheWriter.join(job.out)
    check_same_weights(job.model.network, writer)
    if (ours := job.plan(counted).dataset.digest) != (theirs := writer.plan.dataset.digest):
        raise MismatchError(f"this rank's sequences have the digest {ours}, those of the first rank {theirs}", SAME)
    return Prepared(writer, None, counted.keys), first


def _run_pass(
    job: LanguageModelJob,
    prepared: Prepared,
    writer: CacheWriter,
    first: _FirstRank,
    ranks: Ranks,
    timer: PhaseTimer,
) -> None:
    """Make some of the shards; a thread writes them while the teacher runs."""
    plan, pending = writer.plan, first.pending or []
    basis = stored_bases.read_output_basis(job.out, plan, OUTPUT)
    of_tails = basis.to(job.device) if isinstance(basis, TailBasis) else None
    rows = sum(plan.sequences.rows[shard.shard] for shard in ranks.share(pending)) if plan.sequences else 0
    with (
        keeping_finished_shards(writer, ranks),
        job.progress.task("teacher" + ranks.named(), rows, "rows") as task,
        WriterThread() as background,
    ):
        teacher, own = job.running(), OwnShare(task, rows)
        for _, shard in ranks.claim(pending, first.name):
            background.check()  # a full disk is reported before the teacher runs any further
            with timer.phase("teacher"):
                made = make_shard(teacher, job.sequences, plan, of_tails, prepared.keys, shard, own)
            with timer.phase("waiting for the writer"):
                background.submit(partial(writer.write, 0, shard, None, None, outputs=made))
        with timer.phase("waiting for the writer"):
            background.wait()

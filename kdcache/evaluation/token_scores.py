"""Language models side by side: perplexity, calibration, and how far they are from the teacher of a cache."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch

from kdcache.cache.reader import Cache
from kdcache.cache.sequences import CachedSequences
from kdcache.config.text import TokenTrainSpec
from kdcache.data.tokenizer import has_tokenizer
from kdcache.errors import UsageError
from kdcache.evaluation.metrics import Reliability, reliability
from kdcache.evaluation.text_runs import TextRun
from kdcache.models.causal_lm import CausalLM
from kdcache.models.from_transformers_lm import load_causal_lm
from kdcache.models.language_models import check_tokenizer
from kdcache.models.language_teacher import check_vocabulary_size, context_of
from kdcache.runtime.progress import Progress, Silent
from kdcache.train.tokens.batches import as_token_batch, in_micro_batches, sequence_lengths, with_packing
from kdcache.train.tokens.inputs import held_out_sequences
from kdcache.train.tokens.scoring import TokenScore, TokenSums, positions_of


class LanguageScore(NamedTuple):
    """Measures of a language model on sequences of a cache.

    Attributes:
        network: its name.
        sequences: number of sequences.
        seen: "held out" or "trained on" if it was trained from this cache, else "others".
        positions: taught positions in them.
        perplexity: exponential of the cross-entropy.
        cross_entropy: mean of -log p(next token), nats.
        accuracy: share of positions whose most probable token is the next one.
        calibration_error: expected calibration error of the most probable token, [0, 1].
        kl: mean KL divergence from the teacher at T = 1, nats; None for rows of draws.
        agreement: share of positions with the same most probable token as the teacher; None as for `kl`.
        parameters: of the network.
    """

    network: str
    sequences: int
    seen: str
    positions: int
    perplexity: float
    cross_entropy: float
    accuracy: float
    calibration_error: float
    kl: float | None
    agreement: float | None
    parameters: int


def score_language_models(
    runs: Sequence[TextRun],
    cache: Cache,
    *,
    rows: int | None = None,
    device: torch.device | str = "cpu",
    progress: Progress | None = None,
) -> list[LanguageScore]:
    """Measure language models on the same sequences of a cache: those that were held out from training, or all.

    Args:
        runs: their folders.
        cache: of sequences.
        rows: largest number of sequences; None for all.
        device: of the networks.
        progress: progress reporter; silent if None.

    Raises:
        UsageError: if the samples of the cache are not sequences.
        MismatchError: if a network has fewer tokens, or its folder another tokenizer.
        KdcacheError: if a network cannot be loaded.
    """
    progress = progress or Silent()
    teacher = cache.sequences(device=device)
    lengths = sequence_lengths(teacher.token_start)
    digest = cache.manifest.digest
    found = []
    with progress.task("networks", len(runs), "networks") as task:
        which = _compared([run for run in runs if digest in run.caches], len(lengths))[:rows]
        for run in runs:
            seen = "others" if digest not in run.caches else "held out" if run.held_out else "trained on"
            check_tokenizer(run.folder if has_tokenizer(run.folder) else None, cache.path, cache.manifest.plan)
            found.append(_score(run, teacher, which, seen, lengths, torch.device(device)))
            task.advance(1, run.name)
    return found


def _compared(trained: Sequence[TextRun], count: int) -> list[int]:
    """Return the sequences that all networks are measured on: held out from all that held any out, or else all.

    Args:
        trained: the runs that were trained from the cache.
        count: number of its sequences.
    """
    students = [run.pipeline.student for run in trained if run.pipeline is not None and run.held_out]
    fractions = [student.train.held_out_fraction for student in students if student is not None]
    # The sequences of a smaller fraction are among those of a larger one.
    return held_out_sequences(count, min(fractions)) if fractions else list(range(count))


def _score(
    run: TextRun,
    teacher: CachedSequences,
    which: Sequence[int],
    seen: str,
    lengths: Sequence[int],
    device: torch.device,
) -> LanguageScore:
    """Load and measure one network."""
    causal = load_causal_lm(str(run.folder))
    check_vocabulary_size(causal, teacher.encoding.num_classes, "the vocabulary of the cache")
    causal.network.to(device).eval()
    spec = TokenTrainSpec() if run.pipeline is None or run.pipeline.student is None else run.pipeline.student.train
    longest = min(limit for limit in (spec.max_length, context_of(causal), 2**62) if limit)
    sums, diagram = TokenSums(device), None
    spec = with_packing(spec, causal).model_copy(update={"max_length": longest})
    batches = in_micro_batches(which, lengths, spec)
    teacher.prefetch(batches)
    for batch in batches:
        diagram = _add(causal, teacher, batch, longest, spec.packed is True, sums, diagram)
    if diagram is None:
        raise UsageError(f"{run.name} is to be measured on no sequences", "raise --rows")
    score: TokenScore = sums.score()
    return LanguageScore(
        run.name,
        len(which),
        seen,
        score.positions,
        score.perplexity,
        score.cross_entropy,
        score.accuracy,
        diagram.error,
        score.kl,
        score.agreement,
        sum(one.numel() for one in causal.network.parameters()),
    )


@torch.no_grad()
def _add(
    causal: CausalLM,
    teacher: CachedSequences,
    batch: list[int],
    longest: int,
    packed: bool,
    sums: TokenSums,
    diagram: Reliability | None,
) -> Reliability | None:
    """Add a batch of sequences to the sums, and return the reliability diagram with it."""
    text = teacher.text(batch, [longest] * len(batch))
    given = as_token_batch(batch, text, packed).to(teacher.device)
    targets = teacher.targets(teacher.rows_of(batch, text))
    head = causal.head.cut(teacher.encoding.num_classes)
    for positions in positions_of(causal.hidden_states(given), head, given.labels, targets):
        sums.add(positions)
        own = reliability(positions.logits, positions.labels)
        diagram = own if diagram is None else Reliability(*map(torch.add, diagram, own))
    return diagram

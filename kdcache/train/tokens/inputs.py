"""The inputs of training a language model: sequences and rows of a cache, and the check that they fit the student."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from kdcache.cache.format.schema import Plan
from kdcache.cache.reader import Cache
from kdcache.cache.sequences import CachedSequences
from kdcache.config.text import LanguageStudentSpec, TextPipeline
from kdcache.data.seeding import in_hash_order
from kdcache.errors import UsageError, counted
from kdcache.losses import Loss
from kdcache.losses.token_loss import check_token_loss
from kdcache.models.causal_lm import CausalLM
from kdcache.models.language_models import check_tokenizer, tokenizer_folder
from kdcache.models.language_teacher import check_context, check_vocabulary_size, context_of
from kdcache.runtime.progress import Progress, Silent
from kdcache.train.held_out import OPTION
from kdcache.train.inputs import CacheOptions
from kdcache.train.tokens.batches import sequence_lengths

_PILOT = 64
"""Sequences from which rows are taken to check the loss."""


@dataclass(frozen=True)
class TokenInputs:
    """What students of one cache of sequences share.

    Attributes:
        sequences: tokens and rows of the teacher.
        lengths: tokens of each sequence.
        cache: folder of the cache.
        plan: of the cache.
        record: facts about cache and placement, for the metrics of a run.
    """

    sequences: CachedSequences
    lengths: list[int]
    cache: Path
    plan: Plan
    record: dict[str, Any] = field(default_factory=dict)


def inputs_of_sequences(
    cache: Cache, options: CacheOptions | None = None, *, device: torch.device | str = "cpu", progress: Progress
) -> TokenInputs:
    """Load the sequences and rows of a cache.

    Args:
        cache: of a language model.
        options: placement of the rows.
        device: where to train.
        progress: progress reporter.

    Raises:
        UsageError: if its samples are not sequences, or options of images are set.
    """
    options = options or CacheOptions()
    if options.by_content or options.allow_other_pixels:
        name = "--allow-other-pixels" if options.allow_other_pixels else "--align and --allow-missing"
        raise UsageError(
            f"{name} is for images: a language model is trained on the tokens in the cache", "leave it out"
        )
    if cache.manifest.plan.sequences is None:
        raise UsageError(
            f"{cache.path} is a cache of samples, and the pipeline is of text",
            "use a cache of sequences, see docs/CACHE.md, or a pipeline of images",
        )
    sequences = cache.sequences(device=device, placement=options.placement)
    progress.say(f"rows: {sequences.placement} ({sequences.why})")
    return TokenInputs(
        sequences,
        sequence_lengths(sequences.token_start),
        cache.path,
        cache.manifest.plan,
        {"caches": [cache.manifest.digest], "placement": [sequences.placement]},
    )


def one_cache(caches: Sequence[Cache]) -> Cache:
    """Return the cache of a student.

    Raises:
        UsageError: if there is none, or more than one.
    """
    if len(caches) != 1:
        raise UsageError(
            f"a language model is trained from one cache, and {len(caches)} are given"
            if caches
            else "a language model is trained from the tokens of a cache, and none is given",
            "pass one --cache; a student without a teacher (--loss ce) is trained on the tokens of the same cache",
        )
    return caches[0]


def check_token_pipeline(pipeline: TextPipeline, inputs: TokenInputs) -> None:
    """Check that the loss of a pipeline is defined for the rows of a cache.

    Raises:
        UsageError: if it is not, or the pipeline compares other outputs of the teacher.
    """
    loss: Loss = pipeline.loss
    if loss.outputs:
        raise UsageError(
            f"loss.outputs compares {', '.join(loss.outputs)}, and language models are compared by their next token",
            "remove it, and take a loss such as kd",
        )
    if not loss.uses_teacher:
        return
    sequences = inputs.sequences
    pilot = list(range(min(_PILOT, len(sequences))))
    check_token_loss(loss, sequences.targets(sequences(pilot).rows))


def held_out_sequences(count: int, fraction: float) -> list[int]:
    """Return the sequences that are held out, ascending: the same ones on every machine and for every seed.

    Args:
        count: number of sequences.
        fraction: of them; 0 for none.

    Raises:
        UsageError: if nothing would be held out, or nothing be left.
    """
    if not fraction:
        return []
    held = int(fraction * count + 0.5)
    if not 0 < held < count:
        raise UsageError(
            f"{OPTION} {fraction:g} would hold out {held:,} of {counted(count, 'sequence')}",
            f"set {OPTION} to 0" if count == 1 else f"lower {OPTION}" if held else f"raise {OPTION}",
        )
    return sorted(in_hash_order(count)[:held].tolist())


def check_student(
    causal: CausalLM, spec: LanguageStudentSpec, inputs: TokenInputs, progress: Progress | None = None
) -> None:
    """Check that a student takes the sequences of a cache as they are cut and packed.

    Raises:
        MismatchError: if the tokenizer in its folder has other tokens than the teacher's, its head fewer tokens than
            the vocabulary, or its context is shorter than the sequences.
        UsageError: if it has nothing to train, or mixes packed sequences.
    """
    check_tokenizer(tokenizer_folder(spec), inputs.cache, inputs.plan)
    check_vocabulary_size(causal, inputs.sequences.encoding.num_classes, "the vocabulary of the cache")
    check_sequences(causal, spec, inputs.lengths, progress)


def check_sequences(
    causal: CausalLM, spec: LanguageStudentSpec, lengths: Sequence[int], progress: Progress | None = None
) -> None:
    """Check that a student can be trained on sequences of some lengths, as they are cut and packed.

    Raises:
        MismatchError: if its context is shorter.
        UsageError: if it has nothing to train, or mixes packed sequences.
    """
    longest = min(max(lengths), spec.train.max_length or max(lengths))
    fix = f"set student.train.max_length to {context_of(causal)} or less: longer sequences are then cut to a prefix"
    check_context(causal, longest, fix)
    if spec.train.packed is True and not causal.packs:
        raise UsageError(
            f"{spec.model} ({type(causal.network).__name__}) does not keep packed sequences apart",
            "set student.train.packed to false: its sequences are then padded",
        )
    parameters = list(causal.network.parameters())
    trained = sum(one.numel() for one in parameters if one.requires_grad)
    if not trained:
        raise UsageError(f"{spec.model} has no parameter that requires a gradient", "train at least one")
    if trained < sum(one.numel() for one in parameters):
        whole = sum(one.numel() for one in parameters)
        (progress or Silent()).say(f"note: {trained:,} of the {whole:,} parameters of the student are trained")

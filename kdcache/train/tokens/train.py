"""Stage two for language models, from the top: checks, training, and the run folder."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from kdcache.cache.reader import Cache
from kdcache.config.loss import code_digest, load_function
from kdcache.config.text import LanguageStudentSpec, TextPipeline
from kdcache.data.seeding import seeded
from kdcache.errors import CorruptError, InterruptedRun, counted
from kdcache.models.causal_lm import CausalLM
from kdcache.models.from_transformers_lm import load_causal_lm
from kdcache.models.language_models import (
    build_language_model,
    save_language_model,
    tokenizer_folder,
    tokenizer_of_cache,
    vocabulary_of,
)
from kdcache.runtime.devices import check_device
from kdcache.runtime.paths import expand
from kdcache.runtime.progress import Progress
from kdcache.runtime.terminal import reporter
from kdcache.runtime.user_code import digests_of
from kdcache.train.accelerator import described_settings, hidden_settings, ignored_settings
from kdcache.train.inputs import CacheOptions
from kdcache.train.plots import draw_token_curves
from kdcache.train.run_folder import check_run, check_trackers, complete_run, run_folder
from kdcache.train.tokens.inputs import (
    TokenInputs,
    check_student,
    check_token_pipeline,
    held_out_sequences,
    inputs_of_sequences,
    one_cache,
)
from kdcache.train.tokens.loop import TokenEpoch, fit_tokens

MODEL = "model"
"""Folder of the selected weights in a run folder; transformers loads it."""

WEIGHTS = f"{MODEL}/config.json"
"""File by which a complete run of a language model is recognized."""

_NOTHING_KEPT = (
    "interrupted before the first epoch was complete; no partial file was kept",
    "run it again to start from the beginning",
)


@dataclass(frozen=True)
class LanguageRunResult:
    """The result of a run of a language model.

    Attributes:
        model: with the selected weights.
        best: the selected epoch: the first of the lowest loss on held-out sequences; the last one without any.
        seconds: duration of training, with validation.
        folder: that transformers loads it from.
    """

    model: CausalLM
    best: TokenEpoch
    seconds: float
    folder: Path


def train_language_student(
    pipeline: TextPipeline,
    cache: Cache | Sequence[Cache] | None,
    out: str | Path,
    options: CacheOptions | None = None,
    *,
    device: torch.device | str = "cpu",
    progress: Progress | bool | None = None,
) -> LanguageRunResult:
    """Train the student of a pipeline of text on the sequences of a cache; the teacher itself is not loaded.

    If it is interrupted, the same call resumes after the last complete epoch.

    Args:
        pipeline: `student` and `loss` sections.
        cache: of sequences. A loss without a teacher is trained on its tokens, too.
        out: run folder. If it holds a complete run of the same settings, that one is returned.
        options: placement of the rows; the defaults if None.
        device: where to train.
        progress: True to show progress on stderr, or a progress reporter; silent if None.

    Raises:
        MismatchError: if the student has other tokens than the teacher, or `out` holds a run with other settings.
        InterruptedRun: on Ctrl-C; a KeyboardInterrupt that says what is kept.
        KdcacheError: if the inputs are inconsistent; before the first complete epoch, nothing is left behind.
    """
    pipeline.section("student")
    check_device(device)
    check_run(expand(out), WEIGHTS)
    caches = [] if cache is None else [cache] if isinstance(cache, Cache) else [*cache]
    try:
        inputs = inputs_of_sequences(one_cache(caches), options, device=device, progress=reporter(progress))
        return train_on_sequences(pipeline, inputs, out, device=device, progress=progress)
    except KeyboardInterrupt as interrupt:
        raise InterruptedRun.of(interrupt, *_NOTHING_KEPT) from None


def train_on_sequences(
    pipeline: TextPipeline,
    inputs: TokenInputs,
    out: str | Path,
    *,
    device: torch.device | str = "cpu",
    progress: Progress | bool | None = None,
) -> LanguageRunResult:
    """Train the student of a pipeline on inputs that several students may share; see `train_language_student`."""
    ignored = ignored_settings()
    with hidden_settings():
        return _train(pipeline, inputs, expand(out), torch.device(device), reporter(progress), ignored)


def _train(
    pipeline: TextPipeline,
    inputs: TokenInputs,
    out: Path,
    device: torch.device,
    progress: Progress,
    ignored: dict[str, str],
) -> LanguageRunResult:
    """Check the inputs of a run, train, and write the run folder."""
    spec: LanguageStudentSpec = pipeline.section("student")
    loss = load_function(pipeline.loss)
    pipeline = pipeline.model_copy(update={"loss": loss})
    check_run(out, WEIGHTS)
    check_token_pipeline(pipeline, inputs)
    check_trackers(spec.train.trackers)
    held = held_out_sequences(len(inputs.lengths), spec.train.held_out_fraction)
    if ignored:
        progress.say(f"note: {described_settings(ignored)}")
    code = code_digest(loss) | digests_of([spec.model])
    made_from: dict[str, Any] = {
        "network": "student",
        "caches": inputs.record["caches"],
        **({"code": code} if code else {}),
    }
    if out.exists():
        complete = result_of_language_run(out, complete_run(out, pipeline, made_from))
        progress.say(f"{out} is complete: nothing to do")
        return complete
    if held:
        progress.say(
            f"note: {counted(len(held), 'sequence')} of {len(inputs.lengths):,} are held out: the epoch with the "
            "lowest loss on them is selected"
        )
    begun_with = {
        **made_from,
        "device": device.type,
        # Rows that are read as a stream come in another order.
        "streamed": "stream" in inputs.record["placement"],
    }
    with (
        run_folder(out, pipeline, begun_with, spec.train.trackers) as run,
        torch.random.fork_rng([device] if device.type == "cuda" else []),
        seeded(spec.train.seed),
    ):
        torch.manual_seed(spec.train.seed)
        vocabulary = vocabulary_of(inputs.plan)
        special = vocabulary.special if vocabulary is not None else None
        causal = build_language_model(spec, inputs.sequences.encoding.num_classes, progress, special)
        check_student(causal, spec, inputs, progress)
        trained = fit_tokens(
            causal,
            inputs,
            held,
            spec.train,
            loss,
            device=device,
            on_epoch=run.epoch,
            checkpointer=run,
            progress=progress,
        )
        parameters = [*causal.network.parameters()]
        tokenizer = tokenizer_folder(spec) or tokenizer_of_cache(pipeline.teacher, inputs.plan)
        run.finish(
            lambda folder: save_language_model(causal.network, folder / MODEL, tokenizer),
            draw_token_curves,
            {
                **made_from,
                "loss": loss.title,
                "seed": spec.train.seed,
                "data_seed": spec.train.data_seed,
                "best": trained.best._asdict(),
                "epochs": len(trained.epochs),
                "test": None,
                "sequences": len(inputs.lengths) - len(held),
                "tokens": sum(inputs.lengths) - sum(inputs.lengths[index] for index in held),
                "held_out": len(held),
                "parameters": sum(one.numel() for one in parameters),
                "trained_parameters": sum(one.numel() for one in parameters if one.requires_grad),
                "seconds": round(trained.seconds, 3),
                "ignored_environment": ignored,
                "warnings": trained.warnings,
                **inputs.record,
            },
        )
    return LanguageRunResult(causal, trained.best, trained.seconds, out / MODEL)


def result_of_language_run(out: Path, metrics: dict[str, Any]) -> LanguageRunResult:
    """Return the result of a complete run.

    Raises:
        CorruptError: if its metrics are not those of a run.
        KdcacheError: if its weights cannot be read.
    """
    model = load_causal_lm(str(out / MODEL))
    try:
        best = TokenEpoch(**metrics["best"])
        return LanguageRunResult(model, best, float(metrics["seconds"]), out / MODEL)
    except (TypeError, ValueError, LookupError) as error:
        raise CorruptError(f"cannot read the metrics of {out}: {error}", f"delete {out}, and train again") from error

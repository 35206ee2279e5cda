"""Check whether a pipeline of text can run on this machine; all problems are reported, not only the first."""

from __future__ import annotations

import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import torch

from kdcache.config.text import TextPipeline
from kdcache.data.packing import token_batch
from kdcache.data.text import TokenizedText
from kdcache.data.tokenizer import load_tokenizer
from kdcache.doctor import Check, check, described_dump
from kdcache.dump.tokens.estimate import estimate_language_model
from kdcache.dump.tokens.inputs import TextInputs, load_inputs
from kdcache.dump.tokens.job import LanguageModelJob
from kdcache.dump.tokens.running import sequences_of
from kdcache.errors import counted
from kdcache.losses.chunked_head import chunked_loss
from kdcache.losses.config import Loss
from kdcache.models.language_models import build_language_model, tokenizer_folder
from kdcache.models.language_teacher import check_vocabulary_size
from kdcache.runtime.progress import Progress
from kdcache.train.run_folder import check_trackers
from kdcache.train.tokens.batches import in_micro_batches, with_packing
from kdcache.train.tokens.inputs import check_sequences

_MEMORY = "lower cache.batch_tokens for the teacher; set student.train.micro_batch_tokens for the student"


def examine_text_pipeline(
    pipeline: TextPipeline, out: Path, device: torch.device | str, progress: Progress
) -> Iterator[Check]:
    """Yield whether a pipeline of text can run here. A student alone is checked when its cache is given to it.

    Args:
        pipeline: its texts and teacher, and its student if it has one.
        out: the folder that the cache is to be written to.
        device: where the networks are to run.
        progress: progress reporter.
    """
    found: list[TextInputs] = []
    if pipeline.teacher is None:
        yield Check("teacher", "none in the pipeline: texts and student are checked beside a teacher")
        return
    yield check("text", lambda: _text(pipeline, found, progress), _MEMORY)
    for inputs in found:
        yield check("teacher", partial(_teacher, pipeline, inputs, out, device, progress), _MEMORY)
        if pipeline.student is not None:
            yield check("student", partial(_student, pipeline, inputs.text, device, progress), _MEMORY)


def _text(pipeline: TextPipeline, found: list[TextInputs], progress: Progress) -> str:
    """Load the teacher and the texts, and append them to `found`."""
    inputs = load_inputs(pipeline, progress)
    found.append(inputs)
    lengths = inputs.text.store.lengths()
    return (
        f"{inputs.text.name}: {counted(len(inputs.text), 'sequence')} of up to {int(lengths.max()):,} tokens, "
        f"{int(lengths.sum()):,} in all; {inputs.text.vocabulary_size:,} tokens in the vocabulary"
    )


def _teacher(
    pipeline: TextPipeline, inputs: TextInputs, out: Path, device: torch.device | str, progress: Progress
) -> str:
    """Run a pilot, and estimate the cache."""
    teacher, text = inputs
    names, cache = (text.name, text.split), out / "doctor.kdcache"  # nothing is written
    job = (teacher.model, teacher.identity, text, names, text.vocabulary, pipeline.cache, cache, device, progress)
    found = estimate_language_model(LanguageModelJob(*job))
    speed = f"{found.tokens_per_second:,.0f} tokens/s, {found.rows_per_second:,.0f} rows/s of head and encoding"
    return f"{speed}; {described_dump(found.bytes, found.seconds)}"


def _student(pipeline: TextPipeline, text: TokenizedText, device: torch.device | str, progress: Progress) -> str:
    """Run the forward and backward pass of a first micro-batch on the device, with cross-entropy."""
    spec = pipeline.section("student")
    check_trackers(spec.train.trackers)
    folder = tokenizer_folder(spec)
    if folder is not None and not isinstance(text.vocabulary, int):
        own = load_tokenizer(folder).vocabulary
        known = own.tokens[: len(text.vocabulary.tokens)]
        text.vocabulary.check_same(known, "the tokenizer of the teacher", f"that in {folder}")
    causal = build_language_model(spec, text.vocabulary_size, progress)
    check_vocabulary_size(causal, text.vocabulary_size, "the vocabulary of the teacher")
    lengths = text.store.lengths().tolist()
    check_sequences(causal, spec, lengths, progress)
    train = with_packing(spec.train, causal)
    first = in_micro_batches(range(len(text)), lengths, train)[0]
    batch = token_batch(sequences_of(text, first), train.max_length, packed=train.packed is True).to(device)
    causal.network.to(device).train()
    start = time.perf_counter()
    head = causal.head.cut(text.vocabulary_size)
    parts = chunked_loss(causal.hidden_states(batch), head, batch.labels, None, Loss.model_validate({"name": "ce"}))
    torch.autograd.backward(parts.total)
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize(device)
    seconds = time.perf_counter() - start
    parameters = sum(one.numel() for one in causal.network.parameters())
    return f"{parameters:,} parameters, {seconds:.2f} s for the first micro-batch, {batch.input_ids.numel():,} tokens"

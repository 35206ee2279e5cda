"""The language model, the tokenizer and the texts of a pipeline."""

from __future__ import annotations

from typing import NamedTuple

from kdcache.config.text import TextPipeline, TextSpec
from kdcache.data.text import TokenizedText, load_text
from kdcache.data.tokenizer import Tokenizer, has_tokenizer, load_tokenizer
from kdcache.dump.tokens.job import checked_encoding
from kdcache.errors import UsageError
from kdcache.models.language_teacher import (
    LoadedLanguageModel,
    check_context,
    check_vocabulary_size,
    load_language_teacher,
)
from kdcache.runtime.paths import expand
from kdcache.runtime.progress import Progress


class TextInputs(NamedTuple):
    """What stage one of a pipeline of text needs."""

    teacher: LoadedLanguageModel
    text: TokenizedText


def load_inputs(pipeline: TextPipeline, progress: Progress) -> TextInputs:
    """Return the trained language model of a pipeline, and its texts as tokens.

    What can be checked quickly is checked first: settings, tokenizer and network, then all texts.

    Raises:
        KdcacheError: if one is not found, or they do not fit.
    """
    spec, dataset = pipeline.section("teacher"), pipeline.dataset
    root_of(dataset)
    tokenizer = tokenizer_of(pipeline)
    loaded = load_language_teacher(spec, pipeline.cache.precision, progress)
    check_context(
        loaded.model, dataset.max_length, "set dataset.max_length to that or less (--set dataset.max_length=...)"
    )
    size = len(loaded.model.output.weight)
    if tokenizer is not None:
        check_vocabulary_size(loaded.model, len(tokenizer.vocabulary.tokens), str(tokenizer))
        size = len(tokenizer.vocabulary.tokens)
    checked_encoding(pipeline.cache, loaded.model, size)
    text = text_of(dataset, tokenizer, size, progress)
    return TextInputs(loaded, text)


def root_of(dataset: TextSpec) -> str:
    """Return the file or folder of the texts.

    Raises:
        UsageError: if the pipeline does not name one.
    """
    if dataset.root is None:
        raise UsageError(
            "the pipeline names no texts, which the teacher is to read",
            "set dataset.root to a .jsonl, .parquet or .txt file, or a folder",
        )
    return dataset.root


def text_of(dataset: TextSpec, tokenizer: Tokenizer | None, vocabulary_size: int, progress: Progress) -> TokenizedText:
    """Return the texts of a pipeline as tokens.

    Args:
        dataset: section of the texts.
        tokenizer: None only for records of token ids.
        vocabulary_size: V without a tokenizer.
        progress: progress reporter.
    """
    return load_text(
        root_of(dataset),
        tokenizer,
        format=dataset.format,
        column=dataset.column,
        max_length=dataset.max_length,
        taught=dataset.taught,
        append_eos=dataset.append_eos,
        vocabulary_size=vocabulary_size if tokenizer is None else None,
        progress=progress,
    )


def tokenizer_of(pipeline: TextPipeline) -> Tokenizer | None:
    """Return the tokenizer of a pipeline: the one that it names, or that of the teacher's folder; None without.

    Raises:
        UsageError: if it cannot be read.
        MismatchError: if it has other tokens than that of the teacher's folder.
    """
    kind, _, name = pipeline.teacher.model.partition(":") if pipeline.teacher is not None else ("", "", "")
    folder = expand(name) if kind == "hf" else None
    of_teacher = load_tokenizer(folder) if folder is not None and has_tokenizer(folder) else None
    if pipeline.dataset.tokenizer is None:
        return of_teacher
    named = load_tokenizer(pipeline.dataset.tokenizer)
    if of_teacher is not None:
        named.vocabulary.check_same(of_teacher.vocabulary.tokens, str(named), str(of_teacher))
    return named

"""Build the language model of a pipeline of text, and write it as a folder that transformers loads.

hf:FOLDER                 with the weights in the folder
transformers:TYPE         new; `args:` are keys of its configuration
path/file.py:function     function(vocab_size=V, **args) -> a causal language model of transformers, also in a wrapper
                          of peft; `vocab_size` is passed only if the function takes it
"""

from __future__ import annotations

import copy
import inspect
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from kdcache.cache.format.schema import Plan
from kdcache.cache.format.sequence_records import VocabularyRecord
from kdcache.cache.format.stored_sequences import check_same_tokens, digest_of_tokens
from kdcache.config.text import LanguageModelSpec
from kdcache.data.tokenizer import has_tokenizer, load_tokenizer
from kdcache.models.causal_lm import CausalLM, split_causal_lm
from kdcache.models.from_transformers_lm import load_causal_lm, new_causal_lm
from kdcache.models.language_teacher import network_of_user
from kdcache.runtime import user_code
from kdcache.runtime.paths import expand
from kdcache.runtime.progress import Progress
from kdcache.runtime.transformers_library import quiet

_SIGNATURE = "function(vocab_size=V, **args) -> a causal language model of transformers"

_SIZE = "vocab_size"

_TOKENIZER = (
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "spiece.model",
    "vocab.txt",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
)
"""Files of a folder of transformers that are of its tokenizer."""

_PAD = "pad_token_id"

ADAPTER = "adapter"
"""Folder of the weights that peft trained, beside that of the whole network."""


def build_language_model(
    spec: LanguageModelSpec,
    vocabulary_size: int,
    progress: Progress | None = None,
    special: Mapping[str, int] | None = None,
) -> CausalLM:
    """Return a language model on the CPU, with the random weights that the present seed gives if it is a new one.

    Args:
        spec: the section of a pipeline.
        vocabulary_size: V, the number of tokens of a new network; `args: {vocab_size: ...}` replaces it.
        progress: progress reporter; silent if None.
        special: ids of the special tokens of the vocabulary by name (bos, eos, pad), which a new network then ends
            texts with; `args:` replaces them. None for those of the library.

    Raises:
        KdcacheError: without transformers, for a folder, type, option or function that is not a language model with a
            linear head.
    """
    kind, _, name = spec.model.partition(":")
    if user_code.is_user_code(spec.model):
        return _of_user(spec, vocabulary_size)
    if kind == "hf":
        return load_causal_lm(name, torch.float32, progress=progress)
    ends = {f"{token}_token_id": special.get(token) for token in ("bos", "eos")} if special else {}
    made = new_causal_lm(name, {_SIZE: vocabulary_size, **ends, **spec.args})
    if special and _PAD not in spec.args:
        # Later than the weights: the embedding of a padding token would not be trained, and may be that of eos.
        for settings in (made.network.config, made.network.generation_config):
            setattr(settings, _PAD, special.get("pad"))
    return made


def _of_user(spec: LanguageModelSpec, vocabulary_size: int) -> CausalLM:
    """Return the network of a function of the user.

    Raises:
        UsageError: if it cannot be called, or does not return a network.
    """
    code = user_code.load(spec.model, "model", _SIGNATURE)
    try:
        parameters = inspect.signature(code.target).parameters.values()
    except (TypeError, ValueError):
        parameters = {}.values()
    takes_it = any(one.kind is one.VAR_KEYWORD or one.name == _SIZE for one in parameters)
    given = {_SIZE: vocabulary_size} if takes_it else {}
    with quiet():
        network = network_of_user(code, {**given, **spec.args})
    return split_causal_lm(network)


def tokenizer_folder(spec: LanguageModelSpec) -> Path | None:
    """Return the folder that has the tokenizer of a model beside its weights; None if it has none."""
    kind, _, name = spec.model.partition(":")
    folder = expand(name) if kind == "hf" else None
    return folder if folder is not None and has_tokenizer(folder) else None


def vocabulary_of(plan: Plan) -> VocabularyRecord | None:
    """Return the vocabulary of a cache of sequences; None for another one."""
    return plan.sequences.vocabulary if plan.sequences is not None else None


def tokenizer_of_cache(spec: LanguageModelSpec | None, plan: Plan) -> Path | None:
    """Return the folder of a teacher if it has the tokenizer that a cache was made with; else None."""
    folder = None if spec is None else tokenizer_folder(spec)
    record = vocabulary_of(plan)
    if folder is None or record is None or record.digest is None:
        return None
    return folder if digest_of_tokens(load_tokenizer(folder).vocabulary.tokens) == record.digest else None


def check_tokenizer(folder: Path | None, cache: Path, plan: Plan) -> None:
    """Check that the tokenizer of a student has the tokens of the teacher, by id; more of them may follow.

    Args:
        folder: with the tokenizer; None where there is none to compare.
        cache: folder of the cache.
        plan: of the cache. Where it knows only the number of tokens, nothing is compared.

    Raises:
        MismatchError: with the first id that differs, and both tokens.
    """
    record = vocabulary_of(plan)
    if folder is None or record is None or record.digest is None:
        return
    tokens = load_tokenizer(folder).vocabulary.tokens
    if digest_of_tokens(tokens) != record.digest:
        check_same_tokens(cache, plan, tokens, f"the tokenizer in {folder}")


def save_language_model(network: nn.Module, folder: Path, tokenizer: Path | None) -> None:
    """Write a network as a folder that transformers loads, with configuration and weights.

    Of a network in a wrapper of peft, the folder has all weights with those of the adapter merged into them, and the
    folder `adapter` beside it the adapter alone.

    Args:
        network: of transformers.
        folder: is created.
        tokenizer: folder whose tokenizer is copied; None without one.
    """
    whole: Any = network
    with quiet():
        if hasattr(network, "merge_and_unload"):
            whole.save_pretrained(folder.with_name(ADAPTER))
            whole = copy.deepcopy(whole).merge_and_unload()
        whole.save_pretrained(folder)
    if tokenizer is not None:
        for name in _TOKENIZER:
            if (tokenizer / name).is_file():
                shutil.copyfile(tokenizer / name, folder / name)

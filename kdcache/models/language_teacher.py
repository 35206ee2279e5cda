"""The language model of a pipeline: from a folder of transformers, or a function of the user."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

from kdcache.cache.format.verified_files import record_of
from kdcache.config.text import LanguageModelSpec
from kdcache.errors import MismatchError, UsageError
from kdcache.models.causal_lm import CausalLM, split_causal_lm
from kdcache.models.from_hf import CONFIG
from kdcache.models.from_transformers_lm import load_causal_lm
from kdcache.models.repeatable_weights import built_with_same_weights
from kdcache.models.teacher import TeacherIdentity
from kdcache.runtime import user_code
from kdcache.runtime.paths import expand
from kdcache.runtime.progress import Progress

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
"""Type of a network's weights, by the precision of a pipeline."""

_SIGNATURE = "function(**args) -> a causal language model of transformers"

_CONTEXTS = ("max_position_embeddings", "n_positions", "max_seq_len")
"""Keys of configurations with the most tokens that a network takes."""


class LoadedLanguageModel(NamedTuple):
    """A language model.

    Attributes:
        model: in its precision.
        identity: what distinguishes it from other networks with the same weights.
        folder: that it was read from, which may have its tokenizer; None for a function.
    """

    model: CausalLM
    identity: TeacherIdentity
    folder: Path | None


def load_language_teacher(spec: LanguageModelSpec, precision: str, progress: Progress) -> LoadedLanguageModel:
    """Return the trained language model of a pipeline.

    Args:
        spec: section of the teacher.
        precision: fp32, bf16 or fp16, of its weights.
        progress: progress reporter.

    Raises:
        KdcacheError: if it is not found, has no weights, or its head is not linear.
    """
    dtype = DTYPES[precision]
    kind, _, name = spec.model.partition(":")
    if user_code.is_user_code(spec.model):
        code = user_code.load(spec.model, "model", _SIGNATURE)
        fix = "let the function load trained weights, such as those of from_pretrained"
        network = built_with_same_weights(lambda: network_of_user(code, spec.args), spec.model, fix)
        identity = TeacherIdentity(spec.model.rpartition("/")[2], spec.args, user_code.digest_of(spec.model))
        return LoadedLanguageModel(split_causal_lm(network.to(dtype)), identity, None)
    if kind != "hf":
        raise UsageError(
            f"teacher.model {spec.model} is a new network with random weights",
            "give the folder of a trained one: hf:FOLDER, as save_pretrained writes it",
        )
    folder = expand(name)
    model = load_causal_lm(name, dtype, progress=progress)
    # The same weights compute something else with other settings, such as an activation.
    digest = f"sha256:{record_of(folder / CONFIG).sha256}"
    return LoadedLanguageModel(model, TeacherIdentity(f"hf:{folder.name}", {}, digest), folder)


def network_of_user(code: user_code.UserCode, arguments: Mapping[str, Any]) -> nn.Module:
    """Return the network that a function of the user returns.

    Raises:
        UsageError: if it raises, or returns something else.
    """
    network = code(**arguments)
    if not isinstance(network, nn.Module):
        raise code.mistake(f"returned a {type(network).__name__}, not a network")
    return network


def context_of(model: CausalLM) -> int | None:
    """Return the most tokens that a network takes; None if its configuration does not say."""
    config: Any = getattr(model.network, "config", None)
    text = getattr(config, "text_config", None) or config
    found = (getattr(text, key, None) for key in _CONTEXTS)
    return next((value for value in found if isinstance(value, int) and value > 0), None)


def check_context(model: CausalLM, length: int, fix: str) -> None:
    """Check that a network takes sequences of a length.

    Args:
        model: the network.
        length: in tokens.
        fix: how to make them shorter.

    Raises:
        MismatchError: if they are longer than its context.
    """
    context = context_of(model)
    if context is not None and length > context:
        raise MismatchError(
            f"sequences have up to {length:,} tokens, and {type(model.network).__name__} takes {context:,}", fix
        )


def check_vocabulary_size(model: CausalLM, size: int, where: str) -> None:
    """Check that a network has an output for each token of a vocabulary.

    Raises:
        MismatchError: if the vocabulary is larger.
    """
    rows = len(model.output.weight)
    if rows < size:
        raise MismatchError(
            f"{where} has {size:,} tokens, and the head of {type(model.network).__name__} {rows:,}",
            "use the tokenizer that the network was trained with, or resize the network to it "
            "(resize_token_embeddings) and train it",
        )

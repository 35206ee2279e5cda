"""Build causal language models of transformers, an optional extra: from folders of `save_pretrained`, or new ones.

Nothing is downloaded, and no code in the folder is run: the configuration names a network of the library.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from kdcache.errors import UsageError, did_you_mean
from kdcache.models.causal_lm import CausalLM, split_causal_lm
from kdcache.models.from_hf import configuration, pretrained
from kdcache.runtime.paths import expand
from kdcache.runtime.progress import Progress, Silent
from kdcache.runtime.transformers_library import first_line, library, quiet


def load_causal_lm(
    folder: str, dtype: torch.dtype = torch.float32, trained: bool = True, progress: Progress | None = None
) -> CausalLM:
    """Return the language model of a folder, in parts.

    Args:
        folder: that `save_pretrained` wrote.
        dtype: of the weights.
        trained: whether with its weights, or new ones for the same configuration.
        progress: progress reporter; silent if None.

    Raises:
        KdcacheError: without transformers, or for a folder that does not hold a causal language model with a linear
            head.
    """
    config = configuration(folder, ("MODEL_FOR_CAUSAL_LM_MAPPING",), "a causal language model")
    kind = library().AutoModelForCausalLM
    with quiet():
        model = pretrained(kind, expand(folder), config, progress or Silent()) if trained else kind.from_config(config)
    return split_causal_lm(model.to(dtype))


def new_causal_lm(kind: str, options: Mapping[str, Any], dtype: torch.dtype = torch.float32) -> CausalLM:
    """Return a new language model of a type that transformers knows, in parts.

    Args:
        kind: its `model_type`, such as "llama".
        options: keys of its configuration; others keep the defaults of the library.
        dtype: of the weights.

    Raises:
        UsageError: without transformers, for a type or an option that it does not know, or values that it refuses.
    """
    transformers = library()
    known = {config.model_type: config for config in transformers.MODEL_FOR_CAUSAL_LM_MAPPING}
    if kind not in known:
        raise UsageError(
            f"transformers has no causal language model of the type {kind!r}{did_you_mean(kind, known)}",
            "give a type such as llama, qwen3 or gemma3_text",
        )
    defaults = known[kind]()
    unknown = [key for key in options if not hasattr(defaults, key)]
    if unknown:
        raise UsageError(
            f"the configuration of {kind} has no {unknown[0]!r}{did_you_mean(unknown[0], defaults.to_dict())}",
            f"see the documentation of transformers: {type(defaults).__name__}",
        )
    try:
        with quiet():
            model = transformers.AutoModelForCausalLM.from_config(known[kind](**options))
    except Exception as error:  # its classes check some values, and layers others
        raise UsageError(
            f"transformers cannot build a {kind} model of these options: {first_line(error)}",
            "correct the options; the number of attention heads must divide hidden_size",
        ) from error
    return split_causal_lm(model.to(dtype))

"""Tiny language models of transformers, and sequences for them."""

from __future__ import annotations

from importlib import import_module
from typing import Any

import torch
from torch import Tensor

from kdcache.data.packing import TokenSequence
from kdcache.losses.token_targets import TokenTargets
from kdcache.models.causal_lm import CausalLM
from kdcache.models.from_transformers_lm import new_causal_lm

VOCABULARY_SIZE = 120
TINY: dict[str, Any] = {
    "vocab_size": VOCABULARY_SIZE,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}


def tiny(kind: str = "llama", dtype: torch.dtype = torch.float64, seed: int = 0, **options: Any) -> CausalLM:
    torch.manual_seed(seed)
    return new_causal_lm(kind, {**TINY, **options}, dtype)


def tiny_network(config: str, **options: Any) -> Any:
    """A network of transformers by the name of its configuration's class, with other keys than `TINY`."""
    transformers = import_module("transformers")
    torch.manual_seed(0)
    return transformers.AutoModelForCausalLM.from_config(getattr(transformers, config)(**options))


def sequences(lengths: list[int], seed: int = 0) -> list[TokenSequence]:
    """Sequences in which about two of three positions are taught."""
    generator = torch.Generator().manual_seed(seed)
    made = []
    for number, length in enumerate(lengths):
        tokens = torch.randint(VOCABULARY_SIZE, (length,), generator=generator)
        taught = torch.rand(length, generator=generator) < 2 / 3
        taught[-1] = False
        made.append(TokenSequence(number, tokens, taught))
    return made


def rows_of(targets: list[TokenTargets], rows: list[tuple[int, int]]) -> TokenTargets:
    """The targets of a batch, from those of each sequence."""
    return TokenTargets.concatenate([targets[number][:count] for number, count in rows])


def teacher_logits(given: list[TokenSequence], seed: int = 5) -> list[Tensor]:
    """Logits of the taught positions of each sequence."""
    generator = torch.Generator().manual_seed(seed)
    return [
        2 * torch.randn(int(each.taught.sum()), VOCABULARY_SIZE, generator=generator, dtype=torch.float64)
        for each in given
    ]

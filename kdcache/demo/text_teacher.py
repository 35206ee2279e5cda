"""The teacher of the demo of language models: a tokenizer and a small network, trained on texts from the start."""

from __future__ import annotations

import shutil
import time
from collections.abc import Iterable, Mapping, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from kdcache.data.packing import TokenBatch, TokenSequence, token_batch
from kdcache.data.seeding import seeded
from kdcache.data.text import TokenizedText, load_text
from kdcache.errors import UsageError
from kdcache.models.from_transformers_lm import new_causal_lm
from kdcache.models.language_models import save_language_model
from kdcache.runtime.atomic_write import move_into_place, temporary
from kdcache.runtime.progress import Progress
from kdcache.runtime.transformers_library import library, quiet
from kdcache.train.run_folder import write_json

END = "<|end|>"
"""The only special token of the tokenizer; its id is 0."""

TIMES = "training.json"
"""File of a teacher's folder with the duration of its training."""

_BATCH, _WARM_UP, _CLIP = 16, 0.1, 1.0
"""Sequences per step, share of the steps in which the learning rate rises, largest norm of a gradient."""


def check_libraries() -> None:
    """Check that the libraries of language models are installed.

    Raises:
        UsageError: if one is not.
    """
    library("language models", "lm")
    try:
        import_module("tokenizers")
    except ImportError:
        raise UsageError("a tokenizer is trained by the library tokenizers", "pip install 'kdcache[lm]'") from None


def train_tokenizer(texts: Iterable[str], vocabulary_size: int, folder: Path) -> None:
    """Train a byte-level BPE tokenizer, and write it as a folder that transformers loads.

    Args:
        texts: to train on.
        vocabulary_size: V at most; 256 bytes and the end of a text are among them.
        folder: to write to.
    """
    tokenizers = import_module("tokenizers")
    byte_level = tokenizers.pre_tokenizers.ByteLevel
    inner = tokenizers.Tokenizer(tokenizers.models.BPE())
    inner.pre_tokenizer = byte_level(add_prefix_space=False)
    inner.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=vocabulary_size,
        special_tokens=[END],
        initial_alphabet=byte_level.alphabet(),
        show_progress=False,
    )
    inner.train_from_iterator(texts, trainer)
    with quiet():
        library().PreTrainedTokenizerFast(tokenizer_object=inner, eos_token=END).save_pretrained(folder)


def batch_of(text: TokenizedText, which: Sequence[int]) -> TokenBatch:
    """Return some sequences of a text, padded."""
    sequences = []
    for index in which:
        ids, taught = text.tokens(index)
        sequences.append(TokenSequence(index, torch.from_numpy(ids.astype("int64")), torch.from_numpy(taught)))
    return token_batch(sequences, packed=False)


def train_text_teacher(
    root: Path,
    texts: Sequence[str],
    options: Mapping[str, Any],
    vocabulary_size: int,
    max_length: int,
    epochs: int,
    lr: float,
    out: Path,
    device: torch.device | str,
    progress: Progress,
) -> None:
    """Train a tokenizer and a llama network on texts, and write both to a folder, which is there once it is complete.

    Args:
        root: file of the texts.
        texts: the same ones.
        options: keys of the configuration of the network.
        vocabulary_size: V at most.
        max_length: tokens per sequence at most.
        epochs: passes over the texts.
        lr: highest learning rate of AdamW, which rises and falls again in one cycle.
        out: folder.
        device: where to train.
        progress: progress reporter.
    """
    begun, unfinished = time.perf_counter(), temporary(out)
    shutil.rmtree(unfinished, ignore_errors=True)
    train_tokenizer(texts, vocabulary_size, unfinished)
    text = load_text(root, unfinished, max_length=max_length)
    with seeded(0):
        network = _trained(text, options, epochs, lr, device, progress)
    save_language_model(network.cpu(), unfinished, None)
    write_json(unfinished / TIMES, {"seconds": round(time.perf_counter() - begun, 3)})
    move_into_place(unfinished, out)


def _trained(
    text: TokenizedText,
    options: Mapping[str, Any],
    epochs: int,
    lr: float,
    device: torch.device | str,
    progress: Progress,
) -> nn.Module:
    """Return a new network, trained to predict the next tokens of a text."""
    causal = new_causal_lm("llama", {**options, "vocab_size": text.vocabulary_size})
    network = causal.network.to(device).train()
    optimizer = torch.optim.AdamW(network.parameters(), lr=lr, betas=(0.9, 0.95), weight_decay=0.1)
    steps = epochs * -(-len(text) // _BATCH)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, steps, pct_start=_WARM_UP)
    with progress.task("training the teacher", steps, "steps") as task:
        for epoch in range(1, epochs + 1):
            for which in torch.split(torch.randperm(len(text)), _BATCH):
                batch = batch_of(text, which.tolist()).to(device)
                loss = F.cross_entropy(causal.head.logits(causal.hidden_states(batch)), batch.labels)
                optimizer.zero_grad()
                torch.autograd.backward(loss)
                nn.utils.clip_grad_norm_(network.parameters(), _CLIP)
                optimizer.step()
                schedule.step()
                task.advance(1, f"epoch {epoch} of {epochs}")
    return network

"""A folder with a tiny language model and its tokenizer, made without a network, and texts for them."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from importlib import import_module
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import torch

VOCABULARY_SIZE = 400
"""Tokens of the tokenizer; the head of the model has padding behind them."""

PAD, BOS, EOS = "<pad>", "<s>", "<|end|>"

MARKED = (
    "{% for m in messages %}<|{{ m.role }}|>\n"
    "{% if m.role == 'assistant' %}{% generation %}{{ m.content }}<|end|>{% endgeneration %}"
    "{% else %}{{ m.content }}<|end|>{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)
"""A chat template that marks what the assistant says."""

UNMARKED = MARKED.replace("{% generation %}", "").replace("{% endgeneration %}", "")

FORGETFUL = "{% for m in messages %}{{ loop.length }} {{ m.role }}: {{ m.content }}\n{% endfor %}"
"""A chat template that writes the first messages otherwise when others follow."""

DOCUMENTS = [text[:600] for text in list(topics.values())[:12]]

RECORDS = [{"text": document} for document in DOCUMENTS[:4]]


def write_tokenizer(
    folder: Path, template: str | None = MARKED, bos: bool = False, eos: bool = False, size: int = VOCABULARY_SIZE
) -> Path:
    """Write a byte-level BPE tokenizer; with `bos` or `eos` its call puts these tokens around a text."""
    tokenizers, transformers = import_module("tokenizers"), import_module("transformers")
    byte_level = tokenizers.pre_tokenizers.ByteLevel
    inner = tokenizers.Tokenizer(tokenizers.models.BPE())
    inner.pre_tokenizer = byte_level(add_prefix_space=False)
    inner.decoder = tokenizers.decoders.ByteLevel()
    special = [PAD, BOS, EOS, "<|user|>", "<|assistant|>", "<|system|>"]
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=size, special_tokens=special, initial_alphabet=byte_level.alphabet(), show_progress=False
    )
    inner.train_from_iterator(DOCUMENTS, trainer)
    if bos or eos:
        around = f"{f'{BOS} ' if bos else ''}$A{f' {EOS}' if eos else ''}"
        ids = [(token, inner.token_to_id(token)) for token in (BOS, EOS)]
        inner.post_processor = tokenizers.processors.TemplateProcessing(single=around, special_tokens=ids)
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=inner, pad_token=PAD, eos_token=EOS, bos_token=BOS if bos else None
    )
    tokenizer.chat_template = template
    tokenizer.save_pretrained(folder)
    return folder


def write_teacher(folder: Path, kind: str = "LlamaConfig", seed: int = 0, **options: Any) -> Path:
    """Write a language model whose logits differ enough from one another, and its tokenizer."""
    transformers = import_module("transformers")
    torch.manual_seed(seed)
    config = getattr(transformers, kind)(
        **{
            "vocab_size": VOCABULARY_SIZE + 12,
            "hidden_size": 24,
            "intermediate_size": 32,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "num_key_value_heads": 1,
            "max_position_embeddings": 64,
            "tie_word_embeddings": False,
            "bos_token_id": 1,
            "eos_token_id": 2,
            "pad_token_id": 0,
            **options,
        }
    )
    network = transformers.AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        network.lm_head.weight.mul_(30)
    network.save_pretrained(folder)
    return write_tokenizer(folder)


def write_lines(path: Path, records: Iterable[Mapping[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def write_pipeline(path: Path, root: Path, teacher: Path, dataset: str = "", cache: str = "") -> Path:
    """Write a pipeline of text, with shards of 20 sequences."""
    path.write_text(
        f"dataset: {{name: text, root: '{root}', max_length: 48{dataset}}}\n"
        f"teacher: {{model: 'hf:{teacher}'}}\n"
        f"cache: {{top_k: 4, rank: 6, pilot_rows: 200, shard_sequences: 20, batch_tokens: 200{cache}}}\n"
    )
    return path

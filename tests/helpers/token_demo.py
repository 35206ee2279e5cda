"""The demo of language models in a few seconds: fewer topics, smaller networks, one student per loss."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from kdcache.demo.tokens import TokenDemo, TokenDemoSizes, run_token_demo
from kdcache.runtime.progress import Silent


def network(hidden_size: int) -> dict[str, Any]:
    return {
        "hidden_size": hidden_size,
        "intermediate_size": 2 * hidden_size,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "max_position_embeddings": 128,
        "tie_word_embeddings": True,
        "bos_token_id": None,
        "eos_token_id": 0,
    }


SMALL = TokenDemoSizes(
    vocabulary=280,
    topics=5,
    teacher=network(16),
    student=network(8),
    teacher_epochs=1,
    student_epochs=1,
    rank=4,
    pilot_rows=200,
)


def small_demo(out: Path) -> TokenDemo:
    return run_token_demo(out, 1, "cpu", Silent(), SMALL)

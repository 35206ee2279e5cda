"""Answers of vLLM and SGLang, written from dense log-probabilities as their source writes them.

vllm-project/vllm@578b601: `Sampler.gather_logprobs` puts the prompt's own token before the top k, and its rank is the
number of tokens that are at least as probable; `append_logprobs_for_next_position` makes a dictionary of them, or
appends them to `FlatLogprobs`. A server sends dictionaries as JSON, whose keys are strings.

sgl-project/sglang@001067f: `detokenize_logprob_tokens` makes [log-probability, id, text], None before the first.
"""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

SIZE, K = 50, 4


def prompts(
    lengths: tuple[int, ...] = (7, 2, 12, 5), size: int = SIZE, seed: int = 0
) -> list[tuple[list[int], Tensor]]:
    """Return prompts, and of each the log-probabilities of the next token at each position, [L, V] float32."""
    generator = torch.Generator().manual_seed(seed)
    made = []
    for length in lengths:
        logits = torch.randn(length, size, generator=generator) * 3
        ids = torch.randint(0, size, (length,), generator=generator)
        # Some prompt tokens are the most probable ones, and some the last of the top k.
        for position in range(length - 1):
            if position % 3 < 2:
                ids[position + 1] = logits[position].topk(K).indices[(0, K - 1)[position % 3]]
        made.append((ids.tolist(), logits.log_softmax(dim=1)))
    return made


def gathered(ids: list[int], log_probs: Tensor, k: int) -> list[tuple[list[int], list[float], int]]:
    """Tokens, log-probabilities and the rank of the first of them, per token of the prompt from the second on."""
    rows = []
    for position, token in enumerate(ids[1:]):
        row = log_probs[position]
        top = row.topk(k)
        rank = int((row >= row[token]).sum())
        rows.append(([token, *top.indices.tolist()], [float(row[token]), *top.values.tolist()], rank))
    return rows


def vllm_dicts(ids: list[int], log_probs: Tensor, k: int = K) -> list[dict[int, dict[str, Any]] | None]:
    """`RequestOutput.prompt_logprobs`, each Logprob as `dataclasses.asdict` has it."""
    entries: list[dict[int, dict[str, Any]] | None] = [None]
    for tokens, values, rank in gathered(ids, log_probs, k):
        ranks = itertools.chain((rank,), range(1, k + 1))
        entries.append(
            {
                token: {"logprob": value, "rank": place, "decoded_token": f"<{token}>"}
                for token, value, place in zip(tokens, values, ranks, strict=True)
            }
        )
    return entries


def vllm_early_v1(ids: list[int], log_probs: Tensor, k: int = K) -> list[dict[int, dict[str, Any]] | None]:
    """The same of vllm-project/vllm@016e747, `_make_pos_logprob_dict`: behind the top k, the rank is k + 1 whatever."""
    entries: list[dict[int, dict[str, Any]] | None] = [None]
    for (own, *tokens), (value, *values), _ in gathered(ids, log_probs, k):
        entry = {
            token: {"logprob": one, "rank": place}
            for place, (token, one) in enumerate(zip(tokens, values, strict=True), 1)
        }
        entries.append(entry if own in entry else {**entry, own: {"logprob": value, "rank": k + 1}})
    return entries


def vllm_numbers(ids: list[int], log_probs: Tensor, k: int = K) -> list[dict[int, float] | None]:
    """The same with the number alone per token."""
    return [
        None if entry is None else {token: value["logprob"] for token, value in entry.items()}
        for entry in vllm_dicts(ids, log_probs, k)
    ]


def vllm_flat(ids: list[int], log_probs: Tensor, k: int = K) -> dict[str, list[Any]]:
    """`FlatLogprobs`, as `dataclasses.asdict` has it: the prompt's own token is there twice if it is in the top k."""
    flat: dict[str, list[Any]] = {
        name: [] for name in ("start_indices", "end_indices", "token_ids", "logprobs", "ranks", "decoded_tokens")
    }
    flat["start_indices"].append(0)
    flat["end_indices"].append(0)
    for tokens, values, rank in gathered(ids, log_probs, k):
        flat["start_indices"].append(len(flat["logprobs"]))
        flat["token_ids"] += tokens
        flat["logprobs"] += values
        flat["ranks"] += [rank, *range(1, k + 1)]
        flat["decoded_tokens"] += [None] * (k + 1)
        flat["end_indices"].append(len(flat["logprobs"]))
    return flat


def sglang(ids: list[int], log_probs: Tensor, k: int = K, start: int = 0) -> dict[str, Any]:
    """`meta_info` of an answer to a request with `logprob_start_len`."""
    own: list[list[Any]] = [[None, ids[start], None]]
    top: list[list[list[Any]] | None] = [None]
    for position in range(start, len(ids) - 1):
        row = log_probs[position]
        best = row.topk(k)
        own.append([float(row[ids[position + 1]]), ids[position + 1], None])
        top.append(
            [[value, token, None] for value, token in zip(best.values.tolist(), best.indices.tolist(), strict=True)]
        )
    return {
        "prompt_tokens": len(ids),
        "completion_tokens": 1,
        "input_token_logprobs": own,
        "output_token_logprobs": [[-0.1, 3, None]],
        "input_top_logprobs": top,
        "output_top_logprobs": [[[-0.1, 3, None]]],
    }


def write_lines(path: Path, records: list[Any]) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path

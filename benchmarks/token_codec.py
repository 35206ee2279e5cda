"""Measure the cost and the size of rows of next-token distributions: `python benchmarks/token_codec.py`.

Milliseconds of one core per row, user and system, of encoding logits of a vocabulary of 49,152 tokens as `ghost` (the
16 most probable tokens, and the mass of the others at four temperatures) and as `lowrank` (also 32 coordinates of the
others); their parts; and bytes per row on disk. The bounds are 1 and 3 ms.

The logits are made up: a rank of 128 with falling singular values, and a bias of each token. `--logits FILE.pt` takes
those of a model, a tensor [n, V].
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from kdcache.cache.format.tail_basis import TailBasis
from kdcache.cache.format.token_codec import encode_tokens, largest_tokens
from kdcache.cache.format.token_encoding import TOKEN_TEMPERATURES, TokenEncoding
from kdcache.cache.format.token_tails import fit_tails, tail_weights
from kdcache.cache.format.zarr_store import bytes_per_row
from kdcache.cache.token_basis import fit_token_basis
from kdcache.cli import output

_TOP_K, _RANK, _STEP = 16, 32, 0.4
_PILOT = 512
_ROWS_AT_ONCE = 40


def main() -> None:
    """Print the table."""
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--logits", type=Path, help="file of a tensor [n, V]; default: made up")
    arguments.add_argument("--size", type=int, default=49_152, help="tokens of the vocabulary that is made up")
    arguments.add_argument("--rows", type=int, default=512, help="rows that are encoded")
    arguments.add_argument("--rounds", type=int, default=3)
    arguments.add_argument(
        "--quick", action="store_true", help="small sizes; the results do not compare with the bounds"
    )
    asked = arguments.parse_args()
    torch.set_num_threads(1)
    size, rows = (2000, 64) if asked.quick else (asked.size, asked.rows)
    logits = _made_up(_PILOT + rows, size) if asked.logits is None else torch.load(asked.logits, weights_only=True)
    pilot, logits = logits[: len(logits) // 2][:_PILOT].float(), logits[len(logits) // 2 :][:rows].float()
    basis = fit_token_basis(pilot, _TOP_K, _RANK, _STEP)
    labels = logits.argmax(dim=1)
    size = logits.shape[1]

    def encoding(rank: int) -> TokenEncoding:
        return TokenEncoding(
            num_classes=size,
            top_k=_TOP_K,
            tail="lowrank" if rank else "ghost",
            rank=rank,
            dtype="float16",
            level=True,
            temperatures=TOKEN_TEMPERATURES,
        )

    def blocks(work: Callable[[Tensor], object]) -> Callable[[], object]:
        return lambda: [work(logits[start : start + _ROWS_AT_ONCE]) for start in range(0, len(logits), _ROWS_AT_ONCE)]

    def fit(some: Tensor) -> Tensor:
        return fit_tails(some, tail_weights(some), largest_tokens(some, _TOP_K)[0], basis)

    def encoded(rank: int, of: TailBasis | None) -> Callable[[], object]:
        return lambda: encode_tokens(logits, labels, encoding(rank), of)

    tasks: dict[str, tuple[Callable[[], object], str]] = {
        "topk of torch, k + 32": (blocks(lambda some: some.topk(_TOP_K + 32, dim=1)), ""),
        "head, equal logits in order": (blocks(lambda some: largest_tokens(some, _TOP_K)), ""),
        "softmax of torch": (blocks(lambda some: some.softmax(dim=1)), ""),
        "ghost": (encoded(0, None), "1"),
        "weights, head and coordinates": (blocks(fit), ""),
        f"lowrank, R = {_RANK}": (encoded(_RANK, basis), "3"),
    }
    sizes = {
        "ghost": bytes_per_row(encoding(0), encode_tokens(logits, labels, encoding(0))),
        f"lowrank, R = {_RANK}": bytes_per_row(encoding(_RANK), encode_tokens(logits, labels, encoding(_RANK), basis)),
    }
    output.table(
        f"{len(logits)} rows of {size:,} tokens, one core",
        ["work", "ms per row", "bound", "bytes per row"],
        [
            [
                name,
                f"{_cost(task, len(logits), asked.rounds):.3f}",
                bound,
                f"{sizes[name]:.1f}" if name in sizes else "",
            ]
            for name, (task, bound) in tasks.items()
        ],
    )


def _cost(task: Callable[[], object], rows: int, rounds: int) -> float:
    """Return the least CPU time of a task, in milliseconds per row."""
    task()
    costs = []
    for _ in range(rounds):
        begin = os.times()
        task()
        end = os.times()
        costs.append(end.user - begin.user + end.system - begin.system)
    return min(costs) / rows * 1e3


def _made_up(rows: int, size: int) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    axes = torch.randn(size, 128, generator=generator) * torch.arange(1, 129) ** -0.5
    features = 2 * torch.randn(rows, 128, generator=generator)
    return features @ axes.T + 2 * torch.randn(size, generator=generator)


if __name__ == "__main__":
    main()

"""Compare steps of a language model from stored targets with cross-entropy: `python benchmarks/token_losses.py`.

A new Llama with six layers of width 576 and 49,152 tokens takes steps on packed sequences: forward and backward, with
cross-entropy of whole logits; with KD in chunks from the teacher's mass outside 16 tokens, or with 32 coordinates of
the tail; and with KD as it is usually written, from logits of all positions of student and teacher at once. All on the
same device, interleaved, in float32; medians. The bound is 1.10 of cross-entropy.
"""

from __future__ import annotations

import argparse

import torch
from common import in_turn
from torch import Tensor
from torch.nn import functional as F

import kdcache
from kdcache.cli import output
from kdcache.losses.token_targets import TEMPERATURES, scaled_logits
from kdcache.models.from_transformers_lm import new_causal_lm

_BOUND = 1.10
_TOP_K, _RANK, _LENGTH = 16, 32, 128


def made_up_targets(positions: int, vocabulary_size: int, device: str) -> kdcache.TokenTargets:
    """Return targets whose head has 70% of the mass."""
    generator = torch.Generator().manual_seed(0)
    parts = torch.randn(positions, _TOP_K, generator=generator).softmax(dim=1)
    return kdcache.TokenTargets(
        torch.rand(positions, vocabulary_size // 8, generator=generator).topk(_TOP_K, dim=1).indices,
        (0.7 * parts).log().sort(dim=1, descending=True).values,
        torch.tensor([0.3, 0.5, 0.8, 0.95]).log().expand(positions, -1),
        TEMPERATURES,
        vocabulary_size,
        logsumexp=torch.zeros(positions),
        coordinates=torch.randn(positions, _RANK, generator=generator),
        basis=0.5 * torch.randn(_RANK, vocabulary_size, generator=generator),
        mean=torch.zeros(vocabulary_size),
    ).to(device)


def main() -> None:
    """Print the table."""
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    usual = "cuda" if torch.cuda.is_available() else "cpu"
    arguments.add_argument("--device", default=usual, help=f"device; default {usual}")
    arguments.add_argument("--rounds", type=int, default=5)
    arguments.add_argument("--layers", type=int, default=6, help="layers of the student; default 6")
    arguments.add_argument(
        "--quick", action="store_true", help="small sizes; the results do not compare with the bounds"
    )
    asked = arguments.parse_args()
    width, vocabulary_size, count = (36, 1_000, 2) if asked.quick else (576, 49_152, 4)
    layers, rounds = (1, 1) if asked.quick else (asked.layers, asked.rounds)
    torch.manual_seed(0)
    options = {
        "vocab_size": vocabulary_size,
        "hidden_size": width,
        "intermediate_size": 8 * width // 3,
        "num_hidden_layers": layers,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "tie_word_embeddings": True,
    }
    student = new_causal_lm("llama", options)
    student.network.to(asked.device)
    taught = torch.arange(_LENGTH + 1) < _LENGTH
    drawn = torch.randint(vocabulary_size, (count, _LENGTH + 1))
    batch = kdcache.token_batch([kdcache.TokenSequence(at, row, taught) for at, row in enumerate(drawn)])
    batch = batch.to(asked.device)
    targets = made_up_targets(len(batch.labels), vocabulary_size, asked.device)
    kd, mass_alone = kdcache.loss("kd", tau=1), kdcache.loss("kd", tau=1, tail="student")

    def step(total: Tensor) -> None:
        torch.autograd.backward(total)
        student.network.zero_grad()

    def in_chunks(loss: kdcache.DistillationLoss) -> None:
        hidden = student.hidden_states(batch)
        step(loss.of_tokens(hidden, student.head, batch.labels, targets).total)

    def cross_entropy() -> None:
        step(F.cross_entropy(student.head.logits(student.hidden_states(batch)), batch.labels))

    def at_once() -> None:
        logits = student.head.logits(student.hidden_states(batch))
        teacher = scaled_logits(targets, 1.0)
        value = F.kl_div(logits.log_softmax(1), teacher.log_softmax(1), log_target=True, reduction="batchmean")
        step(0.9 * value + 0.1 * F.cross_entropy(logits, batch.labels))

    works = {
        "cross-entropy": cross_entropy,
        f"KD, top {_TOP_K} and the mass of the tail": lambda: in_chunks(mass_alone),
        f"KD, top {_TOP_K} and {_RANK} coordinates": lambda: in_chunks(kd),
        "KD, all logits at once": at_once,
    }
    seconds = in_turn(works, rounds, asked.device)
    on_cpu = f"{torch.get_num_threads()} CPU threads"
    name = on_cpu if asked.device == "cpu" else torch.cuda.get_device_name(asked.device)
    bounds = {work: f"{_BOUND:.2f}" for work in works if work.startswith("KD, top")}
    output.table(
        f"steps of {len(batch.labels)} positions; {layers} layers of width {width}, {vocabulary_size:,} tokens; {name}",
        ["work", "ms", "per cross-entropy", "bound"],
        [
            [work, f"{1000 * taken:.1f}", f"{taken / seconds['cross-entropy']:.2f}", bounds.get(work, "")]
            for work, taken in seconds.items()
        ],
    )


if __name__ == "__main__":
    main()

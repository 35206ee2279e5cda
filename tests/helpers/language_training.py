"""Caches of tiny teachers of language models, trainers of tiny students, and the dense computation of their steps."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from helpers.language_models import VOCABULARY_SIZE, sequences, tiny
from kdcache import Cache, CausalLM, TokenCacheSpec, TokenSequence, write_token_cache
from kdcache.cache.sequences import CachedSequences
from kdcache.config.text import TextPipeline, TokenTrainSpec, at_temperature_1
from kdcache.losses import Loss
from kdcache.train.tokens.batches import EpochPlan, cut_epoch, sequence_lengths
from kdcache.train.tokens.step import TokenTrainer

LENGTHS = [9, 4, 23, 3, 7, 12, 2, 30, 16]


ALL = list(range(len(LENGTHS)))

WAYS: dict[str, dict[str, Any]] = {
    "packed": {},
    "padded": {"packed": False},
    "micro-batches": {"micro_batch_tokens": 25},
    "padded micro-batches": {"micro_batch_tokens": 40, "packed": False},
    "one sequence at a time": {"micro_batch_tokens": 1},
}

LOSSES: dict[str, dict[str, Any]] = {
    "kd": {"name": "kd"},
    "kd at T = 2": {"name": "kd", "temperature": {"tau": 2.0}},
    "the student's tail": {"name": "kd", "tail": "student"},
    "rkl": {"name": "rkl"},
    "dtkd": {"name": "dtkd"},
    "dkd": {"name": "dkd"},
    "ka+dtd": {"name": "ka+dtd"},
    "cwsm": {"name": "cwsm", "temperature": {"tau": 2.0}},
    "ctkd": {"name": "ctkd", "temperature": {"ramp_epochs": 1}},
    "zscore": {"name": "zscore"},
    "ce": {"name": "ce"},
}


class Taught(NamedTuple):
    """Sequences, and logits of a teacher at the taught positions of each, [n, V] float64."""

    sequences: list[TokenSequence]
    logits: list[Tensor]


def taught(lengths: Sequence[int] = LENGTHS, seed: int = 3) -> Taught:
    """Sequences whose logits lie near a subspace of six dimensions; the first position of each is taught."""
    generator = torch.Generator().manual_seed(seed)
    head = 1.5 * torch.randn(VOCABULARY_SIZE, 6, generator=generator, dtype=torch.float64)
    found = sequences([*lengths], seed)
    logits = []
    for each in found:
        each.taught[0] = True
        count = int(each.taught.sum())
        noise = 0.3 * torch.randn(count, VOCABULARY_SIZE, generator=generator, dtype=torch.float64)
        logits.append(torch.randn(count, 6, generator=generator, dtype=torch.float64) @ head.T + noise)
    return Taught(found, logits)


def cache_of(given: Taught, out: Path, **settings: Any) -> Cache:
    """Write a cache; by default with all probabilities but the smallest one in float32, so that nothing is lost."""
    spec = TokenCacheSpec(**{"top_k": VOCABULARY_SIZE - 1, "dtype": "float32", "shard_sequences": 4, **settings})
    return write_token_cache(
        [each.tokens.numpy() for each in given.sequences],
        given.logits,
        out,
        vocabulary=VOCABULARY_SIZE,
        taught=[each.taught.numpy().astype(bool) for each in given.sequences],
        spec=spec,
    )


def loss_of(**given: Any) -> Loss:
    return Loss.model_validate(at_temperature_1(given))


def spec_of(**given: Any) -> TokenTrainSpec:
    plain = {"packed": True, "optimizer": "sgd", "lr": 0.1, "momentum": 0.0, "nesterov": False, "weight_decay": 0.0}
    return TokenTrainSpec.model_validate({**plain, "schedule": "constant", "max_grad_norm": None, **given})


class Step(NamedTuple):
    """The loss of a step, and the weights after it."""

    parts: tuple[Tensor, ...]
    weights: dict[str, Tensor]


def by_the_trainer(
    teacher: CachedSequences, which: Sequence[int], loss: Loss, model: CausalLM | None = None, **settings: Any
) -> Step:
    """Take one step of a step's sequences with the trainer, on this process's part of them."""
    spec = spec_of(batch_tokens=10_000, **settings)
    causal = model or tiny()
    lengths = sequence_lengths(teacher.token_start)
    trainer = TokenTrainer(causal, spec, loss, EpochPlan(teacher, lengths, [], spec))
    (cut,) = cut_epoch(which, lengths, spec, trainer.ranks)
    causal.network.train()
    parts = trainer.step(cut[trainer.accelerator.process_index], 1)
    (whole,) = trainer.reduced([parts])
    return Step(tuple(whole), copy.deepcopy(causal.network.state_dict()))


def by_hand(given: Taught, which: Sequence[int], tau: float = 1.0, max_length: int | None = None) -> Step:
    """Take the same step for kd with the logits [1, T, V] of each sequence alone, and F.kl_div, in float64."""
    network = tiny().network
    optimizer = torch.optim.SGD(network.parameters(), lr=0.1)
    kl, cross_entropy, count = torch.zeros((), dtype=torch.float64), torch.zeros((), dtype=torch.float64), 0
    for index in which:
        tokens, mask = given.sequences[index].tokens[:max_length], given.sequences[index].taught[:max_length].clone()
        mask[-1] = False
        logits = network(input_ids=tokens[None]).logits[0]
        at = mask.nonzero().squeeze(1)
        teacher = given.logits[index][: len(at)]
        divergence = F.kl_div(
            (logits[at] / tau).log_softmax(dim=1),
            (teacher / tau).log_softmax(dim=1),
            reduction="sum",
            log_target=True,
        )
        kl = kl + tau**2 * divergence
        cross_entropy = cross_entropy + F.cross_entropy(logits[at], tokens[at + 1], reduction="sum")
        count += len(at)
    total = (0.9 * kl + 0.1 * cross_entropy) / count
    torch.autograd.backward(total)
    optimizer.step()
    parts = total.detach(), (cross_entropy / count).detach(), (0.9 * kl / count).detach()
    return Step(parts, network.state_dict())


def check_same(found: Step, expected: Step, tolerance: float = 1e-6) -> None:
    for one, other in zip(found.parts, expected.parts, strict=False):
        torch.testing.assert_close(one.double(), other.double(), rtol=tolerance, atol=tolerance)
    for name, value in expected.weights.items():
        torch.testing.assert_close(found.weights[name], value, rtol=tolerance, atol=tolerance, msg=name)


def text_pipeline(model: str = "transformers:llama", args: Any = None, **sections: Any) -> TextPipeline:
    """Return a pipeline of text whose student is a tiny new network."""
    small = {
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "max_position_embeddings": 64,
    }
    train = {"epochs": 2, "batch_tokens": 40, "lr": 0.01, "seed": 5, **sections.pop("train", {})}
    student = {"model": model, "args": small if args is None else args, "train": train}
    return TextPipeline.model_validate({"dataset": {"name": "text"}, "student": student, **sections})

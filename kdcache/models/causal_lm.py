"""A causal language model as a body, which gives hidden states, and a linear head, whose logits are made in chunks.

Works with any network that has the interface of transformers' causal language models. Whether its head is what it looks
like is decided on a few tokens: the logits of the whole network are compared with those of body and head.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import product
from typing import Any

import torch
from torch import Tensor, nn

from kdcache.data.packing import TokenBatch, TokenSequence, token_batch
from kdcache.errors import UsageError
from kdcache.losses.lm_head import LMHead

_SCALES = ("logit_scale", "lm_head_multiplier", "output_multiplier", "logits_scaling")
"""Keys of configurations whose value the logits are multiplied with (Cohere, Falcon-H1; HyperCLOVA X)."""

_DIVISORS = ("logits_scaling",)
"""Keys of configurations whose value the logits are divided by (Granite)."""

_SOFTCAPS = ("final_logit_softcapping",)
"""Keys of configurations with the bound of the logits (Gemma 2)."""

_ROUNDING = 16
"""Largest difference between two ways to compute values, in units of rounding of the largest one."""


@dataclass(frozen=True)
class CausalLM:
    """A network, and the parts of it that a loss in chunks needs.

    Attributes:
        network: what is trained and saved.
        body: the part that gives the last hidden states.
        output: the linear layer behind them, whose weights may be those of the embedding.
        scale: factor of the logits.
        softcap: bound of the logits; None without.
        packs: whether it keeps packed sequences apart. Networks that ignore the positions that they are given, such as
            recurrent ones, do not.
    """

    network: nn.Module
    body: nn.Module
    output: nn.Linear
    scale: float = 1.0
    softcap: float | None = None
    packs: bool = True

    @property
    def head(self) -> LMHead:
        """The head with the present weights; rows of a padded vocabulary are part of it."""
        return LMHead(self.output.weight, self.output.bias, self.scale, self.softcap)

    def hidden_states(self, batch: TokenBatch) -> Tensor:
        """Return the last hidden states of the taught positions of a batch, [n, d].

        Raises:
            UsageError: for packed sequences that the network does not keep apart.
        """
        if not self.packs and batch.attention_mask is None and len(batch.rows) > 1:
            raise UsageError(
                f"{type(self.network).__name__} does not keep packed sequences apart: it ignores their positions",
                "make batches with token_batch(sequences, packed=False)",
            )
        found: Tensor = self.body(
            input_ids=batch.input_ids,
            position_ids=batch.position_ids,
            attention_mask=batch.attention_mask,
            use_cache=False,  # with a cache of keys, positions no longer separate packed sequences
        ).last_hidden_state
        return batch.taught_of(found)


def split_causal_lm(network: nn.Module) -> CausalLM:
    """Return the body and the head of a causal language model.

    Args:
        network: of transformers, also inside a wrapper of peft.

    Raises:
        UsageError: if its head is not a linear layer, alone or scaled and capped as its configuration says.
    """
    inner: Any = network.get_base_model() if hasattr(network, "get_base_model") else network  # type: ignore[operator]
    body = getattr(inner, getattr(inner, "base_model_prefix", ""), None)
    output = inner.get_output_embeddings() if hasattr(inner, "get_output_embeddings") else None
    if not isinstance(body, nn.Module) or body is inner or type(output) is not nn.Linear:
        found = "no body" if not isinstance(body, nn.Module) else f"the head {type(output).__name__}"
        raise UsageError(
            f"{type(inner).__name__} has {found}, and not a body with a linear head",
            "use a causal language model of transformers; with LoRA, leave its head (lm_head) as it is",
        )
    scales, softcaps = _of_configuration(getattr(inner, "config", None))
    errors = []
    with torch.no_grad(), _evaluating(network):
        batch = _pilot(network, len(output.weight))
        expected = network(input_ids=batch.input_ids, use_cache=False).logits.flatten(0, 1)[batch.taught].float()
        limit = _rounding(output, expected)
        for scale, softcap in product(scales, softcaps):
            model = CausalLM(network, body, output, scale, softcap)
            logits = model.head.logits(model.hidden_states(batch))
            if logits.shape == expected.shape:
                errors.append(float((logits - expected).abs().max()))
                if errors[-1] <= limit:
                    return replace(model, packs=_keeps_packed_sequences_apart(model))
    apart = min(errors, default=float("nan"))
    raise UsageError(
        f"the logits of {type(inner).__name__} differ by {apart:.3g} from those of a linear head on its body",
        "use a network whose logits are a linear function of its last hidden states, scaled or capped as its "
        "configuration says",
    )


def _keeps_packed_sequences_apart(model: CausalLM) -> bool:
    """Return whether hidden states of packed sequences are those of each sequence alone."""
    vocabulary_size = len(model.output.weight)
    generator = torch.Generator().manual_seed(1)
    sequences = []
    for index, length in enumerate((5, 3, 1, 7)):
        tokens = torch.randint(vocabulary_size, (length + 1,), generator=generator)
        sequences.append(TokenSequence(index, tokens, torch.arange(length + 1) < length))
    device = model.output.weight.device
    with torch.no_grad(), _evaluating(model.network):
        together = model.hidden_states(token_batch(sequences).to(device)).float()
        alone = [model.hidden_states(token_batch([each], packed=False).to(device)).float() for each in sequences]
    return float((together - torch.cat(alone)).abs().max()) <= _rounding(model.output, together)


def _rounding(output: nn.Linear, values: Tensor) -> float:
    """Return how far values that should be equal may be apart: normalizations are float32, also in float64."""
    unit = max(torch.finfo(kind).eps for kind in (output.weight.dtype, torch.float32))
    return _ROUNDING * unit * float(values.abs().max())


def _of_configuration(config: Any) -> tuple[list[float], list[float | None]]:
    """Return the factors and the bounds of the logits that a configuration may mean, likeliest first."""
    text = getattr(config, "text_config", None) or config
    scales = [float(value) for key in _SCALES if (value := getattr(text, key, None))]
    scales += [1 / float(value) for key in _DIVISORS if (value := getattr(text, key, None))]
    softcaps: list[float | None] = [float(value) for key in _SOFTCAPS if (value := getattr(text, key, None))]
    return [*scales, 1.0], [*softcaps, None]


def _pilot(network: nn.Module, vocabulary_size: int) -> TokenBatch:
    """Return two short sequences of random tokens, of which all positions but the last are compared."""
    tokens = torch.randint(vocabulary_size, (2, 9), generator=torch.Generator().manual_seed(0))
    taught = torch.arange(9) < 8
    batch = token_batch([TokenSequence(index, row, taught) for index, row in enumerate(tokens)], packed=False)
    return batch.to(next(network.parameters()).device)


@contextmanager
def _evaluating(network: nn.Module) -> Iterator[None]:
    """Switch dropout off for a while."""
    training = {module: module.training for module in network.modules()}
    network.eval()
    try:
        yield
    finally:
        for module, was in training.items():
            module.training = was

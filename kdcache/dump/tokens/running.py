"""A language model that runs as a teacher: batches of sequences in, hidden states of their taught positions out."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from kdcache.cache.sequence_plan import Sequences
from kdcache.data.packing import TokenSequence, fill_batches, token_batch
from kdcache.errors import MismatchError, UsageError
from kdcache.losses.lm_head import LMHead
from kdcache.models.causal_lm import CausalLM
from kdcache.models.checks import set_evaluation_mode
from kdcache.models.language_teacher import DTYPES

_LOGITS_AT_ONCE = 2**26
"""Logits that are in memory at once: 256 MB."""


class RunningLanguageModel:
    """A language model on its device.

    The body runs in the precision of the weights. The head is applied in float32, to some rows at a time: logits of a
    whole batch, [B * T, V], are never in memory.

    Args:
        model: moved to the device and put into evaluation mode.
        vocabulary_size: V; rows of padding that the head has behind them are cut off.
        precision: fp32, bf16 or fp16, that the weights have.
        device: where it runs.

    Attributes:
        head: of V tokens, in float32.
        rows_at_once: rows of logits that are in memory at once.

    Raises:
        MismatchError: if the weights have another precision.
    """

    def __init__(self, model: CausalLM, vocabulary_size: int, precision: str, device: torch.device | str) -> None:
        self.device = torch.device(device)
        found = model.output.weight.dtype
        if found != DTYPES[precision]:
            name = next((name for name, dtype in DTYPES.items() if dtype == found), str(found))
            raise MismatchError(
                f"the teacher's weights are {str(found).removeprefix('torch.')}, and cache.precision is {precision}",
                f"set cache.precision to {name}, or convert the network: "
                f"model.to(torch.{str(DTYPES[precision]).removeprefix('torch.')})",
            )
        self._model = model
        model.network.to(self.device)
        set_evaluation_mode(model.network)
        head = model.head.cut(vocabulary_size)
        weight, bias = head.weight.detach().float(), None if head.bias is None else head.bias.detach().float()
        self.head = LMHead(weight, bias, head.scale, head.softcap)
        self.rows_at_once = max(_LOGITS_AT_ONCE // vocabulary_size, 1)

    @torch.no_grad()
    def hidden_states(self, sequences: Sequence[TokenSequence]) -> Tensor:
        """Return the last hidden states of the taught positions of some sequences, in order, [n, d] float32.

        Raises:
            UsageError: if the batch does not fit the memory of the device.
        """
        batch = token_batch(sequences, packed=False).to(self.device)
        try:
            return self._model.hidden_states(batch).float()
        except torch.cuda.OutOfMemoryError as error:
            rows, width = batch.input_ids.shape
            raise UsageError(
                f"{rows} sequences of {width:,} tokens do not fit the memory of {self.device} beside the network",
                f"set cache.batch_tokens below {rows * width:,}, or cache.precision to bf16",
            ) from error


def sequences_of(source: Sequences, numbers: Sequence[int]) -> list[TokenSequence]:
    """Return some sequences of a source."""
    found = []
    for number in numbers:
        ids, taught = source.tokens(number)
        found.append(
            TokenSequence(number, torch.from_numpy(ids.astype(np.int64)), torch.from_numpy(taught.astype(bool)))
        )
    return found


def cut_batches(lengths: npt.NDArray[np.integer[Any]], batch_tokens: int) -> list[list[int]]:
    """Return the indices of the sequences of each batch: in order of their lengths, the longest first.

    So there is little padding, and a batch that does not fit the memory is the first one.

    Args:
        lengths: of the sequences, in tokens.
        batch_tokens: tokens per batch at most, with padding; a longer sequence is a batch of its own.
    """
    order = np.argsort(-lengths.astype(np.int64), kind="stable")
    cuts = fill_batches(lengths[order].tolist(), batch_tokens, packed=False)
    return [order[cut].tolist() for cut in cuts]

"""Sequences of a cache whose rows a live language model makes whenever they are asked for: the exact reference.

A tail whose coordinates are the teacher's last hidden state, in the basis of its head, is the tail of the teacher
itself, so that the losses see the whole distribution.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor

from kdcache.cache.format.tail_basis import TailBasis
from kdcache.cache.format.token_encoding import TokenEncoding
from kdcache.cache.format.token_rows import TokenRows
from kdcache.cache.sequences import CachedSequences, SequenceText
from kdcache.losses.token_targets import TokenTargets
from kdcache.models.causal_lm import CausalLM
from kdcache.train.tokens.batches import as_token_batch
from kdcache.train.tokens.inputs import TokenInputs


@dataclass(frozen=True, repr=False)
class LiveSequences(CachedSequences):
    """The tokens of a cache, and rows of its teacher that are not stored.

    Attributes:
        teacher: on the device of the rows, in evaluation mode.
    """

    teacher: CausalLM | None = None

    @torch.no_grad()
    def rows_of(self, sequences: Any, text: SequenceText) -> TokenRows:
        """Run the teacher over sequences, or prefixes of them, and return its rows, in float32."""
        if self.teacher is None:
            raise TypeError("no teacher is given")
        batch = as_token_batch([int(index) for index in sequences], text, packed=False).to(self.device)
        hidden = self.teacher.hidden_states(batch)
        logits = self.teacher.head.cut(self.encoding.num_classes).logits(hidden)
        found = TokenTargets.of_logits(logits, self.encoding.top_k, self.encoding.temperatures)
        of_label = logits.log_softmax(dim=1).gather(1, batch.labels.unsqueeze(1))
        statistics = torch.cat([of_label, found.tail_log_mass], dim=1)
        return TokenRows(found.log_probs, found.indices, statistics=statistics, tail=hidden)


def with_live_teacher(inputs: TokenInputs, teacher: CausalLM) -> TokenInputs:
    """Return the sequences of a cache with rows of its teacher itself.

    Args:
        inputs: of students.
        teacher: with a linear head, without bias, scale or bound; moved to their device.
    """
    cached = inputs.sequences
    teacher.network.to(cached.device).eval()
    weight: Tensor = teacher.head.cut(cached.encoding.num_classes).weight.detach()
    classes, width = weight.shape
    encoding = TokenEncoding(
        num_classes=classes,
        top_k=cached.encoding.top_k,
        tail="lowrank",
        rank=width,
        dtype="float32",
        level=False,
        temperatures=(1.0,),
    )
    basis = TailBasis(weight.T, weight.new_zeros(classes), weight.new_ones(width))
    given = {each.name: getattr(cached, each.name) for each in fields(CachedSequences)}
    live = LiveSequences(**{**given, "encoding": encoding, "basis": basis}, teacher=teacher)
    return replace(inputs, sequences=live, record={**inputs.record, "placement": ["live teacher"]})

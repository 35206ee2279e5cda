"""A language model in training, and its steps, on one process or on many.

An optimizer step is of one batch of sequences, however many processes share it, in however many micro-batches each goes
through its part, and however these are packed or padded: the losses are sums over taught positions, divided by their
number in the whole step.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from kdcache.cache.sequences import SequenceText
from kdcache.config.text import TokenTrainSpec
from kdcache.data.packing import TokenBatch
from kdcache.losses import Loss, LossParts, learned_temperature
from kdcache.losses.batch import BatchTotals, of_step
from kdcache.losses.chunked_head import batch_statistics, chunked_loss
from kdcache.losses.lm_head import LMHead
from kdcache.losses.token_targets import TokenTargets
from kdcache.models.causal_lm import CausalLM
from kdcache.train.accelerator import join_processes
from kdcache.train.network_trainer import NetworkTrainer, sum_of_parts
from kdcache.train.tokens.batches import EpochPlan, as_token_batch, no_sequences


class TokenMicroBatch(NamedTuple):
    """Sequences that go through the network at once, and what the teacher says at their taught positions.

    Attributes:
        batch: of the sequences.
        targets: of its taught positions; None for a loss without a teacher.
    """

    batch: TokenBatch
    targets: TokenTargets | None


class TokenNetwork(nn.Module):
    """A language model and the learned temperature of its loss: accelerate wraps this.

    Args:
        causal: the language model.
        theta: the learned temperature; None for most losses.
    """

    def __init__(self, causal: CausalLM, theta: nn.Parameter | None) -> None:
        super().__init__()
        self.causal, self.network, self.theta = causal, causal.network, theta

    def forward(self, batch: TokenBatch) -> Tensor:
        """Return the last hidden states of the taught positions of a batch, [n, d]."""
        return self.causal.hidden_states(batch)


class TokenTrainer(NetworkTrainer):
    """A language model with its optimizer, schedule, average of the weights, and the learned temperature of the loss.

    Args:
        causal: the language model; moved to the device.
        spec: optimizer, schedule, packing, from `with_packing`.
        loss: minimized.
        plan: the steps of each epoch.
        device: where to train.
        report: see `NetworkTrainer`.

    Attributes:
        steps: number of optimizer steps of each epoch.
    """

    def __init__(
        self,
        causal: CausalLM,
        spec: TokenTrainSpec,
        loss: Loss,
        plan: EpochPlan,
        device: torch.device | str = "cpu",
        report: Callable[[str], None] | None = None,
    ) -> None:
        self.spec, self.loss, self.sequences = spec, loss, plan.sequences
        accelerator = join_processes(device, spec.precision)
        self.steps = [len(plan.steps(number, accelerator)) for number in range(1, spec.epochs + 1)]
        causal.network.to(accelerator.device)
        self.theta = learned_temperature(loss, accelerator.device)
        learned = [] if self.theta is None else [("the temperature", self.theta)]
        super().__init__(
            TokenNetwork(causal, self.theta),
            causal.network,
            spec,
            accelerator,
            sum(self.steps) / spec.epochs,
            learned,
            # Batches have other lengths in each step.
            compiled=lambda: causal.body.compile(dynamic=True),
            report=report,
        )
        # The products with the head are in bfloat16, as those of the body are. In float16 the gradients of the logits
        # would underflow: they are computed before the scaler of the loss.
        self._head_type = torch.bfloat16 if spec.precision == "bf16" else None

    @property
    def selected(self) -> TokenNetwork:
        """The network that is validated and saved, and the learned temperature: the average if there is one."""
        return super().selected  # type: ignore[no-any-return]  # the network that it was given, or a copy of it

    def load(self, which: Sequence[int], with_teacher: bool | None = None) -> TokenMicroBatch:
        """Return sequences as they go through the network, cut and packed as `spec` says, on the device.

        Args:
            which: their numbers; none for a process that has no sequences of a step.
            with_teacher: whether rows are read; None if the loss uses them.
        """
        reads_rows = self.loss.uses_teacher if with_teacher is None else with_teacher
        if not which:
            return TokenMicroBatch(no_sequences().to(self.device), self._no_targets() if reads_rows else None)
        cut = None if self.spec.max_length is None else [self.spec.max_length] * len(which)
        text = self.sequences.text(which, cut)
        batch = as_token_batch(which, text, self.spec.packed is True).to(self.device)
        return TokenMicroBatch(batch, self._targets(which, text) if reads_rows else None)

    def _targets(self, which: Sequence[int], text: SequenceText) -> TokenTargets:
        return self.sequences.targets(self.sequences.rows_of(which, text)).to(device=self.device)

    def _no_targets(self) -> TokenTargets:
        text = self.sequences.text([0], [1])  # a prefix of one token has no rows
        return self._targets([0], text)

    def step(self, micro_batches: Sequence[Sequence[int]], epoch: int) -> LossParts:
        """Take an optimizer step, and return this process's part of its loss.

        Args:
            micro_batches: the sequences of each micro-batch of this process.
            epoch: number of the epoch, from 1; schedules of the loss depend on it.
        """
        loaded = [self.load(which) for which in micro_batches]
        count: Tensor | int = sum(len(batch.labels) for batch, _ in loaded)
        if self.ranks > 1:
            count = self.accelerator.reduce(torch.tensor(count, device=self.device), "sum")
        totals = of_step(count, over_all_ranks=self.ranks > 1)
        self.optimizer.zero_grad()
        statistics = self._statistics(loaded, totals)
        each = []
        for (batch, targets), synchronization in self.synchronized_at_last(loaded):
            with synchronization:
                hidden, head = self._head(self._network(batch))
                parts = chunked_loss(
                    hidden,
                    head,
                    batch.labels,
                    targets,
                    self.loss,
                    epoch,
                    self.theta,
                    totals,
                    self.spec.label_smoothing,
                    statistics,
                )
                self.backward(parts.total)
            each.append(parts)
        parts = sum_of_parts(each)
        self.update(parts.total, epoch)
        return parts

    def _head(self, hidden: Tensor) -> tuple[Tensor, LMHead]:
        """Return hidden states and head in the type that their product is computed in."""
        head = self._own_vocabulary(self._whole_network().causal.head)
        if self._head_type is None:
            return hidden.to(head.weight.dtype), head
        bias = None if head.bias is None else head.bias.to(self._head_type)
        return hidden.to(self._head_type), replace(head, weight=head.weight.to(self._head_type), bias=bias)

    def _own_vocabulary(self, head: LMHead) -> LMHead:
        """Return the head cut to the tokens of the teacher, for losses without one too: they are then compared."""
        return head.cut(self.sequences.encoding.num_classes)

    def _whole_network(self) -> TokenNetwork:
        if not isinstance(self._whole, TokenNetwork):
            raise TypeError("the whole network of a language model")
        return self._whole

    def _statistics(self, loaded: Sequence[TokenMicroBatch], totals: BatchTotals) -> list[Tensor] | None:
        """Return the sums over the whole step that dtd and cwsm need; None for the other losses.

        The hidden states are computed once more for it, with the same dropout.
        """
        if not (self.loss.uses_teacher and self.loss.temperature.uses_batch):
            return None
        devices = [self.device] if self.device.type == "cuda" else []
        sums: list[Tensor] = []
        with torch.no_grad(), torch.random.fork_rng(devices):
            for batch, targets in loaded:
                hidden, head = self._head(self._whole_network()(batch))
                found = batch_statistics(hidden, head, targets, self.loss)
                sums = [one + other for one, other in zip(sums, found, strict=True)] if sums else found
        return [totals.sum(value.unsqueeze(0)) for value in sums]

    @torch.no_grad()
    def held_out_loss(self, micro_batch: TokenMicroBatch, hidden: Tensor) -> Tensor:
        """Return the mean loss [] of the selected network at the taught positions of sequences that are held out.

        It is that of the end of all schedules, since epochs with other weights could not be compared.

        Args:
            micro_batch: the sequences.
            hidden: [n, d], its last hidden states there.
        """
        batch, targets = micro_batch
        targets = targets if self.loss.uses_teacher else None
        whole = self.selected
        head = self._own_vocabulary(whole.causal.head)
        smoothing = self.spec.label_smoothing
        found = chunked_loss(
            hidden, head, batch.labels, targets, self.loss, None, whole.theta, None, label_smoothing=smoothing
        )
        return found.total

    def state_dict(self) -> dict[str, Any]:
        """Return all that the next step depends on, as tensors and plain values."""
        return {**super().state_dict(), "theta": None if self.theta is None else self.theta.detach()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what `state_dict` returned."""
        super().load_state_dict(state)
        if self.theta is not None:
            self.theta.data.copy_(state["theta"])

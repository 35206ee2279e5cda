"""Several caches of one data set as one teacher."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Literal

import torch
from torch import Tensor

from kdcache.cache.teacher import CachedOutput, CachedTeacher
from kdcache.errors import UsageError
from kdcache.losses.maps import on_largest_grid

Combine = Literal["logits", "probabilities", "confidence"]


class JoinedTeacher:
    """The teachers of several caches as one `Teacher`.

    `logits`: the weighted mean of the logits. `probabilities`: the weighted mean p of the softmaxes, returned as logits
    log p + s, where s is the weighted mean of the logsumexps; DTKD then sees the mean sharpness of the teachers.
    `confidence`: for each sample, the logits of the teacher with the largest product of weight and largest probability
    at T = 1; of several equal ones, the first. Of maps every place is a sample, and all are first enlarged to the grid
    with the most places, bilinearly between the centers of places.

    Args:
        teachers: of the same samples and views, all of logits or all of maps.
        weights: one per teacher; only their ratios matter. None: equal weights.
        combine: how the logits are combined, as above.

    Raises:
        UsageError: if the number of weights is not the number of teachers.
    """

    def __init__(
        self,
        teachers: Sequence[CachedTeacher | CachedOutput],
        weights: Sequence[float] | None = None,
        combine: Combine = "logits",
    ) -> None:
        if weights is not None and len(weights) != len(teachers):
            raise UsageError(
                f"{len(weights)} weights were given for {len(teachers)} caches", "set join.weights to one per cache"
            )
        self.teachers, self.combine = tuple(teachers), combine
        self.shares = [weight / sum(weights) for weight in weights] if weights else [1 / len(teachers)] * len(teachers)

    def __call__(self, ids: Tensor, view: int = 0) -> Tensor:
        """Return the logits of samples `ids` [B] int64 in a view: [B, C] float32, on the device of the teachers.

        Maps are [B, C, h, w].
        """
        each = [teacher(ids, view) for teacher in self.teachers]
        logits = torch.stack(on_largest_grid(each) if each[0].ndim == 4 else each)
        shares = logits.new_tensor(self.shares).view(-1, *[1] * (logits.ndim - 1))
        if self.combine == "logits":
            return (shares * logits).sum(dim=0)
        log_probs = logits.log_softmax(dim=2)
        if self.combine == "confidence":
            most_confident = (shares.log() + log_probs.amax(dim=2, keepdim=True)).argmax(dim=0, keepdim=True)
            return torch.take_along_dim(logits, most_confident, dim=0)[0]
        sharpness = (shares * logits.logsumexp(dim=2, keepdim=True)).sum(dim=0)
        return (log_probs + shares.log()).logsumexp(dim=0) + sharpness

    def order(self, generator: torch.Generator) -> Tensor:
        """Return a random order of all ids, [N] int64: of a teacher with the placement `stream` if there is one."""
        streamed = [teacher for teacher in self.teachers if teacher.placement == "stream"]
        return (streamed or self.teachers)[0].order(generator)

    def prefetch(self, batches: Iterable[Tensor], view: int = 0) -> None:
        """Announce the batches of ids [B] int64 that will be asked for, in this order."""
        announced = list(batches)
        for teacher in self.teachers:
            teacher.prefetch(announced, view)


class StackedTeacher(JoinedTeacher):
    """The teachers of several caches side by side, for a gate that chooses among them."""

    def __call__(self, ids: Tensor, view: int = 0) -> Tensor:
        """Return the logits of samples `ids` [B] int64 in a view: [B, K, C] float32, for K teachers."""
        return torch.stack([teacher(ids, view) for teacher in self.teachers], dim=1)

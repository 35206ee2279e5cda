"""A cached teacher whose answers are decoded a view at a time, and kept while they are few."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Protocol

import torch
from torch import Tensor

_KEPT = 2**28
"""Bytes of decoded logits that are kept at most: five views of CIFAR-100's 50,000 images at one time."""

_TOGETHER = 2**18
"""Logits that are decoded at once: they stay near the processor."""


class Answers(Protocol):
    """A teacher that knows samples by their ids: a `CachedTeacher`, or several as one."""

    def __call__(self, ids: Tensor, view: int = 0) -> Tensor:
        """[B] int64 -> logits [B, C]."""

    def order(self, generator: torch.Generator) -> Tensor:
        """A random order of all ids, [N] int64."""

    def expect(self, batches: Iterable[Tensor], view: int = 0) -> None:
        """These batches of ids will be asked for."""


class DecodedTeacher:
    """A teacher that decodes a view when it is first asked for, and looks the logits up from then on.

    A view is decoded whole and in the order of the ids, whatever is asked for first: the last bits of a product of
    matrices may depend on the rows beside it, and a run that goes on must have the logits that it had.

    Args:
        teacher: who decodes.
        samples: N, how many there are.
        views: that are kept, at least one. The first that are asked for stay; others take turns in the last place.
    """

    def __init__(self, teacher: Answers, samples: int, views: int) -> None:
        self._teacher, self._samples, self._views = teacher, samples, views
        self._kept: dict[int, Tensor] = {}

    def __call__(self, ids: Tensor, view: int = 0) -> Tensor:
        """Logits [B, C] of samples `ids` [B] int64 in a view."""
        logits = self._kept.get(view)
        if logits is None:
            logits = self._decoded(view)
        return logits.index_select(0, ids.to(logits.device))

    def _decoded(self, view: int) -> Tensor:
        if len(self._kept) == self._views:
            self._kept.popitem()
        first = self._teacher(torch.arange(1), view)
        rows = max(_TOGETHER // first.shape[1], 1)
        cuts = torch.split(torch.arange(self._samples), rows)
        self._teacher.expect(cuts, view)
        logits = self._kept[view] = first.new_empty(self._samples, first.shape[1])
        for cut in cuts:
            logits[cut[0] : cut[-1] + 1] = self._teacher(cut, view)
        return logits

    def order(self, generator: torch.Generator) -> Tensor:
        """The teacher's."""
        return self._teacher.order(generator)

    def expect(self, batches: Iterable[Tensor], view: int = 0) -> None:
        """Nothing is to be made ready for batches: a view comes whole."""


def kept_decoded(teacher: Answers, samples: int, classes: int) -> Answers:
    """The teacher, with its logits kept decoded where those of a view, [N, C] float32, are few enough."""
    views = _KEPT // (4 * samples * classes)
    return DecodedTeacher(teacher, samples, views) if views else teacher

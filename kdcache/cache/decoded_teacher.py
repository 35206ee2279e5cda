"""A teacher whose logits are decoded one view at a time, and kept in memory while they are small enough."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from kdcache.cache.teacher import Teacher, TeacherWrapper

_MAX_DECODED_BYTES = 2**28
"""Largest size of the decoded logits that are kept: five views of CIFAR-100's 50,000 images."""

_LOGITS_PER_DECODE = 2**18
"""Number of logits decoded in one call: few enough to stay in the processor's cache."""


class DecodedTeacher(TeacherWrapper):
    """A teacher that decodes a view when it is first asked for, and looks the logits up from then on.

    A view is always decoded as a whole and in the order of the ids, whatever is asked for first: the last bits of a
    matrix product may depend on the other rows in it, and a resumed run must see the same logits as before.

    Args:
        teacher: decodes the rows.
        samples: N, the number of samples.
        views: number of views that are kept, at least one. The views asked for first stay; later ones replace one
            another in the last slot.
    """

    def __init__(self, teacher: Teacher, samples: int, views: int) -> None:
        super().__init__(teacher)
        self._samples, self._max_views = samples, views
        self._decoded: dict[int, Tensor] = {}

    def __call__(self, ids: Tensor, view: int = 0) -> Tensor:
        """Return the logits [B, C] of samples `ids` [B] int64 in a view."""
        logits = self._decoded.get(view)
        if logits is None:
            logits = self._decode(view)
        return logits.index_select(0, ids.to(logits.device))

    def _decode(self, view: int) -> Tensor:
        if len(self._decoded) == self._max_views:
            self._decoded.popitem()
        first = self.teacher(torch.arange(1), view)
        rows = max(_LOGITS_PER_DECODE // first.shape[1], 1)
        cuts = torch.split(torch.arange(self._samples), rows)
        self.teacher.prefetch(cuts, view)
        logits = self._decoded[view] = first.new_empty(self._samples, first.shape[1])
        for cut in cuts:
            logits[cut[0] : cut[-1] + 1] = self.teacher(cut, view)
        return logits

    def prefetch(self, batches: Iterable[Tensor], view: int = 0) -> None:
        """Do nothing: a view is decoded as a whole."""


def decode_if_small(teacher: Teacher, samples: int, classes: int) -> Teacher:
    """Return the teacher with its logits kept decoded, if those of one view, [N, C] float32, are small enough."""
    views = _MAX_DECODED_BYTES // (4 * samples * classes)
    return DecodedTeacher(teacher, samples, views) if views else teacher

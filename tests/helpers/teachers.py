"""A teacher that answers by id without a cache, to compare one with."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor


class FunctionTeacher:
    """A teacher that is a plain function, such as one that runs a network on the images of the ids.

    Args:
        function: (ids [B] int64, view) -> logits [B, C].
        samples: N, the number of samples.
    """

    def __init__(self, function: Callable[[Tensor, int], Tensor], samples: int) -> None:
        self._function, self._samples = function, samples

    def __call__(self, ids: Tensor, view: int = 0) -> Tensor:
        """Return the logits [B, C] of samples `ids` [B] int64 in a view."""
        return self._function(ids, view)

    def order(self, generator: torch.Generator) -> Tensor:
        """Return a random order of all ids, [N] int64."""
        return torch.randperm(self._samples, generator=generator)

    def prefetch(self, batches: Iterable[Tensor], view: int = 0) -> None:
        """Do nothing: the function is called batch by batch."""

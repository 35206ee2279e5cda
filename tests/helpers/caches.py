"""Caches made for tests."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor, nn

from kdcache import Cache, Samples
from kdcache.data.views import View


class Made(NamedTuple):
    """A cache, and what it was made from."""

    cache: Cache
    samples: Samples
    teacher: nn.Module

    def images(self, view: int = 0) -> Tensor:
        """Return the images of a view as the teacher saw them."""
        views = self.cache.manifest.plan.views
        return View(self.samples, views.transform, views.seed, view).__getitems__(range(len(self.samples)))[0]

    def live(self, view: int = 0) -> Tensor:
        """Return the logits of the live teacher."""
        return self.teacher(self.images(view))  # type: ignore[no-any-return]  # a Module's call is untyped

"""The images that a cached teacher saw, as a data set for any training loop.

data = CachedDataset(dataset, cache)
for epoch in range(epochs):
    data.set_epoch(epoch)
    for images, labels, ids, views in DataLoader(data, batch_size=64, shuffle=True):
        teacher_logits = teacher(ids, views)
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

from kdcache.cache.reader import Cache
from kdcache.config.transform import Transform, step_names
from kdcache.data.replay import SPOT_CHECK_IMAGES, check_matches_cache, replay, teacher_view
from kdcache.data.samples import Samples, wrap
from kdcache.errors import UsageError
from kdcache.runtime.progress import Progress
from kdcache.runtime.terminal import reporter
from kdcache.runtime.user_code import trust

Item = tuple[Tensor, int, int, int]
"""(image [channels, H, W] float32, label, or -1 if unknown, id, view); DataLoader collates each into a tensor."""


class CachedDataset(Dataset[Item]):
    """The data set that a cache was made from, in the views that its teacher saw.

    A change of the view takes effect in all workers of a DataLoader, also persistent ones, with the next batch loaded.

    Args:
        dataset: kdcache's `Samples`, or any map-style data set of (image, label) pairs, in the order in which it was
            dumped, without the cache's transform. Each item of the latter is read twice, to compare it with the cache.
        cache: cache of a teacher.
        progress: True to show progress on stderr, or a progress reporter; silent if None.
        transform: transform of the cache, compared with it. Only needed if it names your own code,
            `path/file.py:function`, which is never run because a cache names it.

    Raises:
        MismatchError: if images, order or labels differ from those of the cache, or replayed views from those that the
            teacher saw.
        UsageError: if the cache's views mix two images, or code outside of kdcache drew them.
    """

    def __init__(
        self,
        dataset: Dataset[Any] | Samples,
        cache: Cache,
        progress: Progress | bool | None = None,
        transform: Transform | None = None,
    ) -> None:
        plan = cache.manifest.plan
        if not isinstance(dataset, Samples):
            dataset = wrap(dataset, cache.num_classes, plan.dataset.name, plan.dataset.split)
        trust(step_names(transform))
        check_matches_cache(cache, dataset, transform, reporter(progress))
        data = teacher_view(cache, dataset)
        if data.mixes:
            raise UsageError(
                f"the views of {cache.path} mix two images, and an item has only one label",
                "train with kdcache train-student, or from a cache of views that are not mixed",
            )
        replay(cache, dataset, SPOT_CHECK_IMAGES)
        self.views = plan.views.count
        self._data = data
        # In shared memory: a persistent worker would otherwise stay at the view that it was started with.
        self._view = torch.zeros((), dtype=torch.int64).share_memory_()  # type: ignore[no-untyped-call]  # in torch

    def __len__(self) -> int:
        return len(self._data)

    @property
    def view(self) -> int:
        """Index of the view of the items."""
        return int(self._view)

    def set_view(self, view: int) -> None:
        """Set the view of the items.

        Raises:
            UsageError: if the cache does not have this view.
        """
        if not 0 <= view < self.views:
            raise UsageError(f"the cache has no view {view}", f"use a view from 0 to {self.views - 1}")
        self._view.fill_(view)

    def set_epoch(self, epoch: int) -> None:
        """Set the view of an epoch, counted from 0: `epoch` mod the number of views."""
        self.set_view(epoch % self.views)

    def __getitem__(self, index: int) -> Item:
        return self.__getitems__([range(len(self))[index]])[0]

    def __getitems__(self, ids: Sequence[int]) -> list[Item]:
        """Return several items at once, as DataLoader requests them: some transforms are faster on a batch."""
        view = self.view
        batch = self._data.batch(ids, view)
        items = zip(batch.images, batch.labels.tolist(), batch.ids.tolist(), strict=True)
        return [(image, label, index, view) for image, label, index in items]

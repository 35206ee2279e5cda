"""The teacher that a cache is: sample ids in, logits out."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from kdcache.cache.format.codec import decode
from kdcache.cache.format.schema import Encoding
from kdcache.cache.format.tail_basis import TailBasis
from kdcache.cache.placement.choose import Placement
from kdcache.cache.placement.prefetch import Place
from kdcache.errors import UsageError


@dataclass(frozen=True)
class CachedTeacher:
    """The teacher that a cache is: a callable from sample ids to logits.

    It may be used in workers of a DataLoader, forked or spawned.

    Attributes:
        place: where the encoded rows are.
        placement: which kind of place that is: device, host, mmap or stream.
        why: that one, in a few words.
        views: how many there are.
        labels: [N] int64, as they were encoded, on the device of the logits.
        encoding: of the rows.
        basis: of their tails, on the device; None where the encoding has none.
        here: the views that were brought here; None for all.
    """

    place: Place
    placement: Placement
    why: str
    views: int
    labels: Tensor
    encoding: Encoding
    basis: TailBasis | None = None
    here: tuple[int, ...] | None = None

    def __call__(self, ids: Tensor, view: int | Tensor = 0) -> Tensor:
        """The teacher's raw logits for samples `ids` [B] int64 in a view: [B, C] float32, on the teacher's device.

        `view` may be a tensor [B] too, such as a batch of a `CachedDataset` holds: of each sample its own.

        Raises:
            UsageError: for an id or a view that the cache has not, and for anything but ids, such as a mask.
        """
        if ids.ndim != 1 or ids.dtype not in (torch.int64, torch.int32):
            raise UsageError(f"ids are {ids.dtype} {list(ids.shape)}", "pass sample ids, an int64 tensor [B]")
        if isinstance(view, Tensor):
            return self._of_views(ids, view)
        self._check_view(view)
        if len(ids) and not (int(ids.min()) >= 0 and int(ids.max()) < len(self.labels)):
            raise UsageError(
                f"ids run from {int(ids.min())} to {int(ids.max())}, the cache's from 0 to {len(self.labels) - 1}",
                "ask for the ordinals of the samples in the data set that was dumped",
            )
        ids, device = ids.long(), self.labels.device
        rows = self.place.rows(ids, view).to(device)
        return decode(rows, self.labels[ids.to(device)], self.encoding, self.basis)

    def _of_views(self, ids: Tensor, views: Tensor) -> Tensor:
        if views.shape != ids.shape or views.dtype not in (torch.int64, torch.int32):
            raise UsageError(
                f"views are {views.dtype} {list(views.shape)} for {len(ids)} ids",
                "pass one view, or an int64 tensor [B] with the view of each id",
            )
        found = sorted(set(views.tolist()))
        if len(found) <= 1:
            return self(ids, *found)
        logits = torch.empty(len(ids), self.encoding.num_classes, device=self.labels.device)
        for view in found:
            of_view = views == view
            logits[of_view.to(logits.device)] = self(ids[of_view.to(ids.device)], view)
        return logits

    def expect(self, batches: Iterable[Tensor], view: int = 0) -> None:
        """Be told which batches of ids [B] int64 will be asked for, in this order: what is on disk is read ahead."""
        self._check_view(view)
        self.place.expect(batches, view)

    def order(self, generator: torch.Generator) -> Tensor:
        """A random order of all ids, [N] int64, that the rows' place serves quickly: block-shuffled for a stream."""
        return self.place.order(generator)

    def _check_view(self, view: int) -> None:
        if not 0 <= view < self.views:
            raise UsageError(f"the cache has no view {view}", f"ask for one of 0 to {self.views - 1}")
        if self.here is not None and view not in self.here:
            raise UsageError(
                f"view {view} of the cache is not here: views {', '.join(map(str, self.here))} of {self.views} are",
                "pull it too, or open the cache with it among its `views`",
            )

"""The `Teacher` protocol, and the teacher of a cache: sample ids in, logits or another output out."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import Generic, Protocol

import torch
from torch import Tensor

from kdcache.cache.format.codec import Rows, decode
from kdcache.cache.format.encoding import Encoding
from kdcache.cache.format.grid_codec import GridRows
from kdcache.cache.format.grid_encoding import GridEncoding
from kdcache.cache.format.output_codec import decode_output
from kdcache.cache.format.output_records import VectorEncoding
from kdcache.cache.format.tail_basis import TailBasis
from kdcache.cache.format.vector_rows import R, VectorBasis, VectorRows
from kdcache.cache.placement.choose import Placement
from kdcache.cache.placement.prefetch import RowSource
from kdcache.errors import UsageError


class Teacher(Protocol):
    """A source of logits that identifies samples by their ids, such as a `CachedTeacher`."""

    def __call__(self, ids: Tensor, view: int = 0) -> Tensor:
        """Return the logits [B, C] of samples `ids` [B] int64 in a view."""

    def order(self, generator: torch.Generator) -> Tensor:
        """Return a random order of all ids, [N] int64, in which they can be read fast."""

    def prefetch(self, batches: Iterable[Tensor], view: int = 0) -> None:
        """Announce the batches of ids [B] int64 that will be asked for, in this order."""


class TeacherWrapper:
    """A base class of teachers that change some of what another teacher does; everything else is forwarded.

    Args:
        teacher: the wrapped teacher.
    """

    def __init__(self, teacher: Teacher) -> None:
        self.teacher = teacher

    def __call__(self, ids: Tensor, view: int = 0) -> Tensor:
        """Return the wrapped teacher's logits [B, C] of samples `ids` [B] int64 in a view."""
        return self.teacher(ids, view)

    def order(self, generator: torch.Generator) -> Tensor:
        """Return the wrapped teacher's random order of all ids, [N] int64."""
        return self.teacher.order(generator)

    def prefetch(self, batches: Iterable[Tensor], view: int = 0) -> None:
        """Announce batches of ids [B] int64 to the wrapped teacher."""
        self.teacher.prefetch(batches, view)


class TeacherWithOutputs:
    """The class logits and other outputs of a teacher, as one.

    Args:
        logits: returns the class logits; None if they are not used.
        outputs: each returns an output [B, D], by name.
        unmapped: names of the outputs whose numbers have a meaning of their own, scores and classes: no linear map of
            the student's is learned for them.
    """

    def __init__(self, logits: Teacher | None, outputs: Mapping[str, Teacher], unmapped: Collection[str] = ()) -> None:
        self.logits, self.outputs, self.unmapped = logits, dict(outputs), frozenset(unmapped)

    def __call__(self, ids: Tensor, view: int = 0) -> Tensor:
        """Return the class logits [B, C] of samples `ids` [B] int64 in a view."""
        return class_logits_of(self)(ids, view)

    def order(self, generator: torch.Generator) -> Tensor:
        """Return a random order of all ids, [N] int64, in which the first of the outputs can be read fast."""
        return self._parts[0].order(generator)

    def prefetch(self, batches: Iterable[Tensor], view: int = 0) -> None:
        """Announce batches of ids [B] int64 to all outputs."""
        batches = list(batches)
        for part in self._parts:
            part.prefetch(batches, view)

    def each(self, wrapped: Callable[[Teacher], Teacher]) -> TeacherWithOutputs:
        """Return this teacher with every output wrapped."""
        outputs = {name: wrapped(output) for name, output in self.outputs.items()}
        return TeacherWithOutputs(None if self.logits is None else wrapped(self.logits), outputs, self.unmapped)

    @property
    def _parts(self) -> list[Teacher]:
        return [*([] if self.logits is None else [self.logits]), *self.outputs.values()]


def class_logits_of(teacher: Teacher) -> Teacher:
    """Return the part of a teacher that returns the class logits, which must be used."""
    if not isinstance(teacher, TeacherWithOutputs):
        return teacher
    if teacher.logits is None:
        raise TypeError("the class logits are not used")
    return teacher.logits


class _CachedRows(ABC, Generic[R]):
    """A callable from sample ids to the decoded rows of an output, which its subclasses say."""

    source: RowSource[R]
    views: int
    opened_views: tuple[int, ...] | None

    @property
    @abstractmethod
    def _samples(self) -> int:
        """Number of samples, N."""

    @property
    @abstractmethod
    def _shape(self) -> tuple[int, ...]:
        """Shape of a decoded row."""

    @property
    @abstractmethod
    def _device(self) -> torch.device:
        """Device of the decoded rows."""

    @abstractmethod
    def _decode(self, rows: R, ids: Tensor) -> Tensor:
        """Return the decoded rows [B, ...] float32 of samples `ids` [B] int64."""

    def __call__(self, ids: Tensor, view: int | Tensor = 0) -> Tensor:
        """Return what the teacher said of samples `ids` [B] int64 in a view: [B, C] float32, on the teacher's device.

        C is the number of classes, or the length of a vector; maps are [B, C, h, w]. `view` may
        also be a tensor [B], with the view of each sample, as a batch of a `CachedDataset` has it.

        Raises:
            UsageError: if an id or a view is out of range, or `ids` is not an integer tensor [B], such as a mask.
        """
        if not isinstance(ids, Tensor):
            raise UsageError(f"ids are a {type(ids).__name__}", "pass sample ids, an int64 tensor [B]")
        if ids.ndim != 1 or ids.dtype not in (torch.int64, torch.int32):
            raise UsageError(f"ids are {ids.dtype} {list(ids.shape)}", "pass sample ids, an int64 tensor [B]")
        if isinstance(view, Tensor):
            return self._of_views(ids, view)
        self._check_view(view)
        if len(ids) and not (int(ids.min()) >= 0 and int(ids.max()) < self._samples):
            raise UsageError(
                f"ids range from {int(ids.min())} to {int(ids.max())}; those of the cache range from 0 to "
                f"{self._samples - 1}",
                "pass the ordinals of the samples in the data set that was dumped",
            )
        ids = ids.long()
        return self._decode(self.source.rows(ids, view).to(self._device), ids)

    def _of_views(self, ids: Tensor, views: Tensor) -> Tensor:
        """Return the decoded rows [B, ...] of samples `ids` [B], each in its own view of `views` [B]."""
        if views.shape != ids.shape or views.dtype not in (torch.int64, torch.int32):
            raise UsageError(
                f"views are {views.dtype} {list(views.shape)} for {len(ids)} ids",
                "pass one view, or an int64 tensor [B] with the view of each id",
            )
        distinct = sorted(set(views.tolist()))
        if len(distinct) <= 1:
            return self(ids, *distinct)
        decoded = torch.empty(len(ids), *self._shape, device=self._device)
        for view in distinct:
            in_view = views == view
            decoded[in_view.to(decoded.device)] = self(ids[in_view.to(ids.device)], view)
        return decoded

    def prefetch(self, batches: Iterable[Tensor], view: int = 0) -> None:
        """Announce the batches of ids [B] int64 that will be asked for, in this order: rows on disk are read ahead."""
        self._check_view(view)
        self.source.prefetch(batches, view)

    def order(self, generator: torch.Generator) -> Tensor:
        """Return a random order of all ids, [N] int64, that can be read fast: block-shuffled for a stream."""
        return self.source.order(generator)

    def _check_view(self, view: int) -> None:
        if not 0 <= view < self.views:
            raise UsageError(f"the cache has no view {view}", f"use a view from 0 to {self.views - 1}")
        if self.opened_views is not None and view not in self.opened_views:
            raise UsageError(
                f"view {view} was not opened: views {', '.join(map(str, self.opened_views))} of {self.views} are",
                "pull it too, or add it to the `views` argument of open_cache",
            )


@dataclass(frozen=True, repr=False)
class CachedTeacher(_CachedRows[Rows]):
    """The teacher of a cache: a callable from sample ids to logits.

    It may be used in workers of a DataLoader, forked or spawned.

    Attributes:
        source: returns encoded rows.
        placement: where they are held: device, host, mmap or stream.
        why: the reason for that placement, in a few words.
        views: number of views of the cache.
        labels: [N] int64, as they were encoded, on the device of the logits.
        encoding: of the rows.
        basis: of their tails, on the device; None if the encoding has no basis.
        opened_views: indices of the views that are in this copy of the cache; None for all.
    """

    source: RowSource[Rows]
    placement: Placement
    why: str
    views: int
    labels: Tensor
    encoding: Encoding
    basis: TailBasis | None = None
    opened_views: tuple[int, ...] | None = None

    def __repr__(self) -> str:
        return (
            f"CachedTeacher(samples={len(self.labels):,}, classes={self.encoding.num_classes:,}, views={self.views}, "
            f"placement={self.placement!r}, device={str(self.labels.device)!r})"
        )

    @property
    def _samples(self) -> int:
        return len(self.labels)

    @property
    def _shape(self) -> tuple[int, ...]:
        return (self.encoding.num_classes,)

    @property
    def _device(self) -> torch.device:
        return self.labels.device

    def _decode(self, rows: Rows, ids: Tensor) -> Tensor:
        return decode(rows, self.labels[ids.to(self._device)], self.encoding, self.basis)


@dataclass(frozen=True, repr=False)
class CachedOutput(_CachedRows[VectorRows | GridRows]):
    """An output of the teacher of a cache: from sample ids to vectors or scores [B, D], or maps [B, C, h, w].

    It may be used in workers of a DataLoader, forked or spawned.

    Attributes:
        name: of the output.
        source: returns encoded rows.
        placement: where they are held: device, host, mmap or stream.
        why: the reason for that placement, in a few words.
        views: number of views of the cache.
        samples: N.
        device: of the vectors or maps.
        encoding: of the rows.
        basis: of the codec klt, on the device; else None.
        opened_views: indices of the views that are in this copy of the cache; None for all.
    """

    name: str
    source: RowSource[VectorRows | GridRows]
    placement: Placement
    why: str
    views: int
    samples: int
    device: torch.device
    encoding: VectorEncoding | GridEncoding
    basis: VectorBasis | None = None
    opened_views: tuple[int, ...] | None = None

    def __repr__(self) -> str:
        size = f"length={self._shape[0]:,}" if len(self._shape) == 1 else f"shape={list(self._shape)}"
        return (
            f"CachedOutput({self.name!r}, samples={self.samples:,}, {size}, "
            f"views={self.views}, placement={self.placement!r}, device={str(self.device)!r})"
        )

    @property
    def _samples(self) -> int:
        return self.samples

    @property
    def _shape(self) -> tuple[int, ...]:
        return self.encoding.shape

    @property
    def _device(self) -> torch.device:
        return self.device

    def _decode(self, rows: VectorRows | GridRows, ids: Tensor) -> Tensor:
        return decode_output(rows, ids, self.encoding, self.basis)

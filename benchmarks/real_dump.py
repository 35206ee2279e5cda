"""Dump the teacher of a package with several encodings in one pass, and relate students of the cache to live ones."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, Subset

import kdcache
from kdcache.cache.format import zarr_store


class Unlabeled(Dataset[tuple[Tensor, int]]):
    """Samples [N, ...] without labels, as a data set."""

    def __init__(self, samples: Tensor) -> None:
        self.samples = samples

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return self.samples[index], -1


class Dumped(NamedTuple):
    """A teacher's cache.

    Attributes:
        cache: of all samples.
        views: the same samples as the teacher saw them.
        planned_on: number of the first samples, on which the encodings were planned.
    """

    cache: kdcache.Cache
    views: kdcache.CachedDataset
    planned_on: int

    @property
    def unseen(self) -> Tensor:
        """Ids of the samples that neither axes nor steps have seen."""
        return torch.arange(self.planned_on, len(self.cache))

    def bytes_per_row(self, output: str | None = None) -> float:
        """Return the compressed bytes per row of an output, of the unseen samples and without axes and metadata."""
        teacher = self.cache.teacher(output)
        return zarr_store.bytes_per_row(teacher.encoding, teacher.source.rows(self.unseen, 0))

    def decoded(self, output: str | None = None) -> Tensor:
        """Return what the cache says of the unseen samples, [M, D]."""
        return self.cache.teacher(output)(self.unseen)


def dump(
    teacher: nn.Module | Callable[[Tensor], Any],
    samples: Tensor,
    planned_on: int,
    folder: Path,
    classes: int = 0,
    transform: list[Any] | None = None,
    **options: Any,
) -> Dumped:
    """Dump a teacher's answers to samples [N, ...], with encodings planned on the first samples alone."""
    data: Dataset[Any] = Unlabeled(samples)
    settings = {"transform": transform, "pilot_rows": planned_on, **options}
    first = kdcache.wrap(Subset(data, range(planned_on)), classes)
    begun = kdcache.dump_teacher(teacher, first, folder / "first.kdcache", **settings)
    whole = kdcache.wrap(data, classes)
    cache = kdcache.dump_teacher(teacher, whole, folder / "whole.kdcache", extends=begun, **settings)
    return Dumped(cache, kdcache.CachedDataset(whole, cache), planned_on)


def live(teacher: Callable[[Tensor], Tensor], views: Dataset[Any], batch_size: int) -> Tensor:
    """Run a teacher on all samples as a cache's data set has them, and return what it says, [N, D]."""
    if isinstance(teacher, nn.Module):
        teacher.eval()
    with torch.inference_mode():
        return torch.cat([teacher(batch[0]) for batch in DataLoader(views, batch_size)]).clone()


def batches(views: Dataset[Any], steps: int, size: int, seed: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield `steps` batches of (samples [B, ...], ids [B]) in random orders, the same for the same seed."""
    generator, done = torch.Generator().manual_seed(seed), 0
    while done < steps:
        for samples, _, ids, _ in DataLoader(views, size, shuffle=True, drop_last=True, generator=generator):
            if done < steps:
                yield samples, ids
            done += 1


def related(
    sources: Mapping[str, Callable[[Tensor], Tensor]],
    student: Callable[[Callable[[Tensor], Tensor], int], list[float]],
    seeds: int,
    digits: int = 4,
) -> list[list[str]]:
    """Train students of each source and seed, and return rows: for each measure its mean, deviation and distance.

    Args:
        sources: each returns the teacher's answers [B, D] to ids [B], by name; the first is the one to compare with.
        student: trains a student of a source with a seed, and returns its measures.
        seeds: number of seeds.
        digits: digits after the point.
    """
    rows: list[list[str]] = []
    base: list[list[float]] = []
    for name, source in sources.items():
        found = [student(source, seed) for seed in range(seeds)]
        base = base or found
        cells = [name]
        for values, others in zip(zip(*found, strict=True), zip(*base, strict=True), strict=True):
            apart = [value - other for value, other in zip(values, others, strict=True)]
            error = f" +- {statistics.stdev(apart) / math.sqrt(seeds):.{digits}f}" if seeds > 1 else ""
            distance = "" if found is base else f"{statistics.mean(apart):+.{digits}f}{error}"
            cells += [f"{statistics.mean(values):.{digits}f}", f"{statistics.pstdev(values):.{digits}f}", distance]
        rows.append(cells)
    return rows

"""Caches made of others: rows are gathered from their parents a shard at a time, as they are or encoded anew.

What was recorded of the teacher stays recorded, as long as the classes are the same: logsumexp, label, mean, deviation
and entropy, and the head as far as the new one reaches. Only what is estimated in the parent is estimated again.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from kdcache.cache import parallel, summary
from kdcache.cache.format import zarr_store
from kdcache.cache.format.codec import Rows, decode, encode, stated_at
from kdcache.cache.format.fingerprints import Inputs
from kdcache.cache.format.recorded_views import recorded
from kdcache.cache.format.schema import STATISTICS, TAIL_TEMPERATURES, Encoding, Plan
from kdcache.cache.format.tail_basis import TailBasis, fit_coordinates, round_coordinates
from kdcache.cache.inspect.card import write_card
from kdcache.cache.lock import release
from kdcache.cache.reader import Cache, open_cache
from kdcache.cache.writer import CacheWriter
from kdcache.errors import InterruptedRun, KdcacheError

_ROWS_AT_ONCE = 2048
_LOWEST = torch.finfo(torch.float16).min
_DTYPES = {"float16": torch.float16, "float32": torch.float32}


@dataclass(frozen=True)
class ParentRows:
    """Rows of a parent, in the order in which they are wanted.

    Attributes:
        path: of the parent.
        plan: of the parent.
        ids: [B] int64, of its samples.
        labels: [B] int64, as they were encoded.
    """

    path: Path
    plan: Plan
    ids: npt.NDArray[np.int64]
    labels: Tensor

    def rows(self, view: int, change: Callable[[Rows, Tensor], Rows] | None = None) -> Rows:
        """The rows of a view, each chunk of the parent read once; `change` is given some of them and their labels."""
        reader, size = zarr_store.RowReader(self.path, self.plan), self.plan.shape.chunk_rows
        order = np.argsort(self.ids, kind="stable")
        ids, labels = self.ids[order], self.labels[torch.from_numpy(order)]
        parts = []
        for chunk in np.unique(ids // size).tolist():
            here = range(chunk * size, min((chunk + 1) * size, self.plan.dataset.samples))
            first, last = np.searchsorted(ids, [here.start, here.stop]).tolist()
            rows = reader.read(view, here)[torch.from_numpy(ids[first:last] - here.start)]
            if change is None:
                parts.append(rows)
                continue
            for start in range(0, len(rows), _ROWS_AT_ONCE):
                some = rows[start : start + _ROWS_AT_ONCE]
                parts.append(change(some, labels[first + start : first + start + len(some)]))
        place = np.empty_like(order)
        place[order] = np.arange(len(order))
        return Rows.concatenate(parts)[torch.from_numpy(place)]

    def recorded(self, view: int) -> npt.NDArray[Any]:
        """What a view of these samples was drawn from, where the parent keeps that."""
        first, last = int(self.ids.min()), int(self.ids.max())
        values: npt.NDArray[Any] = zarr_store.read_recorded(self.path, self.plan, view, range(first, last + 1))
        return values[self.ids - first]

    def logits(self, view: int, classes: list[int] | None = None) -> Tensor:
        """What the rows stand for, [B, C] float32, or of some classes."""
        basis, encoding = zarr_store.read_basis(self.path, self.plan), self.plan.encoding
        logits = decode(self.rows(view), self.labels, encoding, basis)
        return logits if classes is None else logits[:, classes]


@dataclass(frozen=True)
class Recoding:
    """How rows are encoded anew.

    Attributes:
        before: their encoding.
        basis_before: of their tails.
        after: the new encoding.
        basis: of the new tails.
        classes: of which the logits are kept, and in which order; None for all.
    """

    before: Encoding
    basis_before: TailBasis | None
    after: Encoding
    basis: TailBasis | None
    classes: list[int] | None = None

    def __call__(self, rows: Rows, labels: Tensor) -> Rows:
        """The same rows in the new encoding.

        Args:
            rows: of B samples.
            labels: [B] int64, as they were encoded; of a class that is left out, the new row has none.
        """
        logits = decode(rows, labels, self.before, self.basis_before)
        if self.classes is not None:
            return encode(logits[:, self.classes], relabeled(labels, self.classes), self.after, self.basis)
        if rows.indices is not None and self.after.top_k <= self.before.top_k:
            return self._shorter(rows, rows.indices, labels, logits)
        made = encode(logits, labels, self.after, self.basis)
        statistics = torch.cat([rows.statistics[:, : len(STATISTICS)], made.statistics[:, len(STATISTICS) :]], dim=1)
        return replace(made, logsumexp=rows.logsumexp, statistics=statistics)

    def _shorter(self, rows: Rows, indices: Tensor, labels: Tensor, logits: Tensor) -> Rows:
        """Rows of a shorter head: it is the beginning of the longer one, whatever rounding has made equal there."""
        k = self.after.top_k
        stated = stated_at(indices[:, :k], labels, self.after.num_classes)
        moved = ~stated.gather(1, indices.long())
        columns = {name: rows.statistics[:, place].float() for place, name in enumerate(self.before.statistics)}
        label = columns["label_log_prob"].double()
        outside = (labels >= 0) & ~(indices.long() == labels.unsqueeze(1)).any(dim=1)
        for t in TAIL_TEMPERATURES:
            at_t = (rows.log_probs.double() / t).exp()
            # Of the recorded mass m and the sum of what is stated, exp(a / T), follows the sum over all classes.
            sum_stated = at_t.sum(dim=1) + torch.where(outside, (label / t).exp(), 0.0)
            recorded = columns[f"tail_log_mass_t{t}"].double()
            joining = (at_t * moved).sum(dim=1) / sum_stated * -torch.expm1(recorded)
            columns[f"tail_log_mass_t{t}"] = (recorded.exp() + joining).log().clamp(_LOWEST, 0).float()
        statistics = torch.stack([columns[name] for name in self.after.statistics], dim=1).half()
        tail = None
        if self.basis is not None:
            coordinates = fit_coordinates(logits, stated, self.basis.basis, self.basis.mean)
            tail = round_coordinates(coordinates, self.basis.scale)
        log_probs = rows.log_probs[:, :k].clamp(_LOWEST, 0) if self.after.dtype == "float16" else rows.log_probs[:, :k]
        return Rows(log_probs.to(_DTYPES[self.after.dtype]), indices[:, :k], rows.logsumexp, statistics, tail)


def relabeled(labels: Tensor, classes: list[int]) -> Tensor:
    """Labels [B] int64 as places in `classes`, -1 where they are not among them."""
    places = torch.full((max([*classes, int(labels.max())]) + 2,), -1)
    places[classes] = torch.arange(len(classes))
    return places[labels]  # of -1 the last, which is no class


def derive_shard(
    out: Path, view: int, shard: int, pieces: list[ParentRows], inputs: Inputs, classes: list[int] | None, recoded: bool
) -> None:
    """Write one shard of a cache that was begun at `out`: the rows of pieces of its parents, one after the other."""
    writer = CacheWriter.join(out)
    basis = zarr_store.read_basis(out, writer.plan) if recoded else None
    parts = []
    for piece in pieces:
        change = None
        if recoded:
            before = zarr_store.read_basis(piece.path, piece.plan)
            change = Recoding(piece.plan.encoding, before, writer.plan.encoding, basis, classes)
        parts.append(piece.rows(view, change))
    kept = np.concatenate([piece.recorded(view) for piece in pieces]) if recorded(writer.plan.views.transform) else None
    writer.write(view, shard, Rows.concatenate(parts), inputs, kept)


def build(
    writer: CacheWriter,
    function: Callable[..., None],
    arguments: Callable[[int, int], tuple[Any, ...]],
    scheduler: str,
) -> Cache:
    """Write the shards that a cache has not got yet, and seal it.

    Args:
        writer: of the cache.
        function: writes one shard; is given the folder, the view, the shard, and what `arguments` says of these.
        arguments: as said.
        scheduler: as `operations.over` takes it.

    Raises:
        As `complete`.
    """
    todo = [(view, shard) for view in range(writer.plan.views.count) for shard in writer.pending(view)]
    return complete(writer, function, [(*place, *arguments(*place)) for place in todo], scheduler)


def complete(writer: CacheWriter, function: Callable[..., None], calls: list[tuple[Any, ...]], scheduler: str) -> Cache:
    """Make calls that write what a cache has not got yet, and seal it.

    Args:
        writer: of the cache.
        function: is given the folder, and what each call says.
        calls: as said.
        scheduler: as `operations.over` takes it.

    Raises:
        InterruptedRun: on Ctrl-C; finished shards stay, and the same command goes on.
        KdcacheError: if a parent cannot be read; what this call began is deleted.
    """
    out, plan = writer.path, writer.plan
    try:
        parallel.over(function, [(out, *call) for call in calls], scheduler, plan)
        writer.seal(summary.summarize(out, plan, scheduler))
        cache = open_cache(out)
    except KdcacheError:
        writer.discard()
        raise
    except KeyboardInterrupt:
        raise InterruptedRun(
            f"interrupted; {out} keeps its finished shards", "run the same command again to go on"
        ) from None
    finally:
        release(out)
    write_card(cache)
    return cache

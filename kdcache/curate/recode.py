"""Write derived caches: rows are read from their parents shard by shard, and copied or encoded again.

As long as the classes stay the same, the exact values of the parent are copied: logsumexp, label, mean, deviation and
entropy, and the head up to the new top_k. Only values that are estimates in the parent are estimated again.
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
from kdcache.cache.format import stored_bases, zarr_store
from kdcache.cache.format.codec import Rows, decode, encode, stated_at
from kdcache.cache.format.encoding import STATISTICS, TAIL_TEMPERATURES, Encoding
from kdcache.cache.format.fingerprints import Inputs
from kdcache.cache.format.output_codec import Basis, decode_output, encode_output
from kdcache.cache.format.output_records import OutputRecord
from kdcache.cache.format.recorded_views import recorded
from kdcache.cache.format.schema import Plan
from kdcache.cache.format.tail_basis import TailBasis, fit_coordinates, round_coordinates
from kdcache.cache.format.vector_rows import EncodedRows, R
from kdcache.cache.inspect.card import write_card
from kdcache.cache.lock import release
from kdcache.cache.reader import Cache, open_cache
from kdcache.cache.writer import CacheWriter
from kdcache.dump.outputs import labels_of_output
from kdcache.errors import InterruptedRun, KdcacheError

_ROWS_AT_ONCE = 2048
_LOWEST = torch.finfo(torch.float16).min
_DTYPES = {"float16": torch.float16, "float32": torch.float32}


@dataclass(frozen=True)
class ParentRows:
    """Rows of a parent, in their order in the new cache.

    Attributes:
        path: folder of the parent.
        plan: plan of the parent.
        ids: [B] int64, ids of the samples in the parent.
        labels: [B] int64, labels that the rows were encoded with.
    """

    path: Path
    plan: Plan
    ids: npt.NDArray[np.int64]
    labels: Tensor

    def rows(self, view: int, change: Callable[[Rows, Tensor], Rows] | None = None) -> Rows:
        """Return the rows of the class logits in a view; each chunk of the parent is read once.

        Args:
            view: index of the view.
            change: maps rows and their labels to new rows; None to copy.
        """
        return self._read(zarr_store.row_reader(self.path, self.plan), view, change)

    def output_rows(
        self, output: str, view: int, change: Callable[[EncodedRows, Tensor], EncodedRows] | None = None
    ) -> EncodedRows:
        """Return the rows of another output in a view; the arguments are those of `rows`."""
        reader: zarr_store.RowReader[EncodedRows] = zarr_store.output_reader(self.path, self.plan, output)
        return self._read(reader, view, change)

    def _read(self, reader: zarr_store.RowReader[R], view: int, change: Callable[[R, Tensor], R] | None) -> R:
        """Return rows of a view in the order of `ids`, changed if requested."""
        size = self.plan.shape.chunk_rows
        order = np.argsort(self.ids, kind="stable")
        ids, labels = self.ids[order], self.labels[torch.from_numpy(order)]
        parts: list[R] = []
        for chunk in np.unique(ids // size).tolist():
            chunk_ids = range(chunk * size, min((chunk + 1) * size, self.plan.dataset.samples))
            first, last = np.searchsorted(ids, [chunk_ids.start, chunk_ids.stop]).tolist()
            rows = reader.read(view, chunk_ids)[torch.from_numpy(ids[first:last] - chunk_ids.start)]
            if change is None:
                parts.append(rows)
                continue
            for start in range(0, len(rows), _ROWS_AT_ONCE):
                some = rows[start : start + _ROWS_AT_ONCE]
                parts.append(change(some, labels[first + start : first + start + len(some)]))
        inverse = np.empty_like(order)
        inverse[order] = np.arange(len(order))
        return type(parts[0]).concatenate(parts)[torch.from_numpy(inverse)]

    def recorded(self, view: int) -> npt.NDArray[Any]:
        """Return the recorded boxes or seeds of a view of these samples; the parent must store them."""
        first, last = int(self.ids.min()), int(self.ids.max())
        values: npt.NDArray[Any] = zarr_store.read_recorded(self.path, self.plan, view, range(first, last + 1))
        return values[self.ids - first]

    def logits(self, view: int, classes: list[int] | None = None) -> Tensor:
        """Return the decoded logits, [B, C] float32, of all or some classes."""
        basis, encoding = stored_bases.read_basis(self.path, self.plan), self.plan.encoding
        logits = decode(self.rows(view), self.labels, encoding, basis)
        return logits if classes is None else logits[:, classes]


@dataclass(frozen=True)
class Recoding:
    """A change of encoding.

    Attributes:
        before: encoding of the parent.
        basis_before: tail basis of the parent.
        after: new encoding.
        basis: new tail basis.
        classes: classes of the new rows, in their order; None for all.
    """

    before: Encoding
    basis_before: TailBasis | None
    after: Encoding
    basis: TailBasis | None
    classes: list[int] | None = None

    def __call__(self, rows: Rows, labels: Tensor) -> Rows:
        """Encode rows again.

        Args:
            rows: of B samples.
            labels: [B] int64, labels that they were encoded with; a label of a class that is left out becomes -1.
        """
        logits = decode(rows, labels, self.before, self.basis_before)
        if self.classes is not None:
            return encode(logits[:, self.classes], relabeled(labels, self.classes), self.after, self.basis)
        if rows.indices is not None and self.after.top_k <= self.before.top_k:
            return self._shorten(rows, rows.indices, labels, logits)
        encoded = encode(logits, labels, self.after, self.basis)
        statistics = torch.cat([rows.statistics[:, : len(STATISTICS)], encoded.statistics[:, len(STATISTICS) :]], dim=1)
        return replace(encoded, logsumexp=rows.logsumexp, statistics=statistics)

    def _shorten(self, rows: Rows, indices: Tensor, labels: Tensor, logits: Tensor) -> Rows:
        """Truncate the head; the order of the parent stays, also among values that rounding has made equal."""
        k = self.after.top_k
        stated = stated_at(indices[:, :k], labels, self.after.num_classes)
        moved = ~stated.gather(1, indices.long())
        columns = {name: rows.statistics[:, column].float() for column, name in enumerate(self.before.statistics)}
        label = columns["label_log_prob"].double()
        outside = (labels >= 0) & ~(indices.long() == labels.unsqueeze(1)).any(dim=1)
        for t in TAIL_TEMPERATURES:
            at_t = (rows.log_probs.double() / t).exp()
            # The recorded tail mass and the sum of exp(a / T) over the stated classes give the sum over all classes.
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
    """Return labels [B] int64 as indices into `classes`, -1 for other labels."""
    indices = torch.full((max([*classes, int(labels.max())]) + 2,), -1)
    indices[classes] = torch.arange(len(classes))
    return indices[labels]  # label -1 reads the last element, which is always -1


def derive_shard(
    out: Path,
    view: int,
    shard: int,
    parents: list[ParentRows],
    inputs: Inputs,
    classes: list[int] | None,
    recoded: bool,
) -> None:
    """Write one shard of the unsealed cache at `out`: the rows of its parents, concatenated."""
    writer = CacheWriter.join(out)
    rows = _rows_of_logits(out, writer.plan, view, parents, classes, recoded) if writer.plan.class_encoding else None
    outputs = {name: _rows_of_output(out, writer.plan, name, view, parents) for name in writer.plan.named_outputs}
    boxes_or_seeds = None
    if recorded(writer.plan.views.transform):
        boxes_or_seeds = np.concatenate([parent.recorded(view) for parent in parents])
    writer.write(view, shard, rows, inputs, boxes_or_seeds, outputs)


def _rows_of_logits(
    out: Path, plan: Plan, view: int, parents: list[ParentRows], classes: list[int] | None, recoded: bool
) -> Rows:
    """Return the rows of class logits of some samples of a derived cache."""
    basis = stored_bases.read_basis(out, plan) if recoded else None
    parts = []
    for parent in parents:
        change = None
        if recoded:
            before = stored_bases.read_basis(parent.path, parent.plan)
            change = Recoding(parent.plan.encoding, before, plan.encoding, basis, classes)
        parts.append(parent.rows(view, change))
    return Rows.concatenate(parts)


def _rows_of_output(out: Path, plan: Plan, name: str, view: int, parents: list[ParentRows]) -> EncodedRows:
    """Return the rows of another output; those of a parent with another encoding or basis are encoded again."""
    record, basis = plan.named_outputs[name], stored_bases.read_output_basis(out, plan, name)
    parts = []
    for parent in parents:
        before = parent.plan.named_outputs[name]
        old_basis = stored_bases.read_output_basis(parent.path, parent.plan, name)

        def again(
            rows: EncodedRows, labels: Tensor, before: OutputRecord = before, old_basis: Basis = old_basis
        ) -> EncodedRows:
            values = decode_output(rows, labels_of_output(before, labels), before.encoding, old_basis)
            return encode_output(values, labels_of_output(record, labels), record.encoding, basis)

        is_same = before.encoding == record.encoding and same_basis(old_basis, basis)
        parts.append(parent.output_rows(name, view, None if is_same else again))
    return type(parts[0]).concatenate(parts)


def same_basis(first: Basis, other: Basis) -> bool:
    """Return whether two bases are the same, or both None."""
    if first is None or other is None or type(first) is not type(other):
        return first is other
    return all(torch.equal(a, b) for a, b in zip(vars(first).values(), vars(other).values(), strict=True))


def build(
    writer: CacheWriter,
    function: Callable[..., None],
    arguments: Callable[[int, int], tuple[Any, ...]],
    scheduler: str,
) -> Cache:
    """Write the pending shards of a cache, and seal it.

    Args:
        writer: of the cache.
        function: writes one shard; called with the folder, view, shard, and the arguments of these.
        arguments: returns the arguments of a view and shard.
        scheduler: backend; see `parallel.over`.

    Raises:
        As `complete`.
    """
    pending = [(view, shard) for view in range(writer.plan.views.count) for shard in writer.pending(view)]
    return complete(writer, function, [(view, shard, *arguments(view, shard)) for view, shard in pending], scheduler)


def complete(writer: CacheWriter, function: Callable[..., None], calls: list[tuple[Any, ...]], scheduler: str) -> Cache:
    """Run the calls that write the pending shards of a cache, and seal it.

    Args:
        writer: of the cache.
        function: called with the folder and the arguments of each call.
        calls: arguments of each call.
        scheduler: backend; see `parallel.over`.

    Raises:
        As `finish`.
    """
    out, plan = writer.path, writer.plan
    return finish(writer, lambda: parallel.over(function, [(out, *call) for call in calls], scheduler, plan), scheduler)


def finish(writer: CacheWriter, write_shards: Callable[[], object], scheduler: str = "threads") -> Cache:
    """Write the pending shards of a cache, and seal it.

    Args:
        writer: of the cache.
        write_shards: writes and commits them.
        scheduler: backend of the summary; see `parallel.over`.

    Raises:
        InterruptedRun: on Ctrl-C; finished shards stay, and the same command resumes.
        KdcacheError: if a source cannot be read; a cache that this run has created is deleted.
    """
    out, plan = writer.path, writer.plan
    try:
        write_shards()
        writer.seal(summary.summarize(out, plan, scheduler))
        cache = open_cache(out)
    except KdcacheError:
        writer.discard()
        raise
    except KeyboardInterrupt:
        raise InterruptedRun(
            f"interrupted; {out} keeps its finished shards", "run the same command again to resume"
        ) from None
    finally:
        release(out)
    write_card(cache)
    return cache

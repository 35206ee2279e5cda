"""Common parts of `select` and `merge`: samples at new ordinals, their fingerprints, and a plan with a lineage.

The random draws of a view of sample i follow from (seed, i, view). So a sample may only get another ordinal if the
transform is not random, and a cache cannot hold views of two seeds.
"""

from __future__ import annotations

from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from kdcache.cache.format import zarr_store
from kdcache.cache.format.encoding import Encoding, Fidelity, Request
from kdcache.cache.format.fingerprints import Inputs
from kdcache.cache.format.output_records import OutputRecord
from kdcache.cache.format.recorded_views import recorded
from kdcache.cache.format.schema import DatasetRecord, Lineage, Plan, Sharding
from kdcache.cache.format.stored_bases import Bases, basis_of_logits
from kdcache.cache.format.tail_basis import TailBasis
from kdcache.cache.reader import Cache
from kdcache.cache.writer import CacheWriter
from kdcache.curate.recode import ParentRows, build, derive_shard
from kdcache.data.replay import compare_inputs, fingerprints_of
from kdcache.data.samples import Samples
from kdcache.data.views import View
from kdcache.errors import MismatchError, UsageError
from kdcache.runtime.progress import Progress

_CHECKED = 32
"""Number of images with a stored fingerprint that are checked before new fingerprints are computed."""

_SHOWN = 5
"""Ordinals that a message names."""

Ids = npt.NDArray[np.int64]


class ParentSelection(NamedTuple):
    """Samples of a cache, in their order in the new cache."""

    cache: Cache
    ids: Ids


class Encoded(NamedTuple):
    """The encodings of the new cache.

    Attributes:
        request: of the class logits.
        encoding: of the class logits; None if they are left out.
        fidelity: of the class logits.
        basis: of the tail of the class logits.
        recoded: whether rows of class logits are not copied from the parents.
        outputs: the other outputs; None without.
        output_bases: of the other outputs.
    """

    request: Request
    encoding: Encoding | None
    fidelity: Fidelity | None
    basis: TailBasis | None
    recoded: bool
    outputs: dict[str, OutputRecord] | None = None
    output_bases: Bases = MappingProxyType({})

    @property
    def bases(self) -> Bases:
        """Bases of all outputs that have one."""
        return {**basis_of_logits(self.basis), **self.output_bases}


def inputs_at(
    selections: list[ParentSelection], shape: Sharding, count: int, data: Samples | None, progress: Progress
) -> tuple[Sharding, list[Inputs]]:
    """Return the fingerprints of samples at new ordinals, for a transform that is not random.

    A cache stores the fingerprint of every `fingerprint_stride`-th sample. If there is a stride for which all
    fingerprints are known, it is used; otherwise the missing ones are computed from the images.

    Args:
        selections: the samples of each parent, concatenated in the new cache.
        shape: preferred sharding of the new cache.
        count: number of views of the new cache.
        data: the images; None if they are not available.
        progress: progress reporter.

    Returns:
        The sharding, and for each view the fingerprints; number j is of sample j * `fingerprint_stride`.

    Raises:
        UsageError: if images are needed and `data` is None.
        MismatchError: if the images are not those that the teacher saw.
    """
    views = range(count)
    stored = [
        [zarr_store.read_inputs(cache.path, cache.manifest.plan, view) for view in views] for cache, _ in selections
    ]
    strides = [cache.manifest.plan.shape.fingerprint_stride for cache, _ in selections]
    known = np.concatenate([ids % stride == 0 for (_, ids), stride in zip(selections, strides, strict=True)])
    every = [
        Inputs.concatenate([
            inputs[view].at(ids // stride)
            for (_, ids), stride, inputs in zip(selections, strides, stored, strict=True)
        ])
        for view in views
    ]  # fmt: skip
    if recorded(selections[0].cache.manifest.plan.views.transform) == "seeds":
        return shape, [inputs.at(slice(None, None, shape.fingerprint_stride)) for inputs in every]  # 0, all of them
    preferred = shape.fingerprint_stride
    usable = (n for n in range(preferred, shape.shard_rows + 1) if shape.shard_rows % n == 0 and known[::n].all())
    if data is None:
        stride = next(usable, None)
        if stride is None:
            without = (np.flatnonzero(~known[::preferred]) * preferred).tolist()
            some = ", ".join(map(str, without[:_SHOWN])) + (", ..." if len(without) > _SHOWN else "")
            raise UsageError(
                "fingerprints are missing: a cache stores them for every n-th sample only, and the samples that would "
                f"become {some} of the new cache have none ({len(without):,} of them)",
                "pass the data set with --data PIPELINE; the fingerprints are then computed from its images",
            )
        return shape.model_copy(update={"fingerprint_stride": stride}), [
            inputs.at(slice(None, None, stride)) for inputs in every
        ]
    fingerprints = [inputs.at(slice(None, None, preferred)) for inputs in every]
    missing = np.flatnonzero(~known[::preferred])
    keys = np.concatenate([cache.sample_keys[ids] for cache, ids in selections])
    for (cache, _), inputs, stride in zip(selections, stored, strides, strict=True):
        _check_pixels(cache, inputs[0], stride, data, progress)
    positions, begin = _positions_in(data, keys[missing * preferred], progress), 0
    for cache, ids in selections:
        of_parent = (missing * preferred >= begin) & (missing * preferred < begin + len(ids))
        if of_parent.any():
            indices = missing[of_parent]
            for view in views:
                seen = _computed(cache, data, positions[of_parent], ids[indices * preferred - begin], view)
                for values, computed in zip(fingerprints[view], seen, strict=True):
                    values[indices] = computed
        begin += len(ids)
    return shape, fingerprints


def _positions_in(data: Samples, keys: npt.NDArray[np.uint64], progress: Progress) -> Ids:
    """Return the positions of the images with these content keys in a data set."""
    available = data.keys(progress)
    order = np.argsort(available, kind="stable")
    ranks = np.searchsorted(available, keys, sorter=order).clip(max=len(available) - 1)
    positions: Ids = order[ranks]
    missing = np.flatnonzero(available[positions] != keys)
    if len(missing):
        raise MismatchError(
            f"{len(missing)} of the images are not in {data.name}/{data.split}, first the one with the content key "
            f"{keys[missing[0]]:016x}",
            "pass the data set that the cache was made from with --data",
        )
    return positions


def _check_pixels(cache: Cache, inputs: Inputs, stride: int, data: Samples, progress: Progress) -> None:
    """Check that the images of this data set are what the teacher saw, on some with a stored fingerprint."""
    keys = cache.sample_keys[::stride]
    common = np.flatnonzero(np.isin(keys, data.keys(progress)))[:_CHECKED]
    if not len(common):
        raise MismatchError(
            f"{data.name}/{data.split} has none of the images with a fingerprint in {cache.path}",
            "pass the whole data set that the cache was made from with --data",
        )
    computed = _computed(cache, data, _positions_in(data, keys[common], progress), common * stride, 0)
    compare_inputs(cache, 0, torch.from_numpy(common * stride), inputs.at(common), computed)


def _computed(cache: Cache, data: Samples, positions: Ids, ids: Ids, view: int) -> Inputs:
    """Compute the fingerprints of images of a data set, transformed as the samples `ids` of a cache are."""
    cache_ids = np.zeros(len(data), np.int64)
    cache_ids[positions] = ids
    crops, views = cache.crops, cache.manifest.plan.views
    boxes = None if crops is None else crops(view)[cache_ids]
    images = View(data, views.transform, views.seed, view, crops=None if boxes is None else lambda _: boxes)
    return fingerprints_of(images, positions.tolist())


def planned(
    plan: Plan, dataset: DatasetRecord, views: int, encoded: Encoded, shape: Sharding, lineage: Lineage, **others: str
) -> Plan:
    """Return the plan of a derived cache; `plan` is that of its only or first parent."""
    derived = plan.model_copy(
        update={
            **others,
            "dataset": dataset,
            "views": plan.views.model_copy(update={"count": views}),
            "class_request": encoded.request,
            "class_encoding": encoded.encoding,
            "fidelity": encoded.fidelity,
            "outputs": encoded.outputs,
            "shape": shape,
            "lineage": lineage,
        }
    )
    return Plan.model_validate(derived.model_dump())


def derive(
    writer: CacheWriter,
    selections: list[ParentSelection],
    inputs: list[Inputs],
    classes: list[int] | None,
    recoded: bool,
    scheduler: str,
) -> Cache:
    """Write and seal a derived cache.

    Args:
        writer: of the new cache.
        selections: the samples of each parent, concatenated in the new cache.
        inputs: fingerprints per view, as `inputs_at` returns them.
        classes: see `Recoding`.
        recoded: whether rows are encoded again.
        scheduler: backend; see `parallel.over`.
    """
    plan, stride = writer.plan, writer.plan.shape.fingerprint_stride
    ends = np.cumsum([len(selection.ids) for selection in selections])

    def arguments(view: int, shard: int) -> tuple[Any, ...]:
        ids, parents = plan.shard_ids(shard), []
        for (cache, selected), end in zip(selections, ends.tolist(), strict=True):
            begin = end - len(selected)
            of_shard = selected[max(ids.start - begin, 0) : max(ids.stop - begin, 0)].copy()
            if len(of_shard):
                labels = torch.from_numpy(cache.labels[of_shard].astype(np.int64))
                parents.append(ParentRows(cache.path.absolute(), cache.manifest.plan, of_shard, labels))
        fingerprints = slice(ids.start // stride, -(-ids.stop // stride))
        return parents, inputs[view].at(fingerprints), classes, recoded

    return build(writer, derive_shard, arguments, scheduler)

"""What `select` and `merge` have in common: samples in new places, their fingerprints, and a plan with a lineage.

A view of sample i is drawn from (seed, i, view). So a sample may change its place only where a transform draws nothing
at random, and views of two seeds cannot lie in one cache, which has one.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from kdcache.cache.format import zarr_store
from kdcache.cache.format.fingerprints import Inputs
from kdcache.cache.format.recorded_views import recorded
from kdcache.cache.format.schema import DatasetRecord, Encoding, Fidelity, Lineage, Plan, Request, Sharding
from kdcache.cache.format.tail_basis import TailBasis
from kdcache.cache.reader import Cache
from kdcache.cache.writer import CacheWriter
from kdcache.curate.recode import ParentRows, build, derive_shard
from kdcache.data.replay import compare_inputs, fingerprints_of
from kdcache.data.samples import Samples
from kdcache.data.views import View
from kdcache.errors import MismatchError, UsageError
from kdcache.runtime.progress import Progress

_PROVED = 32
"""Images whose fingerprints are known, and that are looked at before those of others are believed."""

Ids = npt.NDArray[np.int64]


class ParentSelection(NamedTuple):
    """Samples of a cache, in the order in which a new cache has them."""

    cache: Cache
    ids: Ids


class Encoded(NamedTuple):
    """How the rows of the new cache are encoded, and whether that is another way than their parents'."""

    request: Request
    encoding: Encoding
    fidelity: Fidelity | None
    basis: TailBasis | None
    recoded: bool


def row_bytes(encoding: Encoding) -> int:
    """Bytes of a row's log-probabilities."""
    return encoding.top_k * np.dtype(encoding.dtype).itemsize


def check_views(cache: Cache, count: int) -> None:
    """That the first `count` views of a cache are here: of one that was pulled, some may not be.

    Raises:
        UsageError: if one is not.
    """
    if missing := sorted(set(range(count)).difference(cache.views)):
        raise UsageError(
            f"view {missing[0]} is wanted, and {cache.path} holds only the views {', '.join(map(str, cache.views))}",
            "select some of these (`--views`), or pull the others",
        )


def inputs_at(
    placed: list[ParentSelection], shape: Sharding, count: int, data: Samples | None, progress: Progress
) -> tuple[Sharding, list[Inputs]]:
    """The fingerprints of samples in new places, of a transform that draws nothing at random, one a view.

    A cache has one of every so many samples; those that come to stand there may have had none. Where the shape can be
    chosen so that all are known, it is; otherwise the images are looked at.

    Args:
        placed: which samples, one after the other.
        shape: of the new cache, as its size suggests it.
        count: how many views it is to have, the first ones.
        data: the images; None if they are not at hand.
        progress: who is told how it goes.

    Returns:
        The shape, and of each view fingerprint j, which is of sample j * `fingerprint_stride`.

    Raises:
        UsageError: if the images are needed, and are not given.
        MismatchError: if they are not those that the teacher saw.
    """
    views = range(count)
    kept = [[zarr_store.read_inputs(cache.path, cache.manifest.plan, view) for view in views] for cache, _ in placed]
    strides = [cache.manifest.plan.shape.fingerprint_stride for cache, _ in placed]
    known = np.concatenate([ids % stride == 0 for (_, ids), stride in zip(placed, strides, strict=True)])
    every = [
        Inputs.concatenate([
            inputs[view].at(ids // stride)
            for (_, ids), stride, inputs in zip(placed, strides, kept, strict=True)
        ])
        for view in views
    ]  # fmt: skip
    if recorded(placed[0].cache.manifest.plan.views.transform) == "seeds":
        return shape, [inputs.at(slice(None, None, shape.fingerprint_stride)) for inputs in every]  # 0, all of them
    least = shape.fingerprint_stride
    usable = (n for n in range(least, shape.shard_rows + 1) if shape.shard_rows % n == 0 and known[::n].all())
    if data is None:
        stride = next(usable, None)
        if stride is None:
            raise UsageError(
                "fingerprints are missing: a cache keeps them of every so many samples, and those that come to stand "
                "in these places had none",
                "give the images, --data PIPELINE; those of its data set are then looked at again",
            )
        return shape.model_copy(update={"fingerprint_stride": stride}), [
            inputs.at(slice(None, None, stride)) for inputs in every
        ]
    found = [inputs.at(slice(None, None, least)) for inputs in every]
    new = np.flatnonzero(~known[::least])
    keys = np.concatenate([cache.sample_keys[ids] for cache, ids in placed])
    for (cache, _), inputs, stride in zip(placed, kept, strides, strict=True):
        _check_pixels(cache, inputs[0], stride, data, progress)
    places, begin = _places_in(data, keys[new * least], progress), 0
    for cache, ids in placed:
        mine = (new * least >= begin) & (new * least < begin + len(ids))
        if mine.any():
            here = new[mine]
            for view in views:
                seen = _seen(cache, data, places[mine], ids[here * least - begin], view)
                for values, fresh in zip(found[view], seen, strict=True):
                    values[here] = fresh
        begin += len(ids)
    return shape, found


def _places_in(data: Samples, keys: npt.NDArray[np.uint64], progress: Progress) -> Ids:
    """Where a data set has the images of these content keys."""
    have = data.keys(progress)
    order = np.argsort(have, kind="stable")
    at = np.searchsorted(have, keys, sorter=order).clip(max=len(have) - 1)
    places: Ids = order[at]
    missing = np.flatnonzero(have[places] != keys)
    if len(missing):
        raise MismatchError(
            f"{data.name}/{data.split} lacks {len(missing)} of the images, first that of the content key "
            f"{keys[missing[0]]:016x}",
            "give the data set that the cache was made from with --data",
        )
    return places


def _check_pixels(cache: Cache, inputs: Inputs, stride: int, data: Samples, progress: Progress) -> None:
    """That images of this data set are seen here as the teacher saw them."""
    keys = cache.sample_keys[::stride]
    common = np.flatnonzero(np.isin(keys, data.keys(progress)))[:_PROVED]
    if not len(common):
        raise MismatchError(
            f"{data.name}/{data.split} has none of the images of which {cache.path} keeps a fingerprint",
            "give the whole data set that the cache was made from with --data",
        )
    seen = _seen(cache, data, _places_in(data, keys[common], progress), common * stride, 0)
    then = inputs.at(common)
    compare_inputs(cache, 0, torch.from_numpy(common * stride), then, seen)


def _seen(cache: Cache, data: Samples, places: Ids, ids: Ids, number: int) -> Inputs:
    """Fingerprints of the images at some places of a data set, seen as the samples `ids` of a cache."""
    at = np.zeros(len(data), np.int64)
    at[places] = ids
    crops, views = cache.crops, cache.manifest.plan.views
    boxes = None if crops is None else crops(number)[at]
    view = View(data, views.transform, views.seed, number, crops=None if boxes is None else lambda _: boxes)
    return fingerprints_of(view, places.tolist())


def planned(
    plan: Plan, dataset: DatasetRecord, views: int, encoded: Encoded, shape: Sharding, lineage: Lineage, **others: str
) -> Plan:
    """The plan of a cache that is made of another one, or of several, of which this is the first one's."""
    made = plan.model_copy(
        update={
            **others,
            "dataset": dataset,
            "views": plan.views.model_copy(update={"count": views}),
            "request": encoded.request,
            "encoding": encoded.encoding,
            "fidelity": encoded.fidelity,
            "shape": shape,
            "lineage": lineage,
        }
    )
    return Plan.model_validate(made.model_dump())


def derive(
    writer: CacheWriter,
    placed: list[ParentSelection],
    inputs: list[Inputs],
    classes: list[int] | None,
    recoded: bool,
    scheduler: str,
) -> Cache:
    """Write and seal the new cache; fingerprints are given a view each, `classes` as `Recoding` has them."""
    plan, stride = writer.plan, writer.plan.shape.fingerprint_stride
    ends = np.cumsum([len(part.ids) for part in placed])

    def arguments(view: int, shard: int) -> tuple[Any, ...]:
        ids, pieces = plan.shard_ids(shard), []
        for part, end in zip(placed, ends.tolist(), strict=True):
            begin = end - len(part.ids)
            mine = part.ids[max(ids.start - begin, 0) : max(ids.stop - begin, 0)].copy()
            if len(mine):
                labels = torch.from_numpy(part.cache.labels[mine].astype(np.int64))
                pieces.append(ParentRows(part.cache.path.absolute(), part.cache.manifest.plan, mine, labels))
        prints = slice(ids.start // stride, -(-ids.stop // stride))
        return pieces, inputs[view].at(prints), classes, recoded

    return build(writer, derive_shard, arguments, scheduler)

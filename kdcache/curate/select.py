"""A smaller cache: fewer views, samples or classes, or a shorter head, without the teacher."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from kdcache.cache.adopt import adopt_shards
from kdcache.cache.format import zarr_store
from kdcache.cache.format.fingerprints import digest_of
from kdcache.cache.format.read_records import read_plan
from kdcache.cache.format.schema import PLAN, Lineage, Plan
from kdcache.cache.format.sharding import choose_sharding
from kdcache.cache.planner import encoding_without_pilot, pilot_ids, plan_encoding
from kdcache.cache.preconditions import check_place
from kdcache.cache.reader import Cache
from kdcache.cache.writer import CacheWriter
from kdcache.curate.derive import Encoded, Ids, ParentSelection, check_views, derive, inputs_at, planned, row_bytes
from kdcache.curate.recode import ParentRows, relabeled
from kdcache.data.mixing import split_mixing
from kdcache.data.samples import Samples
from kdcache.data.transforms import is_drawn
from kdcache.errors import UsageError
from kdcache.runtime.progress import Progress, Silent


def select(
    cache: Cache,
    out: str | Path,
    *,
    views: Sequence[int] | None = None,
    classes: Sequence[str] | None = None,
    samples: Ids | None = None,
    top_k: int | None = None,
    data: Samples | None = None,
    scheduler: str = "threads",
    progress: Progress | None = None,
) -> Cache:
    """A cache of some views, classes or samples of another one, or of fewer classes a row.

    Killed at any moment, the same call goes on at the first shard that is not whole.

    Args:
        cache: the parent.
        out: folder of the new cache.
        views: the first ones, 0, 1, ...; None for all.
        classes: names of those whose logits are kept, in the order that they will have; None for all. The label of a
            sample of another class is then not known.
        samples: [n] ordinals, in the order that they will have; None for all.
        top_k: how many classes of a row are kept.
        data: what the parent was made from, or as much of it as is selected: images that come to stand where the new
            cache has a fingerprint, and that had none, are seen again.
        scheduler: as `operations.over` takes it.
        progress: who is told how it goes.

    Raises:
        UsageError: if what is asked for is not there, or could not be replayed.
        MismatchError: if `out` was begun with other settings, or `data` is something else.
    """
    out, plan = Path(out).absolute(), cache.manifest.plan
    check_place(out)
    count = _count_of(views, plan)
    check_views(cache, count)
    ids = np.arange(len(cache)) if samples is None else np.asarray(samples, np.int64)
    _check_ids(ids, cache)
    chosen = None if classes is None else _places(classes, plan.dataset.class_names)
    labels = torch.from_numpy(cache.labels[ids].astype(np.int64))
    kept_labels = labels if chosen is None else relabeled(labels, chosen)
    asked = {
        **({} if views is None else {"views": count}),
        **({} if classes is None else {"classes": list(classes)}),
        **({} if samples is None else {"samples": len(ids)}),
        **({} if top_k is None else {"top_k": top_k}),
    }
    if not asked:
        raise UsageError("nothing is selected", "say which --views, --classes, --samples or --top-k are to be kept")
    lineage = Lineage(operation="select", arguments=asked, parents=[cache.manifest.digest])
    encoded = _encoded(cache, out, lineage, ids, chosen, top_k)
    keys, numbers = cache.sample_keys[ids], kept_labels.numpy().astype(np.int32)
    names = plan.dataset.class_names if chosen is None else tuple(classes or ())
    dataset = plan.dataset.model_copy(
        update={"samples": len(ids), "class_names": names, "digest": digest_of(keys, numbers)}
    )
    stays = bool((ids == np.arange(len(ids))).all())
    placed = [ParentSelection(cache, ids)]
    if stays:
        shape, first = plan.shape, slice(-(-len(ids) // plan.shape.fingerprint_stride))
        inputs = [zarr_store.read_inputs(cache.path, plan, view).at(first) for view in range(count)]
    else:
        shape = choose_sharding(len(ids), row_bytes(encoded.encoding))
        shape, inputs = inputs_at(placed, shape, count, data, progress or Silent())
    made = planned(plan, dataset, count, encoded, shape, lineage)
    writer = CacheWriter.begin(out, made, numbers, keys, encoded.basis)
    if stays and not encoded.recoded:
        adopt_shards(writer, cache)
    return derive(writer, placed, inputs, chosen, encoded.recoded, scheduler)


def _count_of(views: Sequence[int] | None, plan: Plan) -> int:
    if views is None:
        return plan.views.count
    if not views or list(views) != list(range(len(views))):
        raise UsageError(
            f"the views {', '.join(map(str, views)) or 'none'} are not the first ones: view v of a sample is drawn "
            "from (seed, sample, v), and a cache says how many views it has, not which",
            "ask for 0-N",
        )
    if len(views) > plan.views.count:
        raise UsageError(f"the cache has {plan.views.count} views, {len(views)} are asked for", "ask for fewer")
    return len(views)


def _check_ids(ids: Ids, cache: Cache) -> None:
    """That these samples are there, and can be replayed in their new places."""
    transform = cache.manifest.plan.views.transform
    if not len(ids) or ids.min() < 0 or ids.max() >= len(cache) or len(np.unique(ids)) < len(ids):
        raise UsageError(
            f"the samples are not some of 0 to {len(cache) - 1}, each at most once, and at least one",
            "give ordinals of the data set that was dumped, as `kdcache summarize` prints them",
        )
    if not (ids == np.arange(len(ids))).all() and is_drawn(transform):
        moved = int(np.argmax(ids != np.arange(len(ids))))
        raise UsageError(
            f"sample {ids[moved]} would become sample {moved}, and its views, which are drawn from (seed, sample, "
            "view), could not be replayed",
            "take the first samples (0-N), or dump the teacher on the smaller data set",
        )
    if len(ids) < len(cache) and split_mixing(transform)[1]:
        raise UsageError(
            "each image is mixed with another of the whole data set, and with fewer samples it would be another one",
            "keep all samples, or dump the teacher on the smaller data set",
        )


def _places(classes: Sequence[str], names: tuple[str, ...]) -> list[int]:
    places = {name: place for place, name in enumerate(names)}
    missing = [name for name in classes if name not in places]
    if missing or len(set(classes)) < len(classes) or len(classes) < 2:
        what = f"there is no class {missing[0]!r}" if missing else "two different classes or more are needed"
        raise UsageError(f"{what}: {', '.join(names[:8])}{', ...' if len(names) > 8 else ''}", "name some of these")
    return [places[name] for name in classes]


def _encoded(
    cache: Cache, out: Path, lineage: Lineage, ids: Ids, classes: list[int] | None, top_k: int | None
) -> Encoded:
    plan = cache.manifest.plan
    was, basis = plan.encoding, zarr_store.read_basis(cache.path, plan)
    wanted = len(classes) if classes else was.num_classes
    if top_k is not None and top_k > (min(wanted, was.top_k) if classes is None else wanted):
        raise UsageError(f"top_k {top_k} is more than the cache keeps of {wanted} classes", "ask for fewer: --top-k")
    if classes is None and top_k in (None, was.top_k):
        return Encoded(plan.request, was, plan.fidelity, basis, recoded=False)
    if classes is None and not was.dense:
        request = plan.request.model_copy(update={"top_k": top_k})
        return Encoded(request, was.model_copy(update={"top_k": top_k}), None, basis, recoded=True)
    kept: int | str = top_k or ("all" if was.dense else min(was.top_k, wanted))
    kept = "all" if kept == wanted else kept
    dtype = "float16" if was.dtype == "uint8" and kept != "all" else was.dtype
    tail = "uniform" if was.tail == "uniform" else "lowrank"
    request = plan.request.model_copy(update={"top_k": kept, "rank": None, "dtype": dtype, "tail": tail})
    if (out / PLAN).exists() and (begun := read_plan(out / PLAN)).lineage == lineage:
        return Encoded(begun.request, begun.encoding, begun.fidelity, zarr_store.read_basis(out, begun), recoded=True)
    every = encoding_without_pilot(wanted, request)
    if every is not None:
        return Encoded(request, every, None, None, recoded=True)
    some = ids[pilot_ids(len(ids), request.pilot_rows)]
    labels = torch.from_numpy(cache.labels[some].astype(np.int64))
    logits = ParentRows(cache.path, plan, some, labels).logits(0, classes)
    choice = plan_encoding(logits, labels if classes is None else relabeled(labels, classes), request)
    # Against rows that are an estimate themselves nothing can be measured that a student of the teacher should know.
    true = was.dense and was.dtype != "uint8"
    chosen = choice.chosen
    return Encoded(request, chosen.encoding, choice.fidelity if true else None, chosen.basis, recoded=True)

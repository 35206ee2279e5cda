"""Parts of a data set, dumped in different places, as one cache."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from kdcache.cache.format import zarr_store
from kdcache.cache.format.fingerprints import digest_of
from kdcache.cache.format.schema import Lineage
from kdcache.cache.format.sharding import choose_sharding
from kdcache.cache.format.tail_basis import TailBasis
from kdcache.cache.preconditions import check_place, differences
from kdcache.cache.reader import Cache
from kdcache.cache.writer import CacheWriter
from kdcache.curate.derive import Encoded, ParentSelection, check_views, derive, inputs_at, planned, row_bytes
from kdcache.data.samples import Samples
from kdcache.data.transforms import is_drawn
from kdcache.errors import MismatchError, UsageError
from kdcache.runtime.progress import Progress, Silent


def merge(
    caches: Sequence[Cache],
    out: str | Path,
    *,
    reencode: bool = False,
    data: Samples | None = None,
    scheduler: str = "threads",
    progress: Progress | None = None,
) -> Cache:
    """One cache of the samples of several, in the order in which they are given.

    Killed at any moment, the same call goes on at the first shard that is not whole.

    Args:
        caches: of one teacher, on parts of a data set with the same classes, through a transform without chance.
        out: folder of the new cache.
        reencode: encode rows of other encodings or bases anew, as those of the first cache are.
        data: the images of all parts, as for `select`.
        scheduler: as `operations.over` takes it.
        progress: who is told how it goes.

    Raises:
        UsageError: if what comes of it could not be replayed.
        MismatchError: if the caches do not belong together, or `out` was begun with other settings.
    """
    out, first, listener = Path(out).absolute(), caches[0], progress or Silent()
    check_place(out)
    if len(caches) < 2:
        raise UsageError("one cache is given", "give two or more")
    for other in caches[1:]:
        _check_parts(first, other)
    plan = first.manifest.plan
    for cache in caches:
        check_views(cache, plan.views.count)
    bases = [zarr_store.read_basis(cache.path, cache.manifest.plan) for cache in caches]
    alike = [
        cache.manifest.plan.encoding == plan.encoding and _same_basis(bases[0], basis)
        for cache, basis in zip(caches, bases, strict=True)
    ]
    if not all(alike) and not reencode:
        other = caches[alike.index(False)]
        what = "in another basis" if other.manifest.plan.encoding == plan.encoding else "otherwise"
        raise MismatchError(
            f"rows of {other.path} are encoded {what} than those of {first.path}",
            "add --reencode: what they decode to is then encoded as the first cache's rows are, which costs fidelity",
        )
    placed = [ParentSelection(cache, np.arange(len(cache))) for cache in caches]
    keys = np.concatenate([cache.sample_keys for cache in caches])
    labels = np.concatenate([cache.labels for cache in caches])
    if twice := len(keys) - len(np.unique(keys)):
        listener.say(f"note: {twice} samples have the content of another one")
    dataset = plan.dataset.model_copy(
        update={
            "name": _joined([cache.manifest.plan.dataset.name for cache in caches], " + "),
            "split": _joined([cache.manifest.plan.dataset.split for cache in caches], " + "),
            "samples": len(keys),
            "digest": digest_of(keys, labels),
        }
    )
    lineage = Lineage(
        operation="merge",
        arguments={"reencode": reencode},
        parents=[cache.manifest.digest for cache in caches],
    )
    fidelity = plan.fidelity if all(cache.manifest.plan.fidelity == plan.fidelity for cache in caches) else None
    encoded = Encoded(plan.request, plan.encoding, fidelity if all(alike) else None, bases[0], not all(alike))
    shape, inputs = inputs_at(
        placed, choose_sharding(len(keys), row_bytes(plan.encoding)), plan.views.count, data, listener
    )
    licence = _joined([cache.manifest.plan.licence for cache in caches], " AND ")
    notes = _joined([cache.manifest.plan.notes for cache in caches], "\n")
    made = planned(plan, dataset, plan.views.count, encoded, shape, lineage, licence=licence, notes=notes)
    writer = CacheWriter.begin(out, made, labels, keys, bases[0])
    return derive(writer, placed, inputs, None, encoded.recoded, scheduler)


def _check_parts(first: Cache, other: Cache) -> None:
    """That two caches are parts of one."""
    one, two = first.manifest.plan, other.manifest.plan
    if one.dataset.digest == two.dataset.digest or np.isin(other.sample_keys, first.sample_keys).all():
        why = "with other seeds, and a cache has one seed, from which its views are replayed"
        if one.views.seed == two.views.seed:
            why = "so that there is nothing to add: views of one seed are the same in both"
        raise UsageError(
            f"{first.path} and {other.path} are of the same samples, {why}",
            "for more views: kdcache dump-teacher --extend; to learn from both: train-student --cache A --cache B",
        )
    ours, theirs = (
        {
            "teacher": plan.teacher.model_dump(),
            "transform": plan.views.transform,
            "views": plan.views.count,
            "classes": plan.dataset.class_names,
        }
        for plan in (one, two)
    )
    differ = [f"{key}: {a}, {b}" for key, a, b in differences(ours, theirs)]
    if differ:
        raise MismatchError(
            "\n  ".join([f"{first.path} and {other.path} are no parts of one cache:", *differ]),
            "merge caches of one teacher, one transform and the same classes in the same order",
        )
    if is_drawn(one.views.transform):
        raise UsageError(
            f"the samples of {other.path} would be numbered on from {len(first)}, and their views, which are drawn "
            "from (seed, sample, view), could not be replayed",
            "dump the teacher on the whole data set; kdcache dump-teacher --extend takes over what is made already",
        )


def _same_basis(one: TailBasis | None, two: TailBasis | None) -> bool:
    if one is None or two is None:
        return one is two
    return all(torch.equal(a, b) for a, b in zip(vars(one).values(), vars(two).values(), strict=True))


def _joined(texts: list[str], by: str) -> str:
    """Those that differ, in their order."""
    return by.join(dict.fromkeys(text for text in texts if text))

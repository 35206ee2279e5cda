"""Make a smaller cache without the teacher: fewer views, samples or classes, or a shorter head."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from kdcache.cache.adopt import adopt_shards
from kdcache.cache.format import stored_bases, zarr_store
from kdcache.cache.format.fingerprints import digest_of
from kdcache.cache.format.output_records import DEFAULT_OUTPUT
from kdcache.cache.format.read_records import read_plan
from kdcache.cache.format.schema import PLAN, Lineage, Plan
from kdcache.cache.format.sharding import sharding_of
from kdcache.cache.planner import encoding_without_pilot, pilot_ids, plan_encoding
from kdcache.cache.preconditions import check_place, refuse_sequences
from kdcache.cache.reader import Cache
from kdcache.cache.writer import CacheWriter
from kdcache.curate.derive import Encoded, Ids, ParentSelection, derive, inputs_at, planned
from kdcache.curate.recode import ParentRows, relabeled
from kdcache.data.mixing import split_mixing
from kdcache.data.samples import Samples
from kdcache.data.transforms import is_drawn
from kdcache.errors import UsageError, did_you_mean
from kdcache.runtime.progress import Progress, Silent


def select(
    cache: Cache,
    out: str | Path,
    *,
    views: Sequence[int] | None = None,
    classes: Sequence[str] | None = None,
    samples: Ids | None = None,
    top_k: int | None = None,
    outputs: Sequence[str] | None = None,
    data: Samples | None = None,
    scheduler: str = "threads",
    progress: Progress | None = None,
) -> Cache:
    """Select views, classes or samples of a cache, or fewer classes per row.

    If interrupted at any moment, the same call resumes at the first unfinished shard.

    Args:
        cache: the parent.
        out: folder of the new cache.
        views: the first views, 0, 1, ...; None for all.
        classes: names of the classes to keep, in their new order; None for all. Samples of other classes lose their
            label.
        samples: [n] ordinals, in their new order; None for all.
        top_k: number of classes per row.
        outputs: names of the outputs to keep, `logits` for the class logits; None for all.
        data: data set of the parent, or at least of the selected samples; needed to compute fingerprints that the
            parent does not have.
        scheduler: backend; see `parallel.over`.
        progress: progress reporter; silent if None.

    Raises:
        UsageError: if the cache does not have what is selected, or its views could not be replayed.
        MismatchError: if `out` was started with other settings, or `data` is another data set.
    """
    out, plan = Path(out), cache.manifest.plan
    refuse_sequences(plan, "select", "write the sequences that you want with kdcache.write_token_cache")
    check_place(out)
    out = out.absolute()
    count = _count_of(views, plan)
    cache.check_views(range(count))
    ids = np.arange(len(cache)) if samples is None else np.asarray(samples, np.int64)
    _check_ids(ids, cache)
    class_indices = None if classes is None else _class_indices(classes, plan.dataset.class_names)
    labels = torch.from_numpy(cache.labels[ids].astype(np.int64))
    new_labels = labels if class_indices is None else relabeled(labels, class_indices)
    selected = {
        **({} if views is None else {"views": count}),
        **({} if classes is None else {"classes": list(classes)}),
        **({} if samples is None else {"samples": len(ids)}),
        **({} if top_k is None else {"top_k": top_k}),
        **({} if outputs is None else {"outputs": sorted(outputs)}),
    }
    if not selected:
        raise UsageError("nothing is selected", "set --views, --classes, --samples, --top-k or --output")
    lineage = Lineage(operation="select", arguments=selected, parents=[cache.manifest.digest])
    kept = plan.output_names if outputs is None else _kept_outputs(outputs, plan)
    _check_class_outputs(kept, plan, class_indices)
    if DEFAULT_OUTPUT in kept:
        encoded = _encoded(cache, out, lineage, ids, class_indices, top_k)
    elif class_indices is None and top_k is None:
        encoded = Encoded(plan.request, None, None, None, recoded=False)
    else:
        raise UsageError("classes and top_k select from class logits, which are not kept", "keep the output logits too")
    bases = stored_bases.read_bases(cache.path, plan)
    encoded = encoded._replace(
        outputs={name: plan.named_outputs[name] for name in kept if name != DEFAULT_OUTPUT} or None,
        output_bases={name: basis for name, basis in bases.items() if name in kept and name != DEFAULT_OUTPUT},
    )
    keys, stored_labels = cache.sample_keys[ids], new_labels.numpy().astype(np.int32)
    names = plan.dataset.class_names if class_indices is None else tuple(classes or ())
    dataset = plan.dataset.model_copy(
        update={"samples": len(ids), "class_names": names, "digest": digest_of(keys, stored_labels)}
    )
    same_ordinals = bool((ids == np.arange(len(ids))).all())
    selections = [ParentSelection(cache, ids)]
    if same_ordinals:
        shape, stored = plan.shape, slice(-(-len(ids) // plan.shape.fingerprint_stride))
        inputs = [zarr_store.read_inputs(cache.path, plan, view).at(stored) for view in range(count)]
    else:
        shape = sharding_of(len(ids), encoded.encoding, encoded.outputs)
        shape, inputs = inputs_at(selections, shape, count, data, progress or Silent())
    selected_plan = planned(plan, dataset, count, encoded, shape, lineage)
    writer = CacheWriter.begin(out, selected_plan, stored_labels, keys, encoded.bases)
    if same_ordinals and not encoded.recoded:
        adopt_shards(writer, cache)
    return derive(writer, selections, inputs, class_indices, encoded.recoded, scheduler)


def _count_of(views: Sequence[int] | None, plan: Plan) -> int:
    if views is None:
        return plan.views.count
    if not views or list(views) != list(range(len(views))):
        raise UsageError(
            f"the views {', '.join(map(str, views)) or 'none'} are not the first ones: the random draws of view v "
            "follow from (seed, sample, v), and a cache stores how many views it has, not which",
            "select 0-N",
        )
    if len(views) > plan.views.count:
        raise UsageError(f"the cache has {plan.views.count} views, {len(views)} are selected", "select fewer")
    return len(views)


def _check_ids(ids: Ids, cache: Cache) -> None:
    """Check that the cache has these samples, and that their views can be replayed at their new ordinals."""
    transform = cache.manifest.plan.views.transform
    if not len(ids) or ids.min() < 0 or ids.max() >= len(cache) or len(np.unique(ids)) < len(ids):
        raise UsageError(
            f"the samples must be different ordinals from 0 to {len(cache) - 1}, one or more",
            "use ordinals in the dumped data set, as `kdcache summarize` prints them",
        )
    if not (ids == np.arange(len(ids))).all() and is_drawn(transform):
        moved = int(np.argmax(ids != np.arange(len(ids))))
        raise UsageError(
            f"sample {ids[moved]} would become sample {moved}, and its random views, which follow from (seed, sample, "
            "view), could not be replayed",
            "select the first samples (0-N), or dump the teacher on the smaller data set",
        )
    if len(ids) < len(cache) and split_mixing(transform)[1]:
        raise UsageError(
            "each image is mixed with another one of the data set; with fewer samples, the pairs would change",
            "keep all samples, or dump the teacher on the smaller data set",
        )


def _kept_outputs(outputs: Sequence[str], plan: Plan) -> list[str]:
    """Return the names of some outputs, in the order of the plan.

    Raises:
        UsageError: if the cache does not have one, or none is named.
    """
    unknown = [name for name in outputs if name not in plan.output_names]
    if unknown or not outputs:
        what = f"no output {unknown[0]!r}{did_you_mean(unknown[0], plan.output_names)}" if unknown else "none is named"
        raise UsageError(f"{what}; the cache has {', '.join(plan.output_names)}", "name some of these")
    return [name for name in plan.output_names if name in outputs]


def _check_class_outputs(kept: Sequence[str], plan: Plan, classes: Sequence[int] | None) -> None:
    """Check that a selection of classes leaves no other output with the labels of the data set."""
    bound = [name for name in kept if name in plan.named_outputs and plan.named_outputs[name].labels == "sample"]
    if classes is not None and bound:
        raise UsageError(
            f"the output {bound[0]} has the classes of the data set, of which some would be left out",
            f"leave it out too: name the outputs to keep with --output, without {bound[0]}",
        )


def _class_indices(classes: Sequence[str], names: tuple[str, ...]) -> list[int]:
    indices = {name: index for index, name in enumerate(names)}
    missing = [name for name in classes if name not in indices]
    if missing or len(set(classes)) < len(classes) or len(classes) < 2:
        what = f"class {missing[0]!r} not found" if missing else "two or more different classes are needed"
        raise UsageError(
            f"{what}; the cache has {', '.join(names[:8])}{', ...' if len(names) > 8 else ''}", "name some of these"
        )
    return [indices[name] for name in classes]


def _encoded(
    cache: Cache, out: Path, lineage: Lineage, ids: Ids, classes: list[int] | None, top_k: int | None
) -> Encoded:
    """Choose the encoding of the new cache: that of the parent where the classes and top_k stay, else a new one."""
    plan = cache.manifest.plan
    parent, basis = plan.encoding, stored_bases.read_basis(cache.path, plan)
    num_classes = len(classes) if classes else parent.num_classes
    if top_k is not None and top_k > (min(num_classes, parent.top_k) if classes is None else num_classes):
        raise UsageError(
            f"top_k {top_k} is more than the cache stores of {num_classes} classes", "use a smaller --top-k"
        )
    if classes is None and top_k in (None, parent.top_k):
        return Encoded(plan.request, parent, plan.fidelity, basis, recoded=False)
    if classes is None and not parent.dense:
        request = plan.request.model_copy(update={"top_k": top_k})
        return Encoded(request, parent.model_copy(update={"top_k": top_k}), None, basis, recoded=True)
    new_top_k: int | str = top_k or ("all" if parent.dense else min(parent.top_k, num_classes))
    new_top_k = "all" if new_top_k == num_classes else new_top_k
    dtype = "float16" if parent.dtype == "uint8" and new_top_k != "all" else parent.dtype
    tail = "uniform" if parent.tail == "uniform" else "lowrank"
    request = plan.request.model_copy(update={"top_k": new_top_k, "rank": None, "dtype": dtype, "tail": tail})
    if (out / PLAN).exists() and (started := read_plan(out / PLAN)).lineage == lineage:
        return Encoded(
            started.request, started.encoding, started.fidelity, stored_bases.read_basis(out, started), recoded=True
        )
    full = encoding_without_pilot(num_classes, request)
    if full is not None:
        return Encoded(request, full, None, None, recoded=True)
    pilot = ids[pilot_ids(len(ids), request.pilot_rows)]
    labels = torch.from_numpy(cache.labels[pilot].astype(np.int64))
    logits = ParentRows(cache.path, plan, pilot, labels).logits(0, classes)
    choice = plan_encoding(logits, labels if classes is None else relabeled(labels, classes), request)
    # The fidelity to the teacher can only be measured against exact rows.
    exact = parent.dense and parent.dtype != "uint8"
    chosen = choice.chosen
    return Encoded(request, chosen.encoding, choice.fidelity if exact else None, chosen.basis, recoded=True)

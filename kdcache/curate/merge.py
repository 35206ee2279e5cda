"""Merge the caches of parts of a data set into one cache."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from kdcache.cache.format import stored_bases
from kdcache.cache.format.fingerprints import digest_of
from kdcache.cache.format.output_records import DEFAULT_OUTPUT
from kdcache.cache.format.schema import Lineage, NoiseRecord, Plan
from kdcache.cache.format.sharding import sharding_of
from kdcache.cache.preconditions import check_place, differences, refuse_sequences
from kdcache.cache.reader import Cache
from kdcache.cache.writer import CacheWriter
from kdcache.curate.derive import Encoded, ParentSelection, derive, inputs_at, planned
from kdcache.curate.recode import same_basis
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
    """Concatenate the samples of several caches in the given order.

    If interrupted at any moment, the same call resumes at the first unfinished shard.

    Args:
        caches: of one teacher, on parts of a data set with the same classes, with a transform that is not random.
        out: folder of the new cache.
        reencode: encode rows with another encoding or basis again, with those of the first cache.
        data: the images of all parts, as for `select`.
        scheduler: backend; see `parallel.over`.
        progress: progress reporter; silent if None.

    Raises:
        UsageError: if the views of the merged cache could not be replayed.
        MismatchError: if the caches are inconsistent with each other, or `out` was started with other settings.
    """
    out, first, reporter = Path(out), caches[0], progress or Silent()
    for cache in caches:
        refuse_sequences(cache.manifest.plan, "merge", "write all sequences with kdcache.write_token_cache")
    check_place(out)
    out = out.absolute()
    if len(caches) < 2:
        raise UsageError("merge needs two caches or more, one is given", "name the others too")
    for cache in caches:
        cache.check_views()
    for other in caches[1:]:
        _check_parts(first, other)
    plan = first.manifest.plan
    bases = [stored_bases.read_basis(cache.path, cache.manifest.plan) for cache in caches]
    same_encoding = [
        cache.manifest.plan.class_encoding == plan.class_encoding and same_basis(bases[0], basis)
        for cache, basis in zip(caches, bases, strict=True)
    ]
    same_outputs = [_same_outputs(first, cache) for cache in caches]
    if not all(same_encoding + same_outputs) and not reencode:
        other = caches[(same_encoding + same_outputs).index(False) % len(caches)]
        same = other.manifest.plan.class_encoding == plan.class_encoding
        what = "basis" if same and same_outputs[caches.index(other)] else "encoding"
        raise MismatchError(
            f"the rows of {other.path} have another {what} than those of {first.path}",
            "add --reencode: they are then decoded and encoded again like the first cache's rows, which costs fidelity",
        )
    selections = [ParentSelection(cache, np.arange(len(cache))) for cache in caches]
    keys = np.concatenate([cache.sample_keys for cache in caches])
    labels = np.concatenate([cache.labels for cache in caches])
    if duplicates := len(keys) - len(np.unique(keys)):
        what = "sample has" if duplicates == 1 else "samples have"
        reporter.say(f"note: {duplicates:,} {what} the same content as another one")
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
    output_bases = stored_bases.read_bases(first.path, plan)
    encoded = Encoded(
        plan.request,
        plan.class_encoding,
        fidelity if all(same_encoding) else None,
        bases[0],
        not all(same_encoding),
        plan.outputs,
        {name: basis for name, basis in output_bases.items() if name != DEFAULT_OUTPUT},
    )
    shape = sharding_of(len(keys), plan.class_encoding, plan.outputs)
    shape, inputs = inputs_at(selections, shape, plan.views.count, data, reporter)
    licence = _joined([cache.manifest.plan.licence for cache in caches], " AND ")
    notes = _joined([cache.manifest.plan.notes for cache in caches], "\n")
    merged = planned(plan, dataset, plan.views.count, encoded, shape, lineage, licence=licence, notes=notes)
    merged = merged.model_copy(update={"noise": _noise_of([cache.manifest.plan.noise for cache in caches])})
    writer = CacheWriter.begin(out, merged, labels, keys, encoded.bases)
    return derive(writer, selections, inputs, None, encoded.recoded, scheduler)


def _noise_of(parts: Sequence[NoiseRecord | None]) -> NoiseRecord | None:
    """Return the record of the noise of all parts, which differ in the privacy of their samples at most."""
    first = parts[0]
    digests = [None if part is None else part.privacy for part in parts]
    if first is None or len(set(digests)) == 1:
        return first
    together = hashlib.sha256("\n".join(digest or "1" for digest in digests).encode()).hexdigest()
    return first.model_copy(update={"privacy": f"sha256:{together}"})


def _check_parts(first: Cache, other: Cache) -> None:
    """Check that two caches can be parts of one cache."""
    first_plan, other_plan = first.manifest.plan, other.manifest.plan
    if first_plan.dataset.digest == other_plan.dataset.digest or np.isin(other.sample_keys, first.sample_keys).all():
        why = "with different seeds, but a cache has one seed for all its views"
        if first_plan.views.seed == other_plan.views.seed:
            why = "with the same seed, so their views are the same"
        raise UsageError(
            f"{first.path} and {other.path} have the same samples, {why}",
            "for more views use kdcache dump-teacher --extend; to train on both, train-student --cache A --cache B",
        )
    ours, theirs = (
        {
            "teacher": plan.teacher.model_dump(),
            "transform": plan.views.transform,
            "views": plan.views.count,
            "classes": plan.dataset.class_names,
            "outputs": {name: _kind_of(plan, name) for name in plan.output_names},
            "noise": None if plan.noise is None else plan.noise.model_dump(exclude={"privacy"}),
        }
        for plan in (first_plan, other_plan)
    )
    differ = [f"{key}: {a}, {b}" for key, a, b in differences(ours, theirs)]
    if differ:
        raise MismatchError(
            "\n  ".join([f"{first.path} and {other.path} cannot be merged; they differ in:", *differ]),
            "merge caches with the same teacher and transform, and the same classes in the same order",
        )
    if is_drawn(first_plan.views.transform):
        raise UsageError(
            f"the samples of {other.path} would get ordinals from {len(first)}, and their random views, which follow "
            "from (seed, sample, view), could not be replayed",
            "dump the teacher on the whole data set; kdcache dump-teacher --extend reuses finished shards",
        )


def _kind_of(plan: Plan, name: str) -> str:
    """Return what rows of an output must have in common to be merged."""
    if name == DEFAULT_OUTPUT:
        return "class logits"
    record = plan.named_outputs[name]
    size = " x ".join(map(str, record.shape))
    level = f", level {'unknown' if record.level else 'known'}" if record.places == "grid" else ""
    return f"{record.kind} of {size} from {record.source}, pool {record.pool}, labels {record.labels}{level}"


def _same_outputs(first: Cache, other: Cache) -> bool:
    """Return whether the outputs beside the class logits have the same encodings and bases in both caches."""
    plans = [cache.manifest.plan for cache in (first, other)]
    bases = [stored_bases.read_bases(cache.path, plan) for cache, plan in zip((first, other), plans, strict=True)]
    return all(
        plans[1].named_outputs[name].encoding == record.encoding and same_basis(bases[0].get(name), bases[1].get(name))
        for name, record in plans[0].named_outputs.items()
    )


def _joined(texts: list[str], separator: str) -> str:
    """Join the distinct texts that are not empty, in their order."""
    return separator.join(dict.fromkeys(text for text in texts if text))

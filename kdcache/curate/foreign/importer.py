"""Import the files of FKD, ml-dr and TinyViT as a cache: soft labels, and the boxes or seeds of the views."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from pydantic import ValidationError

from kdcache.cache.format.codec import Rows, encode
from kdcache.cache.format.encoding import Encoding
from kdcache.cache.format.fingerprints import SKETCH_PARTS, Inputs, digest_of
from kdcache.cache.format.recorded_views import CROP, recorded, unit_of
from kdcache.cache.format.schema import Lineage, Plan, ViewsRecord
from kdcache.cache.format.sharding import choose_sharding
from kdcache.cache.preconditions import check_place
from kdcache.cache.reader import Cache
from kdcache.cache.writer import CacheWriter
from kdcache.config.cache import CacheSpec
from kdcache.config.transform import Transform
from kdcache.curate.foreign.fkd import open_fkd
from kdcache.curate.foreign.ml_dr import open_ml_dr
from kdcache.curate.foreign.sparse_labels import OpenedSource, SoftLabelSource, as_rows, logits_of
from kdcache.curate.foreign.tinyvit import open_tinyvit
from kdcache.curate.recode import complete
from kdcache.data.alignment import select_samples
from kdcache.data.loader import cut_range
from kdcache.data.recorded_crop import split_recorded
from kdcache.data.replay import fingerprints_of
from kdcache.data.samples import Samples
from kdcache.data.transforms import is_drawn
from kdcache.data.views import View
from kdcache.dump.noise import refuse_noise
from kdcache.dump.plan import record_of_data, request_of, teacher_by_hearsay
from kdcache.errors import MismatchError, UsageError
from kdcache.runtime.progress import Progress, Silent
from kdcache.runtime.versions import versions

SOURCES: dict[str, Callable[[Path, Samples], OpenedSource]] = {
    "fkd": open_fkd,
    "ml-dr": open_ml_dr,
    "tinyvit": open_tinyvit,
}
_UNITS = {"fkd": "fraction", "ml-dr": "pixels"}
_LOGITS_AT_ONCE = 2**22
_BYTES_PER_CLASS, _BYTES_PER_ROW = 32, 64
"""Memory for a probability, its class and copies of both, and for everything else in a row."""


def cache_of_files(
    source: str | Path,
    layout: str,
    samples: Samples,
    out: str | Path,
    *,
    name: str | None = None,
    transform: Transform | None = None,
    spec: CacheSpec | None = None,
    scheduler: str = "threads",
    progress: Progress | None = None,
) -> Cache:
    """Make a cache from the soft labels of another project; crop v of an image is its view v.

    If interrupted at any moment, the same call resumes at the first unfinished shard.

    Args:
        source: folder that the project's students read.
        layout: one of `SOURCES`.
        samples: data set that the teacher was run on.
        out: folder of the cache.
        name: name of the teacher; None for the name of the folder.
        transform: transform for students, starting with a recorded crop; None for the one that the files state.
        spec: `dtype`, `shard_rows`, `license` and `notes` are used; everything else follows from the files.
        scheduler: backend; see `parallel.over`.
        progress: progress reporter; silent if None.

    Raises:
        UsageError: if no cache can be made from the files, or the transform does not fit them.
        MismatchError: if they are of other samples, or `out` was started with other settings.
        CorruptError: if a file is missing or malformed; names it.
    """
    folder, out, spec = Path(source), Path(out), spec or CacheSpec()
    refuse_noise(spec)
    check_place(out)
    out = out.absolute()
    if not folder.is_dir():
        raise UsageError(f"folder not found: {folder}", f"pass the folder that {layout}'s students read")
    opened = SOURCES[layout](folder, samples)
    student_transform = _transform(layout, opened, transform)
    keys = samples.keys(progress or Silent())
    plan = _plan(folder, layout, opened.source, samples, digest_of(keys, samples.labels), student_transform, name, spec)
    writer = CacheWriter.begin(out, plan, samples.labels, keys)
    pending = {shard: [] for shard in range(plan.shards)}  # type: dict[int, list[int]]
    for view in range(plan.views.count):
        for shard in writer.pending(view):
            pending[shard].append(view)
    calls = []
    for shard, views in pending.items():
        ids = plan.shard_ids(shard)
        labels = torch.from_numpy(samples.labels[ids.start : ids.stop].astype(np.int64))
        names, marked = opened.names[ids.start : ids.stop], _fingerprinted(plan, samples, shard)
        view_groups = [views] if opened.source.by_sample and views else [[view] for view in views]
        calls += [(shard, group, opened.source, names, labels, marked) for group in view_groups]
    return complete(writer, _write_shard, calls, scheduler)


def _transform(layout: str, opened: OpenedSource, given: Transform | None) -> Transform:
    """Return the transform for students: the given one, checked against the files, or the one that the files state."""
    if layout == "tinyvit":
        if given is not None and given != opened.transform:
            raise UsageError(
                "a transform is set, but TinyViT's augmentation can only be run by its own code", "remove `transform`"
            )
        return opened.transform or []
    transform, unit = given if given is not None else opened.transform, _UNITS[layout]
    example = [{CROP: {"size": 224, "unit": unit}}, {"ToImage": {}}, {"ToDtype": {"dtype": "float32", "scale": True}}]
    if transform is None or recorded(transform) != "crops" or unit_of(transform) != unit:
        raise UsageError(
            f"the files of {layout} hold boxes in the unit {unit!r}, "
            + (f"but the transform starts with {transform[:1]}" if transform else "but not the rest of the transform"),
            f"start `transform` of the pipeline like this, and add the normalization: {example}",
        )
    if _stated(transform) != _stated(transform if opened.transform is None else opened.transform):
        raise MismatchError(
            f"the transform differs from the one in the files of {layout}\n  pipeline {transform}\n"
            f"  files    {opened.transform}",
            "leave `transform` out of the pipeline",
        )
    if is_drawn(transform):
        raise UsageError(
            f"the transform has random steps after its recorded crop: {transform[1:]}",
            "remove them: the soft labels are of the crop alone",
        )
    return transform


def _stated(transform: Transform) -> tuple[list[int], Transform]:
    """Return what all files state of a transform: size of the crop and later steps, but not the interpolation."""
    crop, rest = split_recorded(transform)
    return crop.size if crop is not None else [], rest


def _plan(
    folder: Path,
    layout: str,
    source: SoftLabelSource,
    samples: Samples,
    digest: str,
    transform: Transform,
    name: str | None,
    spec: CacheSpec,
) -> Plan:
    """Plan the cache: as many classes per row as the files have, and the rest of the mass spread evenly."""
    classes, dense = samples.num_classes, source.top_k == samples.num_classes
    encoding_spec = {"top_k": "all" if dense else source.top_k, "tail": "uniform", "rank": None, "fidelity": None}
    try:
        encoding = Encoding(
            num_classes=classes, top_k=source.top_k, tail="none" if dense else "uniform", dtype=spec.dtype
        )
        # All views of a shard are in memory at once if a file holds them all.
        memory_per_row = (_BYTES_PER_CLASS * source.top_k + _BYTES_PER_ROW) * (source.views if source.by_sample else 1)
        return Plan(
            teacher=teacher_by_hearsay(name or folder.absolute().name, f"by {layout}", level="unknown"),
            dataset=record_of_data(samples, digest),
            views=ViewsRecord(count=source.views, seed=0, transform=transform),
            request=request_of(spec.model_copy(update=encoding_spec)),
            encoding=encoding,
            fidelity=None,
            shape=choose_sharding(len(samples), memory_per_row, spec.shard_rows),
            batch_size=spec.batch_size,
            versions=versions(),
            licence=spec.license,
            notes=spec.notes,
            lineage=Lineage(operation="convert", arguments={"from": layout, "folder": folder.name}, parents=[]),
        )
    except ValidationError as error:
        first = error.errors()[0]
        raise UsageError(
            f"no cache can be made from these files: {first['msg']}",
            "set cache.dtype to float16 or float32, and check the transform",
        ) from None


def _fingerprinted(plan: Plan, samples: Samples, shard: int) -> Samples:
    """Return the samples of a shard whose fingerprints are stored; their ids are their positions in the shard."""
    ids = plan.shard_ids(shard)
    marked = np.arange(ids.start, ids.stop, plan.shape.fingerprint_stride)
    return select_samples(samples, marked, marked - ids.start)


def _write_shard(
    out: Path,
    shard: int,
    views: list[int],
    source: SoftLabelSource,
    names: list[str],
    labels: torch.Tensor,
    marked: Samples,
) -> None:
    """Write one shard of some views."""
    writer = CacheWriter.join(out)
    soft_labels, encoding = source.read(names, views), writer.plan.encoding
    rows_at_once = max(_LOGITS_AT_ONCE // encoding.num_classes, 1)
    for index, view in enumerate(views):
        probabilities, classes = as_rows(soft_labels, index)
        rows = [
            encode(
                logits_of(probabilities[some.start : some.stop], classes[some.start : some.stop], encoding.num_classes),
                labels[some.start : some.stop],
                encoding,
            )
            for some in cut_range(range(len(names)), rows_at_once)
        ]
        boxes_or_seeds = soft_labels.recorded[index]
        inputs = _inputs(writer.plan, marked, view, boxes_or_seeds)
        writer.write(view, shard, Rows.concatenate(rows), inputs, boxes_or_seeds)


def _inputs(plan: Plan, marked: Samples, view: int, boxes_or_seeds: Any) -> Inputs:
    """Return the fingerprints of the crops; 0 for seeds, which cannot be replayed here."""
    if recorded(plan.views.transform) == "seeds":
        return Inputs(np.zeros(len(marked), np.uint32), np.zeros((len(marked), SKETCH_PARTS), np.float32))
    crops = View(marked, plan.views.transform, plan.views.seed, view, crops=lambda _: boxes_or_seeds)
    return fingerprints_of(crops, range(len(marked)))

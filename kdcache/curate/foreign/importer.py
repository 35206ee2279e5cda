"""Files of FKD, ml-dr and TinyViT as a cache: their rows, and from what their views were drawn."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from pydantic import ValidationError

from kdcache.cache.format.codec import Rows, encode
from kdcache.cache.format.fingerprints import SKETCH_PARTS, Inputs, digest_of
from kdcache.cache.format.recorded_views import CROP, recorded, unit_of
from kdcache.cache.format.schema import Encoding, Lineage, Plan, ViewsRecord
from kdcache.cache.format.sharding import choose_sharding
from kdcache.cache.preconditions import check_place
from kdcache.cache.reader import Cache
from kdcache.cache.writer import CacheWriter
from kdcache.config.schema import CacheSpec, Transform
from kdcache.curate.foreign.fkd import open_fkd
from kdcache.curate.foreign.ml_dr import open_ml_dr
from kdcache.curate.foreign.sparse_labels import Opened, SoftLabelSource, as_rows, logits_of
from kdcache.curate.foreign.tinyvit import open_tinyvit
from kdcache.curate.recode import complete
from kdcache.data.alignment import taken
from kdcache.data.loader import cut_range
from kdcache.data.recorded_crop import split_recorded
from kdcache.data.replay import fingerprints_of
from kdcache.data.samples import Samples
from kdcache.data.transforms import is_drawn
from kdcache.data.views import View
from kdcache.dump.plan import record_of_data, request_of, teacher_by_hearsay
from kdcache.errors import MismatchError, UsageError
from kdcache.runtime.progress import Progress, Silent
from kdcache.runtime.versions import versions

SOURCES: dict[str, Callable[[Path, Samples], Opened]] = {
    "fkd": open_fkd,
    "ml-dr": open_ml_dr,
    "tinyvit": open_tinyvit,
}
_UNITS = {"fkd": "fraction", "ml-dr": "pixels"}
_LOGITS_AT_ONCE = 2**22
_SAID, _RECORDED = 32, 64
"""Bytes in memory of a probability, its class and copies of both, and of what else there is in a row."""


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
    """A cache of what another project has written down of its teacher; crop v of an image is its view v.

    Killed at any moment, the same call goes on at the first shard that is not whole.

    Args:
        source: the folder that the project's own students read.
        layout: one of `SOURCES`.
        samples: the data set that the teacher was run on.
        out: folder of the cache.
        name: of the teacher; None for that of the folder.
        transform: what a student is to be shown, which begins with a recorded crop; None for what the files say.
        spec: `dtype`, `shard_rows`, `license` and `notes` are taken; the rest is what the files have.
        scheduler: as `operations.over` takes it.
        progress: who is told how it goes.

    Raises:
        UsageError: if the files can be used for no cache, or the transform is not of such crops.
        MismatchError: if they are of other samples, or `out` was begun with other settings.
        CorruptError: if a file is missing, or holds something else; names it.
    """
    folder, out, spec = Path(source), Path(out).absolute(), spec or CacheSpec()
    check_place(out)
    if not folder.is_dir():
        raise UsageError(f"there is no folder {folder}", f"give the one that {layout}'s students read")
    opened = SOURCES[layout](folder, samples)
    shown = _transform(layout, opened, transform)
    keys = samples.keys(progress or Silent())
    plan = _plan(folder, layout, opened.source, samples, digest_of(keys, samples.labels), shown, name, spec)
    writer = CacheWriter.begin(out, plan, samples.labels, keys)
    pending = {shard: [] for shard in range(plan.shards)}  # type: dict[int, list[int]]
    for view in range(plan.views.count):
        for shard in writer.pending(view):
            pending[shard].append(view)
    calls = []
    for shard, views in pending.items():
        ids = plan.shard_ids(shard)
        labels = torch.from_numpy(samples.labels[ids.start : ids.stop].astype(np.int64))
        names, marked = opened.names[ids.start : ids.stop], _marked(plan, samples, shard)
        together = [views] if opened.source.by_sample and views else [[view] for view in views]
        calls += [(shard, some, opened.source, names, labels, marked) for some in together]
    return complete(writer, _write_shard, calls, scheduler)


def _transform(layout: str, opened: Opened, said: Transform | None) -> Transform:
    """What a student is shown: what the user says, or what the files say; each where the other is silent."""
    if layout == "tinyvit":
        if said is not None and said != opened.transform:
            raise UsageError(
                "TinyViT's images are drawn by its own code, and a transform was given", "remove `transform`"
            )
        return opened.transform or []
    shown, unit = said if said is not None else opened.transform, _UNITS[layout]
    example = [{CROP: {"size": 224, "unit": unit}}, {"ToImage": {}}, {"ToDtype": {"dtype": "float32", "scale": True}}]
    if shown is None or recorded(shown) != "crops" or unit_of(shown) != unit:
        raise UsageError(
            f"the files of {layout} hold boxes in {unit}, and the transform "
            + (f"begins otherwise: {shown[:1]}" if shown else "is not said: they do not say how the crops were seen"),
            f"begin `transform` of the pipeline so, and go on with its normalization: {example}",
        )
    if _known(shown) != _known(shown if opened.transform is None else opened.transform):
        raise MismatchError(
            f"the transform is not what the files of {layout} say of it\n  here  {shown}\n  there {opened.transform}",
            "leave `transform` out of the pipeline",
        )
    if is_drawn(shown):
        raise UsageError(
            f"the transform draws at random behind its recorded crop: {shown[1:]}",
            "leave such steps out: what the teacher said is of the crop alone",
        )
    return shown


def _known(transform: Transform) -> tuple[list[int], Transform]:
    """All that files can say of a transform: how pixels are resampled is not always in them."""
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
    classes, dense = samples.num_classes, source.top_k == samples.num_classes
    asked = {"top_k": "all" if dense else source.top_k, "tail": "uniform", "rank": None, "fidelity": None}
    try:
        encoding = Encoding(
            num_classes=classes, top_k=source.top_k, tail="none" if dense else "uniform", dtype=spec.dtype
        )
        # What is said of a row, and its box; of all views of a shard at once where a file holds them all.
        held = (_SAID * source.top_k + _RECORDED) * (source.views if source.by_sample else 1)
        return Plan(
            teacher=teacher_by_hearsay(name or folder.absolute().name, f"by {layout}", level="unknown"),
            dataset=record_of_data(samples, digest),
            views=ViewsRecord(count=source.views, seed=0, transform=transform),
            request=request_of(spec.model_copy(update=asked)),
            encoding=encoding,
            fidelity=None,
            shape=choose_sharding(len(samples), held, spec.shard_rows),
            batch_size=spec.batch_size,
            versions=versions(),
            licence=spec.license,
            notes=spec.notes,
            lineage=Lineage(operation="convert", arguments={"from": layout, "folder": folder.name}, parents=[]),
        )
    except ValidationError as error:
        first = error.errors()[0]
        raise UsageError(
            f"no cache can be made of these files: {first['msg']}",
            "set cache.dtype to float16 or float32, and look at the transform",
        ) from None


def _marked(plan: Plan, samples: Samples, shard: int) -> Samples:
    """The samples of a shard that leave a fingerprint, with their places in it for ids."""
    ids = plan.shard_ids(shard)
    marked = np.arange(ids.start, ids.stop, plan.shape.fingerprint_stride)
    return replace(samples, images=taken(samples.images, marked), labels=samples.labels[marked], ids=marked - ids.start)


def _write_shard(
    out: Path,
    shard: int,
    views: list[int],
    source: SoftLabelSource,
    names: list[str],
    labels: torch.Tensor,
    marked: Samples,
) -> None:
    """Write a shard of some views, all of which a file may hold."""
    writer = CacheWriter.join(out)
    said, encoding = source.read(names, views), writer.plan.encoding
    at_once = max(_LOGITS_AT_ONCE // encoding.num_classes, 1)
    for place, view in enumerate(views):
        probabilities, classes = as_rows(said, place)
        rows = [
            encode(
                logits_of(probabilities[some.start : some.stop], classes[some.start : some.stop], encoding.num_classes),
                labels[some.start : some.stop],
                encoding,
            )
            for some in cut_range(range(len(names)), at_once)
        ]
        kept = said.recorded[place]
        writer.write(view, shard, Rows.concatenate(rows), _inputs(writer.plan, marked, view, kept), kept)


def _inputs(plan: Plan, marked: Samples, view: int, kept: Any) -> Inputs:
    """Fingerprints of the crops; 0 where nobody here can make them."""
    if recorded(plan.views.transform) == "seeds":
        return Inputs(np.zeros(len(marked), np.uint32), np.zeros((len(marked), SKETCH_PARTS), np.float32))
    seen = View(marked, plan.views.transform, plan.views.seed, view, crops=lambda _: kept)
    return fingerprints_of(seen, range(len(marked)))

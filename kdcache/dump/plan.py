"""Make the plan of a cache: run a pilot of the teacher, and choose the encoding."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
import torch
from pydantic import ValidationError
from torch import Tensor, nn

from kdcache.cache.format import stored_bases
from kdcache.cache.format.array_specs import raw_bytes
from kdcache.cache.format.encoding import Encoding, Fidelity, Request
from kdcache.cache.format.schema import NO_WEIGHTS, DatasetRecord, Plan, Sharding, TeacherRecord, ViewsRecord
from kdcache.cache.format.sharding import choose_sharding
from kdcache.cache.format.tail_basis import TailBasis
from kdcache.cache.planner import encoding_without_pilot, pilot_ids, plan_encoding
from kdcache.cache.preconditions import check_same_plan
from kdcache.config.schema import CacheSpec
from kdcache.config.transform import Transform
from kdcache.data.loader import batches, cut_range
from kdcache.data.samples import Samples
from kdcache.data.transforms import is_random
from kdcache.data.views import View
from kdcache.errors import UsageError
from kdcache.models import weights_digest
from kdcache.models.inference import InferenceModel, described_precision, refuse_not_finite
from kdcache.models.teacher import TeacherIdentity, has_weights
from kdcache.runtime.progress import Progress
from kdcache.runtime.versions import versions


class Chosen(NamedTuple):
    """The encoding of rows.

    Attributes:
        encoding: chosen for the cache.
        fidelity: measured on the pilot; None without one.
        basis: of the tail; None if the encoding has no basis.
        bytes_per_row: on disk, approximately.
    """

    encoding: Encoding
    fidelity: Fidelity | None
    basis: TailBasis | None
    bytes_per_row: float


def request_of(spec: CacheSpec) -> Request:
    """Return the part of the `cache` section of a pipeline that determines the encoding."""
    return Request(**{name: getattr(spec, name) for name in Request.model_fields})


class Pilot(NamedTuple):
    """The teacher's logits of a few images.

    Attributes:
        logits: [P, C] float32, on the teacher's device.
        labels: [P] int64, on the same device.
        rows_per_second: throughput, including the loading of images.
    """

    logits: Tensor
    labels: Tensor
    rows_per_second: float


def run_pilot(
    teacher: InferenceModel, view: View, spec: CacheSpec, progress: Progress, rows: int | None = None
) -> Pilot:
    """Run the teacher on rows that are spread over the data set.

    Args:
        teacher: on its device.
        view: of the images.
        spec: number of rows (`pilot_rows`), batch size and number of processes that load images.
        progress: progress reporter.
        rows: number of rows, in place of `pilot_rows`.

    Raises:
        MismatchError: if the teacher returns anything but [B, C].
        CorruptError: if it returns NaN or infinities; names the sample.
    """
    ids = pilot_ids(len(view), rows or spec.pilot_rows)
    cuts = [ids[cut.start : cut.stop] for cut in cut_range(range(len(ids)), spec.batch_size)]
    parts = []
    start = time.perf_counter()
    with progress.task("pilot", len(ids), "rows") as task:
        for batch in batches(view, cuts, spec.num_workers, teacher.device):
            logits = teacher(batch.images)
            refuse_not_finite(logits.isfinite().all(dim=1).cpu(), batch.ids)
            parts.append((logits, batch.labels.to(teacher.device)))
            task.advance(len(batch.ids))
    logits, labels = (torch.cat(values) for values in zip(*parts, strict=True))
    return Pilot(logits, labels, len(ids) / (time.perf_counter() - start))


def choose(path: Path, begun: Plan | None, spec: CacheSpec, classes: int, pilot: Callable[[], Pilot]) -> Chosen:
    """Return the encoding of a cache: that of the cache which is resumed or extended, or one planned on a pilot.

    Args:
        path: of the cache that is resumed or extended.
        begun: its plan; None for a new cache.
        spec: what the cache is to keep.
        classes: C.
        pilot: runs a pilot, if one is needed.

    Raises:
        UsageError: if the settings are invalid.
        MismatchError: if they are not those of the cache that is resumed or extended.
    """
    request = request_of(spec)
    if begun is not None:
        check_same_plan(path, begun.request, request, "request")
        return Chosen(begun.encoding, begun.fidelity, stored_bases.read_basis(path, begun), raw_bytes(begun.encoding))
    every = encoding_without_pilot(classes, request)
    if every is not None:
        return Chosen(every, None, None, raw_bytes(every))
    logits, labels, _ = pilot()
    choice = plan_encoding(logits, labels, request)
    chosen = choice.chosen
    return Chosen(chosen.encoding, choice.fidelity, chosen.basis, chosen.bytes_per_row)


def views_of(spec: CacheSpec, transform: Transform) -> ViewsRecord:
    """Return the views of a cache: their number, seed and transform.

    Raises:
        UsageError: if all views would be the same, or the transform cannot be stored.
    """
    if spec.views > 1 and not is_random(transform):
        raise UsageError(
            f"{spec.views} views of a transform that is not random would all be the same",
            "set cache.views to 1, or add a random transform such as - RandomCrop: {size: 32, padding: 4}",
        )
    try:
        return ViewsRecord(count=spec.views, seed=spec.seed, transform=transform)
    except ValidationError as error:
        raise _invalid_plan(error) from None


def plan_cache(
    teacher: TeacherIdentity,
    model: nn.Module,
    samples: Samples,
    digest: str,
    spec: CacheSpec,
    views: ViewsRecord,
    choice: Chosen,
    shape: Sharding | None = None,
    level: Literal["unknown"] | None = None,
) -> Plan:
    """Make the plan of a cache; `shape` is the sharding of a cache that it extends.

    Raises:
        UsageError: if the settings are inconsistent with the data set or with each other.
    """
    row_bytes = choice.encoding.top_k * np.dtype(choice.encoding.dtype).itemsize
    try:
        return Plan(
            teacher=TeacherRecord(
                **teacher._asdict(),
                weights_digest=weights_digest(model),
                parameters=sum(p.numel() for p in model.parameters()),
                precision=described_precision(spec),
                level=level,
                weights=None if has_weights(model) else "none",
            ),
            dataset=record_of_data(samples, digest),
            views=views,
            request=request_of(spec),
            encoding=choice.encoding,
            fidelity=choice.fidelity,
            shape=shape or choose_sharding(len(samples), row_bytes, spec.shard_rows),
            batch_size=spec.batch_size,
            versions=versions(),
            licence=spec.license,
            notes=spec.notes,
        )
    except ValidationError as error:
        raise _invalid_plan(error) from None


def teacher_by_hearsay(name: str, kept: str, level: Literal["unknown"] | None = None) -> TeacherRecord:
    """Return the record of a teacher that kdcache did not run; `kept` is what is known of its logits."""
    return TeacherRecord(
        name=name,
        arguments={},
        code_digest=None,
        weights_digest=NO_WEIGHTS,
        parameters=0,
        precision=f"unknown, kept {kept}",
        level=level,
    )


def record_of_data(samples: Samples, digest: str) -> DatasetRecord:
    """Return the record of a data set in the plan of a cache."""
    return DatasetRecord(
        name=samples.name,
        split=samples.split,
        samples=len(samples),
        class_names=samples.class_names,
        digest=digest,
    )


def _invalid_plan(error: ValidationError) -> UsageError:
    first = error.errors()[0]
    return UsageError(
        f"a cache cannot be made with this {'.'.join(map(str, first['loc']))}: {first['msg']}",
        "change that setting of the cache, the transform or the data set",
    )

"""Make the plan of a cache: run a pilot of the teacher, and choose the encoding."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Literal, NamedTuple

import torch
from pydantic import ValidationError
from torch import Tensor, nn

from kdcache.cache.format import stored_bases
from kdcache.cache.format.array_specs import raw_bytes, raw_bytes_of_all_outputs
from kdcache.cache.format.encoding import Encoding, Fidelity, Request
from kdcache.cache.format.output_records import DEFAULT_OUTPUT
from kdcache.cache.format.schema import (
    NO_WEIGHTS,
    DatasetRecord,
    NoiseRecord,
    Plan,
    Sharding,
    TeacherRecord,
    ViewsRecord,
)
from kdcache.cache.format.sharding import sharding_of
from kdcache.cache.format.stored_bases import Bases, basis_of_logits
from kdcache.cache.format.tail_basis import TailBasis
from kdcache.cache.grid_planner import PILOT_MAPS, pilot_stride
from kdcache.cache.planner import encoding_without_pilot, pilot_ids, plan_encoding
from kdcache.cache.preconditions import check_same_plan
from kdcache.config.cache import CacheSpec
from kdcache.config.transform import Transform
from kdcache.data.loader import batches, cut_range
from kdcache.data.samples import Samples
from kdcache.data.transforms import is_random
from kdcache.data.views import View
from kdcache.dump.outputs import PlannedOutputs, check_same_outputs, plan_outputs
from kdcache.errors import UsageError
from kdcache.models import weights_digest
from kdcache.models.inference import InferenceModel, TeacherOutput, described_precision, refuse_not_finite
from kdcache.models.teacher import TeacherIdentity, has_weights
from kdcache.runtime.progress import Progress
from kdcache.runtime.versions import versions


class Chosen(NamedTuple):
    """The encoding of rows.

    Attributes:
        encoding: of the class logits, chosen for the cache; None if they are not kept.
        fidelity: measured on the pilot; None without one.
        basis: of the tail; None if the encoding has no basis.
        bytes_per_row: on disk, approximately, of all outputs.
        outputs: what is kept beside the class logits.
    """

    encoding: Encoding | None
    fidelity: Fidelity | None
    basis: TailBasis | None
    bytes_per_row: float
    outputs: PlannedOutputs = PlannedOutputs()

    @property
    def bases(self) -> Bases:
        """Bases of all outputs that have one, by name."""
        return {**basis_of_logits(self.basis), **self.outputs.bases}


def request_of(spec: CacheSpec) -> Request:
    """Return the part of the `cache` section of a pipeline that determines the encoding."""
    return Request(**{name: getattr(spec, name) for name in Request.model_fields})


class Pilot(NamedTuple):
    """The teacher's logits of a few images.

    Attributes:
        logits: [P, C] float32, on the teacher's device; None if the class logits are not kept.
        labels: [P] int64, on the same device.
        rows_per_second: throughput, including the loading of images.
        outputs: [P, D] float32 of each other output, by name; of maps [P', C, h, w], those of some of the rows.
        unknown_levels: names of those that are logarithms of probabilities.
    """

    logits: Tensor | None
    labels: Tensor
    rows_per_second: float
    outputs: Mapping[str, Tensor] = MappingProxyType({})
    unknown_levels: frozenset[str] = frozenset()

    def class_logits(self) -> Tensor:
        """Return the class logits, which must be there."""
        if self.logits is None:
            raise TypeError("the class logits are not kept")
        return self.logits


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
    ids = pilot_ids(len(view), rows or pilot_rows(spec))
    cuts = [ids[cut.start : cut.stop] for cut in cut_range(range(len(ids)), spec.batch_size)]
    said: list[TeacherOutput] = []
    labels: list[Tensor] = []
    start = time.perf_counter()
    with progress.task("pilot", len(ids), "rows") as task:
        for batch in batches(view, cuts, spec.num_workers, teacher.device):
            said.append(teacher.run(batch.images, batch.ids, view.view))
            refuse_not_finite(said[-1].finite().cpu(), batch.ids, said[-1].names)
            said[-1] = _with_some_maps(said[-1], len(labels) * spec.batch_size, len(ids))
            labels.append(batch.labels.to(teacher.device))
            task.advance(len(batch.ids))
    logits = [part.logits for part in said if part.logits is not None]
    outputs = {name: torch.cat([part.outputs[name] for part in said]) for name in said[0].outputs}
    seconds = time.perf_counter() - start
    all_logits = torch.cat(logits) if logits else None
    return Pilot(all_logits, torch.cat(labels), len(ids) / seconds, outputs, teacher.unknown_levels)


def pilot_rows(spec: CacheSpec) -> int:
    """Return the number of rows of the pilot: of maps alone a few are enough, which have many places each."""
    of_maps = not spec.logits and all(output.places == "grid" for output in spec.outputs.values())
    return min(spec.pilot_rows, PILOT_MAPS) if of_maps else spec.pilot_rows


def _with_some_maps(said: TeacherOutput, first: int, rows: int) -> TeacherOutput:
    """Return what a teacher says of a batch with some of its maps, on the CPU, as all would not fit into memory.

    Args:
        said: of the batch.
        first: position in the pilot of its first row.
        rows: number of rows of the pilot.
    """
    outputs = dict(said.outputs)
    for name, values in said.outputs.items():
        if values.ndim == 4:
            stride = pilot_stride(rows, values.shape[1:].numel())
            outputs[name] = values[-first % stride :: stride].cpu().clone()
    return TeacherOutput(said.logits, outputs)


def choose(
    path: Path, begun: Plan | None, spec: CacheSpec, classes: int, n_rows: int, pilot: Callable[[], Pilot]
) -> Chosen:
    """Return the encodings of a cache: those of the cache which is resumed or extended, or planned on a pilot.

    Args:
        path: of the cache that is resumed or extended.
        begun: its plan; None for a new cache.
        spec: what the cache is to keep.
        classes: C.
        n_rows: rows of the cache.
        pilot: runs a pilot, if one is needed.

    Raises:
        UsageError: if the settings are invalid.
        MismatchError: if they are not those of the cache that is resumed or extended.
    """
    request = request_of(spec)
    if begun is not None:
        check_same_plan(path, begun.request, request, "request")
        check_same_outputs(path, begun, spec)
        bases = stored_bases.read_bases(path, begun)
        basis = bases.pop(DEFAULT_OUTPUT, None)
        size = float(raw_bytes_of_all_outputs(begun))
        outputs = PlannedOutputs(begun.outputs, bases)
        tails = basis if isinstance(basis, TailBasis) else None
        return Chosen(begun.class_encoding, begun.fidelity, tails, size, outputs)
    every = encoding_without_pilot(classes, request) if spec.logits else None
    run = pilot() if spec.outputs or (spec.logits and every is None) else None
    outputs = PlannedOutputs()
    if run is not None:
        outputs = plan_outputs(spec, run.outputs, run.labels, classes, n_rows, run.unknown_levels)
    if not spec.logits:
        return Chosen(None, None, None, outputs.bytes_per_row, outputs)
    if every is not None or run is None:
        size = float(raw_bytes(every)) if every is not None else 0.0
        return Chosen(every, None, None, size + outputs.bytes_per_row, outputs)
    choice = plan_encoding(run.class_logits(), run.labels, request)
    chosen = choice.chosen
    size = chosen.bytes_per_row + outputs.bytes_per_row
    return Chosen(chosen.encoding, choice.fidelity, chosen.basis, size, outputs)


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
    noise: NoiseRecord | None = None,
) -> Plan:
    """Make the plan of a cache; `shape` is the sharding of a cache that it extends.

    Raises:
        UsageError: if the settings are inconsistent with the data set or with each other.
    """
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
            shape=shape or sharding_of(len(samples), choice.encoding, choice.outputs.records, spec.shard_rows),
            batch_size=spec.batch_size,
            versions=versions(),
            licence=spec.license,
            notes=spec.notes,
            outputs=choice.outputs.records,
            noise=noise,
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

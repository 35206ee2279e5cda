"""Before the first shard: a pilot of the teacher, the encoding that it suggests, and the plan of the cache."""

from __future__ import annotations

import hashlib
import time
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
import torch
from pydantic import ValidationError
from torch import Tensor, nn

from kdcache.cache.format import zarr_store
from kdcache.cache.format.array_specs import raw_bytes
from kdcache.cache.format.codec import encode_finite, not_finite
from kdcache.cache.format.schema import (
    DatasetRecord,
    Encoding,
    Fidelity,
    Plan,
    Request,
    Sharding,
    TeacherRecord,
    ViewsRecord,
)
from kdcache.cache.format.sharding import choose_sharding
from kdcache.cache.format.tail_basis import TailBasis
from kdcache.cache.planner import Choice, encoding_without_pilot, pilot_ids, plan_encoding
from kdcache.cache.writer import check_begun_alike
from kdcache.config.schema import CacheSpec, Transform
from kdcache.data.loader import batches, cut_range
from kdcache.data.samples import Samples
from kdcache.data.transforms import is_random
from kdcache.data.views import View
from kdcache.errors import CorruptError, MismatchError, UsageError
from kdcache.models import weights_digest
from kdcache.models.inference import InferenceModel, described_precision, refuse_not_finite
from kdcache.models.teacher import TeacherIdentity
from kdcache.runtime.progress import Progress
from kdcache.runtime.versions import versions

_NPZ = "write it with numpy.savez(path, logits=[N, C] floats, labels=[N] integers)"


class Chosen(NamedTuple):
    """How rows are encoded, with what measured fidelity, in which basis, and about how many bytes each takes."""

    encoding: Encoding
    fidelity: Fidelity | None
    basis: TailBasis | None
    bytes_per_row: float


def request_of(spec: CacheSpec) -> Request:
    """What the `cache` section of a pipeline asks for."""
    return Request(**{name: getattr(spec, name) for name in Request.model_fields})


class Pilot(NamedTuple):
    """What the teacher says of a few images.

    Attributes:
        logits: [P, C] float32, on the teacher's device.
        labels: [P] int64, beside them.
        rows_per_second: how fast that went, the loading of the images included.
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
        spec: how many rows (`pilot_rows`), how many at once, and how many processes load them.
        progress: who is told how it goes.
        rows: how many instead.

    Raises:
        MismatchError: if the teacher returns anything but [B, C].
        CorruptError: if it returns NaN or infinities; names the sample.
    """
    ids = pilot_ids(len(view), rows or spec.pilot_rows)
    cuts = [ids[cut.start : cut.stop] for cut in cut_range(range(len(ids)), spec.batch_size)]
    parts = []
    began = time.perf_counter()
    with progress.task("pilot", len(ids), "rows") as task:
        for batch in batches(view, cuts, spec.num_workers, teacher.device):
            logits = teacher(batch.images)
            refuse_not_finite(logits.isfinite().all(dim=1).cpu(), batch.ids)
            parts.append((logits, batch.labels.to(teacher.device)))
            task.advance(len(batch.ids))
    logits, labels = (torch.cat(values) for values in zip(*parts, strict=True))
    return Pilot(logits, labels, len(ids) / (time.perf_counter() - began))


class Planned(NamedTuple):
    """What a cache would keep.

    Attributes:
        encoding: of its rows.
        choice: what was tried; None where every class is kept.
        rows: of all its views.
        bytes_per_row: on disk, as far as a pilot tells; None without one.
        rows_per_second: of the pilot; None without one.
    """

    encoding: Encoding
    choice: Choice | None
    rows: int
    bytes_per_row: float | None = None
    rows_per_second: float | None = None

    @property
    def bytes(self) -> float:
        """What the rows and the basis would take on disk; more than that, where no pilot has measured it."""
        a_row = self.bytes_per_row or raw_bytes(self.encoding)
        return a_row * self.rows + 2 * self.encoding.rank * self.encoding.num_classes


def measured(encoding: Encoding, pilot: Pilot) -> float:
    """Bytes that a row of the pilot takes on disk where every class is kept."""
    return zarr_store.bytes_per_row(encoding, encode_finite(pilot.logits, pilot.labels, encoding))


def plan_for_logits(path: Path, fidelity: float | None) -> Planned:
    """What a cache of the logits in an npz file would keep; `labels` in it are taken for the true classes.

    Raises:
        UsageError: if the file does not hold logits [N, C].
        CorruptError: if a logit is NaN or infinite.
    """
    try:
        with np.load(path, allow_pickle=False) as stored:
            arrays = {name: stored[name] for name in stored.files}
    except (OSError, ValueError, EOFError, AttributeError, TypeError, zipfile.BadZipFile) as error:
        raise UsageError(f"cannot read {path} as an npz file: {error}", _NPZ) from None
    logits = arrays.get("logits", np.empty(0))
    labels = arrays.get("labels", np.full(len(logits), -1))
    if (
        logits.ndim != 2
        or logits.dtype.kind != "f"
        or labels.shape != logits.shape[:1]
        or labels.dtype.kind not in "iu"
    ):
        held = ", ".join(f"{name} {list(array.shape)} {array.dtype}" for name, array in arrays.items())
        raise UsageError(f"{path} holds {held or 'nothing'}", _NPZ)
    if len(labels) and not (labels.min() >= -1 and labels.max() < logits.shape[1]):
        raise MismatchError(f"labels of {path} are outside 0 to {logits.shape[1] - 1}", "correct them; -1 is unknown")
    spec = CacheSpec.model_validate({"fidelity": fidelity})
    every = encoding_without_pilot(logits.shape[1], request_of(spec))
    if every is not None:
        return Planned(every, None, len(logits))
    ids = pilot_ids(len(logits), spec.pilot_rows)
    pilot = torch.from_numpy(logits[ids].astype(np.float32))
    if len(bad := not_finite(pilot)):
        raise CorruptError(f"row {ids[int(bad[0])]} of {path} holds NaN or infinite logits", "correct the logits")
    choice = plan_encoding(pilot, torch.from_numpy(labels[ids].astype(np.int64)), request_of(spec))
    return Planned(choice.chosen.encoding, choice, len(logits), choice.chosen.bytes_per_row)


def choose(path: Path, begun: Plan | None, spec: CacheSpec, classes: int, pilot: Callable[[], Pilot]) -> Chosen:
    """The encoding of a cache: that of the cache which it goes on with or extends, or planned on the pilot.

    Args:
        path: of the cache that was begun.
        begun: its plan; None for a new cache.
        spec: what is asked for.
        classes: C.
        pilot: runs one, if it is needed.

    Raises:
        UsageError: if what is asked for cannot be.
        MismatchError: if it is not what the cache was begun with.
    """
    request = request_of(spec)
    if begun is not None:
        check_begun_alike(path, begun.request, request, "request")
        return Chosen(begun.encoding, begun.fidelity, zarr_store.read_basis(path, begun), raw_bytes(begun.encoding))
    every = encoding_without_pilot(classes, request)
    if every is not None:
        return Chosen(every, None, None, raw_bytes(every))
    ran = pilot()
    choice = plan_encoding(ran.logits, ran.labels, request)
    chosen = choice.chosen
    return Chosen(chosen.encoding, choice.fidelity, chosen.basis, chosen.bytes_per_row)


def views_of(spec: CacheSpec, transform: Transform) -> ViewsRecord:
    """What the teacher will see of every image.

    Raises:
        UsageError: if all views would be the same, or the transform cannot be written down.
    """
    if spec.views > 1 and not is_random(transform):
        raise UsageError(
            f"{spec.views} views of a transform that draws nothing at random would all be the same",
            "set cache.views to 1, or add a random transform such as - RandomCrop: {size: 32, padding: 4}",
        )
    try:
        return ViewsRecord(count=spec.views, seed=spec.seed, transform=transform)
    except ValidationError as error:
        raise _not_to_be(error) from None


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
    """What a cache will be, before the teacher has run over it; `shape` is that of a cache that it extends.

    Raises:
        UsageError: if the settings do not fit the data set or one another.
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
        raise _not_to_be(error) from None


def teacher_by_hearsay(name: str, kept: str, level: Literal["unknown"] | None = None) -> TeacherRecord:
    """A teacher that kdcache has not run: nothing is known of it but what was `kept` of its logits."""
    return TeacherRecord(
        name=name,
        arguments={},
        code_digest=None,
        weights_digest=f"sha256:{hashlib.sha256(b'').hexdigest()}",
        parameters=0,
        precision=f"unknown, kept {kept}",
        level=level,
    )


def record_of_data(samples: Samples, digest: str) -> DatasetRecord:
    """What a cache says of the data set that it is of."""
    return DatasetRecord(
        name=samples.name,
        split=samples.split,
        samples=len(samples),
        class_names=samples.class_names,
        digest=digest,
    )


def _not_to_be(error: ValidationError) -> UsageError:
    first = error.errors()[0]
    return UsageError(
        f"no cache can be made with this {'.'.join(map(str, first['loc']))}: {first['msg']}",
        "change that setting of the cache, the transform or the data set",
    )

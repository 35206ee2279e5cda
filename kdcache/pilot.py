"""Before the first shard: a pilot of the teacher, the encoding that it suggests, and the plan of the cache."""

from __future__ import annotations

import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from pydantic import ValidationError
from torch import Tensor, nn

from kdcache.cache import layout
from kdcache.cache.basis import TailBasis
from kdcache.cache.codec import not_finite
from kdcache.cache.planner import Choice, encoding_without_pilot, pilot_ids, plan_encoding
from kdcache.cache.schema import (
    PLAN,
    DatasetRecord,
    Encoding,
    Fidelity,
    Plan,
    Request,
    TeacherRecord,
    ViewsRecord,
    read_plan,
)
from kdcache.cache.shape import choose_shape
from kdcache.cache.writer import check_begun_alike
from kdcache.errors import CorruptError, MismatchError, UsageError
from kdcache.evaluate import check_logits
from kdcache.models import weights_digest
from kdcache.pipeline import CacheSpec, Transform
from kdcache.progress import Progress
from kdcache.provenance import versions
from kdcache.samples import Samples
from kdcache.views import View, batches, cut_range, is_random

_NPZ = "write it with numpy.savez(path, logits=[N, C] floats, labels=[N] integers)"


class Identity(NamedTuple):
    """What tells a teacher from another beside its weights; see `TeacherRecord`."""

    name: str
    arguments: dict[str, Any]
    code_digest: str | None


class Chosen(NamedTuple):
    """How rows are encoded, with what measured fidelity, in which basis."""

    encoding: Encoding
    fidelity: Fidelity | None
    basis: TailBasis | None


def request_of(spec: CacheSpec) -> Request:
    """What the `cache` section of a pipeline asks for."""
    return Request(**{name: getattr(spec, name) for name in Request.model_fields})


def run_pilot(
    model: nn.Module,
    samples: Samples,
    transform: Transform,
    spec: CacheSpec,
    device: torch.device | str,
    progress: Progress,
) -> tuple[Tensor, Tensor]:
    """The teacher's logits [P, C] float32 for rows spread over the data set, on its device, and their labels [P]."""
    ids = pilot_ids(len(samples), spec.pilot_rows)
    cuts = [ids[cut.start : cut.stop] for cut in cut_range(range(len(ids)), spec.batch_size)]
    parts = []
    with progress.task("pilot", len(ids), "rows") as task:
        for images, labels, which in batches(View(samples, transform, spec.seed), cuts, spec.workers, device):
            parts.append((teacher_logits(model, images, which, samples.num_classes, device), labels.to(device)))
            task.advance(len(which))
    return torch.cat([logits for logits, _ in parts]), torch.cat([labels for _, labels in parts])


class Planned(NamedTuple):
    """What a cache would keep.

    Attributes:
        encoding: of its rows.
        choice: what was tried; None where every class is kept.
        rows: of all its views.
    """

    encoding: Encoding
    choice: Choice | None
    rows: int

    @property
    def gigabytes(self) -> float:
        """What the rows and the basis would take on disk, in 10^9 bytes, as far as the pilot tells."""
        a_row = self.choice.chosen.bytes_per_row if self.choice else 0.0
        return (a_row * self.rows + 2 * self.encoding.rank * self.encoding.num_classes) / 1e9


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
    return Planned(choice.chosen.encoding, choice, len(logits))


def choose(out: Path, spec: CacheSpec, classes: int, pilot: Callable[[], tuple[Tensor, Tensor]]) -> Chosen:
    """The encoding of a cache: as it was begun, if it was, or planned on the pilot."""
    request = request_of(spec)
    if (out / PLAN).exists():
        begun = read_plan(out / PLAN)
        check_begun_alike(out, begun.request, request, "request")
        return Chosen(begun.encoding, begun.fidelity, layout.read_basis(out, begun))
    every = encoding_without_pilot(classes, request)
    if every is not None:
        return Chosen(every, None, None)
    choice = plan_encoding(*pilot(), request)
    return Chosen(choice.chosen.encoding, choice.fidelity, choice.chosen.basis)


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
    teacher: Identity,
    model: nn.Module,
    samples: Samples,
    digest: str,
    spec: CacheSpec,
    views: ViewsRecord,
    choice: Chosen,
) -> Plan:
    """What a cache will be, before the teacher has run over it.

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
                precision="float32",
            ),
            dataset=DatasetRecord(
                name=samples.name,
                split=samples.split,
                samples=len(samples),
                class_names=samples.class_names,
                digest=digest,
            ),
            views=views,
            request=request_of(spec),
            encoding=choice.encoding,
            fidelity=choice.fidelity,
            shape=choose_shape(len(samples), row_bytes, spec.shard_rows),
            batch_size=spec.batch_size,
            versions=versions(),
            licence=spec.licence,
            notes=spec.notes,
        )
    except ValidationError as error:
        raise _not_to_be(error) from None


def _not_to_be(error: ValidationError) -> UsageError:
    first = error.errors()[0]
    return UsageError(
        f"no cache can be made with this {'.'.join(map(str, first['loc']))}: {first['msg']}",
        "change that setting of the cache, the transform or the data set",
    )


@torch.no_grad()
def teacher_logits(model: nn.Module, images: Tensor, ids: Tensor, classes: int, device: torch.device | str) -> Tensor:
    """The teacher's raw logits of a batch, [B, C] float32, on its device.

    Raises:
        MismatchError: if it returns anything but [B, C].
        CorruptError: if it returns NaN or infinities; names the sample.
    """
    logits = check_logits(model(images.to(device, non_blocking=True)), len(ids), classes, "teacher").float()
    if len(bad := not_finite(logits)):
        raise CorruptError(
            f"the teacher returned NaN or infinite logits for sample {int(ids[bad[0]])} "
            f"({len(bad)} of the {len(ids)} images of its batch)",
            "check the teacher's weights and the transform",
        )
    return logits

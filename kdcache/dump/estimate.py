"""Estimate what a cache would keep and cost, from a pilot of its teacher or from logits in a file."""

from __future__ import annotations

import zipfile
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import NamedTuple

import numpy as np
import torch

from kdcache.cache.format import zarr_store
from kdcache.cache.format.array_specs import raw_bytes
from kdcache.cache.format.codec import encode_finite, not_finite
from kdcache.cache.format.encoding import Encoding
from kdcache.cache.format.output_records import OutputRecord
from kdcache.cache.format.schema import NO_WEIGHTS
from kdcache.cache.planner import Choice, encoding_without_pilot, pilot_ids, plan_encoding
from kdcache.cache.preconditions import check_place
from kdcache.config.cache import CacheSpec
from kdcache.data.check_images import check_images
from kdcache.data.repeatable import check_repeatable
from kdcache.data.views import View
from kdcache.dump.disk_size import bytes_besides_rows
from kdcache.dump.noise import noise_of_estimate
from kdcache.dump.outputs import plan_outputs
from kdcache.dump.plan import Chosen, Pilot, plan_cache, request_of, run_pilot, views_of
from kdcache.errors import CorruptError, IncompleteError, MismatchError, UsageError
from kdcache.models.inference import InferenceModel, try_teacher
from kdcache.models.teacher import LoadedTeacher
from kdcache.runtime.progress import Progress
from kdcache.runtime.resources import free_disk

_TIMED_BATCHES = 8
"""Batches of a pilot that only measures time and size."""

_NPZ = "write it with numpy.savez(path, logits=[N, C] floats, labels=[N] integers)"


class Estimate(NamedTuple):
    """What a cache would keep and cost.

    Attributes:
        encoding: of the rows of class logits; None if they are not kept.
        choice: the candidates that were measured; None if every class is kept.
        rows: number of rows of all views.
        bytes_per_row: of the rows of all outputs alone, measured on a pilot; None without one.
        rows_per_second: of the pilot; None without one.
        besides_rows: bytes of everything else in the cache; 0 if its samples are not known.
        outputs: kept beside the class logits, by name; None if there are none.
        output_sizes: bytes per row of each of them, by name.
    """

    encoding: Encoding | None
    choice: Choice | None
    rows: int
    bytes_per_row: float | None = None
    rows_per_second: float | None = None
    besides_rows: int = 0
    outputs: dict[str, OutputRecord] | None = None
    output_sizes: Mapping[str, float] = MappingProxyType({})

    @property
    def bytes(self) -> float:
        """Size on disk; an upper bound without a pilot."""
        unmeasured = raw_bytes(self.encoding) if self.encoding is not None else 0
        return (self.bytes_per_row or unmeasured) * self.rows + self.besides_rows


def estimate(
    loaded: LoadedTeacher,
    spec: CacheSpec,
    device: torch.device | str,
    progress: Progress,
    out: Path | None = None,
    pilot_rows: int | None = None,
) -> Estimate:
    """Estimate the cache of a teacher; nothing is written.

    Args:
        loaded: the teacher and its images.
        spec: what the cache is to keep.
        device: where the teacher runs.
        progress: progress reporter.
        out: where the cache is to be written: a pilot is run in any case, for time and size, and the free disk space
            is checked. None: a pilot is run only if the encoding depends on it.
        pilot_rows: number of rows of the pilot; None: as many as the run would use.

    Raises:
        IncompleteError: if the cache does not fit on the disk.
        KdcacheError: if settings, teacher and images are inconsistent.
    """
    num_classes = loaded.samples.num_classes
    views = views_of(spec, loaded.transform)
    rows = len(loaded.samples) * views.count
    encoding = encoding_without_pilot(num_classes, request_of(spec)) if spec.logits else None
    if encoding is not None and out is None and not spec.outputs:
        return Estimate(encoding, None, rows)
    view = View(loaded.samples, loaded.transform, spec.seed)
    try_teacher(loaded.model, view, spec, device)
    noise, record = noise_of_estimate(spec, loaded.samples)
    teacher = InferenceModel(loaded.model, num_classes, spec, device, noise)
    if (encoding is not None or not spec.logits) and not spec.outputs:
        pilot_rows = pilot_rows or _TIMED_BATCHES * spec.batch_size
    pilot = run_pilot(teacher, view, spec, progress, pilot_rows)
    outputs = plan_outputs(spec, pilot.outputs, pilot.labels, num_classes, rows, pilot.unknown_levels)
    choice = None
    if encoding is not None:
        size = _measured_bytes(encoding, pilot)
    elif spec.logits:
        choice = plan_encoding(pilot.class_logits(), pilot.labels, request_of(spec))
        encoding, size = choice.chosen.encoding, choice.chosen.bytes_per_row
    else:
        size = 0.0
    made = Chosen(encoding, None, None, 0, outputs)
    plan = plan_cache(loaded.identity, loaded.model, loaded.samples, NO_WEIGHTS, spec, views, made, noise=record)
    estimated = Estimate(
        encoding,
        choice,
        rows,
        size + outputs.bytes_per_row,
        pilot.rows_per_second,
        bytes_besides_rows(plan, loaded.samples.labels),
        outputs.records,
        outputs.sizes,
    )
    if out is not None:
        check_room(out, estimated.bytes)
    return estimated


def estimate_new_cache(
    loaded: LoadedTeacher,
    spec: CacheSpec,
    out: Path,
    device: torch.device | str,
    progress: Progress,
    decode_images: bool = False,
) -> Estimate:
    """Estimate the cache that a dump to `out` would make, after the checks that the dump begins with.

    Raises:
        UsageError: if a cache cannot be written to `out`.
        CorruptError: if some image files cannot be read; names all of them.
        As `estimate`.
    """
    check_place(out)
    for note in check_images(loaded.samples, progress, decode_images, loaded.transform):
        progress.say(f"note: {note}")
    check_repeatable(loaded.samples)
    return estimate(loaded, spec, device, progress, out)


def _measured_bytes(encoding: Encoding, pilot: Pilot) -> float:
    """Return the bytes per row on disk of a pilot's rows, if every class is kept."""
    return zarr_store.bytes_per_row(encoding, encode_finite(pilot.class_logits(), pilot.labels, encoding))


def check_room(out: Path, needed: float) -> None:
    """Check that a cache of about `needed` bytes fits on the disk.

    Raises:
        IncompleteError: if it does not.
    """
    free = free_disk(out)
    if needed > free:
        raise IncompleteError(
            f"{out} needs about {needed / 1e9:,.3f} GB; {free / 1e9:,.3f} GB are free there",
            "free disk space, write to another disk, or keep less (cache.fidelity, cache.views)",
        )


def estimate_from_logits(path: Path, fidelity: float | None) -> Estimate:
    """Estimate the cache of the logits in an npz file; `labels` in it are the true classes.

    Raises:
        UsageError: if the file does not hold logits [N, C].
        MismatchError: if a label is out of range.
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
        contents = ", ".join(f"{name} {list(array.shape)} {array.dtype}" for name, array in arrays.items())
        raise UsageError(f"{path} holds {contents or 'nothing'}", _NPZ)
    if len(labels) and not (labels.min() >= -1 and labels.max() < logits.shape[1]):
        raise MismatchError(
            f"labels of {path} are outside 0 to {logits.shape[1] - 1}", "correct them; use -1 for an unknown label"
        )
    spec = CacheSpec.model_validate({"fidelity": fidelity})
    encoding = encoding_without_pilot(logits.shape[1], request_of(spec))
    if encoding is not None:
        return Estimate(encoding, None, len(logits))
    ids = pilot_ids(len(logits), spec.pilot_rows)
    pilot = torch.from_numpy(logits[ids].astype(np.float32))
    if len(bad := not_finite(pilot)):
        raise CorruptError(f"row {ids[int(bad[0])]} of {path} holds NaN or infinite logits", "correct the logits")
    choice = plan_encoding(pilot, torch.from_numpy(labels[ids].astype(np.int64)), request_of(spec))
    return Estimate(choice.chosen.encoding, choice, len(logits), choice.chosen.bytes_per_row)

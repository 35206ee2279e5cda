"""Check by what it returns that a teacher is the one that a cache was begun with.

The digest of the weights does not tell all teachers apart. A frozen TorchScript module, or one that calls a session, a
server or a function, has an empty state dict; and the same weights return other logits if other code prepares the
images. So the logits of a few samples are kept beside the plan until the cache is sealed. A sealed cache is compared
with its own rows.
"""

from __future__ import annotations

import io
import zipfile
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from kdcache.cache.format import stored_bases, zarr_store
from kdcache.cache.format.codec import Rows, decode
from kdcache.cache.format.encoding import Encoding
from kdcache.cache.format.output_codec import decode_output
from kdcache.cache.format.output_records import DEFAULT_OUTPUT
from kdcache.cache.format.schema import PROBES, Plan
from kdcache.cache.planner import pilot_ids
from kdcache.config.cache import CacheSpec
from kdcache.data.loader import cut_range
from kdcache.data.views import View
from kdcache.dump.outputs import encode_outputs, labels_of_output
from kdcache.errors import CorruptError, MismatchError
from kdcache.models.inference import InferenceModel, TeacherOutput, refuse_not_finite
from kdcache.models.noise import Noise

_PROBE_ROWS = 8

_PROBED_NUMBERS = 4096
"""Numbers of a map that are kept of each probe, about."""

_TOLERANCE = {"fp32": 0.01, "fp16": 0.01, "bf16": 0.08}
"""Largest RMS difference between the logits of one teacher, relative to their RMS, by the precision that it runs in.

Twice what the precision itself changes in trained and random CNNs: bf16 up to 0.038, fp16 0.0049, fp32 0.0045 (as TF32,
which is how GPUs run its convolutions). Other batch sizes, numbers of threads and memory formats change less than 1e-5
in fp32. Another teacher, or other preprocessing, changes more than 0.05.
"""

_FLOOR = 1e-6
"""RMS difference below which logits are the same, whatever their size."""


class Probes(NamedTuple):
    """The logits of a few samples, in view 0.

    Attributes:
        ids: [P] int64, the samples.
        keys: [P] uint64, their content keys.
        logits: [P, C] float32, followed by the other outputs, [P, C + D + ...], in the order of their names; of maps
            some of their numbers.
        widths: C, D, ..., as far as they were kept.
    """

    ids: npt.NDArray[np.int64]
    keys: npt.NDArray[np.uint64]
    logits: npt.NDArray[np.float32]
    widths: npt.NDArray[np.int64]

    def to_bytes(self) -> bytes:
        """Return the contents of the file that keeps them."""
        file = io.BytesIO()
        np.savez(file, **self._asdict())
        return file.getvalue()

    def columns(self) -> list[slice]:
        """Return the columns of each output, which differ in size."""
        ends = np.cumsum(self.widths).tolist()
        return [slice(end - width, end) for end, width in zip(ends, self.widths.tolist(), strict=True)]

    def with_changes(self, now: Probes) -> Probes:
        """Return these probes, with the values of `now` for the samples whose images changed."""
        return Probes(
            now.ids, now.keys, np.where((self.keys == now.keys)[:, None], self.logits, now.logits), now.widths
        )


class Difference(NamedTuple):
    """How an output of two teachers differs.

    Attributes:
        relative: RMS difference of all logits, or numbers of another output, relative to their RMS.
        sample: the sample of the largest difference.
        class_index: its class, or index in the other output.
        before: the logit of the first teacher.
        now: the logit of the second teacher.
        output: name of the output.
    """

    relative: float
    sample: int
    class_index: int
    before: float
    now: float
    output: str = DEFAULT_OUTPUT

    @property
    def what(self) -> str:
        """What differs, after "other"."""
        return "logits" if self.output == DEFAULT_OUTPUT else f"numbers as the output {self.output}"

    def __str__(self) -> str:
        where = "class" if self.output == DEFAULT_OUTPUT else "number"
        return (
            f"with a relative difference of {self.relative:.2g}; the largest is that of sample {self.sample}, {where} "
            f"{self.class_index}: {self.before:.4f} then, {self.now:.4f} now"
        )


def probe_ids(samples: int) -> list[int]:
    """Return the samples that a teacher is probed with, [P], of a data set of `samples`."""
    return pilot_ids(samples, _PROBE_ROWS)


def run_probes(
    model: nn.Module,
    view: View,
    keys: npt.NDArray[np.uint64],
    spec: CacheSpec,
    device: torch.device | str,
    noise: Noise | None = None,
) -> Probes:
    """Run a teacher on a few samples that are spread over the data set.

    Args:
        model: the teacher; moved to the device and put into evaluation mode.
        view: view 0 of the teacher's images.
        keys: [P] uint64, content keys of the samples `probe_ids`.
        spec: precision and memory format.
        device: where the teacher runs.
        noise: of the cache; None without.

    Raises:
        MismatchError: if the teacher does not return [B, C].
    """
    ids = probe_ids(len(view))
    running = _teacher(model, view, spec, device, None if noise is None else replace(noise, purpose="probes"))
    # One by one, so that no row depends on an image that is replaced later, or cannot be read.
    running.take_as_logits()
    rows = [
        None if (images := _image(view, sample)) is None else _probed(running.run(images, torch.tensor([sample])))
        for sample in ids
    ]
    widths = next(([part.shape[1] for part in row] for row in rows if row is not None), [view.samples.num_classes])
    unreadable = torch.full((1, sum(widths)), torch.nan)
    values = torch.cat([unreadable if row is None else torch.cat(row, dim=1) for row in rows])
    return Probes(np.array(ids), keys, values.numpy(), np.array(widths))


def _parts(said: TeacherOutput) -> list[Tensor]:
    """Return the logits and all other outputs of a batch, [B, D] each, on the CPU."""
    return [part.flatten(1).cpu() for part in said.parts.values()]


def _probed(said: TeacherOutput) -> list[Tensor]:
    """Return the outputs of one sample that are kept, [1, D] each: of a map numbers that are spread over it."""
    is_map = [part.ndim > 2 for part in said.parts.values()]
    # An odd distance meets all channels and lines.
    return [
        part[:, :: (part.shape[1] // _PROBED_NUMBERS) | 1] if spread else part
        for part, spread in zip(_parts(said), is_map, strict=True)
    ]


def _image(view: View, sample: int) -> Tensor | None:
    """Return an image [1, channels, H, W]; None if it cannot be read, which the pass reports after finished shards."""
    try:
        return view.__getitems__([sample]).images
    except CorruptError:
        return None


def read_probes(cache: Path, now: Probes) -> Probes | None:
    """Return the probes of an unsealed cache; None if there are none of the same samples and classes as `now`."""
    try:
        with np.load(cache / PROBES, allow_pickle=False) as stored:
            probes = Probes(*(stored[name] for name in Probes._fields))
    except (OSError, ValueError, EOFError, KeyError, zipfile.BadZipFile):
        return None
    same = np.array_equal(probes.ids, now.ids) and probes.keys.shape == now.keys.shape
    same = same and np.array_equal(probes.widths, now.widths)
    return probes if same and probes.logits.shape == now.logits.shape else None


def check_probes(before: Probes, now: Probes, run_again: Callable[[], Probes], spec: CacheSpec, made: str) -> None:
    """Check that two teachers return the same, on the probes whose images are the same.

    Rows that are not finite are left out: the pass refuses them by their sample.

    Args:
        before: of the first teacher.
        now: of the second.
        run_again: runs the second teacher once more, to find one that is not deterministic.
        spec: precision of the second teacher.
        made: what the first teacher is, such as "CACHE was begun with".

    Raises:
        MismatchError: if they differ by more than their precision explains.
    """
    same = (before.keys == now.keys) & np.isfinite(before.logits).all(axis=1) & np.isfinite(now.logits).all(axis=1)
    if not same.any():
        return
    ids, again = now.ids[same].tolist(), None
    for name, columns in zip(spec.output_names, now.columns(), strict=True):
        was, live = (torch.from_numpy(probes.logits[same][:, columns]) for probes in (before, now))
        classes = torch.arange(live.shape[1]).expand(len(live), -1)
        found = _difference(was, live, ids, classes)._replace(output=name)
        if not _is_same(found, spec):
            again = run_again() if again is None else again
            itself = _difference(live, torch.from_numpy(again.logits[same][:, columns]), ids, classes)
            raise _other_teacher(made, found, itself, spec)


def check_first_batch(
    cache: Path,
    plan: Plan,
    view: View,
    model: nn.Module,
    spec: CacheSpec,
    device: torch.device | str,
    noise: Noise | None = None,
    shard: int = 0,
) -> Difference:
    """Check that a teacher returns what a cache keeps of the first batch of a shard.

    The batch is one of the pass, since logits may depend on the other images of their batch. The classes that a row
    keeps individually are compared, up to their rounding.

    Args:
        cache: its folder; the shard must be complete.
        plan: its plan.
        view: of the teacher's images; its index is the view of the cache.
        model: the teacher; moved to the device and put into evaluation mode.
        spec: precision and memory format.
        device: where the teacher runs.
        noise: of the cache; None without.
        shard: index of the shard.

    Returns:
        How far the teacher's logits differ from those of the cache.

    Raises:
        MismatchError: if they differ by more than precision and rounding explain.
        CorruptError: if it returns NaN or infinities, or the rows or an image cannot be read.
    """
    batch = cut_range(plan.shard_ids(shard), plan.batch_size)[0]
    loaded, running = view.__getitems__(batch), _teacher(model, view, spec, device, noise)
    said = running.run(loaded.images, loaded.ids, view.view)
    refuse_not_finite(said.finite().cpu(), torch.tensor(batch), said.names)
    differences = _from_stored(cache, plan, view.view, batch, said, loaded.labels)
    for found, live, part in zip(differences, _parts(said), range(len(differences)), strict=True):
        if not _is_same(found, spec):
            again = _parts(running.run(loaded.images, loaded.ids, view.view))[part]
            itself = _difference(live, again, batch, torch.arange(live.shape[1]).expand(len(batch), -1))
            raise _other_teacher(f"{cache} was made with", found, itself, spec)
    return max(differences, key=lambda difference: difference.relative)


def _from_stored(
    cache: Path, plan: Plan, view: int, batch: range, said: TeacherOutput, labels: Tensor
) -> list[Difference]:
    """Return how each output of a batch differs from what a cache keeps of it, beyond the rounding of its encoding."""
    differences = []
    if said.logits is not None:
        classes, kept, rounding = _kept(zarr_store.read_rows(cache, plan, view, batch), plan.encoding)
        differences.append(_difference(kept, said.logits.cpu().gather(1, classes), batch, classes, rounding))
    values = {name: output.cpu() for name, output in said.outputs.items()}
    bases = stored_bases.read_bases(cache, plan)
    for name, live in encode_outputs(values, labels, plan, bases).items():
        stored = zarr_store.output_reader(cache, plan, name).read(view, batch)
        record, basis = plan.named_outputs[name], bases.get(name)
        truth = labels_of_output(record, labels)
        kept, again = (decode_output(rows, truth, record.encoding, basis).flatten(1) for rows in (stored, live))
        columns = torch.arange(kept.shape[1]).expand(len(kept), -1)
        differences.append(_difference(kept, again, batch, columns)._replace(output=name))
    return differences


def _is_same(found: Difference, spec: CacheSpec) -> bool:
    """Return whether a difference may be due to other devices, libraries or batches alone."""
    return found.relative <= _TOLERANCE[spec.precision]


def _other_teacher(made: str, found: Difference, itself: Difference, spec: CacheSpec) -> MismatchError:
    """Return the error for a teacher that is not the one that `made`; `itself` is its difference from itself."""
    if not _is_same(itself, spec):
        return MismatchError(
            f"this teacher returns other {found.what} each time that it is run, and others than the one that {made}: "
            f"it differs from itself {itself}",
            "make it deterministic: no dropout, sampling or random preprocessing in evaluation mode",
        )
    return MismatchError(
        f"this teacher is not the one that {made} (their names and weights do not differ): it returns other "
        f"{found.what}, {found}",
        "use that teacher, with the same code, preprocessing and library versions; for this one make a new cache",
    )


def _teacher(
    model: nn.Module, view: View, spec: CacheSpec, device: torch.device | str, noise: Noise | None
) -> InferenceModel:
    """Return a teacher as the pass runs it, but not compiled: for so few rows that would take longer."""
    return InferenceModel(model, view.samples.num_classes, spec.model_copy(update={"compile": False}), device, noise)


def _kept(rows: Rows, encoding: Encoding) -> tuple[Tensor, Tensor, Tensor]:
    """Return what rows keep individually, [B, k] each: classes, logits, and bounds of their rounding (FORMAT.md, 5)."""
    if rows.indices is None:
        logits = decode(rows, torch.full((len(rows),), -1), encoding)
        classes = torch.arange(encoding.num_classes).expand(len(rows), -1)
    else:
        logits, classes = rows.log_probs.float() + rows.logsumexp.unsqueeze(1), rows.indices.long()
    log_probs = logits - rows.logsumexp.unsqueeze(1)
    if encoding.dtype == "float32":
        return classes, logits, torch.zeros_like(logits)
    if encoding.dtype == "float16":
        return classes, logits, 2.0**-10 * log_probs.abs() + 2.0**-24
    top = log_probs.amax(dim=1, keepdim=True)
    spread = top - log_probs.amin(dim=1, keepdim=True)
    return classes, logits, (spread / 255 + 2.0**-10 * (top.abs() + spread) + 1e-4).expand_as(logits)


def _difference(
    before: Tensor, now: Tensor, ids: Sequence[int], classes: Tensor, rounding: Tensor | None = None
) -> Difference:
    """Return the difference between logits [B, K] of samples `ids` and classes [B, K], beyond the rounding of one."""
    apart = (now - before).double().abs()
    if rounding is not None:
        apart = (apart - rounding).clamp_min(0)
    row, column = divmod(int(apart.argmax()), apart.shape[1])
    rms, size = (float(values.square().mean().sqrt()) for values in (apart, now.double()))
    return Difference(
        rms / size if rms > _FLOOR else 0.0,
        ids[row],
        int(classes[row, column]),
        float(before[row, column]),
        float(now[row, column]),
    )

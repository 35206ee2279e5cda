"""Import dense logits from a file as a cache, and export a cache as dense logits.

The files are described in `logit_files`. Files of other projects (FKD, TinyViT, ml-dr), which hold a few probabilities
per row, are handled by `foreign/`.
"""

from __future__ import annotations

import os
import zipfile
from pathlib import Path
from typing import IO, Any

import numpy as np
import numpy.typing as npt
import torch

from kdcache.cache.format import stored_bases, zarr_store
from kdcache.cache.format.codec import Rows, decode, encode, not_finite
from kdcache.cache.format.fingerprints import Inputs, digest_of
from kdcache.cache.format.read_records import read_plan
from kdcache.cache.format.schema import PLAN, Lineage, Plan
from kdcache.cache.format.sharding import bytes_per_shard_row, choose_sharding
from kdcache.cache.format.stored_bases import basis_of_logits
from kdcache.cache.format.verified_files import record_of
from kdcache.cache.planner import pilot_ids
from kdcache.cache.preconditions import check_outside, check_place
from kdcache.cache.reader import Cache
from kdcache.cache.writer import CacheWriter
from kdcache.config.cache import CacheSpec
from kdcache.config.transform import Transform
from kdcache.curate.logit_files import LogitFile, content_of, open_logits
from kdcache.curate.recode import build
from kdcache.curate.scratch import scratch_file
from kdcache.data.loader import cut_range
from kdcache.data.replay import fingerprints_of
from kdcache.data.samples import Samples, check_same_samples
from kdcache.data.transforms import is_random
from kdcache.data.views import View
from kdcache.dump.noise import refuse_noise
from kdcache.dump.plan import Pilot, choose, record_of_data, request_of, teacher_by_hearsay, views_of
from kdcache.errors import CorruptError, MismatchError, UsageError
from kdcache.runtime.progress import Progress, Silent
from kdcache.runtime.versions import versions

_ROWS_AT_ONCE = 2048


def cache_of_logits(
    source: str | Path,
    samples: Samples,
    out: str | Path,
    *,
    name: str | None = None,
    transform: Transform | None = None,
    spec: CacheSpec | None = None,
    scheduler: str = "threads",
    progress: Progress | None = None,
) -> Cache:
    """Make a cache from the dense logits in a file, planned like a dump.

    If interrupted at any moment, the same call resumes at the first unfinished shard. Outputs of LogSoftmax and Softmax
    are recognized by their rows; such a cache has `level: unknown`.

    Args:
        source: npz, npy, pt or pth file; see `logit_files`.
        samples: the data set; row i of the file is of sample i.
        out: folder of the cache.
        name: name of the teacher; None for the name of the file.
        transform: the teacher's transform of an image; None for the data set's own.
        spec: as for `dump_teacher`; number of views and seed are taken from the file.
        scheduler: backend; see `parallel.over`.
        progress: progress reporter; silent if None.

    Raises:
        UsageError: if the file holds no logits, its probabilities have underflowed, or its views cannot be replayed.
        MismatchError: if the file is of other samples, or `out` was started with other settings.
        CorruptError: if a logit is NaN or infinite; names the sample.
    """
    source, out, spec, progress = Path(source), Path(out), spec or CacheSpec(), progress or Silent()
    refuse_noise(spec)
    transform = samples.transform if transform is None else transform
    check_place(out)
    out = out.absolute()
    with open_logits(source, out.with_name(f"{out.name}.logits")) as opened:
        keys = samples.keys(progress)
        _check_fits(opened, samples, keys, transform)
        file = opened._replace(content=content_of(opened))
        if file.ignored:
            progress.say(f"note: {source} also holds {', '.join(file.ignored)}, which is not used")
        if file.content != "logits":
            progress.say(
                f"note: {source} holds {file.content}: the logits are known up to an additive constant per row"
            )
        plan, writer = _begin(file, samples, keys, out, name, transform, spec)
        stride = plan.shape.fingerprint_stride
        marked = range(0, len(samples), stride)
        views = range(plan.views.count)
        inputs = [fingerprints_of(View(samples, transform, plan.views.seed, view), marked) for view in views]

        def arguments(view: int, shard: int) -> tuple[Any, ...]:
            ids = plan.shard_ids(shard)
            labels = torch.from_numpy(samples.labels[ids.start : ids.stop].astype(np.int64))
            fingerprints = inputs[view].at(slice(ids.start // stride, -(-ids.stop // stride)))
            return file._replace(labels=None, sample_keys=None), labels, fingerprints

        return build(writer, _encode_shard, arguments, scheduler)


def _begin(
    file: LogitFile,
    samples: Samples,
    keys: npt.NDArray[np.uint64],
    out: Path,
    name: str | None,
    transform: Transform,
    spec: CacheSpec,
) -> tuple[Plan, CacheWriter]:
    """Plan the cache, and create it or resume it."""
    spec = spec.model_copy(update={"views": file.shape[0], "seed": file.seed or 0})

    def pilot() -> Pilot:
        ids = pilot_ids(len(samples), spec.pilot_rows)
        logits = torch.from_numpy(file.logits(0, ids))
        if len(bad := not_finite(logits)):
            raise _not_finite(file.source, ids[int(bad[0])])
        return Pilot(logits, torch.from_numpy(samples.labels[ids].astype(np.int64)), 0.0)

    started = read_plan(out / PLAN) if (out / PLAN).exists() else None
    chosen = choose(out, started, spec, samples.num_classes, len(samples) * spec.views, pilot)
    known = file.content == "logits"
    plan = Plan(
        teacher=teacher_by_hearsay(
            name or file.source.stem,
            f"in {file.dtype}" if known else f"as {file.content} in {file.dtype}",
            level=None if known else "unknown",
        ),
        dataset=record_of_data(samples, digest_of(keys, samples.labels)),
        views=views_of(spec, transform),
        request=request_of(spec),
        encoding=chosen.encoding,
        fidelity=chosen.fidelity,
        shape=choose_sharding(len(samples), bytes_per_shard_row(chosen.encoding), spec.shard_rows),
        batch_size=spec.batch_size,
        versions=versions(),
        licence=spec.license,
        notes=spec.notes,
        lineage=Lineage(
            operation="convert",
            arguments={"file": file.source.name, "sha256": record_of(file.source).sha256},
            parents=[],
        ),
    )
    return plan, CacheWriter.begin(out, plan, samples.labels, keys, basis_of_logits(chosen.basis))


def _encode_shard(out: Path, view: int, shard: int, file: LogitFile, labels: torch.Tensor, inputs: Inputs) -> None:
    """Read, encode and write one shard."""
    writer = CacheWriter.join(out)
    basis, ids, parts = stored_bases.read_basis(out, writer.plan), writer.plan.shard_ids(shard), []
    for start in range(0, len(ids), _ROWS_AT_ONCE):
        some = labels[start : start + _ROWS_AT_ONCE]
        first = ids.start + start
        logits = torch.from_numpy(file.logits(view, slice(first, first + len(some))))
        if len(bad := not_finite(logits)):
            raise _not_finite(file.source, first + int(bad[0]))
        parts.append(encode(logits, some, writer.plan.encoding, basis))
    writer.write(view, shard, Rows.concatenate(parts), inputs)


def _not_finite(source: Path, sample: int) -> CorruptError:
    return CorruptError(f"{source} holds NaN or infinite logits for sample {sample}", "correct the logits")


def _check_fits(file: LogitFile, samples: Samples, keys: npt.NDArray[np.uint64], transform: Transform) -> None:
    """Check that row i of the file can be of sample i of the data set, as a student will see it."""
    source = file.source
    views, rows, classes = file.shape
    if (rows, classes) != (len(samples), samples.num_classes):
        raise MismatchError(
            f"{source} has {rows} rows of {classes} classes, {samples.name}/{samples.split} has {len(samples)} samples "
            f"of {samples.num_classes}",
            "use the data set and the split that the teacher was run on, in its order",
        )
    check_same_samples(
        samples,
        keys,
        keys if file.sample_keys is None else file.sample_keys,
        samples.labels if file.labels is None else file.labels,
    )
    if is_random(transform) and file.seed is None:
        raise UsageError(
            f"the transform is random, and {source} does not hold its seed: the augmentation that the teacher saw "
            "cannot be replayed for a student",
            "set `transform:` to that of unaugmented images, or run the teacher with kdcache dump-teacher",
        )
    if views > 1 and not is_random(transform):
        raise UsageError(
            f"{source} has {views} views, but the transform is not random: all views would be the same",
            "set `transform:` to the teacher's augmentation",
        )


def logits_of_cache(cache: Cache, out: str | Path) -> None:
    """Write the decoded logits of a cache, float32 [N, C] or [V, N, C] for several views, as npz or npy.

    Raises:
        UsageError: if `out` exists or has another suffix, or is inside a cache.
        IncompleteError: if a view is not here.
    """
    out = Path(out)
    check_outside(out)
    cache.check_views()
    if out.suffix not in (".npz", ".npy"):
        raise UsageError(f"{out} ends neither in .npz nor in .npy", "give a name with one of these suffixes with -o")
    if os.path.lexists(out):
        raise UsageError(f"{out} exists already", "give another name with -o")
    with scratch_file(out.with_name(f"{out.name}.partial")) as unfinished, unfinished.open("w+b") as file:
        if out.suffix == ".npy":
            _write_logits(cache, file)
        else:
            _write_npz(cache, file)
        file.flush()
        os.fsync(file.fileno())
        unfinished.replace(out)


def _write_npz(cache: Cache, file: IO[bytes]) -> None:
    with zipfile.ZipFile(file, "w") as packed:
        with packed.open("logits.npy", "w", force_zip64=True) as member:
            _write_logits(cache, member)
        arrays: dict[str, npt.NDArray[Any]] = {
            "labels": cache.labels,
            "sample_keys": cache.sample_keys,
            "seed": np.array(cache.manifest.plan.views.seed),
        }
        for name, values in arrays.items():
            with packed.open(f"{name}.npy", "w", force_zip64=True) as member:
                np.lib.format.write_array(member, values, allow_pickle=False)


def _write_logits(cache: Cache, file: IO[bytes]) -> None:
    """Write an npy file in parts, with only one part in memory."""
    plan = cache.manifest.plan
    labels, basis = torch.from_numpy(cache.labels.astype(np.int64)), stored_bases.read_basis(cache.path, plan)
    size = (len(cache), cache.num_classes)
    shape = size if plan.views.count == 1 else (plan.views.count, *size)
    header = {"descr": "<f4", "fortran_order": False, "shape": shape}
    np.lib.format.write_array_header_2_0(file, header)
    reader = zarr_store.row_reader(cache.path, plan)
    for view in range(plan.views.count):
        for chunk in cut_range(range(len(cache)), plan.shape.chunk_rows):
            rows = reader.read(view, chunk)
            for start in range(0, len(rows), _ROWS_AT_ONCE):
                some = rows[start : start + _ROWS_AT_ONCE]
                of_rows = labels[chunk.start + start : chunk.start + start + len(some)]
                file.write(decode(some, of_rows, plan.encoding, basis).numpy().astype("<f4").tobytes())

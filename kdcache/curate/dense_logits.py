"""Dense logits that people have, as a cache, and a cache as dense logits.

An npz file holds `logits` [N, C] or [V, N, C]; it may hold `labels` [N] and `sample_keys` [N], which are then compared
with the data set, and the `seed` of its views, without which random views cannot be replayed. An npy file holds the
logits alone.

Files of other projects (FKD, TinyViT, ml-dr), which hold a few probabilities a row, are the matter of `foreign/`.
"""

from __future__ import annotations

import shutil
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from kdcache.cache.format import zarr_store
from kdcache.cache.format.codec import Rows, decode, encode, not_finite
from kdcache.cache.format.fingerprints import Inputs, digest_of
from kdcache.cache.format.integrity import record_of
from kdcache.cache.format.read_records import read_plan
from kdcache.cache.format.schema import PLAN, Lineage, Plan
from kdcache.cache.format.sharding import choose_sharding
from kdcache.cache.planner import pilot_ids
from kdcache.cache.preconditions import check_outside, check_place
from kdcache.cache.reader import Cache
from kdcache.cache.writer import CacheWriter
from kdcache.config.schema import CacheSpec, Transform
from kdcache.curate.derive import row_bytes
from kdcache.curate.recode import build
from kdcache.data.loader import cut_range
from kdcache.data.replay import fingerprints_of
from kdcache.data.samples import Samples, check_same_samples
from kdcache.data.transforms import is_random
from kdcache.data.views import View
from kdcache.dump.plan import Pilot, choose, record_of_data, request_of, teacher_by_hearsay, views_of
from kdcache.errors import CorruptError, MismatchError, UsageError
from kdcache.runtime.atomic_write import open_atomic
from kdcache.runtime.progress import Progress, Silent
from kdcache.runtime.versions import versions

_HOW = "write it with numpy.savez(path, logits=[N, C] floats), or numpy.save(path, logits)"
_ROWS_AT_ONCE = 2048


class _Dense(NamedTuple):
    """Logits in a file: the file, [V, N, C], and what lies beside them."""

    npy: Path
    shape: tuple[int, int, int]
    dtype: str
    beside: dict[str, npt.NDArray[Any]]

    def rows(self, view: int, which: slice | list[int]) -> npt.NDArray[np.float32]:
        """Some rows of a view, [B, C]."""
        mapped = np.load(self.npy, mmap_mode="r", allow_pickle=False).reshape(self.shape)
        return np.asarray(mapped[view, which]).astype(np.float32)


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
    """A cache of the dense logits in a file, planned as a dump's is.

    Killed at any moment, the same call goes on at the first shard that is not whole.

    Args:
        source: npz or npy, as above.
        samples: the data set, of which row i is of sample i.
        out: folder of the cache.
        name: of the teacher; None for that of the file.
        transform: what the teacher saw of an image; None for the data set's own.
        spec: what to keep, as for `dump_teacher`; its views and seed are those of the file.
        scheduler: as `operations.over` takes it.
        progress: who is told how it goes.

    Raises:
        UsageError: if the file holds no logits, or its views cannot be replayed.
        MismatchError: if it is of other samples, or `out` was begun with other settings.
        CorruptError: if a logit is NaN or infinite; names the sample.
    """
    source, out, listener = Path(source), Path(out).absolute(), progress or Silent()
    transform = samples.transform if transform is None else transform
    check_place(out)
    with _opened(source, out.with_name(f"{out.name}.logits")) as dense:
        keys = samples.keys(listener)
        _check_fits(source, dense, samples, keys, transform)
        seed = int(dense.beside["seed"]) if "seed" in dense.beside else 0
        spec = (spec or CacheSpec()).model_copy(update={"views": dense.shape[0], "seed": seed})
        views = views_of(spec, transform)

        def pilot() -> Pilot:
            ids = pilot_ids(len(samples), spec.pilot_rows)
            logits = torch.from_numpy(dense.rows(0, ids))
            if len(bad := not_finite(logits)):
                raise _not_finite(source, ids[int(bad[0])])
            return Pilot(logits, torch.from_numpy(samples.labels[ids].astype(np.int64)), 0.0)

        begun = read_plan(out / PLAN) if (out / PLAN).exists() else None
        chosen = choose(out, begun, spec, samples.num_classes, pilot)
        plan = Plan(
            teacher=teacher_by_hearsay(name or source.stem, f"in {dense.dtype}"),
            dataset=record_of_data(samples, digest_of(keys, samples.labels)),
            views=views,
            request=request_of(spec),
            encoding=chosen.encoding,
            fidelity=chosen.fidelity,
            shape=choose_sharding(len(samples), row_bytes(chosen.encoding), spec.shard_rows),
            batch_size=spec.batch_size,
            versions=versions(),
            licence=spec.license,
            notes=spec.notes,
            lineage=Lineage(
                operation="convert", arguments={"file": source.name, "sha256": record_of(source).sha256}, parents=[]
            ),
        )
        marked = range(0, len(samples), plan.shape.fingerprint_stride)
        inputs = [fingerprints_of(View(samples, transform, seed, view), marked) for view in range(plan.views.count)]
        writer = CacheWriter.begin(out, plan, samples.labels, keys, chosen.basis)
        stride = plan.shape.fingerprint_stride

        def arguments(view: int, shard: int) -> tuple[Any, ...]:
            ids = plan.shard_ids(shard)
            labels = torch.from_numpy(samples.labels[ids.start : ids.stop].astype(np.int64))
            prints = inputs[view].at(slice(ids.start // stride, -(-ids.stop // stride)))
            return dense._replace(beside={}), labels, prints, source

        return build(writer, _encode_shard, arguments, scheduler)


def _encode_shard(
    out: Path, view: int, shard: int, dense: _Dense, labels: torch.Tensor, inputs: Inputs, source: Path
) -> None:
    writer = CacheWriter.join(out)
    basis, ids, parts = zarr_store.read_basis(out, writer.plan), writer.plan.shard_ids(shard), []
    for start in range(0, len(ids), _ROWS_AT_ONCE):
        truth = labels[start : start + _ROWS_AT_ONCE]
        first = ids.start + start
        logits = torch.from_numpy(dense.rows(view, slice(first, first + len(truth))))
        if len(bad := not_finite(logits)):
            raise _not_finite(source, first + int(bad[0]))
        parts.append(encode(logits, truth, writer.plan.encoding, basis))
    writer.write(view, shard, Rows.concatenate(parts), inputs)


def _not_finite(source: Path, sample: int) -> CorruptError:
    return CorruptError(f"{source} holds NaN or infinite logits for sample {sample}", "correct the logits")


def _check_fits(
    source: Path, dense: _Dense, samples: Samples, keys: npt.NDArray[np.uint64], transform: Transform
) -> None:
    """That row i of the file can be of sample i of the data set, as a student will see it."""
    views, rows, classes = dense.shape
    if (rows, classes) != (len(samples), samples.num_classes):
        raise MismatchError(
            f"{source} has {rows} rows of {classes} classes, {samples.name}/{samples.split} has {len(samples)} samples "
            f"of {samples.num_classes}",
            "give the data set and the split that the teacher was run on, in its order",
        )
    beside = dense.beside
    then = beside.get("sample_keys", keys), beside.get("labels", samples.labels)
    check_same_samples(samples, keys, *then)
    if is_random(transform) and "seed" not in beside:
        raise UsageError(
            f"the transform draws at random, and {source} does not say from which seed: no student could be shown what "
            "this teacher saw",
            "give the transform of clean images (`transform:`), or run the teacher with kdcache dump-teacher",
        )
    if views > 1 and not is_random(transform):
        raise UsageError(
            f"{source} has {views} views, and the transform draws nothing at random: all would be the same",
            "give the transform that the teacher's images went through, in `transform:`",
        )


@contextmanager
def _opened(source: Path, scratch: Path) -> Iterator[_Dense]:
    """The logits of a file, to be mapped: those of an npz are unpacked into a folder, deleted in the end."""
    shutil.rmtree(scratch, ignore_errors=True)
    try:
        try:
            npy, beside = source, {}
            if source.suffix == ".npz":
                scratch.mkdir(parents=True)
                npy = scratch / "logits.npy"
                with zipfile.ZipFile(source) as packed, packed.open("logits.npy") as member, npy.open("wb") as unpacked:
                    shutil.copyfileobj(member, unpacked, 2**20)
                with np.load(source, allow_pickle=False) as arrays:
                    names = {"labels", "sample_keys", "seed"}.intersection(arrays.files)
                    beside = {name: arrays[name] for name in names}
            logits = np.load(npy, mmap_mode="r", allow_pickle=False)
        except (OSError, ValueError, EOFError, KeyError, AttributeError, zipfile.BadZipFile) as error:
            raise UsageError(
                f"cannot read logits from {source}: {error}", f"{_HOW}; files of others need --from"
            ) from None
        if logits.ndim not in (2, 3) or logits.dtype.kind != "f" or not logits.size or logits.flags.f_contiguous:
            raise UsageError(f"{source} holds {logits.dtype} {list(logits.shape)} for logits", f"in C order: {_HOW}")
        views, rows, classes = logits.shape if logits.ndim == 3 else (1, *logits.shape)
        yield _Dense(npy.absolute(), (views, rows, classes), logits.dtype.name, beside)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def logits_of_cache(cache: Cache, out: str | Path) -> None:
    """Write what a cache decodes to, float32, as npz or npy; [N, C], or [V, N, C] where there are several views.

    Raises:
        UsageError: if the name ends otherwise, or something lies there.
    """
    out = Path(out)
    check_outside(out)
    if out.suffix not in (".npz", ".npy") or out.exists():
        raise UsageError(f"{out} exists already, or ends in neither .npz nor .npy", "give another name with -o")
    with open_atomic(out) as file:
        if out.suffix == ".npy":
            _write_logits(cache, file)
        else:
            with zipfile.ZipFile(file, "w") as packed:
                with packed.open("logits.npy", "w", force_zip64=True) as member:
                    _write_logits(cache, member)
                views = cache.manifest.plan.views
                beside: dict[str, npt.NDArray[Any]] = {"labels": cache.labels, "sample_keys": cache.sample_keys}
                for name, values in (beside | {"seed": np.array(views.seed)}).items():
                    with packed.open(f"{name}.npy", "w", force_zip64=True) as member:
                        np.lib.format.write_array(member, values, allow_pickle=False)


def _write_logits(cache: Cache, file: IO[bytes]) -> None:
    """One part after the other, so that the memory of one is enough."""
    plan = cache.manifest.plan
    labels, basis = torch.from_numpy(cache.labels.astype(np.int64)), zarr_store.read_basis(cache.path, plan)
    size = (len(cache), cache.num_classes)
    shape = size if plan.views.count == 1 else (plan.views.count, *size)
    header = {"descr": "<f4", "fortran_order": False, "shape": shape}
    np.lib.format.write_array_header_2_0(file, header)
    reader = zarr_store.RowReader(cache.path, plan)
    for view in range(plan.views.count):
        for chunk in cut_range(range(len(cache)), plan.shape.chunk_rows):
            rows = reader.read(view, chunk)
            for start in range(0, len(rows), _ROWS_AT_ONCE):
                some = rows[start : start + _ROWS_AT_ONCE]
                truth = labels[chunk.start + start : chunk.start + start + len(some)]
                file.write(decode(some, truth, plan.encoding, basis).numpy().astype("<f4").tobytes())

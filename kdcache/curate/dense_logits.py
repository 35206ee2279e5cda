"""Import dense logits and other outputs from a file as a cache.

The files are described in `logit_files`. Files of other projects (FKD, TinyViT, ml-dr), which hold a few probabilities
per row, are handled by `foreign/`.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from kdcache.cache.format import stored_bases
from kdcache.cache.format.codec import not_finite
from kdcache.cache.format.fingerprints import Inputs, digest_of
from kdcache.cache.format.output_codec import encode_output
from kdcache.cache.format.read_records import read_plan
from kdcache.cache.format.schema import PLAN, Lineage, Plan, TeacherRecord
from kdcache.cache.format.sharding import sharding_of
from kdcache.cache.format.vector_rows import EncodedRows
from kdcache.cache.format.verified_files import record_of
from kdcache.cache.planner import pilot_ids
from kdcache.cache.preconditions import check_place
from kdcache.cache.reader import Cache
from kdcache.cache.writer import CacheWriter
from kdcache.config.cache import CacheSpec
from kdcache.config.transform import Transform
from kdcache.curate.logit_files import LOGITS, RESERVED, LogitFile, content_of, open_logits
from kdcache.curate.recode import build
from kdcache.data.replay import fingerprints_of
from kdcache.data.same_samples import check_same_samples
from kdcache.data.samples import Samples
from kdcache.data.transforms import is_random
from kdcache.data.views import View
from kdcache.dump.noise import refuse_noise
from kdcache.dump.outputs import encode_outputs
from kdcache.dump.plan import Pilot, choose, record_of_data, request_of, teacher_by_hearsay, views_of
from kdcache.errors import CorruptError, MismatchError, UsageError
from kdcache.models.checks import OutputScale
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
    """Make a cache from the dense logits, and the `outputs` of `spec`, in a file, planned like a dump.

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
    with ExitStack() as opened:
        files = {
            output: opened.enter_context(open_logits(source, out.with_name(f"{out.name}.{output}"), output))
            for output in _checked_names(source, spec)
        }
        keys = samples.keys(progress)
        for output, file in files.items():
            _check_fits(file, output, samples, keys, transform)
        files = {output: file._replace(content=_content(output, file, spec)) for output, file in files.items()}
        first = next(iter(files.values()))
        if unused := sorted(set(first.ignored).difference(files)):
            progress.say(f"note: {source} also holds {', '.join(unused)}, which is not used")
        if (content := first.content) != "logits":
            progress.say(f"note: {source} holds {content}: the logits are known up to an additive constant per row")
        logits = files.get(LOGITS)
        known = logits is None or logits.content == "logits"
        teacher = teacher_by_hearsay(
            name or source.stem,
            f"in {first.dtype}" if known else f"as {first.content} in {first.dtype}",
            level=None if known else "unknown",
        )
        return cache_of_arrays(files, samples, keys, out, transform, spec, teacher, {}, scheduler)


def cache_of_arrays(
    files: Mapping[str, LogitFile],
    samples: Samples,
    keys: npt.NDArray[np.uint64],
    out: Path,
    transform: Transform,
    spec: CacheSpec,
    teacher: TeacherRecord,
    described: Mapping[str, str],
    scheduler: str,
) -> Cache:
    """Make a cache from arrays whose rows are those of the samples.

    Args:
        files: of each output, all from one source.
        samples: the data set.
        keys: [N] uint64, its content keys.
        out: folder of the cache.
        transform: of a sample.
        spec: names the same outputs; number of views and seed are taken from the files.
        teacher: record of the teacher.
        described: arguments for the lineage, before the name and the sha256 of the source.
        scheduler: backend; see `parallel.over`.

    Raises:
        MismatchError: if `out` was started with other settings.
        CorruptError: if a number is NaN or infinite; names the sample.
    """
    plan, writer = _begin(files, samples, keys, out, transform, spec, teacher, described)
    stride = plan.shape.fingerprint_stride
    marked = range(0, len(samples), stride)
    views = range(plan.views.count)
    inputs = [fingerprints_of(View(samples, transform, plan.views.seed, view), marked) for view in views]
    sent = {output: file._replace(labels=None, sample_keys=None) for output, file in files.items()}

    def arguments(view: int, shard: int) -> tuple[Any, ...]:
        ids = plan.shard_ids(shard)
        labels = torch.from_numpy(samples.labels[ids.start : ids.stop].astype(np.int64))
        fingerprints = inputs[view].at(slice(ids.start // stride, -(-ids.stop // stride)))
        return sent, labels, fingerprints

    return build(writer, _encode_shard, arguments, scheduler)


def _checked_names(source: Path, spec: CacheSpec) -> list[str]:
    """Return the names of the outputs that are imported, the class logits first.

    Raises:
        UsageError: if a file cannot hold them.
    """
    if source.suffix == ".npy" and len(spec.output_names) > 1:
        raise UsageError(
            f"{source} holds one array, and cache.outputs names {', '.join(spec.outputs)} beside the logits",
            "store them in one npz file, each under its name",
        )
    if maps := [name for name, output in spec.outputs.items() if output.places == "grid"]:
        raise UsageError(
            f"cache.outputs.{maps[0]} is a map (places: grid), and files of rows [N, D] are imported",
            "keep maps by running the teacher (kdcache dump-teacher), or remove the output",
        )
    if taken := RESERVED.intersection(spec.outputs):
        raise UsageError(
            f"an array {min(taken)} of {source} is not an output", f"give the output {min(taken)} another name"
        )
    return spec.output_names


def _content(output: str, file: LogitFile, spec: CacheSpec) -> OutputScale:
    """Return whether an output is stored as logits or as probabilities; vectors and scores are what they are."""
    is_classes = output == LOGITS or spec.outputs[output].kind == "classes"
    return content_of(file) if is_classes else "logits"


def _begin(
    files: Mapping[str, LogitFile],
    samples: Samples,
    keys: npt.NDArray[np.uint64],
    out: Path,
    transform: Transform,
    spec: CacheSpec,
    teacher: TeacherRecord,
    described: Mapping[str, str],
) -> tuple[Plan, CacheWriter]:
    """Plan the cache, and create it or resume it."""
    file = next(iter(files.values()))
    spec = spec.model_copy(update={"views": file.shape[0], "seed": file.seed or 0})

    def pilot() -> Pilot:
        ids = pilot_ids(len(samples), spec.pilot_rows)
        values = {output: torch.from_numpy(file.logits(0, ids)) for output, file in files.items()}
        for output, rows in values.items():
            if len(bad := not_finite(rows)):
                raise _not_finite(file.source, output, ids[int(bad[0])])
        labels = torch.from_numpy(samples.labels[ids].astype(np.int64))
        unknown = frozenset(output for output, file in files.items() if file.content != "logits")
        return Pilot(values.pop(LOGITS, None), labels, 0.0, values, unknown)

    started = read_plan(out / PLAN) if (out / PLAN).exists() else None
    chosen = choose(out, started, spec, samples.num_classes, len(samples) * spec.views, pilot)
    plan = Plan(
        teacher=teacher,
        dataset=record_of_data(samples, digest_of(keys, samples.labels)),
        views=views_of(spec, transform),
        request=request_of(spec),
        encoding=chosen.encoding,
        fidelity=chosen.fidelity,
        shape=sharding_of(len(samples), chosen.encoding, chosen.outputs.records, spec.shard_rows),
        batch_size=spec.batch_size,
        versions=versions(),
        licence=spec.license,
        notes=spec.notes,
        lineage=Lineage(
            operation="convert",
            arguments={**described, "file": file.source.name, "sha256": record_of(file.source).sha256},
            parents=[],
        ),
        outputs=chosen.outputs.records,
    )
    return plan, CacheWriter.begin(out, plan, samples.labels, keys, chosen.bases)


def _encode_shard(
    out: Path, view: int, shard: int, files: Mapping[str, LogitFile], labels: torch.Tensor, inputs: Inputs
) -> None:
    """Read, encode and write one shard."""
    writer = CacheWriter.join(out)
    plan, bases = writer.plan, stored_bases.read_bases(out, writer.plan)
    basis, ids = bases.get(LOGITS), plan.shard_ids(shard)
    parts: dict[str, list[EncodedRows]] = {output: [] for output in files}
    for start in range(0, len(ids), _ROWS_AT_ONCE):
        some = labels[start : start + _ROWS_AT_ONCE]
        first = ids.start + start
        values: dict[str, torch.Tensor] = {}
        for output, file in files.items():
            values[output] = torch.from_numpy(file.logits(view, slice(first, first + len(some))))
            if len(bad := not_finite(values[output])):
                raise _not_finite(file.source, output, first + int(bad[0]))
        if LOGITS in values:
            parts[LOGITS].append(encode_output(values[LOGITS], some, plan.encoding, basis))
        for output, rows in encode_outputs(values, some, plan, bases).items():
            parts[output].append(rows)
    whole = {output: type(rows[0]).concatenate(rows) for output, rows in parts.items()}
    writer.write(view, shard, whole.pop(LOGITS, None), inputs, outputs=whole)


def _not_finite(source: Path, output: str, sample: int) -> CorruptError:
    return CorruptError(f"{source} holds NaN or infinite {output} for sample {sample}", f"correct the {output}")


def _check_fits(
    file: LogitFile, output: str, samples: Samples, keys: npt.NDArray[np.uint64], transform: Transform
) -> None:
    """Check that row i of the file can be of sample i of the data set, as a student will see it."""
    source = file.source
    views, rows, numbers = file.shape
    expected = samples.num_classes if output == LOGITS else numbers
    if (rows, numbers) != (len(samples), expected):
        of_classes = output == LOGITS
        raise MismatchError(
            f"{source} has {rows} rows of {numbers} {'classes' if of_classes else output}, "
            f"{samples.name}/{samples.split} has {len(samples)} samples"
            + (f" of {samples.num_classes}" if of_classes else ""),
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

"""Examine this machine, and check whether a pipeline can run on it; all problems are reported, not only the first."""

from __future__ import annotations

import os
import re
import tempfile
import time
from collections.abc import Callable, Iterator
from importlib import metadata
from pathlib import Path
from typing import NamedTuple

import torch
from accelerate.commands.config.config_args import default_config_file
from torch import nn

from kdcache.config.schema import Pipeline, TrainSpec
from kdcache.config.transform import Transform
from kdcache.data.check_images import check_images
from kdcache.data.check_masks import joined
from kdcache.data.datasets import SPLITS, load_held_out, load_split
from kdcache.data.images import FileImages
from kdcache.data.repeatable import check_repeatable
from kdcache.data.samples import Samples
from kdcache.data.transforms import transform_for_evaluation
from kdcache.data.views import View
from kdcache.dump.estimate import estimate
from kdcache.errors import KdcacheError, MismatchError, UsageError, counted
from kdcache.models import build_for
from kdcache.models.checks import check_logits, try_network
from kdcache.models.teacher import load_teacher
from kdcache.runtime.paths import existing, fix_for
from kdcache.runtime.progress import Progress
from kdcache.runtime.resources import free_disk, free_memory
from kdcache.runtime.versions import versions
from kdcache.train.run_folder import check_trackers

_TEST_FILE_BYTES = 64 * 2**20
"""Size of the file that measures the write speed: larger than a disk's own buffer, and written quickly."""


_MEMORY = "lower cache.batch_size for the teacher; raise student.train.gradient_accumulation_steps for the student"


class Check(NamedTuple):
    """The result of one check.

    Attributes:
        what: was checked.
        result: in a few words.
        problem: the error, if there is one.
    """

    what: str
    result: str
    problem: KdcacheError | None = None


def examine_machine(out: Path) -> Iterator[Check]:
    """Yield what the machine has.

    Args:
        out: the folder that caches and runs are to be written to; it need not exist.
    """
    yield Check("versions", ", ".join(f"{name} {version}" for name, version in versions().items()))
    yield Check("extras", _extras())
    yield Check("devices", _devices())
    configured = Path(default_config_file)
    yield Check("accelerate", str(configured) if configured.is_file() else "not configured; one process, one device")
    yield Check("memory", f"{free_memory() / 1e9:,.1f} GB free")
    yield Check("disk", f"{free_disk(out) / 1e9:,.1f} GB free in {out}")
    yield check("write speed", lambda: _write_speed(out))


def examine_pipeline(
    pipeline: Pipeline,
    out: Path,
    device: torch.device | str,
    progress: Progress,
    decode_images: bool = False,
) -> Iterator[Check]:
    """Yield whether a pipeline can run here; what it needs to download is downloaded.

    Args:
        pipeline: its data set, and its teacher and student if it has them.
        out: the folder that the cache is to be written to.
        device: where the networks are to run.
        progress: progress reporter.
        decode_images: whether image files are decoded, not only their headers checked.
    """
    splits: list[Samples] = []
    yield check("data set", lambda: _data_set(pipeline, splits))
    if not splits:
        return  # nothing else can be checked without images
    if any(isinstance(samples.images, FileImages) for samples in splits):
        yield check("images", lambda: _images(pipeline, splits, progress, decode_images))
    train = splits[0]
    transforms: list[Transform] = [train.transform if pipeline.transform is None else pipeline.transform]
    if pipeline.teacher is not None:
        yield check("teacher", lambda: _teacher(pipeline, out, device, progress, transforms))
    yield check("transform", lambda: _transform(pipeline, train, transforms[-1]))
    if pipeline.student is not None:
        yield check("student", lambda: _student(pipeline, train, transforms[-1], device))


def check(what: str, examine: Callable[[], str], memory_fix: str = _MEMORY) -> Check:
    """Return the result of a check, or the problem that it raises.

    Args:
        what: is checked.
        examine: returns the result in a few words.
        memory_fix: what makes a batch smaller.
    """
    try:
        return Check(what, examine())
    except torch.OutOfMemoryError as error:
        first = str(error).splitlines()[0]
        problem: KdcacheError = MismatchError(
            f"a batch does not fit the memory of the device: {first}",
            memory_fix,
        )
    except KdcacheError as error:
        problem = error
    return Check(what, problem.what, problem)


def _extras() -> str:
    """List the optional libraries of the package, with their versions."""
    matches = [re.match(r"([\w.-]+).*extra == ['\"](\w+)['\"]", line) for line in metadata.requires("kdcache") or []]
    names = sorted({match[1] for match in matches if match and match[2] != "test"})
    return ", ".join(f"{name} {_version(name) or 'not installed'}" for name in names) or "none"


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _devices() -> str:
    devices = [f"{os.cpu_count()} CPU cores"]
    for index in range(torch.cuda.device_count()):
        total = torch.cuda.get_device_properties(index).total_memory
        name = torch.cuda.get_device_name(index)
        devices.append(f"cuda:{index} {name}, {free_memory(f'cuda:{index}') / 1e9:,.1f} of {total / 1e9:,.1f} GB free")
    if torch.backends.mps.is_available():
        devices.append("mps")
    return "; ".join(devices)


def _write_speed(out: Path) -> str:
    """Measure the speed of writing and flushing a file."""
    folder = existing(out)
    content = os.urandom(_TEST_FILE_BYTES)
    try:
        with tempfile.TemporaryFile(dir=folder) as file:
            start = time.perf_counter()
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
            seconds = time.perf_counter() - start
    except OSError as error:
        raise UsageError(f"cannot write to {folder}: {error.strerror}", fix_for(error)) from None
    return f"{_TEST_FILE_BYTES / 1e6 / seconds:,.0f} MB/s in {folder}"


def _data_set(pipeline: Pipeline, splits: list[Samples]) -> str:
    """Load all splits, and append them to `splits`."""
    train = load_split(pipeline.dataset, "train")
    held_out = load_held_out(pipeline.dataset, "validation"), load_held_out(pipeline.dataset, "test")
    splits += [samples for samples in (train, *held_out) if samples is not None]
    for samples in splits:
        check_repeatable(samples)
    counts = [
        f"{len(samples):,} {split}"
        for split, samples in zip(SPLITS, (train, *held_out), strict=True)
        if samples is not None
    ]
    return f"{train.name}: {', '.join(counts)} images, {train.num_classes} classes"


def _images(pipeline: Pipeline, splits: list[Samples], progress: Progress, decode: bool) -> str:
    """Check the image files of all splits."""
    problems, notes = [], []
    for samples in splits:
        try:
            found = check_images(samples, progress, decode, pipeline.transform)
            notes += [f"{samples.split}: {note}" for note in found]
        except KdcacheError as error:
            problems.append(error)
    if problems:
        raise joined(problems)
    count = sum(len(samples) for samples in splits)
    whole = f"all {count:,} files were decoded" if decode else f"the headers of all {count:,} files can be read"
    return "; ".join([whole, *notes])


def _teacher(
    pipeline: Pipeline, out: Path, device: torch.device | str, progress: Progress, transforms: list[Transform]
) -> str:
    """Load the teacher, append its transform to `transforms`, run a first batch, and estimate its cache."""
    loaded = load_teacher(pipeline, progress)
    transforms.append(loaded.transform)
    # Axes of other outputs that are fitted to one batch say nothing of the fidelity that the whole pilot reaches.
    pilot_rows = None if pipeline.cache.outputs else pipeline.cache.batch_size
    cache = estimate(loaded, pipeline.cache, device, progress, out, pilot_rows=pilot_rows)
    if cache.rows_per_second is None:
        raise ValueError("a pilot is run where the cache is to be written")
    dump = described_dump(cache.bytes, cache.rows / cache.rows_per_second)
    return f"{cache.rows_per_second:,.0f} images/s; {dump}"


def described_dump(size: float, seconds: float) -> str:
    """Return an estimate of a dump in words.

    Args:
        size: of the cache, in bytes.
        seconds: of the dump.
    """
    duration = f"{seconds:,.0f} s" if seconds < 60 else f"{seconds / 60:,.1f} min"
    return f"estimated cache: {size / 1e6:,.2f} MB, dumped in {duration}"


def _transform(pipeline: Pipeline, samples: Samples, transform: Transform) -> str:
    transform_for_evaluation(pipeline.eval_transform, transform)
    if samples.graph is not None:
        return f"none: {counted(samples.graph.features.shape[1], 'feature')} of each node"
    return " x ".join(map(str, View(samples, transform, pipeline.cache.seed).shape()))


def _student(pipeline: Pipeline, samples: Samples, transform: Transform, device: torch.device | str) -> str:
    """Run the forward and backward pass of a first micro-batch on the device."""
    spec = pipeline.section("student")
    check_trackers(spec.train.trackers)
    view = View(samples, transform if spec.transform is None else spec.transform, pipeline.cache.seed)
    trained = spec.weights is not None or spec.names_weights
    model = build_for(spec, samples, view.shape(), trained=trained)
    try_network(model, view, "cpu", "student")
    seconds = _first_micro_batch(model.to(device), view, spec.train, device)
    return f"{sum(p.numel() for p in model.parameters()):,} parameters, {seconds:.2f} s for the first micro-batch"


def _first_micro_batch(model: nn.Module, view: View, spec: TrainSpec, device: torch.device | str) -> float:
    """Return the seconds of the first micro-batch."""
    count = min(-(-spec.batch_size // spec.gradient_accumulation_steps), len(view))
    images = view.__getitems__(range(count)).images.to(device)
    start = time.perf_counter()
    of_maps = view.samples.maps is not None
    logits = check_logits(model.train()(images), count, view.samples.num_classes, "student", of_maps)
    logits.float().logsumexp(dim=1).sum().backward()  # type: ignore[no-untyped-call]
    if images.is_cuda:
        torch.cuda.synchronize(images.device)
    return time.perf_counter() - start

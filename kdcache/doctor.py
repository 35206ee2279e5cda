"""What this machine has, and whether a pipeline can run on it: each thing is tried, and all that is wrong is told."""

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

from kdcache.cache.planner import encoding_without_pilot, plan_encoding
from kdcache.config.schema import Pipeline, TrainSpec, Transform
from kdcache.data.datasets import SPLITS, load_held_out, load_split
from kdcache.data.samples import Samples
from kdcache.data.transforms import transform_for_evaluation
from kdcache.data.views import View
from kdcache.dump.dump import check_room
from kdcache.dump.plan import measured, request_of, run_pilot, views_of
from kdcache.errors import KdcacheError, MismatchError, UsageError
from kdcache.models import build_model
from kdcache.models.checks import check_logits, try_network
from kdcache.models.inference import InferenceModel, try_teacher
from kdcache.models.teacher import load_teacher
from kdcache.runtime.progress import Progress
from kdcache.runtime.resources import existing, free_disk, free_memory
from kdcache.runtime.versions import versions
from kdcache.train.run_folder import check_trackers

_WRITTEN = 64 * 2**20
"""Bytes that are written for the speed of a disk: more than its own buffer, and soon done."""


class Check(NamedTuple):
    """One thing that was looked at: what it is, what was found, and the mistake if it is not well."""

    what: str
    found: str
    problem: KdcacheError | None = None


def examine_machine(out: Path) -> Iterator[Check]:
    """What there is, whatever the pipeline.

    Args:
        out: the folder that caches and runs are to be written to, which need not be there yet.
    """
    yield Check("versions", ", ".join(f"{name} {number}" for name, number in versions().items()))
    yield Check("extras", _extras())
    yield Check("devices", _devices())
    configured = Path(default_config_file)
    yield Check("accelerate", str(configured) if configured.is_file() else "not configured; one process, one device")
    yield Check("memory", f"{free_memory() / 1e9:,.1f} GB free")
    yield Check("disk", f"{free_disk(out) / 1e9:,.1f} GB free in {out}")
    yield _tried("write speed", lambda: _write_speed(out))


def examine_pipeline(pipeline: Pipeline, out: Path, device: torch.device | str, progress: Progress) -> Iterator[Check]:
    """Whether a pipeline can run here; what it would download is downloaded.

    Args:
        pipeline: the teacher and the student of it, each if it has one.
        out: the folder that the cache is to be written to.
        device: where the networks are to run.
        progress: who is told how it goes.
    """
    loaded: list[Samples] = []
    yield _tried("data set", lambda: _data_set(pipeline, loaded))
    if not loaded:
        return  # nothing else can be tried without images
    seen: list[Transform] = [loaded[0].transform if pipeline.transform is None else pipeline.transform]
    if pipeline.teacher is not None:
        yield _tried("teacher", lambda: _teacher(pipeline, out, device, progress, seen))
    yield _tried("transform", lambda: _transform(pipeline, loaded[0], seen[-1]))
    if pipeline.student is not None:
        yield _tried("student", lambda: _student(pipeline, loaded[0], seen[-1], device))


def _tried(what: str, look: Callable[[], str]) -> Check:
    try:
        return Check(what, look())
    except torch.OutOfMemoryError as error:
        first = str(error).splitlines()[0]
        problem: KdcacheError = MismatchError(
            f"a batch does not fit the memory of the device: {first}",
            "lower cache.batch_size for the teacher; raise student.train.gradient_accumulation_steps for the student",
        )
    except KdcacheError as mistake:
        problem = mistake
    return Check(what, problem.what, problem)


def _extras() -> str:
    """Which optional libraries are there, of those that the package names for its users."""
    wanted = [re.match(r"([\w.-]+).*extra == ['\"](\w+)['\"]", line) for line in metadata.requires("kdcache") or []]
    names = sorted({found[1] for found in wanted if found and found[2] != "test"})
    return ", ".join(f"{name} {_version(name) or 'not installed'}" for name in names) or "none"


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _devices() -> str:
    found = [f"{os.cpu_count()} CPU cores"]
    for number in range(torch.cuda.device_count()):
        total = torch.cuda.get_device_properties(number).total_memory
        name = torch.cuda.get_device_name(number)
        found.append(f"cuda:{number} {name}, {free_memory(f'cuda:{number}') / 1e9:,.1f} of {total / 1e9:,.1f} GB free")
    if torch.backends.mps.is_available():
        found.append("mps")
    return "; ".join(found)


def _write_speed(out: Path) -> str:
    folder = existing(out)
    content = os.urandom(_WRITTEN)
    try:
        with tempfile.TemporaryFile(dir=folder) as file:
            began = time.perf_counter()
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
            seconds = time.perf_counter() - began
    except OSError as error:
        raise UsageError(
            f"cannot write to {folder}: {error.strerror}", "give a folder that you may write to, with -o"
        ) from None
    return f"{_WRITTEN / 1e6 / seconds:,.0f} MB/s in {folder}"


def _data_set(pipeline: Pipeline, loaded: list[Samples]) -> str:
    samples = load_split(pipeline.dataset, "train")
    validation, test = load_held_out(pipeline.dataset, "validation"), load_held_out(pipeline.dataset, "test")
    loaded.append(samples)
    splits = zip(SPLITS, (samples, validation, test), strict=True)
    counts = [f"{len(there):,} {split}" for split, there in splits if there is not None]
    return f"{samples.name}: {', '.join(counts)} images, {samples.num_classes} classes"


def _teacher(
    pipeline: Pipeline, out: Path, device: torch.device | str, progress: Progress, seen: list[Transform]
) -> str:
    """Its weights, a first batch of it, and what its cache would take."""
    model, _, samples, transform = load_teacher(pipeline, progress)
    seen.append(transform)
    spec = pipeline.cache
    rows = len(samples) * views_of(spec, transform).count
    view = View(samples, transform, spec.seed)
    try_teacher(model, view, spec, device)
    teacher = InferenceModel(model, samples.num_classes, spec, device)
    pilot = run_pilot(teacher, view, spec, progress, spec.batch_size)
    every = encoding_without_pilot(samples.num_classes, request_of(spec))
    if every is not None:
        a_row = measured(every, pilot)
    else:
        a_row = plan_encoding(pilot.logits, pilot.labels, request_of(spec)).chosen.bytes_per_row
    check_room(out, a_row * rows)
    minutes = rows / pilot.rows_per_second / 60
    size = f"{a_row * rows / 1e6:,.2f} MB"
    return f"{pilot.rows_per_second:,.0f} images/s; a cache of about {size} and {minutes:,.1f} minutes"


def _transform(pipeline: Pipeline, samples: Samples, transform: Transform) -> str:
    transform_for_evaluation(pipeline.eval_transform, transform)
    return " x ".join(map(str, View(samples, transform, pipeline.cache.seed).shape()))


def _student(pipeline: Pipeline, samples: Samples, seen: Transform, device: torch.device | str) -> str:
    """A first piece of a step, there and back, on the device."""
    spec = pipeline.section("student")
    check_trackers(spec.train.trackers)
    view = View(samples, seen if spec.transform is None else spec.transform, pipeline.cache.seed)
    trained = spec.weights is not None or spec.names_weights
    model = build_model(spec, samples.num_classes, view.shape(), trained=trained)
    try_network(model, view, "cpu", "student")
    seconds = _first_piece(model.to(device), view, spec.train, device)
    return f"{sum(p.numel() for p in model.parameters()):,} parameters, {seconds:.2f} s for the first piece of a step"


def _first_piece(model: nn.Module, view: View, spec: TrainSpec, device: torch.device | str) -> float:
    count = min(-(-spec.batch_size // spec.gradient_accumulation_steps), len(view))
    images = view.__getitems__(range(count)).images.to(device)
    began = time.perf_counter()
    logits = check_logits(model.train()(images), count, view.samples.num_classes, "student")
    logits.float().logsumexp(dim=1).sum().backward()  # type: ignore[no-untyped-call]
    if images.is_cuda:
        torch.cuda.synchronize(images.device)
    return time.perf_counter() - began

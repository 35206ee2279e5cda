"""Stage one: the teacher runs once over every view, and a sealed cache is left."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from torch import nn

from kdcache.cache import operations
from kdcache.cache.basis import TailBasis
from kdcache.cache.codec import Rows, encode
from kdcache.cache.planner import encoding_without_pilot, plan_encoding
from kdcache.cache.reader import Cache, open_cache
from kdcache.cache.schema import Plan
from kdcache.cache.verify import record_of
from kdcache.cache.writer import CacheWriter, check_place
from kdcache.datasets import load_split
from kdcache.errors import InterruptedRun, KdcacheError
from kdcache.evaluate import try_network
from kdcache.fingerprints import Inputs, inputs_of
from kdcache.models import build_model, preset_transform
from kdcache.pilot import Identity, Planned, choose, plan_cache, request_of, run_pilot, teacher_logits, views_of
from kdcache.pipeline import CacheSpec, Pipeline, Transform
from kdcache.progress import Progress, Silent, Task
from kdcache.samples import Samples, digest_of
from kdcache.views import View, batches, cut_range

_CHANCE = 1.5
"""A teacher below so many times the accuracy of guessing deserves a word."""


class _Cut(NamedTuple):
    """A batch: which shard it belongs to, and which samples it holds."""

    shard: int
    ids: range


class LoadedTeacher(NamedTuple):
    """What the `dataset` and `teacher` sections of a pipeline name."""

    model: nn.Module
    identity: Identity
    samples: Samples
    transform: Transform


def load_teacher(pipeline: Pipeline) -> LoadedTeacher:
    """The trained teacher of a pipeline, and the training images that it is to see.

    Raises:
        KdcacheError: if one is not there, or they do not fit.
    """
    spec = pipeline.section("teacher")
    samples = load_split(pipeline.dataset, "train")
    transform = pipeline.transform
    if transform is None:
        transform = preset_transform(spec) or samples.transform
    model = build_model(spec, samples.num_classes, View(samples, transform).shape(), trained=True)
    path, _, _ = spec.model.partition(":")
    code = f"sha256:{record_of(Path(path)).sha256}" if path.endswith(".py") else None
    # Of a teacher from a file the name is kept, not where the file lay on this machine.
    return LoadedTeacher(model, Identity(spec.model.rpartition("/")[2], spec.args, code), samples, transform)


def plan_for_teacher(pipeline: Pipeline, device: torch.device | str, progress: Progress) -> Planned:
    """What a cache of a pipeline's teacher would keep, from a pilot; nothing is written.

    Raises:
        KdcacheError: if anything does not fit.
    """
    loaded, spec = load_teacher(pipeline), pipeline.cache
    rows = len(loaded.samples) * views_of(spec, loaded.transform).count
    every = encoding_without_pilot(loaded.samples.num_classes, request_of(spec))
    if every is not None:
        return Planned(every, None, rows)
    model = loaded.model.to(device).eval()
    pilot = run_pilot(model, loaded.samples, loaded.transform, spec, device, progress)
    choice = plan_encoding(*pilot, request_of(spec))
    return Planned(choice.chosen.encoding, choice, rows)


def dump_teacher(
    model: nn.Module,
    samples: Samples,
    out: str | Path,
    *,
    name: str | Identity = "teacher",
    transform: Transform | None = None,
    spec: CacheSpec | None = None,
    device: torch.device | str = "cpu",
    progress: Progress | None = None,
) -> Cache:
    """Run a teacher over all views of a data set and store what a student needs of its output.

    Killed at any moment, the same call goes on at the first shard that is not whole, and the sealed cache has the same
    root digest as one that was never interrupted: batches are cut inside shards, always alike.

    Args:
        model: the teacher; put into evaluation mode.
        samples: the data set, in its own order.
        out: folder of the cache, by custom `NAME.kdcache`.
        name: what the manifest calls the teacher, and what else tells it from another of the same weights.
        transform: what the teacher sees of an image; None for the data set's own.
        spec: what to keep; by default every class up to 64, and else the cheapest within a fidelity of 0.02.
        device: where the teacher runs and rows are encoded.
        progress: who is told how it goes.

    Raises:
        UsageError: if the settings do not fit, or `out` is something else.
        MismatchError: if the teacher does not return [B, C], or `out` was begun with other settings.
        CorruptError: if it returns NaN or infinities; names the sample.
            After these errors what this call began is deleted; after any other exception, such as one of the
            teacher's own, finished shards stay.
        InterruptedRun: on Ctrl-C; what is written stays.
    """
    out, spec = Path(out), spec or CacheSpec()
    listener: Progress = progress or Silent()
    transform = samples.transform if transform is None else transform
    check_place(out)
    views = views_of(spec, transform)
    # What cannot be asked for is refused before all images are read.
    encoding_without_pilot(samples.num_classes, request_of(spec))
    model = model.to(device).eval()
    try_network(model, View(samples, transform, spec.seed), device, "teacher")
    keys = samples.keys(listener)
    pilot = partial(run_pilot, model, samples, transform, spec, device, listener)
    chosen = choose(out, spec, samples.num_classes, pilot)
    teacher = name if isinstance(name, Identity) else Identity(name, {}, None)
    plan = plan_cache(teacher, model, samples, digest_of(keys, samples.labels), spec, views, chosen)
    basis = chosen.basis.to(device) if chosen.basis is not None else None
    writer = CacheWriter(out, plan, samples.labels, keys, chosen.basis)
    try:
        todo = {view: shards for view in range(plan.views.count) if (shards := writer.pending(view))}
        if not writer.began:
            count = sum(map(len, todo.values()))
            listener.say(f"going on with {out}: {count} of {plan.views.count * plan.shards} shards are to be done")
        rows_to_do = sum(len(plan.shard_ids(shard)) for shards in todo.values() for shard in shards)
        try:
            with listener.task("teacher", rows_to_do, "rows") as task:
                for view, shards in todo.items():
                    for shard, rows, inputs in _run(
                        model, View(samples, transform, spec.seed, view), plan, basis, shards, spec, device, task
                    ):
                        writer.write(view, shard, rows, inputs)
        except KdcacheError:
            writer.discard()
            raise
        writer.seal(operations.summarise(out, plan))
    except KeyboardInterrupt:
        raise InterruptedRun(
            f"interrupted; {out} keeps its finished shards", "run the same command again to go on"
        ) from None
    cache = open_cache(out)
    accuracy = cache.manifest.summary.teacher_accuracy
    if accuracy is not None and accuracy < _CHANCE / samples.num_classes:
        listener.say(
            f"note: the teacher is right on {accuracy:.1%} of these samples, which is hardly better than chance"
        )
    return cache


def _run(
    model: nn.Module,
    view: View,
    plan: Plan,
    basis: TailBasis | None,
    shards: list[int],
    spec: CacheSpec,
    device: torch.device | str,
    task: Task,
) -> Iterator[tuple[int, Rows, Inputs]]:
    """The rows of each of `shards`, in order, on the CPU, and the fingerprints of some of their images."""
    cuts = [_Cut(shard, ids) for shard in shards for ids in cut_range(plan.shard_ids(shard), plan.batch_size)]
    loaded = batches(view, [list(cut.ids) for cut in cuts], spec.workers, device)
    parts: list[Rows] = []
    prints: list[Inputs] = []
    for cut, (images, labels, ids) in zip(cuts, loaded, strict=True):
        prints.append(inputs_of(images[ids % plan.shape.fingerprint_stride == 0]))
        logits = teacher_logits(model, images, ids, plan.encoding.num_classes, device)
        parts.append(encode(logits, labels.to(device), plan.encoding, basis).to("cpu"))
        task.advance(len(cut.ids))
        if cut.ids.stop == plan.shard_ids(cut.shard).stop:
            yield cut.shard, Rows.concatenate(parts), Inputs.concatenate(prints)
            parts, prints = [], []

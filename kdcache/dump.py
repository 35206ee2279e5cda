"""Stage one: the teacher runs once over every view, and a sealed cache is left."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from pydantic import ValidationError
from torch import Tensor, nn

from kdcache.cache import layout, operations
from kdcache.cache.codec import Rows, encode, not_finite
from kdcache.cache.reader import Cache, open_cache
from kdcache.cache.schema import DatasetRecord, Encoding, Plan, TeacherRecord, ViewsRecord
from kdcache.cache.writer import CacheWriter, check_place
from kdcache.datasets import load_split
from kdcache.errors import CorruptError, InterruptedRun, KdcacheError, UsageError
from kdcache.evaluate import check_logits, try_network
from kdcache.models import build_model, preset_transform, weights_digest
from kdcache.pipeline import CacheSpec, Pipeline, Transform
from kdcache.progress import Progress, Silent, Task
from kdcache.provenance import versions
from kdcache.samples import Samples, digest_of
from kdcache.views import View, batches, cut_range, is_random


class _Cut(NamedTuple):
    """A batch: which shard it belongs to, and which samples it holds."""

    shard: int
    ids: range


class LoadedTeacher(NamedTuple):
    """What the `dataset` and `teacher` sections of a pipeline name."""

    model: nn.Module
    name: str
    samples: Samples
    transform: Transform


def load_teacher(pipeline: Pipeline) -> LoadedTeacher:
    """The trained teacher of a pipeline, and the training images that it is to see.

    Raises:
        KdcacheError: if one is not there, or they do not fit.
    """
    spec = pipeline.section("teacher")
    samples = load_split(pipeline.dataset, "train")
    model = build_model(spec, samples.num_classes, samples.images.shape(), trained=True)
    transform = pipeline.transform
    if transform is None:
        transform = preset_transform(spec) or samples.transform
    # Of a teacher from a file the name is kept, not where the file lay on this machine.
    return LoadedTeacher(model, spec.model.rpartition("/")[2], samples, transform)


def plan_cache(
    model: nn.Module, name: str, samples: Samples, transform: Transform, spec: CacheSpec, digest: str
) -> Plan:
    """What a cache will be, before the teacher has run.

    Raises:
        UsageError: if the settings do not fit the data set or one another.
    """
    classes = samples.num_classes
    if spec.top_k != "all" and spec.top_k > classes:
        raise UsageError(
            f"top_k {spec.top_k} is larger than the number of classes, {classes}", "set cache.top_k to less, or to all"
        )
    if spec.views > 1 and not is_random(transform):
        raise UsageError(
            f"{spec.views} views of a transform that draws nothing at random would all be the same",
            "set cache.views to 1, or add a random transform such as - RandomCrop: {size: 32, padding: 4}",
        )
    top_k = classes if spec.top_k == "all" else spec.top_k
    try:
        return Plan(
            teacher=TeacherRecord(
                name=name,
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
            views=ViewsRecord(count=spec.views, seed=spec.seed, transform=transform),
            encoding=Encoding(
                num_classes=classes, top_k=top_k, tail="none" if top_k == classes else spec.tail, dtype=spec.dtype
            ),
            shape=layout.choose_shape(len(samples), top_k * np.dtype(spec.dtype).itemsize, spec.shard_rows),
            batch_size=spec.batch_size,
            versions=versions(),
            licence=spec.licence,
            notes=spec.notes,
        )
    except ValidationError as error:
        first = error.errors()[0]
        raise UsageError(
            f"no cache can be made with this {'.'.join(map(str, first['loc']))}: {first['msg']}",
            "change that setting of the cache, the transform or the data set",
        ) from None


def dump_teacher(
    model: nn.Module,
    samples: Samples,
    out: str | Path,
    *,
    name: str = "teacher",
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
        name: what the manifest calls the teacher.
        transform: what the teacher sees of an image; None for the data set's own.
        spec: what to keep; the defaults keep every class in float16.
        device: where the teacher runs and rows are encoded.
        progress: who is told how it goes.

    Raises:
        UsageError: if the settings do not fit, or `out` is something else.
        MismatchError: if the teacher does not return [B, C], or `out` was begun with other settings.
        CorruptError: if it returns NaN or infinities; names the sample.
            Whatever the teacher or the data set did wrong, what this call began is deleted.
        InterruptedRun: on Ctrl-C; what is written stays.
    """
    out, spec = Path(out), spec or CacheSpec()
    listener: Progress = progress or Silent()
    transform = samples.transform if transform is None else transform
    check_place(out)
    model = model.to(device).eval()
    try_network(model, View(samples, transform, spec.seed), device, "teacher")
    keys = samples.keys(listener)
    plan = plan_cache(model, name, samples, transform, spec, digest_of(keys, samples.labels))
    writer = CacheWriter(out, plan, samples.labels, keys)
    try:
        todo = {view: shards for view in range(plan.views.count) if (shards := writer.pending(view))}
        if not writer.began:
            count = sum(map(len, todo.values()))
            listener.say(f"going on with {out}: {count} of {plan.views.count * plan.shards} shards are to be done")
        rows_to_do = sum(len(plan.shard_ids(shard)) for shards in todo.values() for shard in shards)
        try:
            with listener.task("teacher", rows_to_do, "rows") as task:
                for view, shards in todo.items():
                    for shard, rows in _run(
                        model, View(samples, transform, spec.seed, view), plan, shards, spec, device, task
                    ):
                        writer.write(view, shard, rows)
        except KdcacheError:
            writer.discard()
            raise
        writer.seal(operations.summarise(out, plan))
    except KeyboardInterrupt:
        raise InterruptedRun(
            f"interrupted; {out} keeps its finished shards", "run the same command again to go on"
        ) from None
    return open_cache(out)


def _run(
    model: nn.Module,
    view: View,
    plan: Plan,
    shards: list[int],
    spec: CacheSpec,
    device: torch.device | str,
    task: Task,
) -> Iterator[tuple[int, Rows]]:
    """The rows of each of `shards`, in order, on the CPU."""
    cuts = [_Cut(shard, ids) for shard in shards for ids in cut_range(plan.shard_ids(shard), plan.batch_size)]
    loaded = batches(view, [list(cut.ids) for cut in cuts], spec.workers, device)
    parts: list[Rows] = []
    for cut, (images, labels, ids) in zip(cuts, loaded, strict=True):
        parts.append(_teach(model, images, labels, ids, plan, device).to("cpu"))
        task.advance(len(cut.ids))
        if cut.ids.stop == plan.shard_ids(cut.shard).stop:
            yield cut.shard, Rows.concatenate(parts)
            parts = []


@torch.no_grad()
def _teach(
    model: nn.Module, images: Tensor, labels: Tensor, ids: Tensor, plan: Plan, device: torch.device | str
) -> Rows:
    logits = check_logits(model(images.to(device, non_blocking=True)), len(ids), plan.encoding.num_classes, "teacher")
    if len(bad := not_finite(logits)):
        raise CorruptError(
            f"the teacher returned NaN or infinite logits for sample {int(ids[bad[0]])} "
            f"({len(bad)} of the {len(ids)} images of its batch)",
            "check the teacher's weights and the transform",
        )
    return encode(logits, labels.to(device), plan.encoding)

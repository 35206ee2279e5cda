"""Stage one: the teacher runs once over every view, and a sealed cache is left."""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from torch import nn

from kdcache.cache import summary
from kdcache.cache.adopt import adopt_shards
from kdcache.cache.format import zarr_store
from kdcache.cache.format.fingerprints import digest_of
from kdcache.cache.format.read_records import read_plan
from kdcache.cache.format.schema import PLAN
from kdcache.cache.inspect.card import write_card
from kdcache.cache.lock import release
from kdcache.cache.planner import encoding_without_pilot, plan_encoding
from kdcache.cache.reader import Cache, open_cache
from kdcache.cache.writer import CacheWriter, check_place
from kdcache.config.schema import CacheSpec, Pipeline, Transform
from kdcache.data.samples import Samples
from kdcache.data.views import View
from kdcache.dump.extend import check_extends
from kdcache.dump.plan import Pilot, Planned, choose, measured, plan_cache, request_of, run_pilot, views_of
from kdcache.dump.teacher_pass import PhaseTimer, Shard, run_pass
from kdcache.errors import IncompleteError, InterruptedRun, KdcacheError, MismatchError
from kdcache.models import weights_digest
from kdcache.models.inference import InferenceModel, try_teacher
from kdcache.models.teacher import TeacherIdentity, load_teacher
from kdcache.runtime.distributed import Ranks
from kdcache.runtime.progress import Progress, Silent
from kdcache.runtime.resources import free_disk

_CHANCE = 1.5
"""A teacher below so many times the accuracy of guessing deserves a word."""

_TIMED = 8
"""Batches of a pilot that is run for its time alone."""

_LATE = 120
"""Seconds after which another machine's files must be seen on a shared file system."""

_SAME = "start every rank with the same command, the same files and the same versions"


def plan_for_teacher(
    pipeline: Pipeline, device: torch.device | str, progress: Progress, out: Path | None = None
) -> Planned:
    """What a cache of a pipeline's teacher would keep, from a pilot; nothing is written.

    Args:
        pipeline: its `dataset`, `teacher` and `cache` sections.
        device: where the teacher runs.
        progress: who is told how it goes.
        out: where the cache is to be: the pilot is then run in any case, for its time, and the disk looked at.

    Raises:
        IncompleteError: if the disk cannot hold it.
        KdcacheError: if anything does not fit.
    """
    loaded, spec = load_teacher(pipeline, progress), pipeline.cache
    if out is not None:
        check_place(out)
    rows = len(loaded.samples) * views_of(spec, loaded.transform).count
    every = encoding_without_pilot(loaded.samples.num_classes, request_of(spec))
    if every is not None and out is None:
        return Planned(every, None, rows)
    view = View(loaded.samples, loaded.transform, spec.seed)
    try_teacher(loaded.model, view, spec, device)
    teacher = InferenceModel(loaded.model, loaded.samples.num_classes, spec, device)
    if every is not None:
        pilot = run_pilot(teacher, view, spec, progress, _TIMED * spec.batch_size)
        planned = Planned(every, None, rows, measured(every, pilot), pilot.rows_per_second)
    else:
        pilot = run_pilot(teacher, view, spec, progress)
        choice = plan_encoding(pilot.logits, pilot.labels, request_of(spec))
        chosen = choice.chosen
        planned = Planned(chosen.encoding, choice, rows, chosen.bytes_per_row, pilot.rows_per_second)
    if out is not None:
        check_room(out, planned.bytes)
    return planned


def check_room(out: Path, needed: float) -> None:
    """That a disk can hold a cache of about so many bytes.

    Raises:
        IncompleteError: if it cannot.
    """
    free = free_disk(out)
    if needed > free:
        raise IncompleteError(
            f"{out} would take about {needed / 1e9:,.3f} GB; {free / 1e9:,.3f} GB are free there",
            "make room, give another disk with -o, or keep less (cache.fidelity, cache.views)",
        )


def dump_teacher(
    model: nn.Module,
    samples: Samples,
    out: str | Path,
    *,
    name: str | TeacherIdentity = "teacher",
    transform: Transform | None = None,
    spec: CacheSpec | None = None,
    extends: Cache | None = None,
    ranks: Ranks | None = None,
    device: torch.device | str = "cpu",
    progress: Progress | None = None,
) -> Cache:
    """Run a teacher over all views of a data set and store what a student needs of its output.

    Killed at any moment, the same call goes on at the first shard that is not whole, and the sealed cache has the same
    root digest as one that was never interrupted, whatever the number of ranks: batches are cut inside shards, always
    alike.

    Args:
        model: the teacher; put into evaluation mode.
        samples: the data set, in its own order.
        out: folder of the cache, by custom `NAME.kdcache`.
        name: what the manifest calls the teacher, and what else tells it from another of the same weights.
        transform: what the teacher sees of an image; None for the data set's own.
        spec: what to keep; by default every class up to 64, and else the cheapest within a fidelity of 0.02.
        extends: a sealed cache of fewer views or samples, whose shards are taken over.
        ranks: this process among several that call this with the same arguments; None for one alone.
        device: where the teacher runs and rows are encoded.
        progress: who is told how it goes.

    Raises:
        UsageError: if the settings do not fit, or `out` is something else.
        MismatchError: if the teacher does not return [B, C], or `out` was begun, or `extends` made, with other
            settings.
        CorruptError: if it returns NaN or infinities; names the sample.
            After these errors what this call began, alone, is deleted; after any other exception, such as one of the
            teacher's own, finished shards stay.
        IncompleteError: if the disk cannot hold the cache, or another rank has ended; what is written stays.
        InterruptedRun: on Ctrl-C; what is written stays.
    """
    out, spec, ranks = Path(out), spec or CacheSpec(), ranks or Ranks()
    listener: Progress = progress if progress and ranks.is_first else Silent()
    teacher = name if isinstance(name, TeacherIdentity) else TeacherIdentity(name, {}, None)
    transform = samples.transform if transform is None else transform
    view_of = partial(View, samples, transform, spec.seed)
    clock = PhaseTimer()
    try:
        with clock.on("before the pass"):
            settle = partial(_settle, model, samples, out, teacher, transform, spec, extends, device, listener)
            writer, todo = _begin(out, settle, model, ranks)
            running = InferenceModel(model, samples.num_classes, spec, device)
            basis = zarr_store.read_basis(out, writer.plan)
            basis = basis.to(device) if basis is not None else None
        rows = sum(len(writer.plan.shard_ids(shard.number)) for shard in todo)
        try:
            with listener.task("teacher" + ranks.named(), rows, "rows") as task:
                run_pass(running, view_of, writer.plan, basis, todo, spec.num_workers, writer.write, task, clock)
        except IncompleteError:
            raise
        except KdcacheError:
            if ranks.count == 1:
                writer.discard()
            raise
        ranks.wait()
        if ranks.is_first:
            with clock.on("sealing"):
                _wait_for_files(writer, ranks)
                writer.seal(summary.summarize(out, writer.plan))
        ranks.wait()
        with clock.on("sealing"):
            cache = open_cache(out)
            if ranks.is_first:
                write_card(cache)
    except KeyboardInterrupt:
        if not out.exists():
            raise
        raise InterruptedRun(
            f"interrupted; {out} keeps its finished shards", "run the same command again to go on"
        ) from None
    finally:
        release(out)
    listener.say(f"time: {clock}")
    accuracy = cache.manifest.summary.teacher_accuracy
    if accuracy is not None and accuracy < _CHANCE / samples.num_classes:
        listener.say(
            f"note: the teacher is right on {accuracy:.1%} of these samples, which is hardly better than chance"
        )
    return cache


def _begin(
    out: Path, settle: Callable[[], CacheWriter], model: nn.Module, ranks: Ranks
) -> tuple[CacheWriter, list[Shard]]:
    """The first rank settles everything; the others read it from the disk, and each takes its share of the shards."""
    if ranks.is_first:
        try:
            writer = settle()
        except KdcacheError as error:
            ranks.tell(error)
            raise
        return writer, ranks.share(ranks.tell(_pending(writer)))
    pending: list[Shard] = ranks.tell(None)
    writer = CacheWriter.join(out)
    if (digest := weights_digest(model)) != (of_first := writer.plan.teacher.weights_digest):
        raise MismatchError(f"this rank's teacher has the weights {digest}, the first one's {of_first}", _SAME)
    return writer, ranks.share(pending)


def _settle(
    model: nn.Module,
    samples: Samples,
    out: Path,
    teacher: TeacherIdentity,
    transform: Transform,
    spec: CacheSpec,
    extends: Cache | None,
    device: torch.device | str,
    progress: Progress,
) -> CacheWriter:
    """Everything before the pass: what cannot be is refused, the plan made, the cache begun or gone on with."""
    check_place(out)
    views = views_of(spec, transform)
    # What cannot be asked for is refused before all images are read.
    encoding_without_pilot(samples.num_classes, request_of(spec))
    view = View(samples, transform, spec.seed)
    level = try_teacher(model, view, spec, device)
    keys = samples.keys(progress)
    path, begun = out, read_plan(out / PLAN) if (out / PLAN).exists() else None
    if begun is None and extends is not None:
        path, begun = extends.path, extends.manifest.plan

    def pilot() -> Pilot:
        return run_pilot(InferenceModel(model, samples.num_classes, spec, device), view, spec, progress)

    chosen = choose(path, begun, spec, samples.num_classes, pilot)
    shape = extends.manifest.plan.shape if extends else None
    plan = plan_cache(teacher, model, samples, digest_of(keys, samples.labels), spec, views, chosen, shape, level)
    if extends is not None:
        check_extends(extends, plan, keys, samples.labels)
    if not (out / PLAN).exists():
        check_room(out, chosen.bytes_per_row * plan.views.count * plan.dataset.samples)
    writer = CacheWriter.begin(out, plan, samples.labels, keys, chosen.basis)
    if extends is not None and (taken := adopt_shards(writer, extends)):
        progress.say(f"{taken} shards are those of {extends.path}")
    if not writer.began:
        progress.say(
            f"going on with {out}: {len(_pending(writer))} of {views.count * plan.shards} shards are to be done"
        )
    return writer


def _pending(writer: CacheWriter) -> list[Shard]:
    return [Shard(view, number) for view in range(writer.plan.views.count) for number in writer.pending(view)]


def _wait_for_files(writer: CacheWriter, ranks: Ranks) -> None:
    """Until what the other ranks have written is seen here: a network's file system may take its time."""
    late = time.monotonic() + (_LATE if ranks.count > 1 else 0)
    while _pending(writer) and time.monotonic() < late:
        time.sleep(1)

"""Stage one: run the teacher once over every view, and leave a sealed cache."""

from __future__ import annotations

import secrets
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from kdcache.cache import summary
from kdcache.cache.format import stored_bases, zarr_store
from kdcache.cache.inspect.card import CARD, PICTURE, write_card
from kdcache.cache.lock import release
from kdcache.cache.reader import Cache, open_sealed
from kdcache.cache.summary import ShardStatistics
from kdcache.cache.writer import CacheWriter
from kdcache.config.cache import CacheSpec
from kdcache.config.section import section_with
from kdcache.config.transform import Transform, step_names
from kdcache.data.images import ItemImages
from kdcache.data.loader import workers_for
from kdcache.data.repeatable import check_repeatable
from kdcache.data.samples import Samples, as_samples
from kdcache.dump.job import DumpJob, Prepared, pending_shards, prepare
from kdcache.dump.noise import noise_of_cache
from kdcache.dump.probes import Probes, check_probes
from kdcache.dump.shared_pass import (
    SAME,
    OwnShare,
    check_same_weights,
    interrupted,
    keeping_finished_shards,
    wait_for_files,
)
from kdcache.dump.teacher_pass import MadeShard, PhaseTimer, Shard, run_pass
from kdcache.errors import KdcacheError, MismatchError
from kdcache.models.checks import samples_for
from kdcache.models.teacher import TeacherIdentity, as_network
from kdcache.runtime.devices import check_device
from kdcache.runtime.distributed import Ranks
from kdcache.runtime.paths import expand
from kdcache.runtime.progress import Progress, Silent
from kdcache.runtime.terminal import reporter
from kdcache.runtime.user_code import trust

_CHANCE = 1.5
"""A teacher whose accuracy is below this multiple of guessing gets a note."""


class _FirstRank(NamedTuple):
    """What the first rank tells the others.

    Attributes:
        pending: shards that the ranks divide among themselves.
        name: under which they claim them.
        probes: of its teacher; None if the cache is complete.
    """

    pending: list[Shard]
    name: str
    probes: Probes | None


def dump_teacher(
    model: nn.Module | Callable[[Tensor], Any],
    samples: Samples | Dataset[Any],
    out: str | Path,
    *,
    name: str | TeacherIdentity = "teacher",
    transform: Transform | None = None,
    spec: CacheSpec | Mapping[str, Any] | None = None,
    extends: Cache | None = None,
    ranks: Ranks | None = None,
    decode_images: bool = False,
    device: torch.device | str = "cpu",
    progress: Progress | bool | None = None,
    **options: Any,
) -> Cache:
    """Run a teacher over all views of a data set, and store what a student needs of its output.

    If it is killed at any moment, the same call resumes at the first unfinished shard. The sealed cache has the same
    root digest as one that was never interrupted, whatever the number of ranks: batches are cut inside shards, always
    in the same way. If the cache is complete already, it is checked and returned.

    Args:
        model: the teacher; set to evaluation mode. A plain function from images [B, channels, H, W] to logits [B, C],
            which may return a NumPy array, is a teacher without weights.
        samples: the data set, in its own order: from `load_split` or `wrap`, or any map-style data set of (image,
            label) pairs. The classes of the latter are its attribute `classes`, or else the outputs of the model.
        out: folder of the cache, by convention `NAME.kdcache`.
        name: the teacher's name in the manifest, or its full identity.
        transform: of the teacher's images; None for the data set's own.
        spec: what to keep, as a mapping with the keys of the `cache` section of a pipeline file; by default every class
            up to 64, otherwise the cheapest encoding within a fidelity of 0.02.
        extends: a sealed cache of fewer views or samples, whose shards are taken over.
        ranks: this process among several that make this call with the same arguments; None for a single process.
        decode_images: decode every image file before the pass, and name all that cannot be decoded. By default only
            the headers are checked.
        device: where the teacher runs and rows are encoded.
        progress: True to show progress on stderr, or a progress reporter; silent if None.
        options: the keys of `spec` one by one, such as `views=2, fidelity=0.05`, or
            `outputs={"features": {"source": "layer4", "pool": "mean"}}`.

    Returns:
        The sealed cache.

    Raises:
        UsageError: if the settings are invalid, or `out` is something else or a cache with other settings.
        MismatchError: if the teacher does not return [B, C] or does not give an output, or if teacher or settings
            differ from those of an unsealed cache at `out`, from those of `extends`, or from those of another rank.
        CorruptError: if an image file cannot be read, or a logit is NaN or infinite; names the file or the sample.
        IncompleteError: if the cache does not fit on the disk, or another rank has ended.
        InterruptedRun: on Ctrl-C.
            After any of these errors finished shards are kept, and the same call resumes.
    """
    ranks, cache_spec = ranks or Ranks(), section_with(CacheSpec, spec, options, "the options of the cache")
    trust(step_names(transform))
    model = as_network(model)
    check_device(device)
    samples = samples_for(model, samples, transform, device) if cache_spec.logits else as_samples(samples)
    job = DumpJob(
        model,
        name if isinstance(name, TeacherIdentity) else TeacherIdentity(name, {}, None),
        samples,
        samples.transform if transform is None else transform,
        cache_spec,
        expand(out),
        extends,
        decode_images,
        device,
        reporter(progress) if ranks.is_first else Silent(),
    )
    timer = PhaseTimer()
    try:
        cache = _dump(job, ranks, timer)
    except KeyboardInterrupt as interrupt:
        raise interrupted(interrupt, job.out) from None
    finally:
        release(job.out)
    job.progress.say(f"time: {timer}")
    accuracy = cache.manifest.summary.teacher_accuracy
    if accuracy is not None and accuracy < _CHANCE / samples.num_classes:
        job.progress.say(f"note: the teacher's accuracy on these samples is {accuracy:.1%}, hardly better than chance")
    return cache


def _dump(job: DumpJob, ranks: Ranks, timer: PhaseTimer) -> Cache:
    """Prepare, run this rank's share of the pass, and seal the cache."""
    with timer.phase("before the pass"):
        prepared, first = _prepare(job, ranks)
    if prepared.writer is None:
        cache = prepared.complete or open_sealed(job.out)
        if ranks.is_first and not all((job.out / name).exists() for name in (CARD, PICTURE)):
            # The run that sealed it was killed before it had written the card.
            write_card(cache, summary.histograms(summary.collect_statistics(job.out, cache.manifest.plan)))
        return cache
    writer, job = prepared.writer, replace(job, noise=prepared.noise)
    statistics = _run_pass(job, writer, first, ranks, timer)
    with timer.phase("waiting for other ranks") if ranks.count > 1 else nullcontext():
        of_all_ranks = ranks.gather(statistics)
    if ranks.is_first:
        with timer.phase("sealing"):
            wait_for_files(writer, ranks)
            if isinstance(job.samples.images, ItemImages):
                check_repeatable(job.samples, zarr_store.read_samples(job.out, writer.plan)[1])
            known = {shard: of_shard for of_rank in of_all_ranks for shard, of_shard in of_rank.items()}
            collected = summary.collect_statistics(job.out, writer.plan, known)
            writer.seal(summary.summary_of(collected, writer.plan))
    ranks.wait()
    with timer.phase("sealing"):
        cache = open_sealed(job.out)
        if ranks.is_first:
            write_card(cache, summary.histograms(collected))
    return cache


def _prepare(job: DumpJob, ranks: Ranks) -> tuple[Prepared, _FirstRank]:
    """Prepare the job on the first rank, and return the shards that are to be made."""
    if ranks.is_first:
        try:
            prepared = prepare(job)
        except KdcacheError as error:
            ranks.tell(error)
            raise
        # A new name each time: what was claimed by a rank that has died is claimed again.
        pending = pending_shards(prepared.writer) if prepared.writer else []
        return prepared, ranks.tell(_FirstRank(pending, secrets.token_hex(8), prepared.probes))
    first = ranks.tell(_FirstRank([], "", None))
    if first.probes is None:
        return Prepared(None, None, None), first
    writer = CacheWriter.join(job.out)
    check_same_weights(job.model, writer)
    noise = None
    if writer.plan.noise is not None:  # else the keys need not be read
        keys = zarr_store.read_samples(job.out, writer.plan)[1]
        noise = noise_of_cache(job.out, writer.plan, job.spec, job.samples, keys)
    run_probes = partial(replace(job, noise=noise).run_probes, first.probes.keys)
    try:
        check_probes(first.probes, run_probes(), run_probes, job.spec, "the first rank has")
    except MismatchError as error:
        raise MismatchError(error.what, SAME) from None
    return Prepared(writer, None, first.probes, noise), first


def _run_pass(
    job: DumpJob, writer: CacheWriter, first: _FirstRank, ranks: Ranks, timer: PhaseTimer
) -> dict[tuple[int, int], ShardStatistics]:
    """Make some of the shards, and return their statistics."""
    plan, images = writer.plan, job.view()
    model = job.inference_model()
    bases = {name: basis.to(job.device) for name, basis in stored_bases.read_bases(job.out, plan).items()}
    labels = torch.from_numpy(job.samples.labels).long()
    statistics: dict[tuple[int, int], ShardStatistics] = {}
    write = partial(_write, writer, labels, statistics)
    share = [len(plan.shard_ids(shard.shard)) for shard in ranks.share(first.pending)]
    num_workers = workers_for(images, job.spec.num_workers, sum(-(-rows // plan.batch_size) for rows in share))
    shards = ranks.claim(first.pending, first.name)
    with (
        keeping_finished_shards(writer, ranks),
        job.progress.task("teacher" + ranks.named(), sum(share), "rows") as task,
    ):
        own = OwnShare(task, sum(share))
        run_pass(model, images, plan, bases, shards, num_workers, write, own, timer)
    return statistics


def _write(
    writer: CacheWriter,
    labels: torch.Tensor,
    statistics: dict[tuple[int, int], ShardStatistics],
    view: int,
    shard: int,
    made: MadeShard,
) -> None:
    """Write a shard, and add the statistics of its class logits, if it has them, to `statistics`."""
    writer.write(view, shard, made.rows, made.inputs, outputs=made.outputs)
    ids = writer.plan.shard_ids(shard)
    of_shard = labels[ids.start : ids.stop]
    if made.rows is not None:
        statistics[view, shard] = summary.shard_statistics(made.rows, of_shard, writer.plan.encoding)

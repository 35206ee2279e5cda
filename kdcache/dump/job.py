"""A dump, and everything that happens before its teacher pass: checks, the plan, and the cache created or resumed."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from kdcache.cache.adopt import adopt_shards
from kdcache.cache.changed_images import differs_in_images_alone
from kdcache.cache.format.fingerprints import digest_of
from kdcache.cache.format.read_records import read_manifest, read_plan
from kdcache.cache.format.schema import MANIFEST, PLAN, PROBES, Plan
from kdcache.cache.planner import encoding_without_pilot, pilot_ids
from kdcache.cache.preconditions import check_place, check_sealed_plan, remove_leftovers
from kdcache.cache.reader import Cache, open_cache
from kdcache.cache.writer import CacheWriter
from kdcache.config.cache import CacheSpec
from kdcache.config.transform import Transform
from kdcache.data.check_images import check_images
from kdcache.data.mixing import split_mixing
from kdcache.data.repeatable import check_repeatable
from kdcache.data.samples import Samples
from kdcache.data.views import View
from kdcache.dump.estimate import check_room
from kdcache.dump.extend import check_extends
from kdcache.dump.noise import plan_noise
from kdcache.dump.outputs import PlannedOutputs, check_same_outputs
from kdcache.dump.plan import Chosen, Pilot, choose, pilot_rows, plan_cache, request_of, run_pilot, views_of
from kdcache.dump.probes import Probes, check_first_batch, check_probes, probe_ids, read_probes, run_probes
from kdcache.dump.teacher_pass import Shard
from kdcache.errors import CorruptError, KdcacheError, UsageError, counted
from kdcache.models import weights_digest
from kdcache.models.inference import InferenceModel, try_teacher
from kdcache.models.noise import Noise
from kdcache.models.teacher import TeacherIdentity
from kdcache.runtime.atomic_write import write_file
from kdcache.runtime.progress import Progress

_OTHER_NAME = "write to another folder, or delete it first"

_NO_WEIGHTS = (
    "the teacher, or a member of it, has no weights that kdcache can read: it is recognized by its logits of a few "
    "samples alone"
)


@dataclass(frozen=True)
class DumpJob:
    """A teacher, a data set, and the cache that is to be made of them.

    Attributes:
        model: the teacher.
        identity: what distinguishes it from other teachers with the same weights.
        samples: the data set.
        transform: of the teacher's images.
        spec: what the cache keeps.
        out: folder of the cache.
        extends: a sealed cache whose shards are taken over; None for a new one.
        decode_images: whether every image file is decoded before the pass.
        device: where the teacher runs and rows are encoded.
        progress: progress reporter.
        noise: on the logits; None without, or before it is known.
    """

    model: nn.Module
    identity: TeacherIdentity
    samples: Samples
    transform: Transform
    spec: CacheSpec
    out: Path
    extends: Cache | None
    decode_images: bool
    device: torch.device | str
    progress: Progress
    noise: Noise | None = None

    def view(self, index: int = 0) -> View:
        """Return a view of the data set, as the teacher sees it."""
        return View(self.samples, self.transform, self.spec.seed, index)

    def inference_model(self) -> InferenceModel:
        """Return the teacher on its device, in its precision."""
        return InferenceModel(self.model, self.samples.num_classes, self.spec, self.device, self.noise)

    def run_probes(self, keys: npt.NDArray[np.uint64]) -> Probes:
        """Return the teacher's logits of a few samples; `keys` are the content keys of these."""
        return run_probes(self.model, self.view(), keys, self.spec, self.device, self.noise)

    def check_sealed(self, cache: Cache) -> None:
        """Check that the teacher is the one of a sealed cache of the same images; raises MismatchError if not."""
        plan = cache.manifest.plan
        images = self.view(cache.views[0])
        check_first_batch(cache.path, plan, images, self.model, self.spec, self.device, self.noise)

    def run_pilot(self) -> Pilot:
        """Run the teacher on the pilot rows."""
        return run_pilot(self.inference_model(), self.view(), self.spec, self.progress)


class Prepared(NamedTuple):
    """A cache that can be written, or that is complete already.

    Attributes:
        writer: of the cache; None if it is complete.
        complete: the sealed cache with the settings of the job; None if there is something to do.
        probes: of the teacher, with which other ranks compare theirs; None if the cache is complete.
        noise: on the logits; None without.
    """

    writer: CacheWriter | None
    complete: Cache | None
    probes: Probes | None
    noise: Noise | None = None


def prepare(job: DumpJob) -> Prepared:
    """Check the job, make the plan, and create or resume the cache.

    Raises:
        UsageError: if the settings are invalid, or `job.out` is something else or a sealed cache with other settings.
        MismatchError: if the teacher does not return [B, C], or settings differ from those of the cache.
        CorruptError: if image files or logits cannot be used.
        IncompleteError: if the cache does not fit on the disk.
    """
    out, spec, samples = job.out, job.spec, job.samples
    is_sealed = (out / MANIFEST).is_file()
    if not is_sealed:
        check_place(out)
    views = views_of(spec, job.transform)
    # Invalid settings are refused before all images are read.
    if spec.logits:
        encoding_without_pilot(samples.num_classes, request_of(spec))
    level = None
    if not is_sealed:
        level = _try_and_check_images(job)
    keys = samples.keys(job.progress)
    digest = digest_of(keys, samples.labels)
    shape = job.extends.manifest.plan.shape if job.extends else None
    path, begun = _existing(job)
    noise, noise_record = plan_noise(
        spec, out, path, begun, (job.identity, weights_digest(job.model)), views, samples, keys, job.progress
    )
    job = replace(job, noise=noise)
    if is_sealed and (sealed := begun) is not None:
        if sealed.dataset.class_names != samples.class_names:
            raise UsageError(f"{out} is already a sealed cache, of other classes", _OTHER_NAME)
        outputs = PlannedOutputs(sealed.outputs)
        check_same_outputs(out, sealed, spec)
        chosen = Chosen(sealed.class_encoding, sealed.fidelity, None, 0, outputs)
        plan = plan_cache(
            job.identity, job.model, samples, digest, spec, views, chosen, shape, sealed.teacher.level, noise_record
        )
        return Prepared(None, _complete(job, sealed, plan), None)
    chosen = choose(path, begun, spec, samples.num_classes, len(samples) * spec.views, job.run_pilot)
    plan = plan_cache(job.identity, job.model, samples, digest, spec, views, chosen, shape, level, noise_record)
    if job.extends is not None:
        check_extends(job.extends, plan, keys, samples)
        job.check_sealed(job.extends)
    if not (out / PLAN).exists():
        check_room(out, chosen.bytes_per_row * plan.views.count * plan.dataset.samples)
    if plan.teacher.weights == "none":
        job.progress.say("note: " + _NO_WEIGHTS)
    run = partial(job.run_probes, keys[probe_ids(len(samples))])
    probes, before = run(), None
    # With other settings they are other views: `begin` refuses these by name.
    if path == out and begun is not None and (begun == plan or differs_in_images_alone(begun, plan)):
        before = read_probes(out, probes)
    if before is not None:
        check_probes(before, probes, run, spec, f"{out} was begun with")
    writer = _begin(job, plan, chosen, keys, probes)
    if not writer.created and (before is None or (before.keys != probes.keys).any()):
        write_file(out / PROBES, (before.with_changes(probes) if before else probes).to_bytes())
    return Prepared(writer, None, probes, noise)


def _existing(job: DumpJob) -> tuple[Path, Plan | None]:
    """Return path and plan of the cache that is complete, resumed or extended; no plan for a new one."""
    if (job.out / MANIFEST).is_file():
        return job.out, read_manifest(job.out / MANIFEST).plan
    if (job.out / PLAN).exists():
        return job.out, read_plan(job.out / PLAN)
    if job.extends is not None:
        return job.extends.path, job.extends.manifest.plan
    return job.out, None


def _try_and_check_images(job: DumpJob) -> Literal["unknown"] | None:
    """Return the level of the teacher's logits, after checking teacher and image files, the fast check first."""
    try:
        level = try_teacher(job.model, job.view(), job.spec, job.device)
    except KdcacheError as error:
        # An image or a mask that was tried cannot be read; this names all of them.
        if isinstance(error, CorruptError) or job.samples.maps is not None:
            check_images(job.samples, job.progress, job.decode_images, job.transform)
        raise
    if job.samples.privacy is not None and job.spec.noise is None:
        job.progress.say(
            "note: the data set says how private its samples are, and without cache.noise their logits are stored "
            "exactly"
        )
    for note in check_images(job.samples, job.progress, job.decode_images, job.transform):
        job.progress.say(f"note: {note}")
    check_repeatable(job.samples)
    return level


def _complete(job: DumpJob, sealed: Plan, plan: Plan) -> Cache:
    """Return the sealed cache at `job.out`, if its plan is that of the job and every byte is as it was written."""
    check_sealed_plan(job.out, sealed, plan)
    cache = open_cache(job.out)
    if plan.teacher.weights == "none":
        job.check_sealed(cache)
    remove_leftovers(job.out)
    job.progress.say(f"{job.out} is complete: nothing to do")
    return cache


def _begin(job: DumpJob, plan: Plan, chosen: Chosen, keys: npt.NDArray[np.uint64], probes: Probes) -> CacheWriter:
    """Create or resume the cache, and report what is done already."""
    writer = CacheWriter.begin(
        job.out, plan, job.samples.labels, keys, chosen.bases, _fixed_images(job), probes.to_bytes()
    )
    if writer.remade:
        job.progress.say(
            f"images changed since {job.out} was begun: {counted(writer.remade, 'finished shard')} will be made again"
        )
    if job.extends is not None and (adopted := adopt_shards(writer, job.extends)):
        job.progress.say(f"{counted(adopted, 'shard')} taken from {job.extends.path}")
    if not writer.created:
        n_pending = len(pending_shards(writer))
        remain = f"{n_pending} of {counted(plan.views.count * plan.shards, 'shard')}"
        job.progress.say(f"resuming {job.out}: {remain} {'remains' if n_pending == 1 else 'remain'}")
    return writer


def _fixed_images(job: DumpJob) -> frozenset[int] | None:
    """Return the ids of the samples that all rows depend on; None if every row may depend on any image."""
    if split_mixing(job.transform)[1]:
        return None
    needs_pilot = (
        bool(job.spec.outputs) or encoding_without_pilot(job.samples.num_classes, request_of(job.spec)) is None
    )
    return frozenset(pilot_ids(len(job.samples), pilot_rows(job.spec)) if needs_pilot else ())


def pending_shards(writer: CacheWriter) -> list[Shard]:
    """Return the shards of all views that are still to be made, in order."""
    return [Shard(view, shard) for view in range(writer.plan.views.count) for shard in writer.pending(view)]

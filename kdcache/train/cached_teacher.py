"""The teacher of a run: the class logits and the other outputs of its caches, as far as the loss uses them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch

from kdcache.cache.decoded_teacher import decode_if_small
from kdcache.cache.format.output_records import OutputRecord
from kdcache.cache.joined_teacher import JoinedTeacher, StackedTeacher
from kdcache.cache.placement.choose import Placement
from kdcache.cache.reader import Cache
from kdcache.cache.teacher import CachedOutput, CachedTeacher, Teacher, TeacherWithOutputs
from kdcache.config.schema import JoinSpec, Pipeline
from kdcache.data.alignment import AlignedTeacher
from kdcache.data.samples import Samples
from kdcache.errors import MismatchError, UsageError, counted, did_you_mean
from kdcache.losses import Loss
from kdcache.losses.map_options import ALL_LOSSES
from kdcache.losses.outputs import OutputLossOptions
from kdcache.runtime.progress import Progress
from kdcache.train.dense import map_of_classes


def load_teacher(
    pipeline: Pipeline,
    caches: Sequence[Cache],
    samples: Samples,
    placement: Placement | Literal["auto"],
    device: torch.device | str,
    progress: Progress,
) -> tuple[Teacher | None, list[Placement]]:
    """Return the teacher of a run, None for a loss that uses none, and the placements of its rows.

    Args:
        pipeline: `join`, and the `loss`.
        caches: one or several.
        samples: the data set, with the ids of its samples in the caches.
        placement: requested for the rows.
        device: where the outputs are returned.
        progress: progress reporter.

    Raises:
        UsageError: if the cache does not have an output, or the loss is not one for its kind.
        MismatchError: if the loss uses class logits, and the cache has none.
    """
    loss = pipeline.loss
    placements: list[Placement] = []
    logits: Teacher | None = None
    if loss.uses_teacher:
        names = [None if samples.maps is None else map_of_classes(cache, samples) for cache in caches]
        cached = [
            cache.teacher(name, device=device, placement=placement) for name, cache in zip(names, caches, strict=True)
        ]
        for each in cached:
            progress.say(f"placement of the cache: {each.placement} ({each.why})")
            placements.append(each.placement)
        logits = _of_samples(_joined(cached, pipeline), samples, caches[0])
        if samples.maps is None and loss.gate is None and all(each.placement != "stream" for each in cached):
            logits = decode_if_small(logits, len(samples), samples.num_classes)
    if not loss.outputs:
        return logits, placements
    check_outputs(loss, caches, samples.group_size)
    outputs: dict[str, Teacher] = {}
    for name in loss.outputs:
        output = caches[0].teacher(name, device=device, placement=placement)
        progress.say(f"placement of the output {name}: {output.placement} ({output.why})")
        placements.append(output.placement)
        outputs[name] = _of_samples(output, samples, caches[0])
    unmapped = [name for name in outputs if caches[0].outputs[name].kind != "vector"]
    return TeacherWithOutputs(logits, outputs, unmapped), placements


def _joined(cached: Sequence[CachedTeacher | CachedOutput], pipeline: Pipeline) -> Teacher:
    """Return the teachers of several caches as one, or side by side for a gate.

    Raises:
        UsageError: if there are fewer than a gate is over, or it would replace the settings of `join`.
    """
    join, gate = pipeline.join, pipeline.loss.gate
    if gate is None:
        return cached[0] if len(cached) == 1 else JoinedTeacher(cached, join.weights, join.combine)
    needed = max(2, gate.top)
    if len(cached) < needed:
        raise UsageError(
            f"loss.gate chooses among several teachers (top {gate.top}), and the run has "
            f"{counted(len(cached), 'cache')}",
            f"pass at least {needed}, with --cache for each",
        )
    if join != JoinSpec():
        raise UsageError("loss.gate chooses among the teachers, and `join` joins them", "remove one of the two")
    return StackedTeacher(cached)


def _of_samples(teacher: Teacher, samples: Samples, cache: Cache) -> Teacher:
    """Return a teacher that takes the ordinals of the samples."""
    return teacher if samples.ids is None else AlignedTeacher(teacher, samples.ids, len(cache))


def check_outputs(loss: Loss, caches: Sequence[Cache], group_size: int = 1) -> None:
    """Check that a cache has the outputs of a loss, of kinds that their losses are for.

    Args:
        loss: of the run.
        caches: of its teachers.
        group_size: number of samples that are trained on together.

    Raises:
        UsageError: if it does not.
        MismatchError: if several caches are joined.
    """
    if len(caches) > 1:
        raise MismatchError(
            f"{len(caches)} caches are joined, and the loss uses the outputs {', '.join(loss.outputs)}: only class "
            "logits are joined",
            "pass one cache, or dump the teachers' outputs into one",
        )
    plan = caches[0].manifest.plan
    for name, options in loss.outputs.items():
        record = plan.named_outputs.get(name)
        if record is None:
            raise UsageError(
                f"the loss uses the output {name}, and {caches[0].path} has "
                f"{', '.join(plan.output_names)}{did_you_mean(name, plan.output_names)}",
                "name one of these in `loss`, or dump the teacher with `cache.outputs`",
            )
        _check_kind(name, record, options, group_size)


def _check_kind(name: str, record: OutputRecord, options: OutputLossOptions, group_size: int) -> None:
    """Check that an output is of a kind that its loss is for, with as many scores as it compares.

    Raises:
        UsageError: if it is not.
    """
    kinds, width, loss = type(options).kinds, type(options).width, options.name
    if (record.places == "grid") != (type(options).places == "grid"):
        is_map = record.places == "grid"
        others = sorted(name for name, each in ALL_LOSSES.items() if (each.places == "grid") == is_map)
        raise UsageError(
            f"the loss {loss} is for {'rows of samples' if is_map else 'maps'}, and the output {name} is "
            f"{'a map per sample' if is_map else 'one row per sample'}",
            f"take one of {', '.join(others)} (docs/LOSSES.md)",
        )
    if record.kind not in kinds:
        raise UsageError(
            f"the loss {loss} is for an output of kind {' or '.join(kinds)}, and {name} is of kind {record.kind}",
            "see docs/LOSSES.md for the losses of each kind",
        )
    if type(options).needs_level and record.level is not None:
        raise UsageError(
            f"the loss {loss} compares places, and the logits of the output {name} are known up to a constant at "
            "each place",
            f"dump the teacher's logits, not probabilities, with cache.outputs.{name}.over_places=true, or take "
            "pixel_kd",
        )
    if type(options).of_groups and record.channels == 1 and group_size == 1:
        raise UsageError(
            f"the loss {loss} compares several scores, the output {name} has one per sample, and the samples are not "
            "in groups",
            "give the data set `groups`, one row of samples per query (docs/TRAINING.md), or take a loss of single "
            "scores, such as mse",
        )
    compared = group_size if record.channels == 1 else record.channels
    if width is not None and compared != width:
        source = "the groups of the data set have" if record.channels == 1 else f"the output {name} has"
        raise UsageError(
            f"the loss {loss} compares {width} scores, and {source} {compared}",
            f"take a loss for any number of scores, such as list_kl or mse, or {width} scores",
        )

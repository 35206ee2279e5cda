"""Samples of a cache that a student is not trained on, by whose loss its epoch is selected."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import numpy.typing as npt

from kdcache.cache.teacher import Teacher, TeacherWithOutputs
from kdcache.config.transform import step_names
from kdcache.data.alignment import AlignedTeacher, select_samples
from kdcache.data.mixing import split_mixing
from kdcache.data.sample_groups import Groups, groups_among
from kdcache.data.samples import Samples
from kdcache.data.seeding import in_hash_order
from kdcache.errors import UsageError, counted
from kdcache.train.inputs import TrainingInputs

Ids = npt.NDArray[np.int64]

OPTION = "train.held_out_fraction"


def held_out_ids(samples: Samples, fraction: float) -> Ids:
    """Return the ordinals of the samples that are held out, ascending, [n] int64.

    The same ones are held out on every machine and for every seed. Groups that share a sample are held out together, so
    that no sample that is trained on is in a group that is held out.

    Args:
        samples: training samples.
        fraction: of the samples; more than 0, less than 1.

    Raises:
        UsageError: if nothing would be held out, or nothing be left.
    """
    count, members = len(samples), np.arange(len(samples))
    if samples.groups is not None:
        members = np.unique(samples.groups)
    parts = members if samples.groups is None else connected_parts(samples.groups, count)[members]
    parts, part_of = np.unique(parts, return_inverse=True)
    order = in_hash_order(len(parts))
    sizes = np.bincount(part_of)[order].cumsum()
    chosen = order[: int(np.searchsorted(sizes, fraction * len(members) + 0.5, "right"))]
    if not 0 < len(chosen) < len(parts):
        of = "samples" if samples.groups is None else "parts, within which groups share samples"
        raise UsageError(
            f"{OPTION} {fraction:g} would hold out {len(chosen):,} of the {len(parts):,} {of}, of "
            f"{samples.name}/{samples.split}",
            f"set {OPTION} to 0" if len(parts) == 1 else f"lower {OPTION}" if len(chosen) else f"raise {OPTION}",
        )
    return members[np.isin(part_of, chosen)]


def connected_parts(groups: Groups, count: int) -> Ids:
    """Return the smallest ordinal that each sample is connected to by groups that share samples, [count] int64.

    Args:
        groups: [M, K] ordinals.
        count: number of samples; one that is in no group is a part of its own.
    """
    smallest = np.arange(count)
    while True:
        found = smallest.copy()
        np.minimum.at(found, groups, smallest[groups].min(axis=1, keepdims=True))
        found = found[found]
        if np.array_equal(found, smallest):
            return smallest
        smallest = found


def hold_out(inputs: TrainingInputs, fraction: float) -> tuple[TrainingInputs, TrainingInputs]:
    """Divide the samples of some inputs into those that a student is trained on, and those that are held out.

    Raises:
        UsageError: if too few samples would be held out or left, or images are mixed with any others.
    """
    samples = inputs.samples
    if split_mixing(inputs.transform)[1] is not None:
        mixing = [*step_names(inputs.transform)][-1]
        raise UsageError(
            f"{mixing} mixes each image with any other one of the cache, and {OPTION} holds some of them out",
            f"set {OPTION} to 0, or use a cache of views that are not mixed",
        )
    held = held_out_ids(samples, fraction)
    rest = np.setdiff1d(np.arange(len(samples)), held)
    return _part(inputs, rest), _part(inputs, held)


def describe(trained: TrainingInputs, held: TrainingInputs) -> str:
    """Return how many samples are held out, as a line for the user."""
    return (
        f"note: {counted(len(held.samples), 'sample')} of {len(held.samples) + len(trained.samples):,} are held out: "
        "the epoch with the lowest loss on them is selected"
    )


def _part(inputs: TrainingInputs, positions: Ids) -> TrainingInputs:
    """Return some of the samples, with the teacher of these."""
    samples = inputs.samples
    ids = positions if samples.ids is None else samples.ids[positions]
    kept = groups_among(samples.groups, positions, len(samples), f"{samples.name}/{samples.split}")
    chosen = replace(select_samples(samples, positions, ids), groups=kept.groups)
    return replace(inputs, samples=chosen, teacher=_teacher_of(inputs.teacher, positions, len(samples)))


def _teacher_of(teacher: Teacher | None, positions: Ids, count: int) -> Teacher | None:
    if teacher is None:
        return None
    if isinstance(teacher, TeacherWithOutputs):
        return teacher.each(lambda part: AlignedTeacher(part, positions, count))
    return AlignedTeacher(teacher, positions, count)

"""Groups of samples that are trained on together, such as two passages for one query, and the names of samples."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from kdcache.errors import MismatchError, UsageError

Groups = npt.NDArray[np.int64]
"""[M, K] ordinals of samples. With K = 2 a group is a triple: its query with a positive and with a negative passage."""

_WRITE = "give groups=[M, K], the positions of K >= 2 samples each, counted from 0"


def checked_groups(groups: npt.NDArray[np.integer[Any]], count: int, where: str) -> Groups:
    """Return groups as int64 [M, K], after checking that they are of the samples.

    Args:
        groups: [M, K], of any integer type.
        count: N, number of samples.
        where: name of the data set, for messages.

    Raises:
        UsageError: if they are not a table of integers, or a group has one sample.
        MismatchError: if a group has a sample that does not exist, or one twice; names the first such group.
    """
    if groups.ndim != 2 or groups.dtype.kind not in "iu" or len(groups) == 0 or groups.shape[1] < 2:
        raise UsageError(f"{where} has groups {list(groups.shape)} {groups.dtype}", _WRITE)
    outside = np.flatnonzero(((groups < 0) | (groups >= count)).any(axis=1))
    if len(outside):
        raise MismatchError(
            f"group {outside[0]} of {where} is of the samples {groups[outside[0]].tolist()}, and there are {count} "
            f"samples, counted from 0 ({len(outside)} such groups)",
            _WRITE,
        )
    ordered = np.sort(groups, axis=1)
    twice = np.flatnonzero((ordered[:, 1:] == ordered[:, :-1]).any(axis=1))
    if len(twice):
        raise MismatchError(
            f"group {twice[0]} of {where} has a sample twice: {groups[twice[0]].tolist()} ({len(twice)} such groups)",
            "remove these groups: there is nothing to compare in them",
        )
    return groups.astype(np.int64)


def check_names(names: npt.NDArray[np.generic], count: int, where: str) -> None:
    """Check that samples have one name each, and no two of them the same.

    Raises:
        UsageError: if they are not strings [N].
        MismatchError: if one is given twice.
    """
    if names.shape != (count,) or names.dtype.kind != "U":
        raise UsageError(
            f"{where} has {count} samples and sample_names {list(names.shape)} {names.dtype}",
            f"give one string per sample, [{count}]",
        )
    ordered = np.sort(names)
    if len(twice := ordered[1:][ordered[1:] == ordered[:-1]]):
        raise MismatchError(
            f"two samples of {where} have the name {str(twice[0])!r} ({len(twice)} such names)",
            "give each sample a name of its own, or leave one of equal samples out",
        )


class KeptGroups(NamedTuple):
    """The groups of which all samples are kept.

    Attributes:
        groups: [m, K], with the new ordinals; None if the samples have no groups.
        notes: how many are left out, one line; () for none.
    """

    groups: Groups | None = None
    notes: tuple[str, ...] = ()


def groups_among(groups: Groups | None, positions: npt.NDArray[np.int64], count: int, where: str) -> KeptGroups:
    """Return the groups of which all samples are kept.

    Args:
        groups: [M, K].
        positions: [n], ordinals of the samples that are kept, in their new order.
        count: N, number of samples before.
        where: name of the data set, for messages.

    Raises:
        MismatchError: if there are groups, and none is left.
    """
    if groups is None:
        return KeptGroups()
    renumbered = np.full(count, -1)
    renumbered[positions] = np.arange(len(positions))
    moved = renumbered[groups]
    kept = moved[(moved >= 0).all(axis=1)]
    lost = f"{len(groups) - len(kept):,} of {len(groups):,} groups of {where} have samples that are not in this split"
    if not len(kept):
        raise MismatchError(
            lost, "keep all samples: set dataset.validation_fraction and dataset.test_fraction to 0, without --align"
        )
    if len(kept) == len(groups):
        return KeptGroups(kept)
    return KeptGroups(kept, (f"{lost}, and are left out",))

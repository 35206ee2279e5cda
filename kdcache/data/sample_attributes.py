"""What a data set may say of its samples beside images and labels: groups, names and privacy.

A data set of the user has them as attributes, an npz file as arrays.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
from torch.utils.data import Dataset

from kdcache.data.sample_groups import Groups, check_names, checked_groups
from kdcache.errors import MismatchError, UsageError

Privacy = npt.NDArray[np.float64]
"""[N] from 0 to 1: how private a sample is, and so how much noise its logits get."""


class SampleAttributes(NamedTuple):
    """What a data set says of its samples; None for what it does not say.

    Attributes:
        groups: [M, K], samples that are trained on together.
        sample_names: [N] str.
        privacy: [N], weights of the noise.
    """

    groups: Groups | None = None
    sample_names: npt.NDArray[np.str_] | None = None
    privacy: Privacy | None = None

    def names_at(self, ids: npt.NDArray[np.int64]) -> npt.NDArray[np.str_] | None:
        """Return the names of some samples [n]."""
        return None if self.sample_names is None else self.sample_names[ids]

    def privacy_at(self, ids: npt.NDArray[np.int64]) -> Privacy | None:
        """Return the privacy of some samples [n]."""
        return None if self.privacy is None else self.privacy[ids]


def attributes_of_dataset(dataset: Dataset[Any], count: int, where: str) -> SampleAttributes:
    """Return the attributes `groups`, `sample_names` and `privacy` of a data set of `count` samples.

    Raises:
        KdcacheError: if they are not of these samples; see `sample_groups.py` and `checked_privacy`.
    """
    return _checked(lambda name: getattr(dataset, name, None), count, where)


def attributes_of_arrays(arrays: Mapping[str, npt.NDArray[Any]], count: int, where: str) -> SampleAttributes:
    """Return the arrays `groups`, `sample_names` and `privacy` among those of a file of `count` samples.

    Raises:
        KdcacheError: if they are not of these samples; see `sample_groups.py` and `checked_privacy`.
    """
    return _checked(arrays.get, count, where)


def _checked(named: Callable[[str], Any], count: int, where: str) -> SampleAttributes:
    groups, names, privacy = (
        None if (given := named(name)) is None else np.asarray(given) for name in SampleAttributes._fields
    )
    if names is not None:
        check_names(names, count, where)
    return SampleAttributes(
        None if groups is None else checked_groups(groups, count, where),
        names,
        None if privacy is None else checked_privacy(privacy, count, where),
    )


def checked_privacy(privacy: npt.NDArray[Any], count: int, where: str) -> Privacy:
    """Return the privacy of samples as float64 [N], after checking it.

    Args:
        privacy: [N], of any type of number, or bool.
        count: N, number of samples.
        where: name of the data set, for messages.

    Raises:
        UsageError: if it is not one number per sample.
        MismatchError: if a number is not from 0 to 1; names the first.
    """
    if privacy.shape != (count,) or privacy.dtype.kind not in "biuf":
        raise UsageError(
            f"{where} has {count} samples and privacy {list(privacy.shape)} {privacy.dtype}",
            f"give one number from 0 to 1 per sample, [{count}]",
        )
    outside = np.flatnonzero(~((privacy >= 0) & (privacy <= 1)))
    if len(outside):
        raise MismatchError(
            f"sample {outside[0]} of {where} has the privacy {privacy[outside[0]]}, which is not from 0 to 1 "
            f"({len(outside)} such samples)",
            "give 0 for a sample that is public, 1 for one that is private, or what lies between",
        )
    return privacy.astype(np.float64)

"""Sparse soft labels: a few probabilities per row, as other projects store them, and the logits of such rows.

The logits are known up to an additive constant per row. For the classes that are not stored, only their total mass is
known. It is spread evenly (`uniform`), but no such class gets more than the smallest stored probability, or less than
the floor 2^-24 / C: in renormalized or rounded files their mass is 0, and log(0) would dominate every temperature above
1. So at T = 1 a row equals the stored one to 2^-24; at T > 1 the floor changes the soft targets. `loss: truncated` uses
the stored classes alone, without a floor.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from kdcache.config.transform import Transform
from kdcache.errors import CorruptError, UsageError

LEAST = 2.0**-24
"""Total floor over all classes: the rounding error of a sum of float32 probabilities that is 1."""

_SUM_TOLERANCE = 0.01
"""By how much the sum of rounded probabilities may exceed 1; a hundred float16 values exceed it by 0.001 at most."""

Floats = npt.NDArray[np.float32]


class SparseSoftLabels(NamedTuple):
    """Soft labels of B samples in V views, k classes each.

    Attributes:
        probabilities: [V, B, k] float32.
        classes: [V, B, k] int64, the classes of the probabilities.
        recorded: augmentation of the views: boxes [V, B, 5] float32, or seeds [V, B] int32.
    """

    probabilities: Floats
    classes: npt.NDArray[np.int64]
    recorded: npt.NDArray[Any]


class SoftLabelSource(Protocol):
    """The files of another project; small, and may be sent to another process."""

    @property
    def views(self) -> int:
        """Number of views V."""

    @property
    def top_k(self) -> int:
        """Number of classes per row k."""

    @property
    def by_sample(self) -> bool:
        """Whether one file holds all views of a sample."""

    def read(self, names: Sequence[str], views: Sequence[int]) -> SparseSoftLabels:
        """Read the soft labels of some samples, by their names in the project, in some views.

        Raises:
            KdcacheError: if a file is missing or malformed; names it.
        """


class OpenedSource(NamedTuple):
    """The files of another project for a data set.

    Attributes:
        source: the files.
        names: name of each sample in the project.
        transform: transform that the files state; None if they do not.
    """

    source: SoftLabelSource
    names: list[str]
    transform: Transform | None


def check_rows(path: Path, probabilities: Floats, classes: npt.NDArray[np.int64], num_classes: int) -> None:
    """Check that rows [..., k] of a file are probabilities of different classes.

    Raises:
        CorruptError: if they are not.
    """
    ascending = np.sort(classes, axis=-1)
    if classes.size and (ascending[..., 0].min() < 0 or ascending[..., -1].max() >= num_classes):
        raise malformed(
            path, f"holds classes from {classes.min()} to {classes.max()}, but the data set has {num_classes}"
        )
    if (np.diff(ascending, axis=-1) == 0).any():
        raise malformed(path, "holds a class twice in one row")
    with np.errstate(invalid="ignore"):
        wrong = ~(np.isfinite(probabilities) & (probabilities >= 0)).all(axis=-1)
        total = probabilities.sum(axis=-1, dtype=np.float64)
    if wrong.any() or not ((total > 0) & (total <= 1 + _SUM_TOLERANCE)).all():
        raise malformed(path, "holds values that are not probabilities, or that add up to 0 or to more than 1")


def malformed(path: Path, what: str) -> CorruptError:
    """Return the error for a file that cannot be used."""
    return CorruptError(f"{path} {what}", "get the file again from its source")


def check_first(folder: Path, name: str, layout: str) -> None:
    """Check that a folder has the first file that it would have in a layout.

    Raises:
        UsageError: if it does not.
    """
    if not (folder / name).is_file():
        raise UsageError(
            f"{folder} is not a folder of {layout} files for this data set: {name} not found",
            f"pass the folder that {layout}'s students read, with --from and the project (fkd, ml-dr or tinyvit)",
        )


def logits_of(probabilities: Tensor, classes: Tensor, num_classes: int) -> Tensor:
    """Return the log-probabilities of rows over all classes, [B, C] float32.

    Args:
        probabilities: [B, k].
        classes: [B, k] int64, the classes of the probabilities.
        num_classes: number of classes C.
    """
    floor, others = LEAST / num_classes, num_classes - probabilities.shape[1]
    stored = probabilities.double()
    share = (1 - stored.sum(dim=1, keepdim=True)).clamp_min(0) / max(others, 1)
    stored = stored.clamp_min(floor)
    share = share.minimum(stored.amin(dim=1, keepdim=True)).clamp_min(floor)
    return share.log().expand(-1, num_classes).scatter(1, classes, stored.log()).float()


def most_probable(logits: Tensor, top_k: int) -> tuple[Floats, npt.NDArray[np.int64]]:
    """Return the k largest probabilities of logits [B, C] at T = 1, descending, and their classes; both [B, k]."""
    values, classes = logits.double().softmax(dim=1).sort(dim=1, descending=True, stable=True)
    return values[:, :top_k].float().numpy(), classes[:, :top_k].numpy()


def as_rows(soft_labels: SparseSoftLabels, index: int) -> tuple[Tensor, Tensor]:
    """Return (probabilities, classes) of the view at an index, as tensors [B, k]."""
    return torch.from_numpy(soft_labels.probabilities[index]), torch.from_numpy(soft_labels.classes[index])

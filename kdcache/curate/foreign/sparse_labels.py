"""A few probabilities a row, as other projects keep them, and the logits that they stand for.

They say nothing of the level of the logits, and of the classes that they leave out only how much mass these have
together. It is spread evenly (`uniform`); but no class that a file leaves out gets more than the least of those that it
keeps, and none at all less than 2^-24 / C: a file that was renormalized, or rounded, says that they have nothing, and a
logarithm of nothing would drown every temperature above 1. So at T = 1 a row is what the file says, to 2^-24; at higher
temperatures the floor speaks, where the file is silent. `loss: truncated` is the reading without a floor.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from kdcache.config.schema import Transform
from kdcache.errors import CorruptError, UsageError

LEAST = 2.0**-24
"""Of all classes together: the rounding of a sum of float32 probabilities that is 1."""

_MORE_THAN_ONE = 0.01
"""By how much rounded probabilities may add up to more than 1: a hundred in float16 come to a thousandth at most."""

Floats = npt.NDArray[np.float32]


class SparseSoftLabels(NamedTuple):
    """What files say of B samples in V views.

    Attributes:
        probabilities: [V, B, k] float32.
        classes: [V, B, k] int64.
        recorded: from what the views were drawn: boxes [V, B, 5] float32, or seeds [V, B] int32.
    """

    probabilities: Floats
    classes: npt.NDArray[np.int64]
    recorded: npt.NDArray[Any]


class SoftLabelSource(Protocol):
    """Files of another project; small, and may be sent to another process."""

    @property
    def views(self) -> int:
        """V."""

    @property
    def top_k(self) -> int:
        """k, how many classes of a row are kept."""

    @property
    def by_sample(self) -> bool:
        """Whether a file holds all views of a sample, and is read once for all of them."""

    def read(self, names: Sequence[str], views: Sequence[int]) -> SparseSoftLabels:
        """What is said of some samples, by the names that the project has for them, in some views.

        Raises:
            KdcacheError: if a file is missing or holds anything else; names it.
        """


class Opened(NamedTuple):
    """A source, the name that it has for each sample, and the transform that its files state; None if they do not."""

    source: SoftLabelSource
    names: list[str]
    transform: Transform | None


def checked(path: Path, probabilities: Floats, classes: npt.NDArray[np.int64], num_classes: int) -> None:
    """That rows [..., k] of a file are some probabilities of different classes.

    Raises:
        CorruptError: which says what else they are.
    """
    ascending = np.sort(classes, axis=-1)
    if classes.size and (ascending[..., 0].min() < 0 or ascending[..., -1].max() >= num_classes):
        raise refused(
            path, f"names classes from {classes.min()} to {classes.max()}, and the data set has {num_classes}"
        )
    if (np.diff(ascending, axis=-1) == 0).any():
        raise refused(path, "names a class twice in one row")
    with np.errstate(invalid="ignore"):
        wrong = ~(np.isfinite(probabilities) & (probabilities >= 0)).all(axis=-1)
        total = probabilities.sum(axis=-1, dtype=np.float64)
    if wrong.any() or not ((total > 0) & (total <= 1 + _MORE_THAN_ONE)).all():
        raise refused(path, "holds numbers that are no probabilities, or add up to nothing or to more than 1")


def refused(path: Path, what: str) -> CorruptError:
    """A file that cannot be used."""
    return CorruptError(f"{path} {what}", "get the file again from where it was made")


def check_first(folder: Path, name: str, layout: str) -> None:
    """That a folder is one of a layout at all.

    Raises:
        UsageError: if the first of the files that it would have is not there.
    """
    if not (folder / name).is_file():
        raise UsageError(
            f"{folder} is no folder of {layout}'s files for this data set: it has no {name}",
            f"give the folder that {layout}'s students read, with --from for what wrote it (fkd, ml-dr or tinyvit)",
        )


def logits_of(probabilities: Tensor, classes: Tensor, num_classes: int) -> Tensor:
    """The logits that rows stand for, as far as they tell: log-probabilities [B, C] float32.

    Args:
        probabilities: [B, k].
        classes: [B, k] int64, of which they are.
        num_classes: C.
    """
    floor, others = LEAST / num_classes, num_classes - probabilities.shape[1]
    kept = probabilities.double()
    left = (1 - kept.sum(dim=1, keepdim=True)).clamp_min(0) / max(others, 1)
    kept = kept.clamp_min(floor)
    even = left.minimum(kept.amin(dim=1, keepdim=True)).clamp_min(floor)
    return even.log().expand(-1, num_classes).scatter(1, classes, kept.log()).float()


def most_probable(logits: Tensor, top_k: int) -> tuple[Floats, npt.NDArray[np.int64]]:
    """The largest probabilities of logits [B, C] at T = 1, falling, and their classes; both [B, k]."""
    values, classes = logits.double().softmax(dim=1).sort(dim=1, descending=True, stable=True)
    return values[:, :top_k].float().numpy(), classes[:, :top_k].numpy()


def as_rows(said: SparseSoftLabels, place: int) -> tuple[Tensor, Tensor]:
    """(probabilities, classes) of one view, as tensors [B, k]."""
    return torch.from_numpy(said.probabilities[place]), torch.from_numpy(said.classes[place])

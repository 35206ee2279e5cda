"""Finished runs of networks that say a class of every pixel, read from their folders."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from kdcache.errors import CorruptError, UsageError
from kdcache.evaluation.runs import RunRecord, read_run
from kdcache.models.pixel_scores import PixelScore

_METRICS = "metrics.json"


class PixelRun(NamedTuple):
    """A finished run of a network that says a class of every pixel.

    Attributes:
        record: what it has in common with runs of one label per image; its accuracies are of pixels.
        test: scores on the test split; None without one.
        validation: mean intersection over union of the selected epoch; None without a validation split.
    """

    record: RunRecord
    test: PixelScore | None
    validation: float | None


def is_pixel_run(folder: Path) -> bool:
    """Return whether a folder is a run of a network that says a class of every pixel."""
    try:
        return "validation_mean_iou" in json.loads((folder / _METRICS).read_text(encoding="utf-8"))["best"]
    except (OSError, ValueError, LookupError, TypeError):
        return False  # reading the run reports what is wrong with it


def all_of_pixels(folders: Sequence[Path]) -> bool:
    """Return whether some runs are of networks that say a class of every pixel.

    Raises:
        UsageError: if only some of them are.
    """
    of_pixels = [folder for folder in folders if is_pixel_run(folder)]
    others = [folder for folder in folders if folder not in of_pixels]
    if of_pixels and others:
        raise UsageError(
            f"{of_pixels[0]} says a class of every pixel, and {others[0]} does not",
            "report on runs of one kind at a time",
        )
    return bool(of_pixels)


def read_pixel_run(folder: Path) -> PixelRun:
    """Read a run folder.

    Raises:
        UsageError: if the folder is not a finished run.
        CorruptError: if its files cannot be read.
    """
    record = read_run(folder)
    try:
        metrics = json.loads((folder / _METRICS).read_text(encoding="utf-8"))
        test = metrics["test"]
        score = PixelScore(**{**test, "iou": tuple(test["iou"])}) if test else None
        return PixelRun(record, score, metrics["best"]["validation_mean_iou"])
    except (OSError, ValueError, TypeError, LookupError) as error:
        raise CorruptError(
            f"cannot read the metrics of {folder}: {type(error).__name__}: {error}", "train it again, or leave it out"
        ) from None

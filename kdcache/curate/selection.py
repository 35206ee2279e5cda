"""What `select` keeps, as text: names of classes, ids of samples."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt

from kdcache.cache.reader import Cache
from kdcache.errors import UsageError
from kdcache.runtime.ranges import parse_ids

OF_CLASSES = "of-classes"


def parse_classes(text: str) -> list[str]:
    """Return the names of classes in a file, one per line, or in a comma-separated list."""
    if Path(text).is_file():
        return [line for line in map(str.strip, Path(text).read_text(encoding="utf-8").splitlines()) if line]
    return text.split(",")


def parse_samples(text: str, cache: Cache, classes: Sequence[str] | None) -> npt.NDArray[np.int64]:
    """Return the ids of the samples to select, [n] int64.

    Args:
        text: path of a file with one id per line, a range `N-M`, or `of-classes` for the samples of `classes`.
        cache: to select from.
        classes: names of classes; None if there is no selection of classes.

    Raises:
        UsageError: if the text is something else, or `of-classes` without classes.
    """
    if text == OF_CLASSES:
        if classes is None:
            raise UsageError(f"--samples {OF_CLASSES} needs --classes", "add --classes with the names of the classes")
        names = cache.manifest.plan.dataset.class_names
        return np.flatnonzero(np.isin(cache.labels, [index for index, name in enumerate(names) if name in classes]))
    return parse_ids(text, "--samples")

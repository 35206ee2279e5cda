"""Choices of samples and classes by name, by file or by range, for `select`."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import numpy.typing as npt

from kdcache.cache.reader import Cache
from kdcache.errors import UsageError

Ids = npt.NDArray[np.int64]


def read_class_names(path: Path) -> list[str]:
    """Read names of classes from a file with one per line; empty lines are ignored."""
    return [line for line in map(str.strip, path.read_text(encoding="utf-8").splitlines()) if line]


def read_ordinals(path: Path) -> Ids:
    """Read ordinals of samples from a file with one per line.

    Raises:
        UsageError: if something is not a whole number of 0 or more.
    """
    words = path.read_text(encoding="utf-8").split()
    if wrong := [word for word in words if not (word.isascii() and word.isdecimal() and int(word) < 2**63)]:
        raise UsageError(f"{path} holds {wrong[0]!r}, which is not an ordinal", "write one whole number per line")
    return np.array(words, np.int64)


def parse_range(text: str, option: str) -> range:
    """Return the range of `N-M`, with both ends, or of `N` alone.

    Args:
        text: the range.
        option: name of the option for messages.

    Raises:
        UsageError: if the text is not such a range.
    """
    first, dash, last = text.partition("-")
    if not (text.isascii() and first.isdecimal() and (last.isdecimal() or not dash)):
        raise UsageError(f"{option} is {text!r}, which is not a range", f"write a range such as {option} 0-3")
    return range(int(first), int(last or first) + 1)


def samples_of_classes(cache: Cache, classes: list[str]) -> Ids:
    """Return the ordinals of the samples whose label is one of some classes, ascending."""
    indices = [index for index, name in enumerate(cache.manifest.plan.dataset.class_names) if name in classes]
    return np.flatnonzero(np.isin(cache.labels, indices))

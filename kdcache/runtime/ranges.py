"""Ranges of indices as text: `3`, `0-9`, `0,2-4`."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import numpy.typing as npt

from kdcache.errors import UsageError

_MAX_DIGITS = 10
"""Of an index; indices up to a longer number would not fit the memory."""


def parse_range(text: str, option: str) -> range:
    """Return the indices of `N-M`, both included, or of `N`.

    Args:
        text: as the user wrote it.
        option: name of the command-line option, for messages.

    Raises:
        UsageError: if the text is something else.
    """
    first, dash, last = text.partition("-")
    is_range = (
        text.isascii()
        and first.isdecimal()
        and (last.isdecimal() or not dash)
        and max(len(first), len(last)) <= _MAX_DIGITS
    )
    if not is_range:
        raise UsageError(f"{option} must be an index or a range, not {text!r}", f"write for example {option} 0-3")
    if int(last or first) < int(first):
        raise UsageError(f"{option} {text} ends before it begins", f"write {option} {last}-{first}")
    return range(int(first), int(last or first) + 1)


def parse_ids(text: str, option: str) -> npt.NDArray[np.int64]:
    """Return the ids of samples in a file, one per line, or in a range `N-M`, [n] int64.

    Raises:
        UsageError: if the text is something else.
    """
    if Path(text).is_file():
        lines = Path(text).read_text(encoding="utf-8", errors="replace").split()
        if wrong := [line for line in lines if not (line.isascii() and line.isdecimal() and int(line) < 2**63)]:
            raise UsageError(
                f"{text} contains {wrong[0][:40]!r}, which is not a sample id", "write one integer per line"
            )
        return np.array(lines, np.int64)
    selected = parse_range(text, option)
    return np.arange(selected.start, selected.stop)

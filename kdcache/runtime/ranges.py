"""Ranges of indices as text: `3`, `0-9`, `0,2-4`."""

from __future__ import annotations

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
    return range(int(first), int(last or first) + 1)

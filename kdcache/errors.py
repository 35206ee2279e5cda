"""Errors that a user can fix: each says what happened, and what to do."""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches


class KdcacheError(Exception):
    """An error with a fix; the command line prints it without a traceback.

    Args:
        what: what happened, with the values that disagree.
        fix: the command or the change that solves it.
    """

    exit_code = 2

    def __init__(self, what: str, fix: str) -> None:
        super().__init__(f"{what}\nfix: {fix}")
        self.what = what
        self.fix = fix

    def __reduce__(self) -> tuple[type[KdcacheError], tuple[str, str]]:
        return type(self), (self.what, self.fix)


class UsageError(KdcacheError):
    """Invalid arguments, or an invalid pipeline file (exit code 2)."""


class IncompleteError(KdcacheError):
    """A cache that is not sealed, or work that could not be completed (exit code 3)."""

    exit_code = 3


class MismatchError(KdcacheError):
    """Inputs that are valid alone but inconsistent with each other (exit code 4)."""

    exit_code = 4


class CorruptError(KdcacheError):
    """Damaged files, or values that are not finite (exit code 5)."""

    exit_code = 5


class InterruptedRun(KeyboardInterrupt):
    """The user pressed Ctrl-C; says what is kept, and how to resume (exit code 130).

    Like every KeyboardInterrupt, it is not an Exception: code that handles errors and continues does not stop it.

    Args:
        what: what is kept.
        fix: how to resume.
    """

    exit_code = 130

    def __init__(self, what: str, fix: str) -> None:
        super().__init__(f"{what}\nfix: {fix}")
        self.what = what
        self.fix = fix

    def __reduce__(self) -> tuple[type[InterruptedRun], tuple[str, str]]:
        return type(self), (self.what, self.fix)

    @classmethod
    def of(cls, interrupt: KeyboardInterrupt, what: str, fix: str) -> InterruptedRun:
        """Return the error for the caller of a public function, without the traceback of the code that it stopped.

        Args:
            interrupt: returned if it says already what is kept.
            what: says it of any other.
            fix: how to resume.
        """
        return interrupt.with_traceback(None) if isinstance(interrupt, cls) else cls(what, fix)


def similar_name(given: object, known: Iterable[str], cutoff: float = 0.6) -> str | None:
    """Return the known name that is most like a wrong one; None if none is like it.

    Args:
        given: the wrong name.
        known: the right ones.
        cutoff: smallest similarity, from 0 to 1.
    """
    names = {name.casefold(): name for name in known if name != given}
    found = get_close_matches(str(given).casefold(), names, n=1, cutoff=cutoff)
    return names[found[0]] if found else None


def did_you_mean(given: object, known: Iterable[str]) -> str:
    """Return ", did you mean NAME?" with the known name that is most like a wrong one; "" if none is like it."""
    similar = similar_name(given, known)
    return "" if similar is None else f", did you mean {similar}?"


def counted(number: int, singular: str, plural: str | None = None) -> str:
    """Return a number with its unit: `1 image`, `1,000 images`; the plural is given if it is not the singular + s."""
    return f"{number:,} {singular if number == 1 else plural or f'{singular}s'}"


def indices_below(number: int) -> str:
    """Return the valid indices of `number` things: `0 to 9`, or `0` of a single one."""
    return "0" if number == 1 else f"0 to {number - 1}"

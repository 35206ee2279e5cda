"""Errors that a user can fix: each says what happened, and what to do."""

from __future__ import annotations


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


class InterruptedRun(KdcacheError):
    """The user pressed Ctrl-C; says what is kept, and how to resume (exit code 130)."""

    exit_code = 130

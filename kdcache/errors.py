"""What kdcache raises when a user can mend it: what happened, and what to do about it."""

from __future__ import annotations


class KdcacheError(Exception):
    """A mistake that has a remedy; the command line prints it without a traceback.

    Args:
        what: what happened, with the values that disagree.
        fix: the command or the change that mends it.
    """

    exit_code = 2

    def __init__(self, what: str, fix: str) -> None:
        super().__init__(f"{what}\nfix: {fix}")
        self.what = what
        self.fix = fix

    def __reduce__(self) -> tuple[type[KdcacheError], tuple[str, str]]:
        return type(self), (self.what, self.fix)


class UsageError(KdcacheError):
    """Arguments or a pipeline file that cannot be right (exit code 2)."""


class IncompleteError(KdcacheError):
    """A cache that was begun and not sealed (exit code 3)."""

    exit_code = 3


class MismatchError(KdcacheError):
    """Two things that are each well, and do not belong together (exit code 4)."""

    exit_code = 4


class CorruptError(KdcacheError):
    """Bytes or numbers that cannot be trusted (exit code 5)."""

    exit_code = 5


class InterruptedRun(KdcacheError):
    """The user pressed Ctrl-C; what is kept, and how to go on (exit code 130)."""

    exit_code = 130

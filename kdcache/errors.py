"""Errors that a user can fix: each says what happened, and what to do."""

from __future__ import annotations


def counted(count: int, noun: str) -> str:
    """Return a number with its noun, such as `1 shard` or `1,200 shards`."""
    return f"{count:,} {noun}{'' if count == 1 else 's'}"


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

"""What a user is told when a process that loads images dies: the system kills one where memory runs out."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from kdcache.errors import IncompleteError

# Torch raises a bare RuntimeError, from a signal's handler too, wherever the main thread is at that moment.
_TORCH_SAYS = "DataLoader worker (pid"

# An error of the data set's own code, in a process that lives on.
_RAISED_THERE = "Caught "


@contextmanager
def told_of_lost_processes(*ends: type[Exception]) -> Iterator[None]:
    """Tell of a death inside in words that help.

    Args:
        ends: errors that are the end of a pipe here: what torch has not yet seen die, its pipe tells first.

    Raises:
        IncompleteError: if a process that loads images died.
    """
    try:
        yield
    except Exception as error:
        said = str(error)
        is_end = isinstance(error, ends) and not said.startswith(_RAISED_THERE)
        if not (is_end or (isinstance(error, RuntimeError) and said.startswith(_TORCH_SAYS))):
            raise
        raise IncompleteError(
            f"a process that loads images died: {said or type(error).__name__}",
            "the same command goes on; where memory ran out, with fewer of them (`workers`)",
        ) from error

"""Load the batches of a view, in worker processes or in this one, and report a worker that died."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset

from kdcache.data.views import Batch, View
from kdcache.errors import IncompleteError, KdcacheError

# Torch raises a plain RuntimeError with this text, also from a signal handler, at any point of the main thread.
_DEAD_WORKER = "DataLoader worker (pid"

# The beginning of an error that the data set's own code raised in a worker that is still alive.
_RAISED_IN_WORKER = "Caught "


@contextmanager
def report_lost_workers(*pipe_errors: type[Exception]) -> Iterator[None]:
    """Report the death of a loader process inside the context as an IncompleteError.

    Args:
        pipe_errors: errors of a closed pipe to a worker, which may be raised before torch detects that the worker died.

    Raises:
        IncompleteError: if a process that loads images died.
    """
    try:
        yield
    except Exception as error:
        message = str(error)
        is_pipe_error = isinstance(error, pipe_errors) and not message.startswith(_RAISED_IN_WORKER)
        if not (is_pipe_error or (isinstance(error, RuntimeError) and message.startswith(_DEAD_WORKER))):
            raise
        raise IncompleteError(
            f"a process that loads images died: {message or type(error).__name__}",
            "run the same command again to resume; if memory ran out, lower `num_workers`",
        ) from error


def cut_range(ids: range, batch_size: int) -> list[range]:
    """Split a range of ids into batches; the last one may be shorter."""
    return [range(start, min(start + batch_size, ids.stop)) for start in range(ids.start, ids.stop, batch_size)]


def batches(
    data: View,
    cuts: Sequence[Sequence[int]],
    num_workers: int = 0,
    device: torch.device | str = "cpu",
    view: int | None = None,
) -> Iterator[Batch]:
    """Yield the batches of a view, in the order of `cuts`, prefetched by worker processes.

    Args:
        data: views of a data set.
        cuts: ids of each batch.
        num_workers: number of processes that load images; 0 for this one.
        device: device that uses the batches; for a GPU, they are in pinned memory.
        view: index of the view; None for `data.view`.

    Raises:
        IncompleteError: if a worker process dies.
    """
    view = data.view if view is None else view
    data.boxes(view)  # read before workers are forked, so that they share the memory
    loader: DataLoader[Any] = DataLoader(
        _Requests(data),
        batch_sampler=[(view, cut) for cut in cuts],  # type: ignore[misc]  # torch expects lists, and passes anything on
        num_workers=num_workers,
        collate_fn=_unchanged,
        pin_memory=torch.device(device).type == "cuda",
        generator=torch.Generator(),  # seeds the workers, which no view uses; leaves the caller's generator alone
    )
    with report_lost_workers(*((ConnectionError, EOFError) if num_workers else ())):
        for batch in loader:
            if isinstance(batch, KdcacheError):
                raise batch
            yield batch


class _Requests(Dataset[Any]):
    """A data set that is indexed by (view, ids).

    Errors are returned as values: of an error that a worker process raises, DataLoader passes on the text only.
    """

    def __init__(self, data: View) -> None:
        self.data = data

    def __getitems__(self, request: tuple[int, Sequence[int]]) -> Batch | KdcacheError:
        view, ids = request
        try:
            return self.data.batch(ids, view)
        except KdcacheError as error:
            return error


def _unchanged(batch: Any) -> Any:
    return batch

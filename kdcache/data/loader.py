"""Load the batches of a view, in worker processes or in this one, and report a worker that died."""

from __future__ import annotations

import multiprocessing
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch.utils.data import DataLoader, Dataset, Subset

from kdcache.data.images import ArrayImages, ItemImages
from kdcache.data.views import Batch, View
from kdcache.errors import IncompleteError, KdcacheError, UsageError
from kdcache.runtime.launched import local_processes
from kdcache.runtime.resources import available_cores

_MAX_AUTOMATIC = 8

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


class Loader:
    """The batches of a data set's views, prefetched by worker processes that stay alive from one pass to the next.

    Args:
        data: views of a data set.
        num_workers: number of processes that load images; 0 for this one, "auto" for `automatic_workers`.
        device: device that uses the batches; for a GPU, they are in pinned memory.
    """

    def __init__(self, data: View, num_workers: int | Literal["auto"] = 0, device: torch.device | str = "cpu") -> None:
        self.data = data
        self._requests = _Sampler()
        workers = automatic_workers(data) if num_workers == "auto" else num_workers
        if workers and multiprocessing.current_process().daemon:
            raise UsageError(
                f"num_workers is {workers}, and this is a daemonic process, such as one of a multiprocessing.Pool, "
                "which cannot start others",
                "set num_workers to 0 or auto, or use concurrent.futures.ProcessPoolExecutor",
            )
        self._pipe_errors = (ConnectionError, EOFError) if workers else ()
        self._loader: DataLoader[Any] = DataLoader(
            _Requests(data),
            batch_sampler=self._requests,  # type: ignore[arg-type]  # torch expects lists of ids, and passes anything on
            num_workers=workers,
            collate_fn=_unchanged,
            pin_memory=torch.device(device).type == "cuda",
            # Boxes of a view are read before workers are forked, so that they share the memory.
            persistent_workers=workers > 0 and not data.has_boxes,
            generator=torch.Generator(),  # seeds the workers, which no view uses; leaves the caller's generator alone
        )

    def batches(self, cuts: Sequence[Sequence[int]], view: int | None = None) -> Iterator[Batch]:
        """Yield the batches of a view, in the order of `cuts`. One pass at a time: a new one ends the one before.

        Args:
            cuts: ids of each batch.
            view: index of the view; None for `data.view`.

        Raises:
            IncompleteError: if a worker process dies.
        """
        view = self.data.view if view is None else view
        self.data.boxes(view)
        yield from self.requested([(view, cut) for cut in cuts])

    def requested(self, requests: Iterable[tuple[int, Sequence[int]]]) -> Iterator[Batch]:
        """Yield the batches of some requests, (view, ids) each, which are drawn as late as prefetching allows.

        Raises:
            IncompleteError: if a worker process dies.
        """
        self._requests.requests = requests
        with report_lost_workers(*self._pipe_errors):
            for batch in self._loader:
                if isinstance(batch, KdcacheError):
                    raise batch
                yield batch


def batches(
    data: View,
    cuts: Sequence[Sequence[int]],
    num_workers: int | Literal["auto"] = 0,
    device: torch.device | str = "cpu",
    view: int | None = None,
) -> Iterator[Batch]:
    """Yield the batches of a view, in the order of `cuts`, for a single pass; see `Loader`."""
    return Loader(data, workers_for(data, num_workers, len(cuts)), device).batches(cuts, view)


def workers_for(data: View, num_workers: int | Literal["auto"], n_batches: int) -> int:
    """Return the number of processes for a single pass: if it is "auto", no more than there are batches."""
    return min(automatic_workers(data), n_batches) if num_workers == "auto" else num_workers


def automatic_workers(data: View) -> int:
    """Return how many processes should load images: those of the cores that this process may use, at most 8.

    None for images in memory that are transformed together, as a process would take longer to send them, and for a data
    set of the user, which may hold what processes cannot share, such as an open HDF5 file.
    """
    images = data.samples.images
    if data.is_batched and isinstance(images, ArrayImages):
        return 0
    if isinstance(images, ItemImages) and not _is_of_torchvision(images.dataset):
        return 0
    if multiprocessing.current_process().daemon:
        return 0  # such a process, as those of a multiprocessing.Pool, cannot start others
    return max(1, min(available_cores() // local_processes(), _MAX_AUTOMATIC))


def _is_of_torchvision(dataset: Dataset[Any]) -> bool:
    """Return whether a data set, or that of which it is a part, is one of torchvision's."""
    while isinstance(dataset, Subset):
        dataset = dataset.dataset
    return type(dataset).__module__.startswith("torchvision.datasets")


class _Sampler:
    """The requests of a pass, in a form that `DataLoader` iterates over."""

    def __init__(self) -> None:
        self.requests: Iterable[tuple[int, Sequence[int]]] = ()

    def __iter__(self) -> Iterator[tuple[int, Sequence[int]]]:
        return iter(self.requests)


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

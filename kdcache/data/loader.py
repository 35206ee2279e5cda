"""Load the batches of a view, in worker processes or in this one, and report a worker that died."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset

from kdcache.data.views import Batch, View
from kdcache.errors import IncompleteError, KdcacheError

# Torch raises a bare RuntimeError, from a signal's handler too, wherever the main thread is at that moment.
_TORCH_SAYS = "DataLoader worker (pid"

# An error of the data set's own code, in a process that lives on.
_RAISED_THERE = "Caught "


@contextmanager
def report_lost_workers(*ends: type[Exception]) -> Iterator[None]:
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
            "the same command goes on; where memory ran out, with fewer of them (`num_workers`)",
        ) from error


def cut_range(ids: range, batch_size: int) -> list[range]:
    """A run of ids in batches, the last one shorter where it does not come out even."""
    return [range(start, min(start + batch_size, ids.stop)) for start in range(ids.start, ids.stop, batch_size)]


def batches(
    view: View, cuts: Sequence[Sequence[int]], workers: int = 0, device: torch.device | str = "cpu"
) -> Iterator[Batch]:
    """The batches of a view, in the order of `cuts`, loaded by `num_workers` processes ahead of the one that asks.

    Raises:
        IncompleteError: if one of these processes dies.
    """
    loader: DataLoader[Any] = DataLoader(
        _Fetched(view),
        batch_sampler=cuts,  # type: ignore[arg-type]  # torch says lists, and takes ranges as well
        num_workers=workers,
        collate_fn=_as_is,
        pin_memory=torch.device(device).type == "cuda",
        generator=torch.Generator(),  # of the workers' seeds, which no view uses; the caller's is left alone
    )
    with report_lost_workers(*((ConnectionError, EOFError) if workers else ())):
        for batch in loader:
            if isinstance(batch, KdcacheError):
                raise batch
            yield batch


class _Fetched(Dataset[Any]):
    """A view whose mistakes come back as values: of one raised in a worker process, DataLoader keeps the text only."""

    def __init__(self, view: View) -> None:
        self.view = view
        view.boxes()  # here, so that forked workers share them

    def __getitems__(self, ids: Sequence[int]) -> Batch | KdcacheError:
        try:
            return self.view.__getitems__(ids)
        except KdcacheError as error:
            return error


def _as_is(batch: Any) -> Any:
    return batch

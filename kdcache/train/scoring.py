"""The scores of a network on the validation split, shared by all processes, and on the test split."""

from __future__ import annotations

from collections.abc import Callable

import torch
from accelerate.utils import gather_object
from torch import Tensor, distributed, nn

from kdcache.config.schema import TrainSpec
from kdcache.data.loader import cut_range
from kdcache.data.views import View
from kdcache.models.checks import set_evaluation_mode
from kdcache.models.evaluate import Scorer, SplitScore, Sums
from kdcache.runtime.progress import Progress, Task
from kdcache.train.passes import TEST, VALIDATION, MicroBatches, Pass, Work
from kdcache.train.step import Trainer

_EVALUATION_BATCH = 512


def validation_work(trainer: Trainer, validation: View, epoch: int, task: Task) -> Work[SplitScore]:
    """Return the score of the network on the validation split, of which each process evaluates its share."""
    network, count, evaluated = trainer.selected_network, len(validation), 0

    def on_batch(images: int) -> None:
        nonlocal evaluated
        evaluated += images * trainer.ranks
        task.advance(0, f"validating epoch {epoch}: {min(evaluated, count):,} of {count:,} images")

    if trainer.ranks > 1:
        for statistics in network.buffers():  # of batch normalization: those of the first process are selected
            distributed.broadcast(statistics, 0)
    cuts = _evaluation_cuts(count)[trainer.accelerator.process_index :: trainer.ranks]
    wanted = Pass(validation, validation.view, cuts, 1, (epoch, VALIDATION), trainer.device, trainer.spec.num_workers)
    own = yield from _sums_work(network, wanted, on_batch)
    parts: list[Sums] = gather_object([own])
    return Sums(*map(sum, zip(*parts, strict=True))).score(validation.samples)


def testing_work(
    model: nn.Module, test: View, spec: TrainSpec, epochs: int, device: torch.device | str, progress: Progress
) -> Work[SplitScore]:
    """Return the score of a network, which is on `device`, on the test split, after so many epochs."""
    wanted = Pass(
        test,
        test.view,
        _evaluation_cuts(len(test)),
        1,
        (epochs, TEST),
        torch.device(device),
        spec.num_workers,
        stays=False,
    )
    with progress.task("test", len(test), "images") as task:
        sums = yield from _sums_work(model, wanted, task.advance)
    return sums.score(test.samples)


def _evaluation_cuts(count: int) -> list[Tensor]:
    return [torch.arange(cut.start, cut.stop) for cut in cut_range(range(count), _EVALUATION_BATCH)]


def _sums_work(network: nn.Module, wanted: Pass, on_batch: Callable[[int], None]) -> Work[Sums]:
    """Return the sums of a network, in evaluation mode, over the batches of a pass."""
    was_training, scorer = network.training, Scorer(network)
    set_evaluation_mode(network)
    for ids in wanted.cuts:
        _add(scorer, (yield wanted))
        on_batch(len(ids))
    if network.training != was_training:
        network.train(was_training)
    return scorer.sums


def _add(scorer: Scorer, micro_batches: MicroBatches) -> None:
    (batch,) = micro_batches
    scorer.add(batch.images, batch.labels)

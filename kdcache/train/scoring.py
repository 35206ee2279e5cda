"""The scores of a network on the validation split, on samples that are held out, and on the test split."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from accelerate.utils import gather_object
from torch import Tensor, distributed, nn

from kdcache.cache.teacher import Teacher
from kdcache.config.schema import TrainSpec
from kdcache.data.loader import cut_range
from kdcache.data.views import View
from kdcache.models.checks import set_evaluation_mode
from kdcache.models.evaluate import Scorer, SplitScore, Sums, total_of
from kdcache.models.pixel_scores import PixelScore, PixelSums
from kdcache.runtime.progress import Progress, Task
from kdcache.train.batches import check_groups, cut_batches
from kdcache.train.passes import TEST, VALIDATION, MicroBatches, Pass, Work
from kdcache.train.step import Trainer

_EVALUATION_BATCH = 512


def validation_work(trainer: Trainer, validation: View, epoch: int, task: Task) -> Work[SplitScore | PixelScore]:
    """Return the score of the network on the validation split, of which each process evaluates its share."""
    network, count, evaluated = trainer.selected.model, len(validation), 0

    def on_batch(images: int) -> None:
        nonlocal evaluated
        evaluated += images * trainer.ranks
        task.advance(0, f"validating epoch {epoch}: {min(evaluated, count):,} of {count:,} images")

    _share_statistics(trainer)
    cuts = _evaluation_cuts(count)[trainer.accelerator.process_index :: trainer.ranks]
    wanted = Pass(validation, validation.view, cuts, 1, (epoch, VALIDATION), trainer.device, trainer.spec.num_workers)
    own = yield from _sums_work(network, wanted, on_batch)
    parts: list[Sums | PixelSums] = gather_object([own])
    return total_of(parts).score(validation.samples)


def _share_statistics(trainer: Trainer) -> None:
    """Give all processes the batch statistics of the first one, which are those that are selected."""
    if trainer.ranks > 1:
        for statistics in trainer.selected.model.buffers():
            distributed.broadcast(statistics, 0)


class HeldOut(NamedTuple):
    """Samples that no step is taken on.

    Attributes:
        view: their images and labels.
        teacher: of these samples; None for a loss without one.
    """

    view: View
    teacher: Teacher | None


def held_out_work(trainer: Trainer, held: HeldOut, cuts: list[Tensor], epoch: int, task: Task) -> Work[float]:
    """Return the mean loss of the network on samples that are held out, of which each process evaluates its share.

    Args:
        trainer: of the network.
        held: the samples.
        cuts: their batches, from `held_out_cuts`.
        epoch: counted from 1.
        task: is advanced by each batch.
    """
    own = cuts[trainer.accelerator.process_index :: trainer.ranks]
    _share_statistics(trainer)
    network = trainer.selected
    was_training = network.model.training
    set_evaluation_mode(network.model)
    wanted = Pass(
        held.view, held.view.view, own, 1, (epoch, VALIDATION), trainer.device, trainer.spec.num_workers, held.teacher
    )
    total = torch.zeros((), dtype=torch.float64)
    for number, ids in enumerate(own, 1):
        (batch,) = yield wanted
        total += len(ids) * trainer.held_out_loss(ids, held.view, batch).cpu().double()
        task.advance(0, f"validating epoch {epoch}: batch {number:,} of {len(own):,}")
    if network.model.training != was_training:
        network.model.train(was_training)
    return math.fsum(gather_object([float(total)])) / sum(map(len, cuts))


def held_out_cuts(trainer: Trainer, held: View) -> list[Tensor]:
    """Return the ordinals [b] int64 of the batches of samples that are held out.

    They are as large as those of training, since some losses compare the samples of a batch.

    Raises:
        UsageError: if they do not divide into the groups of the loss.
    """
    groups = held.samples.groups
    order = torch.arange(len(held))[:, None] if groups is None else torch.from_numpy(groups)
    cuts = cut_batches(order, trainer.spec.model_copy(update={"gradient_accumulation_steps": 1}), 1)
    check_groups(cuts, 1, trainer.loss)
    return [ids for (ids,) in cuts]


def testing_work(
    model: nn.Module, test: View, spec: TrainSpec, epochs: int, device: torch.device | str, progress: Progress
) -> Work[SplitScore | PixelScore]:
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


def _sums_work(network: nn.Module, wanted: Pass, on_batch: Callable[[int], None]) -> Work[Sums | PixelSums]:
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
    scorer.add(batch.images, batch.labels, batch.maps)

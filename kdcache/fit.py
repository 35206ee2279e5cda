"""The training loop: epochs of steps, one schedule, and the best epoch on the validation split kept."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.optim import SGD, AdamW, Optimizer
from torch.optim.lr_scheduler import CosineAnnealingLR, LambdaLR, LRScheduler, MultiStepLR

from kdcache.cache.reader import CachedTeacher
from kdcache.errors import CorruptError, UsageError
from kdcache.evaluate import evaluate
from kdcache.losses import Loss, LossParts, distillation_loss, learned_temperature
from kdcache.pipeline import TrainSpec
from kdcache.progress import Progress, Silent
from kdcache.views import View, batches

Teacher = Callable[[Tensor, int], Tensor]
"""(ids [B] int64, view) -> logits [B, C]: a `CachedTeacher`, or anything that answers like one."""


class Epoch(NamedTuple):
    """A line of metrics.csv; losses are means over the epoch's steps, `LossParts` says of what."""

    epoch: int
    lr: float
    loss: float
    cross_entropy: float
    distillation: float
    validation_accuracy: float | None
    validation_loss: float | None


def steps(
    model: nn.Module,
    train: View,
    spec: TrainSpec,
    loss: Loss,
    epoch: int,
    optimizer: Optimizer,
    teacher: Teacher | None = None,
    device: torch.device | str = "cpu",
    theta: nn.Parameter | None = None,
) -> list[LossParts]:
    """One epoch of training, and the loss of each of its steps.

    Args:
        model: in training mode.
        train: images and labels, set to the view of this epoch.
        spec: batch size, seed and workers; the order of the samples follows from (seed, epoch).
        loss: what is minimised.
        epoch: counted from 1.
        optimizer: of the model's parameters, and of theta.
        teacher: where the teacher's logits come from; None for a loss without one.
        device: where the model is.
        theta: what a loss learns itself (`learned_temperature`).
    """
    generator = torch.Generator().manual_seed(spec.seed * 1_000_003 + epoch)
    cached = teacher if isinstance(teacher, CachedTeacher) else None
    order = cached.order(generator) if cached else torch.randperm(len(train), generator=generator)
    cuts = torch.split(order, spec.batch_size)
    if len(cuts) > 1 and len(cuts[-1]) == 1:
        # Batch norm cannot be trained on a batch of one; the next epoch's order leaves out another sample.
        cuts = cuts[:-1]
    if cached:
        cached.expect(cuts, train.view)
    parts = []
    for batch in batches(train, [cut.tolist() for cut in cuts], spec.workers, device):
        student_logits = model(batch.images.to(device, non_blocking=True))
        teacher_logits = teacher(batch.ids, train.view).to(device) if teacher is not None else None
        mixed = batch.mixed.to(device) if batch.mixed is not None else None
        step = distillation_loss(student_logits, teacher_logits, batch.labels.to(device), loss, epoch, mixed, theta)
        optimizer.zero_grad()
        torch.autograd.backward(step.total)
        optimizer.step()
        parts.append(LossParts(*(value.detach() for value in step)))
    return parts


def fit(
    model: nn.Module,
    train: View,
    validation: View | None,
    spec: TrainSpec,
    loss: Loss,
    *,
    teacher: Teacher | None = None,
    views: int | None = 1,
    device: torch.device | str = "cpu",
    on_epoch: Callable[[Epoch], None] | None = None,
    progress: Progress | None = None,
) -> Epoch:
    """Train a network, and leave in it the weights of its best epoch on the validation split.

    Args:
        model: the network; moved to `device`.
        train: images and labels.
        validation: for the selection; None keeps the last epoch's weights.
        spec: optimizer, schedule, seed.
        loss: what is minimised.
        teacher: where the teacher's logits come from.
        views: epoch e sees view (e - 1) mod `views`; None gives every epoch a view of its own.
        device: where to train.
        on_epoch: called with each line of metrics.
        progress: who is told how it goes.

    Raises:
        CorruptError: if the loss becomes NaN or infinite.
    """
    model.to(device)
    theta = learned_temperature(loss, device)
    optimizer = make_optimizer(model, spec, theta)
    schedule = _make_schedule(optimizer, spec)
    best: tuple[Epoch, dict[str, Tensor]] | None = None
    with (progress or Silent()).task("training", spec.epochs, "epochs") as task:
        for number in range(1, spec.epochs + 1):
            train.view = number - 1 if views is None else (number - 1) % views
            rate = optimizer.param_groups[0]["lr"]
            model.train()
            parts = steps(model, train, spec, loss, number, optimizer, teacher, device, theta)
            means = LossParts(*(torch.stack(values).double().mean() for values in zip(*parts, strict=True)))
            if not torch.isfinite(means.total):
                raise CorruptError(
                    f"the loss became {means.total.item()} in epoch {number}",
                    "lower train.lr, or the weights of the loss",
                )
            schedule.step()
            score = evaluate(model, validation, device) if validation is not None else None
            epoch = Epoch(
                number,
                rate,
                means.total.item(),
                means.cross_entropy.item(),
                means.distillation.item(),
                score.accuracy if score else None,
                score.loss if score else None,
            )
            if on_epoch:
                on_epoch(epoch)
            if best is None or score is None or score.accuracy > (best[0].validation_accuracy or 0.0):
                best = epoch, copy.deepcopy(model.state_dict())
            task.advance(1, f"loss {epoch.loss:.3f}" + (f", validation {score.accuracy:.1%}" if score else ""))
    if best is None:
        raise UsageError("there was no epoch to train", "set train.epochs to 1 or more")
    model.load_state_dict(best[1])
    return best[0]


def make_optimizer(model: nn.Module, spec: TrainSpec, theta: nn.Parameter | None = None) -> Optimizer:
    """The optimizer that a pipeline describes, of the model and of what its loss learns."""
    parameters = [*model.parameters(), *([] if theta is None else [theta])]
    if spec.optimizer == "adamw":
        return AdamW(parameters, lr=spec.lr, weight_decay=spec.weight_decay)
    nesterov = spec.nesterov and spec.momentum > 0
    return SGD(parameters, lr=spec.lr, momentum=spec.momentum, nesterov=nesterov, weight_decay=spec.weight_decay)


def _make_schedule(optimizer: Optimizer, spec: TrainSpec) -> LRScheduler:
    if spec.schedule == "cosine":
        return CosineAnnealingLR(optimizer, T_max=spec.epochs)
    if spec.schedule == "multistep":
        return MultiStepLR(optimizer, milestones=spec.milestones, gamma=spec.decay)
    return LambdaLR(optimizer, lambda _: 1.0)

"""Losses of networks that say a class of every pixel, against sums over single pixels in float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from kdcache.losses import Loss, learned_temperature
from kdcache.losses.batch import BatchTotals
from kdcache.losses.dense import DenseTotals, dense_loss, dense_totals
from kdcache.losses.maps import labels_of_places

CLASSES, TAU = 5, 4.0


def batch(seed: int = 0, places: tuple[int, int] = (3, 4), pixels: tuple[int, int] = (9, 12)) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(seed)
    student, teacher = (
        3 * torch.randn(2, CLASSES, *places, generator=generator, dtype=torch.float64) for _ in range(2)
    )
    maps = torch.randint(-1, CLASSES, (2, *pixels), generator=generator)
    return student, teacher, maps


def loss_of(name: str, **options: object) -> Loss:
    return Loss.model_validate({"name": name, **options})


def by_pixels(student: Tensor, teacher: Tensor, maps: Tensor, loss: Loss) -> Tensor:
    """CE and KD as sums over single pixels and places."""
    enlarged = F.interpolate(student, maps.shape[1:], mode="bilinear")
    ce, known = torch.zeros((), dtype=torch.float64), 0
    for b, row, column in (maps >= 0).nonzero().tolist():
        ce = ce - enlarged[b, :, row, column].log_softmax(0)[maps[b, row, column]]
        known += 1
    kd, count = torch.zeros((), dtype=torch.float64), 0
    for b in range(len(student)):
        for row in range(student.shape[2]):
            for column in range(student.shape[3]):
                p = (teacher[b, :, row, column] / TAU).softmax(0)
                q = (student[b, :, row, column] / TAU).log_softmax(0)
                kd, count = kd + TAU**2 * (p * (p.log() - q)).sum(), count + 1
    return loss.ce_weight * ce / known + loss.kd_weight * kd / count


@pytest.mark.parametrize("pixels", [(9, 12), (3, 4), (8, 7)])
def test_cross_entropy_is_of_pixels_and_distillation_of_places(pixels: tuple[int, int]) -> None:
    student, teacher, maps = batch(pixels=pixels)
    loss, results = loss_of("kd"), []
    for function in (lambda *given: dense_loss(*given).total, by_pixels):
        leaf = student.clone().requires_grad_()
        total = function(leaf, teacher, maps, loss)
        results.append((total.detach(), *torch.autograd.grad(total, leaf)))
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", ["ce", "kd", "dtkd", "ka", "ka+dtd", "dkd", "dist", "ctkd", "zscore"])
@pytest.mark.parametrize("cut", [1, 2])
def test_parts_of_a_step_add_up(name: str, cut: int) -> None:
    student, teacher, maps = (torch.cat(parts) for parts in zip(batch(1), batch(2), strict=True))
    loss = loss_of(name)
    if cut == 2 and loss.is_of_the_batch:
        pytest.skip("its statistics are of the whole step, which the trainer computes at once")
    learned = learned_temperature(loss)
    theta = None if learned is None else learned.detach().double()
    used = teacher if loss.uses_teacher else None
    whole = dense_loss(student, used, maps, loss, 3, theta)
    totals = dense_totals(maps, used)
    size = len(maps) // cut
    parts = [
        dense_loss(
            student[start : start + size],
            None if used is None else used[start : start + size],
            maps[start : start + size],
            loss,
            3,
            theta,
            totals,
        )
        for start in range(0, len(maps), size)
    ]
    for value, pieces in zip(whole, zip(*parts, strict=True), strict=True):
        torch.testing.assert_close(torch.stack(pieces).sum(), value, rtol=1e-12, atol=1e-12)


def test_the_student_is_brought_to_the_places_of_the_teacher() -> None:
    student, teacher, maps = batch()
    small = F.interpolate(student, (2, 2), mode="bilinear")
    loss = loss_of("kd", ce_weight=0.0)
    expected = dense_loss(F.interpolate(small, (3, 4), mode="bilinear"), teacher, maps, loss).total
    torch.testing.assert_close(dense_loss(small, teacher, maps, loss).total, expected)


def test_labels_of_places_are_those_of_the_nearest_pixels() -> None:
    maps = torch.arange(36).reshape(1, 6, 6)
    # The center of place (0, 0) of 2 x 2 lies between pixels 1 and 2 of each axis, or at pixel 1 of 3 x 3.
    assert labels_of_places(maps, (2, 2)).flatten().tolist() == [7, 10, 25, 28]
    assert torch.equal(labels_of_places(maps, (6, 6)), maps)


def test_ignored_pixels_count_for_distillation_alone() -> None:
    student, teacher, maps = batch(pixels=(3, 4))
    none = torch.full_like(maps, -1)
    loss = loss_of("kd")
    parts = dense_loss(student, teacher, none, loss)
    assert float(parts.cross_entropy) == 0 and float(parts.distillation) > 0
    changed = dense_loss(student, teacher, maps, loss)
    torch.testing.assert_close(parts.distillation, changed.distillation)
    assert dense_totals(none, teacher) == DenseTotals(
        torch.tensor(0), BatchTotals(24, torch.tensor(0), torch.tensor(0))
    )


def test_half_precision_is_raised() -> None:
    student, teacher, maps = batch()
    loss = loss_of("dtkd")
    half = dense_loss(student.bfloat16(), teacher.float(), maps, loss, 30)
    full = dense_loss(student.bfloat16().float(), teacher.float(), maps, loss, 30)
    assert half.total.dtype == torch.float32
    torch.testing.assert_close(half.total, full.total)

"""Losses on maps against NumPy in float64, written from their formulas one place after the other."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from torch import Tensor
from torch.autograd import gradcheck

import kdcache
from kdcache.errors import UsageError
from kdcache.losses.batch import BatchTotals
from kdcache.losses.boundaries import body_kd, boundaries, boundary_kd
from kdcache.losses.config import Loss
from kdcache.losses.map_options import MAP_LOSSES
from kdcache.losses.maps import (
    attention_transfer,
    channel_wise,
    masked_latents,
    pixel_kd,
    pixel_mse,
    resized,
    rows_of_places,
    standardized,
    theia,
)

Array = npt.NDArray[np.float64]
SHAPE = (3, 4, 5, 6)


def drawn(*shape: int, seed: int = 0, scale: float = 2.0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return scale * torch.randn(shape or SHAPE, dtype=torch.float64, generator=generator)


STUDENT, TEACHER = drawn(), drawn(seed=1)
MASK = torch.rand(3, 5, 6, generator=torch.Generator().manual_seed(2)) < 0.6
LABELS = torch.randint(0, 4, (3, 20, 24), generator=torch.Generator().manual_seed(3))


def softmax(values: Array) -> Array:
    shifted = np.exp(values - values.max())
    result: Array = shifted / shifted.sum()
    return result


def kl(true: Array, other: Array) -> float:
    p, q = softmax(true), softmax(other)
    return float((p * np.log(p / q)).sum())


def places(maps: Tensor) -> itertools.product[tuple[int, int]]:
    return itertools.product(range(maps.shape[2]), range(maps.shape[3]))


def of_places(student: Tensor, teacher: Tensor, function: Any, mask: Tensor | None = None) -> list[float]:
    """The mean of a function of two vectors over the places of each map that count."""
    means = []
    for index in range(len(student)):
        s, t = student[index].numpy(), teacher[index].numpy()
        counted = [(y, x) for y, x in places(student) if mask is None or mask[index, y, x]]
        means.append(float(np.mean([function(t[:, y, x], s[:, y, x]) for y, x in counted])) if counted else 0.0)
    return means


def near(found: Tensor, expected: Any) -> None:
    np.testing.assert_allclose(found.detach().numpy(), expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("tau", [1.0, 4.0])
@pytest.mark.parametrize("mask", [None, MASK])
def test_pixel_kd(tau: float, mask: Tensor | None) -> None:
    expected = of_places(STUDENT, TEACHER, lambda t, s: tau**2 * kl(t / tau, s / tau), mask)
    near(pixel_kd(STUDENT, TEACHER, tau, mask), expected)


def test_pixel_kd_is_that_of_cirkd() -> None:
    """Their code: batchmean over the rows of all places, times T^2."""
    rows = [maps.permute(0, 2, 3, 1).reshape(-1, 4) / 2 for maps in (STUDENT, TEACHER)]
    theirs = torch.nn.functional.kl_div(rows[0].log_softmax(1), rows[1].softmax(1), reduction="batchmean") * 4
    torch.testing.assert_close(pixel_kd(STUDENT, TEACHER, 2.0).mean(), theirs)


def test_places_that_do_not_count_change_nothing() -> None:
    student = STUDENT.clone().requires_grad_()
    broken = torch.where(MASK[:, None], TEACHER, torch.inf)
    broken[1] = torch.inf
    mask = MASK.clone()
    mask[1] = False
    values = pixel_mse(student, broken, mask)
    (gradient,) = torch.autograd.grad(values.sum(), student)
    near(values[1], 0.0)
    assert gradient.isfinite().all()
    assert not gradient[1].any()


@pytest.mark.parametrize("mask", [None, MASK])
def test_pixel_mse(mask: Tensor | None) -> None:
    near(pixel_mse(STUDENT, TEACHER, mask), of_places(STUDENT, TEACHER, lambda t, s: np.mean((t - s) ** 2), mask))


@pytest.mark.parametrize("tau", [1.0, 4.0])
def test_channel_wise_divergence(tau: float) -> None:
    s, t = STUDENT.flatten(2).numpy(), TEACHER.flatten(2).numpy()
    expected = [np.mean([tau**2 * kl(t[b, c] / tau, s[b, c] / tau) for c in range(4)]) for b in range(3)]
    near(channel_wise(STUDENT, TEACHER, tau), expected)


def test_channel_wise_divergence_sees_the_level_of_a_place_and_pixel_kd_does_not() -> None:
    shifted = TEACHER + drawn(3, 1, 5, 6, seed=4)
    near(pixel_kd(STUDENT, shifted), pixel_kd(STUDENT, TEACHER).numpy())
    assert (channel_wise(STUDENT, shifted) - channel_wise(STUDENT, TEACHER)).abs().min() > 0.01


@pytest.mark.parametrize("power", [1.0, 2.0, 4.0])
def test_attention_transfer(power: float) -> None:
    wide = drawn(3, 7, 5, 6, seed=5)
    attention = [(np.abs(maps.numpy()) ** power).mean(axis=1).reshape(3, -1) for maps in (STUDENT, wide)]
    unit = [values / np.linalg.norm(values, axis=1, keepdims=True) for values in attention]
    near(attention_transfer(STUDENT, wide, power), ((unit[0] - unit[1]) ** 2).mean(axis=1))


def huber(apart: Array) -> Array:
    return np.where(np.abs(apart) < 1, 0.5 * apart**2, np.abs(apart) - 0.5)


@pytest.mark.parametrize("given", [False, True])
def test_theia(given: bool) -> None:
    s, t = STUDENT.numpy(), TEACHER.numpy()
    mean, deviation = t.mean(axis=(0, 2, 3)), t.std(axis=(0, 2, 3))
    if given:
        mean, deviation = mean + 1, deviation * 2
    target = (t - mean[:, None, None]) / deviation[:, None, None]
    expected = []
    for index in range(3):
        h, u = s[index].ravel(), target[index].ravel()
        cosine = h @ u / np.linalg.norm(h) / np.linalg.norm(u)
        expected.append(0.9 * (1 - cosine) + 0.1 * huber(h - u).mean())
    statistics = (torch.from_numpy(mean), torch.from_numpy(deviation)) if given else (None, None)
    near(theia(STUDENT, TEACHER, 0.9, *statistics), expected)


def test_theia_of_parts_of_a_batch_has_the_statistics_of_the_whole() -> None:
    whole = theia(STUDENT, TEACHER)
    loss = options_of("theia")

    def batch_sum(rows: Tensor) -> Tensor:
        return sums.pop(0) if len(rows) < 3 else rows.sum(dim=0)

    # What the sums over the whole batch are, in the order in which the loss asks for them.
    mean = TEACHER.mean(dim=(2, 3))
    spread = (TEACHER - mean.mean(dim=0)[:, None, None]).square().mean(dim=(2, 3))
    parts = []
    for cut in (slice(0, 1), slice(1, 3)):
        three = torch.tensor(3.0, dtype=torch.float64)
        sums = [mean.sum(dim=0), three, spread.sum(dim=0), three]
        parts.append(loss.values(STUDENT[cut], TEACHER[cut], BatchTotals(3, 3, 3, sum=batch_sum)))
    near(torch.cat(parts), whole.numpy())


@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("mask", [None, MASK])
def test_masked_latents(normalize: bool, mask: Tensor | None) -> None:
    def apart(t: Array, s: Array) -> float:
        target = (t - t.mean()) / np.sqrt(t.var() + 1e-5) if normalize else t
        return float(np.abs(s - target).mean())

    near(masked_latents(STUDENT, TEACHER, mask, normalize), of_places(STUDENT, TEACHER, apart, mask))


def test_standardized_maps() -> None:
    values = STUDENT.numpy()
    over = {"channels": (1,), "places": (2, 3)}
    for name, axes in over.items():
        count = np.prod([values.shape[axis] for axis in axes])
        deviation = values.std(axis=axes, keepdims=True) * np.sqrt(count / (count - 1)) + 1e-7
        near(standardized(STUDENT, name), (values - values.mean(axis=axes, keepdims=True)) / deviation)  # type: ignore[arg-type]
    assert standardized(STUDENT, "none") is STUDENT


@pytest.mark.parametrize("align_corners", [False, True])
def test_bilinear_interpolation_is_that_of_its_definition(align_corners: bool) -> None:
    maps, (height, width) = TEACHER[:1, :1], (9, 13)
    found = resized(maps, (height, width), align_corners=align_corners)[0, 0]
    grid = maps[0, 0].numpy()
    for y, x in itertools.product(range(height), range(width)):
        at = []
        for index, size, of in ((y, height, 5), (x, width, 6)):
            where = index * (of - 1) / (size - 1) if align_corners else max((index + 0.5) * of / size - 0.5, 0)
            low = min(int(where), of - 1)
            at.append((low, min(low + 1, of - 1), where - low))
        (top, bottom, down), (left, right, over) = at
        above = grid[top, left] * (1 - over) + grid[top, right] * over
        below = grid[bottom, left] * (1 - over) + grid[bottom, right] * over
        assert float(found[y, x]) == pytest.approx(above * (1 - down) + below * down, abs=1e-12)
    assert resized(maps, (5, 6)) is maps
    assert resized(maps, (10, 12), "nearest")[0, 0, 3, 5] == maps[0, 0, 1, 2]


# Labels


@pytest.mark.parametrize("kind", ["dtkd", "ka", "dtkd+ka", "zscore"])
def test_losses_of_class_logits_at_every_place(kind: str) -> None:
    """Against the loss of one place after the other; these losses have no statistics of the batch."""
    labels = torch.randint(0, 4, (3, 5, 6), generator=torch.Generator().manual_seed(6))
    labels[0, 1, 2] = 255
    student, teacher = STUDENT.float(), TEACHER.float()
    loss = kdcache.loss(kind)
    rows = rows_of_places(student, teacher, labels)
    assert rows.labels[8] == -1
    expected = []
    for b, y, x in itertools.product(range(3), range(5), range(6)):
        label = -1 if labels[b, y, x] == 255 else labels[b, y, x]
        one = loss(student[b : b + 1, :, y, x], teacher[b : b + 1, :, y, x], torch.tensor([int(label)]), epoch=30)
        expected.append((float(one.distillation), float(one.cross_entropy)))
    parts = loss(*rows, epoch=30)
    means = np.mean([kd for kd, _ in expected]), np.sum([ce for _, ce in expected]) / 89
    np.testing.assert_allclose([float(parts.distillation), float(parts.cross_entropy)], means, rtol=1e-4)
    assert len(rows_of_places(student, teacher, labels, with_ignored=False).labels) == 89


def test_boundaries_are_where_another_class_is_near() -> None:
    labels = LABELS.clone()
    labels[0] = 1
    labels[1, :, :12], labels[1, :, 12:] = 0, 3
    labels[1, 8:, 11] = 255
    found = boundaries(labels, 4, (5, 6)).double()
    height, width = labels.shape[1:]
    pixels = np.zeros((3, 4, height, width))
    for b, c, y, x in itertools.product(range(3), range(4), range(height), range(width)):
        if labels[b, y, x] != 255:
            near_by = labels[b, max(y - 3, 0) : y + 4, max(x - 3, 0) : x + 4] == c
            pixels[b, c, y, x] = float(near_by.any()) - float(near_by.all())
    near(found, pixels.reshape(3, 4, 5, 4, 6, 4).mean(axis=(3, 5)))
    assert not found[0].any()


def test_boundary_and_body_terms() -> None:
    edges = boundaries(LABELS // 2, 4, (5, 6)).double()
    assert not edges[:, 2:].any()  # two classes do not occur
    apart = np.zeros((3, 5, 6))
    for b, y, x in np.ndindex(apart.shape):
        apart[b, y, x] = kl(TEACHER[b, :, y, x].numpy(), STUDENT[b, :, y, x].numpy())
    expected = []
    for b in range(3):
        terms = [2 / float(edges[b, c].sum()) * float((edges[b, c].numpy() * apart[b]).sum()) for c in range(2)]
        expected.append(sum(terms))
    near(boundary_kd(STUDENT, TEACHER, edges), expected)
    s, t = ((maps * (1 - edges)).flatten(2).numpy() for maps in (STUDENT, TEACHER))
    near(body_kd(STUDENT, TEACHER, edges), [np.mean([kl(t[b, c], s[b, c]) for c in range(4)]) for b in range(3)])


# Options


def options_of(name: str, **options: Any) -> Any:
    return Loss.model_validate({"logits": False, "maps": {"name": name, **options}}).outputs["maps"]


def with_labels(name: str, places: tuple[int, int], count: int) -> dict[str, Tensor]:
    """Label maps of twice as many rows and columns as the places, for a loss that needs them."""
    if not MAP_LOSSES[name].needs_maps:
        return {}
    generator = torch.Generator().manual_seed(5)
    shape = (count, 2 * places[0], 2 * places[1])
    return {"label_maps": torch.randint(-1, 3, shape, generator=generator)}


@pytest.mark.parametrize("name", MAP_LOSSES)
def test_gradients_are_those_of_finite_differences(name: str) -> None:
    student, teacher = drawn(2, 3, 3, 4).requires_grad_(), drawn(2, 3, 3, 4, seed=1)
    assert gradcheck(
        lambda values: options_of(name).values(values, teacher, **with_labels(name, (3, 4), 2)), (student,)
    )


@pytest.mark.parametrize("name", MAP_LOSSES)
def test_degenerate_maps_have_finite_losses_and_gradients(name: str) -> None:
    for given, teacher in ((torch.zeros(2, 3, 4, 4), torch.ones(2, 3, 4, 4)), (drawn(1, 3, 1, 1), drawn(1, 3, 1, 1))):
        student = given.clone().requires_grad_()
        labels = with_labels(name, (given.shape[2], given.shape[3]), len(given))
        values = options_of(name).values(student, teacher, **labels)
        (gradient,) = torch.autograd.grad(values.sum(), student)
        assert values.isfinite().all()
        assert gradient.isfinite().all()


@pytest.mark.parametrize("name", ["pixel_kd", "pixel_mse", "cwd", "at", "salt"])
def test_a_student_that_is_the_teacher_has_no_loss(name: str) -> None:
    assert options_of(name).values(TEACHER, TEACHER).abs().max() < 1e-12


@pytest.mark.parametrize(("align", "corners"), [("bilinear", False), ("bilinear", True), ("nearest", False)])
def test_the_teachers_map_is_brought_to_the_grid_of_the_student(align: Any, corners: bool) -> None:
    student = drawn(3, 4, 10, 12, seed=7)
    found = options_of("pixel_kd", align=align, align_corners=corners, tau=2.0).values(student, TEACHER)
    mode: Any = {"mode": align} if align == "nearest" else {"mode": align, "align_corners": corners}
    enlarged = torch.nn.functional.interpolate(TEACHER, (10, 12), **mode)
    near(found, pixel_kd(student, enlarged, 2.0).numpy())


@pytest.mark.parametrize(
    ("name", "over"), [("pixel_kd", "channels"), ("pixel_mse", "channels"), ("pixel_mse", "places")]
)
def test_both_sides_are_standardized(name: str, over: Any) -> None:
    both = standardized(STUDENT, over), standardized(TEACHER, over)
    expected = pixel_kd(*both) if name == "pixel_kd" else pixel_mse(*both)
    near(options_of(name, standardize=over).values(STUDENT, TEACHER), expected.numpy())


def test_a_loss_of_maps_by_name() -> None:
    loss = kdcache.output_loss("cwd", tau=2.0, weight=3.0)
    near(loss(STUDENT, TEACHER), 3 * float(channel_wise(STUDENT, TEACHER, 2.0).mean()))
    assert kdcache.output_loss("at")(STUDENT, drawn(3, 9, 2, 2)).isfinite()
    with pytest.raises(UsageError, match=r"maps are \[3, 4, 5, 6\], the teacher's \[3, 9, 2, 2\]"):
        loss(STUDENT, drawn(3, 9, 2, 2))
    with pytest.raises(UsageError, match=r"the student's maps are \[3, 4\]"):
        loss(STUDENT[:, :, 0, 0], TEACHER[:, :, 0, 0])
    with pytest.raises(UsageError, match="did you mean pixel_kd"):
        kdcache.output_loss("pixelkd")

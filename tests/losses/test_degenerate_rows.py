"""Every loss where its norms, deviations and sharpnesses are 0: equal logits, constant rows, heads of zeros."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from helpers.loss_cases import loss_of, with_gradient
from pydantic import ValidationError
from torch import Tensor, nn

from kdcache.losses import Loss, distillation_loss, learned_temperature
from kdcache.losses.correlation import cosine, dist
from kdcache.losses.normalizations import z_score
from kdcache.losses.presets import PARTS
from kdcache.losses.registry import ADJUSTMENTS, DIVERGENCES, NORMALIZATIONS, TEMPERATURES

BOUND = 1e5
"""Of any entry of a gradient: T^2 over the smallest deviation that counts, which DIST and z-scores divide by."""

NAMES = [
    *PARTS,
    "zscore+dist",
    "zscore+mse",
    "dtkd+dist",
    "dtd+dist",
    "dtd+cosine",
    "ka+dist",
    "ctkd+dist",
    "zscore+ctkd",
]


def logits(rows: int, classes: int, seed: int) -> Tensor:
    return 3 * torch.randn(rows, classes, generator=torch.Generator().manual_seed(seed))


def options_of(name: str) -> dict[str, Any]:
    options: dict[str, Any] = {"adjustment": {"top": 3}} if "truncated" in name else {}
    return {**options, "temperature": {"kind": "constant", "tau": 1.0}} if name == "zscore+mse" else options


def pairs(dtype: torch.dtype) -> dict[str, tuple[Tensor, Tensor]]:
    """Student's and teacher's logits [6, 10] with degenerate rows."""
    v, u = logits(6, 10, 1).to(dtype), logits(6, 10, 2).to(dtype)
    zeros, constant = torch.zeros_like(v), torch.full_like(v, 1000.1)
    # Constant up to rounding, in some rows only, and in a batch whose columns do not vary.
    rounded = constant + torch.finfo(dtype).eps * 1000 * torch.randn(6, 10, generator=torch.Generator().manual_seed(3))
    some = torch.where(torch.arange(6).unsqueeze(1) < 3, zeros, v)
    return {
        "equal logits": (u, u),
        "zero student": (zeros, u),
        "zero teacher": (v, zeros),
        "both zero": (zeros, zeros),
        "constant student": (constant, u),
        "constant teacher": (v, constant),
        "constant but for rounding": (rounded.to(dtype), u),
        "some rows zero": (some, u),
        "the same row again and again": (v[:1].repeat(6, 1), u),
        "the same rows of both": (v[:1].repeat(6, 1), u[:1].repeat(6, 1)),
        "a batch of one": (zeros[:1], u[:1]),
    }


CASES = list(pairs(torch.float32))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("name", NAMES)
def test_value_and_gradient_stay_bounded(name: str, case: str, dtype: torch.dtype) -> None:
    student, teacher = pairs(dtype)[case]
    loss = loss_of(name, **options_of(name))
    for labels in (torch.arange(len(student)), torch.full((len(student),), -1)):
        theta = learned_temperature(loss)
        value, gradient = with_gradient(
            lambda v: distillation_loss(v, teacher, labels, loss, theta=theta).total,  # noqa: B023  # called at once
            student,
        )
        assert value.isfinite()
        assert value >= -1e-6
        assert gradient.isfinite().all()
        assert gradient.abs().max() < (BOUND if "dist" in name or "zscore" in name else 1e3)


def every_combination() -> dict[str, Loss]:
    """Every kind of every axis of the registry, with every other that it may be combined with."""
    axes = [[*NORMALIZATIONS], [*ADJUSTMENTS], [*TEMPERATURES], [*DIVERGENCES]]
    valid: dict[str, Loss] = {}
    for normalization, adjustment, temperature, divergence in itertools.product(*axes):
        given = {
            "normalization": normalization,
            "adjustment": {"kind": adjustment, **({"top": 3} if adjustment == "truncation" else {})},
            "temperature": {"kind": temperature},
            "divergence": {"kind": divergence},
        }
        for options in ({}, {"tau": 1.0}) if temperature == "constant" else ({},):
            try:
                loss = Loss.model_validate({**given, "temperature": {"kind": temperature, **options}})
            except ValidationError:
                continue
            valid[f"{normalization} {adjustment} {temperature} {divergence}"] = loss
            break
    return valid


COMBINATIONS = every_combination()


def test_every_kind_of_the_registry_is_in_a_combination() -> None:
    kinds = [{*NORMALIZATIONS}, {*ADJUSTMENTS}, {*TEMPERATURES}, {*DIVERGENCES}]
    for axis, expected in enumerate(kinds):
        assert {name.split()[axis] for name in COMBINATIONS} == expected


@pytest.mark.parametrize("combination", COMBINATIONS)
def test_every_combination_stays_bounded_at_degenerate_rows(combination: str) -> None:
    loss = COMBINATIONS[combination]
    theta = learned_temperature(loss)
    for student, teacher in pairs(torch.float32).values():
        value, gradient = with_gradient(
            lambda v: distillation_loss(v, teacher, torch.arange(len(v)), loss, theta=theta).total,  # noqa: B023
            student,
        )
        assert value.isfinite()
        assert gradient.isfinite().all()
        assert gradient.abs().max() < BOUND


@pytest.mark.parametrize("name", NAMES)
def test_a_head_of_zeros_gets_a_bounded_gradient_and_learns(name: str) -> None:
    features, teacher = logits(8, 16, 4), logits(8, 10, 5)
    labels = teacher.argmax(dim=1)
    head = nn.Linear(16, 10)
    nn.init.zeros_(head.weight)
    nn.init.zeros_(head.bias)
    loss = loss_of(name, **options_of(name), ce_weight=1.0)
    theta = learned_temperature(loss)
    optimizer = torch.optim.SGD(head.parameters(), lr=0.01)
    totals = []
    for _ in range(30):
        parts = distillation_loss(head(features), teacher, labels, loss, theta=theta)
        optimizer.zero_grad()
        torch.autograd.backward(parts.total)
        for parameter in head.parameters():
            assert parameter.grad is not None
            assert parameter.grad.isfinite().all()
            assert parameter.grad.abs().max() < BOUND
        nn.utils.clip_grad_norm_(head.parameters(), 1.0)
        optimizer.step()
        totals.append(parts.cross_entropy.item())
    assert totals[-1] < totals[0]


def test_no_correlation_counts_a_half_and_has_no_gradient() -> None:
    student, teacher = torch.zeros(1, 4), torch.tensor([[1.0, 2.0, 3.0, 4.0]])
    labels = torch.tensor([0])
    value, gradient = with_gradient(lambda v: dist(v, teacher, labels, gamma=0.0).sum(), student)
    assert value == 0.5
    assert (gradient == 0).all()
    value, gradient = with_gradient(lambda v: dist(v, torch.zeros_like(v), labels).sum(), student)
    assert value == 0
    assert (gradient == 0).all()


def test_the_guards_leave_all_other_values_as_they_were_to_the_last_bit() -> None:
    for rows, classes in itertools.product((2, 7), (2, 10, 100)):
        v, u = logits(rows, classes, 6), logits(rows, classes, 7)
        expected = (v - v.mean(dim=1, keepdim=True)) / (v.std(dim=1, keepdim=True) + 1e-7)
        assert torch.equal(z_score(v), expected)
        q, p = v.softmax(dim=1), u.softmax(dim=1)
        a, b = (z / z.square().sum(dim=1, keepdim=True).sqrt() for z in (q, p))
        assert torch.equal(cosine(v, u, torch.zeros(rows)), (a - b).square().sum(dim=1) / 2)


def test_a_column_of_tiny_probabilities_still_counts() -> None:
    # 1e-13 is small, but it varies by much of itself.
    student = torch.tensor([[0.0, -30.0, 1.0], [0.0, -31.0, 2.0], [0.0, -29.0, 0.0]], dtype=torch.float64)
    teacher = torch.tensor([[0.0, -29.0, 1.0], [0.0, -31.0, 3.0], [0.0, -30.0, 0.0]], dtype=torch.float64)
    q, p = student.softmax(dim=1)[:, 1], teacher.softmax(dim=1)[:, 1]
    correlation = torch.corrcoef(torch.stack([q, p]))[0, 1]
    columns = [
        torch.corrcoef(torch.stack([student.softmax(dim=1)[:, j], teacher.softmax(dim=1)[:, j]]))[0, 1]
        for j in range(3)
    ]
    assert abs(correlation) < 0.9
    value = dist(student, teacher, torch.zeros(3), beta=0.0)
    torch.testing.assert_close(value[0], (1 - torch.stack(columns)).mean())

"""The names of losses and their options: what they stand for, and which are refused."""

from __future__ import annotations

import itertools
import json
from typing import Any

import pytest
import torch
from helpers.loss_cases import loss_of
from pydantic import ValidationError

from kdcache.losses import Loss, distillation_loss, learned_temperature
from kdcache.losses.presets import PARTS
from kdcache.losses.registry import ADJUSTMENTS, DIVERGENCES, NORMALIZATIONS, TEMPERATURES


@pytest.mark.parametrize(
    ("name", "adjustment", "temperature"),
    [
        ("ce", "none", "constant"),
        ("kd", "none", "constant"),
        ("dtkd", "none", "dtkd"),
        ("dtd", "none", "dtd_flsw"),
        ("ka", "probability_shift", "constant"),
        ("ka+kd", "probability_shift", "constant"),
        ("ka+dtd", "probability_shift", "dtd_flsw"),
        ("dtd+ka", "probability_shift", "dtd_flsw"),
        ("dtkd+ka", "probability_shift", "dtkd"),
        ("ka+dtkd", "probability_shift", "dtkd"),
        ("lsr", "label_smoothing", "constant"),
        ("truncated+cwsm", "truncation", "dtd_cwsm"),
        ("ctkd", "none", "ctkd"),
        ("noisy+cswt", "noise", "cswt"),
    ],
)
def test_names_choose_their_axes(name: str, adjustment: str, temperature: str) -> None:
    loss = loss_of(name)
    assert (loss.name, loss.adjustment.kind, loss.temperature.kind) == (name, adjustment, temperature)
    weights = (loss.ce_weight, loss.kd_weight, loss.plain_kd_weight, loss.warmup_epochs)
    if name == "ce":
        assert weights == (1, 0, 0, 0)
    elif temperature == "dtkd":
        assert weights == (1, 3, 1, 20)
    else:
        assert weights == (0.1, 0.9, 0, 0)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("hinton", "unknown loss 'hinton': its parts are kd, ka, lsr"),
        ("", "unknown loss ''"),
        ("dtkd+", "unknown loss"),
        ("KD", "unknown loss 'KD'"),
        ("ce+ka", "or 'ce' alone"),
        ("dtkd+dtd", "'dtkd\\+dtd' chooses the same thing twice"),
        ("kd+dtkd", "chooses the same thing twice"),
        ("ka+ka", "'ka\\+ka' chooses the same thing twice"),
        ("zscore+zscore", "chooses the same thing twice: take one of zscore and zscore"),
        ("ctkd+dkd+dtkd", "chooses the same thing twice: take one of ctkd and dtkd"),
        ("r2kd+cskd", "chooses the same thing twice: take one of r2kd and cskd"),
        ("noisy+ka", "chooses the same thing twice"),
        ("dkd+dist", "chooses the same thing twice: take one of dkd and dist"),
        ("lsr+kd+ka", "chooses the same thing twice: take one of lsr and ka"),
        ("dtd+mse", "cancels out of mse"),
        ("dtkd+pld", "take dtkd with detach: true"),
    ],
)
def test_names_that_mean_nothing_are_refused(name: str, message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        loss_of(name)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"alpha": 1}, "alpha\n  Extra inputs are not permitted"),
        ({"temperature": {"gamma": 2}}, "gamma\n  Extra inputs are not permitted"),
        ({"temperature": {"kind": "dtd_cwsm", "gamma": 2}}, "gamma\n  Extra inputs are not permitted"),
        ({"temperature": {"kind": "warm"}}, "'constant', 'dtkd', 'dtd_flsw', 'dtd_cwsm', 'ctkd'"),
        ({"divergence": {"kind": "l1"}}, "'kl', 'reverse_kl', 'jensen_shannon', 'dkd', 'dist'"),
        ({"name": "dkd", "divergence": {"gamma": 2}}, "gamma\n  Extra inputs are not permitted"),
        ({"name": "ofa", "divergence": {"eps": 0.5}}, "greater than or equal to 1"),
        ({"name": "truncated", "adjustment": {"top": 0}}, "greater than or equal to 1"),
        ({"normalization": "max"}, "'none' or 'z_score'"),
        ({"temperature": {"tau": 0}}, "greater than 0"),
        ({"adjustment": {"smoothing": 0.1}}, "smoothing\n  Extra inputs are not permitted"),
        ({"kd_weight": -1}, "greater than or equal to 0"),
        ({"kd_weight": "1"}, "valid number"),
        ({"plain_kd_weight": 1}, "raise kd_weight instead"),
        ({"ce_weight": 0, "kd_weight": 0}, "nothing to learn"),
        ({"name": "ce", "temperature": {"kind": "dtkd"}}, "would have no effect"),
        ({"name": "ce", "temperature": {"tau": 8}}, "would have no effect"),
        ({"name": "ce", "adjustment": {"kind": "label_smoothing"}}, "would have no effect"),
        ({"name": "ce", "warmup_epochs": 5}, "would have no effect"),
        ({"name": "ce", "normalization": "z_score"}, "would have no effect"),
        ({"name": "ce", "divergence": {"kind": "dist"}}, "would have no effect"),
        ({"name": "dkd", "divergence": {"alpha": 0, "beta": 0}}, "alpha and beta of dkd are both 0"),
        ({"name": "dist", "divergence": {"beta": 0, "gamma": 0}}, "beta and gamma of dist are both 0"),
        ({"name": "brier", "divergence": {"alpha": 1}}, "less than 1"),
        ({"name": "brier+dtkd", "divergence": {"alpha": 0.5}}, "brier is above 0 even where"),
        ({"name": "comparative", "temperature": {"tau": 4}}, "cancels out of comparative"),
        ({"name": "comparative", "divergence": {"group_size": 0}}, "greater than or equal to 1"),
        ({"name": "noisy", "adjustment": {"share": 0}}, "greater than 0"),
        ({"name": "noisy", "adjustment": {"share": 1.5}}, "less than or equal to 1"),
        ({"name": "cswt", "temperature": {"low": 6}}, "low, 6, must be below high, 6"),
        ({"name": "cskd", "temperature": {"kind": "constant"}}, "raise kd_weight instead"),
        ({"name": "dkd+truncated", "adjustment": {"top": 1}}, "top: 1 may leave none"),
        ({"name": "mse", "temperature": {"tau": 4}}, "take kind: constant with tau: 1"),
        ({"name": "ctkd", "plain_kd_weight": 1}, "ctkd has none"),
        ({"name": "dtkd", "temperature": {"equalize": "exact"}}, "set sharpness: logsumexp and center: true"),
        ({"name": "ce", "kd_weight": 0.0, "ce_weight": 0.0, "warmup_epochs": 1}, "nothing to learn; .* no effect"),
    ],
    ids=str,
)
def test_options_that_are_unknown_or_without_effect_are_refused(given: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        Loss.model_validate(given)


def test_an_option_without_a_kind_keeps_the_named_one() -> None:
    loss = loss_of("ka+dtd", temperature={"tau": 8})
    assert loss.temperature.model_dump() == {"kind": "dtd_flsw", "tau": 8, "beta": 40, "gamma": 2, "min_temperature": 1}
    assert loss.adjustment.kind == "probability_shift"


def test_another_kind_drops_the_options_of_the_named_one() -> None:
    loss = loss_of("dtd", temperature={"kind": "constant"}, adjustment={"kind": "label_smoothing"})
    assert loss.temperature.model_dump() == {"kind": "constant", "tau": 4}
    assert loss.adjustment.model_dump() == {"kind": "label_smoothing", "smoothing": 0.1}


def test_parts_that_say_different_things_are_heard_in_the_order_of_the_list() -> None:
    assert loss_of("kd+dist").model_dump(exclude={"name"}) == loss_of("dist").model_dump(exclude={"name"})
    for name in ("dtkd+dkd", "dkd+dtkd"):
        loss = loss_of(name)
        assert (loss.temperature.kind, loss.divergence.kind) == ("dtkd", "dkd")
        assert (loss.ce_weight, loss.kd_weight, loss.plain_kd_weight, loss.warmup_epochs) == (1, 3, 1, 20)
    loss = loss_of("dkd+zscore+dtd+ka")
    axes = (loss.normalization, loss.adjustment.kind, loss.temperature.kind, loss.divergence.kind)
    assert axes == ("z_score", "probability_shift", "dtd_flsw", "dkd")
    assert (loss.ce_weight, loss.kd_weight) == (1, 1)


def makes_sense(adjustment: str, temperature: str, divergence: str) -> bool:
    """Which of the grid is refused, said another way."""
    if divergence == "mse":
        return temperature in ("constant", "dtkd") and adjustment in ("none", "probability_shift", "noise")
    if divergence in ("comparative", "ff_g2m"):
        return temperature == "constant" and adjustment in ("none", "probability_shift", "noise")
    if divergence in ("ofa", "plackett_luce") and temperature in ("dtkd", "ctkd"):
        return False
    return (adjustment, divergence) not in {("truncation", "reverse_kl"), ("label_smoothing", "plackett_luce")}


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_the_whole_grid_is_refused_with_a_reason_or_gives_finite_losses(divergence: str) -> None:
    generator = torch.Generator().manual_seed(5)
    student, teacher = (3 * torch.randn(6, 20, generator=generator) for _ in range(2))
    student.requires_grad_()
    labels = torch.tensor([3, -1, 19, 0, -1, 7])
    normalizations = itertools.cycle(NORMALIZATIONS)
    for adjustment, temperature in itertools.product(ADJUSTMENTS, TEMPERATURES):
        normalization = next(normalizations)
        given: dict[str, Any] = {"adjustment": {"kind": adjustment}, "divergence": {"kind": divergence}}
        given["temperature"] = {"kind": temperature, **({"tau": 1.0} if temperature == "constant" else {})}
        if not makes_sense(adjustment, temperature, divergence):
            with pytest.raises(ValidationError, match=r"Value error, .{40,}"):
                loss_of(normalization=normalization, **given)
            continue
        loss = loss_of(normalization=normalization, **given)
        parts = distillation_loss(student, teacher, labels, loss, theta=learned_temperature(loss))
        (gradient,) = torch.autograd.grad(parts.total, student)
        assert parts.total.isfinite()
        assert gradient.isfinite().all()
        assert parts.distillation > 0


@pytest.mark.parametrize("name", ["ce", *PARTS, "ka+dtd", "dtkd+dkd", "zscore+truncated+cwsm+dist"])
def test_a_loss_reads_back_from_what_it_writes(name: str) -> None:
    loss = loss_of(name, ce_weight=0.25)
    assert Loss.model_validate(loss.model_dump()) == loss
    assert Loss.model_validate(json.loads(loss.model_dump_json())) == loss

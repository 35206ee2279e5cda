"""Targets of tokens: the mass of the tail at any temperature, and the decoded teacher, against dense logits."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from helpers.loss_cases import few
from helpers.token_targets import TEMPERATURES, drawn, language_logits, targets_of
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from kdcache.errors import UsageError
from kdcache.losses.token_targets import TokenTargets, head_and_tail, log_tail_sum, scaled_logits


def true_mass(logits: Tensor, targets: TokenTargets, temperature: float | Tensor) -> Tensor:
    return 1 - (logits / temperature).softmax(dim=1).gather(1, targets.indices).sum(dim=1, keepdim=True)


def stored_in_float16(targets: TokenTargets) -> TokenTargets:
    return dataclasses.replace(targets, tail_log_mass=targets.tail_log_mass.half().double())


@pytest.mark.parametrize("temperature", [1.1, 1.25, 1.5, 1.75, 3.0, 6.0, 20.0])
def test_the_mass_between_the_stored_temperatures_is_right_to_three_thousandths(temperature: float) -> None:
    logits = language_logits(60, 8_000)
    targets = stored_in_float16(targets_of(logits, 16))
    errors = head_and_tail(targets, temperature)[1].exp() - true_mass(logits, targets, temperature)
    assert errors.abs().mean() < 0.003
    assert errors.abs().max() < 0.015


@pytest.mark.parametrize("temperature", TEMPERATURES)
def test_head_and_tail_are_those_of_the_softmax_at_a_stored_temperature(temperature: float) -> None:
    logits = language_logits(20, 3_000)
    targets = targets_of(logits, 16)
    head, tail = head_and_tail(targets, temperature)
    torch.testing.assert_close(head, (logits / temperature).log_softmax(dim=1).gather(1, targets.indices))
    torch.testing.assert_close(tail.exp(), true_mass(logits, targets, temperature))


@few
@given(st.integers(0, 2**31), st.integers(1, 8), st.floats(1.0, 50.0))
def test_head_and_tail_add_up_to_1_at_any_temperature_of_each_row(seed: int, top_k: int, highest: float) -> None:
    targets = targets_of(language_logits(6, 40, seed=seed), top_k)
    temperature = torch.linspace(1.0, highest, 6, dtype=torch.float64).unsqueeze(1)
    head, tail = head_and_tail(targets, temperature)
    torch.testing.assert_close(head.exp().sum(dim=1) + tail.exp().squeeze(1), torch.ones(6, dtype=torch.float64))


def test_the_mass_below_1_follows_the_tangent() -> None:
    logits = language_logits(60, 8_000)
    targets = targets_of(logits, 16)
    for temperature, largest in ((0.9, 0.01), (0.7, 0.05), (0.5, 0.1)):
        errors = head_and_tail(targets, temperature)[1].exp() - true_mass(logits, targets, temperature)
        assert errors.abs().mean() < largest
        assert errors.max() < 1e-9, "the tangent of a convex function is below it"


def test_the_mass_is_differentiable_in_the_temperature() -> None:
    targets = targets_of(language_logits(4, 200), 8)
    temperature = torch.tensor([[0.8], [1.2], [2.5], [5.0]], dtype=torch.float64, requires_grad=True)
    torch.autograd.gradcheck(lambda t: head_and_tail(targets, t), temperature)
    torch.autograd.gradcheck(lambda t: scaled_logits(targets, t), temperature)


@pytest.mark.parametrize("temperature", [1.0, 2.0, 4.0])
def test_a_basis_of_full_rank_gives_the_teacher_back(temperature: float) -> None:
    logits = language_logits(30, 300, width=12)
    targets = targets_of(logits, 8, rank=14)
    torch.testing.assert_close(scaled_logits(targets, temperature), logits / temperature, rtol=1e-5, atol=1e-5)


def test_the_decoded_teacher_has_the_stored_mass_and_no_class_above_the_head() -> None:
    logits = language_logits(50, 2_000, width=48)
    targets = targets_of(logits, 16, rank=4)
    for temperature in (1.0, 1.5, 2.0, 4.0):
        decoded = scaled_logits(targets, temperature)
        rest = decoded.softmax(dim=1).scatter(1, targets.indices, 0.0)
        torch.testing.assert_close(
            rest.sum(dim=1, keepdim=True), true_mass(logits, targets, temperature), rtol=0, atol=4e-3
        )
        assert (decoded.argmax(dim=1) == logits.argmax(dim=1)).all()
        limit = logits.gather(1, targets.indices[:, -1:]) / temperature
        assert (decoded.scatter(1, targets.indices, -1e9) <= limit + 1e-9).all()


def test_a_column_for_the_label_may_be_left_out_of_a_row() -> None:
    logits = language_logits(12, 100)
    labels = logits.argmax(dim=1)
    labels[::2] = logits.argmin(dim=1)[::2]
    targets = targets_of(logits, 4, labels=labels)
    assert (targets.log_probs == -torch.inf).any(dim=1).tolist() == [False, True] * 6
    for temperature in (1.0, 2.0):
        decoded = scaled_logits(targets, temperature)
        torch.testing.assert_close(
            decoded.gather(1, labels.unsqueeze(1)), (logits / temperature).gather(1, labels[:, None])
        )
        torch.testing.assert_close(decoded.logsumexp(dim=1), (logits / temperature).logsumexp(dim=1))


def test_a_head_of_all_classes_leaves_an_empty_tail() -> None:
    logits = language_logits(5, 6)
    targets = targets_of(logits, 6)
    assert (log_tail_sum(targets, 2.0) == -1e4).all()
    torch.testing.assert_close(scaled_logits(targets, 2.0), logits / 2)


def test_another_temperature_than_the_only_one_is_refused() -> None:
    logits = language_logits(3, 50)
    targets = targets_of(logits, 4, temperatures=(1.0,))
    torch.testing.assert_close(head_and_tail(targets, 1.0)[1].exp(), true_mass(logits, targets, 1.0))
    with pytest.raises(
        UsageError, match=r"T = 2 is asked of rows that state the mass outside their head at T = 1 only"
    ):
        head_and_tail(targets, 2.0)
    with pytest.raises(UsageError, match="T = 2 is asked"):
        scaled_logits(targets, torch.tensor([[1.0], [2.0], [1.0]]))


def test_parts_of_targets_are_targets() -> None:
    for targets in (targets_of(language_logits(9, 60), 4, rank=3), drawn(language_logits(9, 60), 10)):
        again = TokenTargets.concatenate([targets[:4], targets[4:]]).to("cpu")
        for field in dataclasses.fields(targets):
            value, other = getattr(targets, field.name), getattr(again, field.name)
            pairs = zip(value, other, strict=True) if field.name == "draws" and value else [(value, other)]
            assert all(one.equal(two) if isinstance(one, Tensor) else one == two for one, two in pairs)


def test_targets_of_logits_at_hand_are_those_of_the_definition() -> None:
    logits = language_logits(7, 90)
    found, expected = TokenTargets.of_logits(logits, 5), targets_of(logits, 5)
    for name in ("indices", "log_probs", "tail_log_mass", "logsumexp"):
        torch.testing.assert_close(getattr(found, name), getattr(expected, name))
    assert found.temperatures == TEMPERATURES

"""The agent of ITKD: its state, its distribution, PPO's objective, and the arithmetic of its reward."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.distributions import Normal

from kdcache.losses import Loss
from kdcache.losses.temperature_agent import (
    ITKDOptions,
    Rollout,
    TemperatureAgent,
    calibrated,
    clipped_objective,
    normalized,
    return_loss,
    standardized,
)

B, C = 9, 5


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def agent(low: float = 2.0, high: float = 6.0) -> TemperatureAgent:
    torch.manual_seed(3)
    return TemperatureAgent(low, high).double()


def log_density(actions: Tensor, mean: Tensor, std: float) -> Tensor:
    density: Tensor = Normal(mean, std).log_prob(actions)  # type: ignore[no-untyped-call]  # of torch
    return density


def test_the_objective_is_equation_7_of_ppo() -> None:
    """Sample by sample: both signs of the advantage, with ratios below, within and above the clipping range."""
    before = drawn(6)
    ratios, advantages = [0.5, 0.5, 1.1, 1.1, 1.7, 1.7], [2.0, -3.0, 0.5, -0.7, 1.1, -0.4]
    now = (before + torch.tensor(ratios, dtype=torch.float64).log()).requires_grad_()
    found = clipped_objective(now, before, torch.tensor(advantages, dtype=torch.float64), 0.2)
    terms = [min(w * a, min(max(w, 0.8), 1.2) * a) for w, a in zip(ratios, advantages, strict=True)]
    assert float(found.detach()) == pytest.approx(sum(terms) / 6, abs=1e-14)
    (gradient,) = torch.autograd.grad(found, now)
    # A ratio that has left the range in the direction of its advantage has no gradient; that of any other is w A / B.
    free = [
        w * a / 6 if not ((w > 1.2 and a > 0) or (w < 0.8 and a < 0)) else 0.0
        for w, a in zip(ratios, advantages, strict=True)
    ]
    torch.testing.assert_close(gradient, torch.tensor(free, dtype=torch.float64), rtol=0, atol=1e-14)
    weights = torch.tensor(advantages, dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda values: clipped_objective(values, before, weights, 0.2), (now,))


def test_the_densities_are_those_of_the_actions() -> None:
    network, states = agent(), drawn(B, 3)
    rollout = network.act(states, drawn(B, seed=1))
    mean = 4 * torch.tanh(network.policy(states) / 4)
    assert network.log_std.item() == -0.5
    expected = log_density(rollout.actions, mean, math.exp(-0.5))
    torch.testing.assert_close(rollout.actions, mean + math.exp(-0.5) * drawn(B, seed=1), rtol=0, atol=1e-14)
    torch.testing.assert_close(rollout.log_likelihoods, expected, rtol=0, atol=1e-13)
    assert torch.autograd.gradcheck(
        lambda values: network.log_likelihoods(values, rollout.actions.detach()), (states.requires_grad_(),)
    )
    for value, bound in ((9.0, 0.5), (-9.0, -3.0)):
        torch.nn.init.constant_(network.log_std, value)
        found = network.log_likelihoods(states, rollout.actions)
        torch.testing.assert_close(found, log_density(rollout.actions, mean, math.exp(bound)), rtol=0, atol=1e-9)


def test_the_state_has_the_second_largest_probability() -> None:
    """The published code has the second smallest."""
    v, u = 3 * drawn(B, C), 3 * drawn(B, C, seed=1)
    found = agent().observe(v, u)
    ordered = np.sort(v.softmax(1).numpy(), axis=1)
    state = np.stack([ordered[:, -1], u.softmax(1).numpy().max(1), ordered[:, -1] - ordered[:, -2]], axis=1)
    np.testing.assert_allclose(found.numpy(), state, rtol=0, atol=1e-15)
    published = (v.softmax(1).amax(1) - v.softmax(1).kthvalue(2, dim=1).values).numpy()
    np.testing.assert_allclose(published, ordered[:, -1] - ordered[:, 1], rtol=0, atol=1e-15)
    assert np.all(published > state[:, 2])


def test_without_noise_the_action_is_the_mean() -> None:
    network, v, u = agent(), 3 * drawn(B, C).requires_grad_(), 3 * drawn(B, C, seed=1)
    temperature = network(v, u, torch.arange(B) % C).temperature
    mean = 4 * torch.tanh(network.policy(network.observe(v, u)) / 4)
    torch.testing.assert_close(temperature, 2 + 4 * torch.sigmoid(mean), rtol=0, atol=1e-14)
    assert torch.autograd.grad(temperature.sum(), v, allow_unused=True)[0] is None


def test_temperatures_have_a_floor() -> None:
    network = ITKDOptions().make()
    for noise in (-1e6, 1e6):
        actions = network.act(torch.rand(B, 3), torch.full((B,), noise)).actions
        temperature = network.temperature(actions)
        assert bool(((temperature >= 1) & (temperature <= 10)).all())


def test_the_reward_is_calibrated_as_in_the_published_code() -> None:
    """utils/trainer.py at 0183c6c, get_prediction, from the reward of each sample on."""
    parts, reward = drawn(B).numpy(), 1.7
    redistributed_reward = parts.copy()
    prediction_error = np.full(B, reward) - redistributed_reward.sum()
    redistributed_reward += prediction_error.reshape(-1) / redistributed_reward.shape[0]
    found = calibrated(torch.from_numpy(parts), reward)
    np.testing.assert_allclose(found.numpy(), redistributed_reward, rtol=0, atol=1e-15)
    assert float(found.sum()) == pytest.approx(reward)


def test_advantages_are_normalized_as_in_the_published_code() -> None:
    """utils/rl/agents/utils/ppo_utils.py at 0183c6c, get; of equal ones it has 0 / 0."""
    adv_buf = drawn(B).numpy()
    found = normalized(torch.from_numpy(adv_buf)).numpy()
    np.testing.assert_allclose(found, (adv_buf - np.mean(adv_buf)) / np.std(adv_buf), rtol=1e-12)
    assert not normalized(torch.full((B,), 0.25)).any()
    assert not normalized(torch.ones(1)).any()


def published_advantages(reward: float) -> Any:
    """finish_path and get of the published code, for a value function that is 0."""
    rews, gamma, lam = np.append(np.zeros(B - 1), reward), 0.99, 0.95
    advantages = np.array([sum((gamma * lam) ** (k - i) * rews[k] for k in range(i, B)) for i in range(B)])
    return (advantages - advantages.mean()) / advantages.std()


def test_the_published_advantages_know_the_sign_of_the_reward_alone_and_add_up_to_zero() -> None:
    """Why the reward is divided over the samples here: equal actions of all samples get no advantage together."""
    np.testing.assert_allclose(published_advantages(0.01), published_advantages(7.0), rtol=1e-9)
    np.testing.assert_allclose(published_advantages(0.01), -published_advantages(-7.0), rtol=1e-9)
    assert abs(published_advantages(0.01).sum()) < 1e-12


@given(
    st.lists(st.tuples(st.floats(-10, 10), st.integers(1, 200)), min_size=2, max_size=20),
    st.floats(0.01, 100),
    st.floats(-5, 5),
)
def test_the_scale_of_a_reward_does_not_matter(batches: list[tuple[float, int]], scale: float, shift: float) -> None:
    rewards, sizes = [reward for reward, _ in batches], [size for _, size in batches]
    found = standardized(rewards, sizes)
    if np.std(rewards) < 1e-3:
        return
    expected = np.sqrt(sizes) * (np.array(rewards) - np.mean(rewards)) / np.std(rewards)
    np.testing.assert_allclose(np.array(found), expected, rtol=1e-6, atol=1e-9)
    other = standardized([scale * reward + shift for reward in rewards], sizes)
    np.testing.assert_allclose(np.array(other), expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("rewards", [[0.25], [0.0, 0.0], [1 / 3, 1 / 3, 1 / 3]])
def test_equal_rewards_say_nothing(rewards: list[float]) -> None:
    assert standardized(rewards, [4] * len(rewards)) is None


def test_the_loss_of_the_parts_is_that_of_their_sums() -> None:
    parts, rewards, sizes = drawn(9).requires_grad_(), drawn(3, seed=1), [4, 2, 3]
    found = return_loss(parts, rewards, sizes)
    h, position, expected = parts.detach().numpy(), 0, 0.0
    for reward, size in zip(rewards.numpy(), sizes, strict=True):
        expected += (h[position : position + size].sum() - reward) ** 2 / size / 3
        position += size
    assert float(found.detach()) == pytest.approx(expected, abs=1e-14)
    assert torch.autograd.gradcheck(lambda values: return_loss(values, rewards, sizes), (parts,))


def test_a_part_depends_on_state_and_action() -> None:
    network, states, actions = agent(), drawn(B, 3), drawn(B, seed=1)
    found = network.parts_of_reward(Rollout(states, actions, torch.zeros(B)))
    by_hand = torch.stack([network.reward(torch.cat([states[i], actions[i : i + 1]])[None])[0] for i in range(B)])
    torch.testing.assert_close(found, by_hand, rtol=0, atol=1e-14)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"low": 5.0, "high": 5.0}, "nothing between them"),
        ({"low": 0.0}, "greater than 0"),
        ({"clip": 1.0}, "less than 1"),
        ({"start_epoch": 0}, "greater than or equal to 1"),
        ({"reward": "test"}, "'training' or 'validation'"),
        ({"published": True}, "Extra inputs"),
    ],
)
def test_options_that_make_no_sense_are_refused(options: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        Loss.model_validate({"name": "kd", "controller": {"kind": "itkd"} | options})


@pytest.mark.parametrize(
    ("name", "words"), [("dtkd", "sets the temperatures, and so does dtkd"), ("mse", "mse has none")]
)
def test_losses_without_a_constant_temperature_of_their_own_are_refused(name: str, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        Loss.model_validate({"name": name, "controller": {"kind": "itkd"}})


def test_the_accuracy_needs_the_one_true_class() -> None:
    for reward, part in (("training", "the controller itkd"), ("validation", None)):
        loss = Loss.model_validate({"name": "kd", "controller": {"kind": "itkd", "reward": reward}})
        assert loss.acts_on_label == part

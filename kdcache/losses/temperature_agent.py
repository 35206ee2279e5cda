"""An agent that sets the temperature of each sample, and learns from a reward (ITKD: Zhang et al. 2024, 2407.00115).

Its state is s = [max q, max p, q_1 - q_2] (`controllers.confidences`), its action x is drawn from a normal distribution
with mean R tanh(MLP(s) / R), R = 4, and a standard deviation of its own, and the temperature is

    T = low + (high - low) sigmoid(x).

A batch has one reward: how much better the student was after the step with these temperatures. A network h(s, x) learns
to divide it over the samples from the rewards of the last batches (`return_loss`), and each sample gets its part
(`calibrated`). The policy goes up PPO's objective (`clipped_objective`) with the advantages r - V(s), normalized over
the batch. `train/temperature_agent.py` trains it.

ERRATA of the published code (Zhengbo-Zhang/ITKD@0183c6c, utils/trainer.py, utils/rl), beside that of `confidences`:

- Its temperatures are in (0, 10), so that T^2 KL can vanish. Here `low` is a bound, 1 by default.
- It takes the density of x at T, with a mean in (-1, 1) and T in (0, 10). Nearly all temperatures are then above the
  mean, and a positive advantage raises the mean whatever the temperature was. Here it is the density at x.
- Its mean, tanh(MLP(s)), keeps T within 27 % and 73 % of the range, apart from the noise. Here these are 2 % and 98 %.
- Its reward is the accuracy on the batch less that on the batch before, both measured before the step that it is meant
  to judge. Here it is the accuracy on the next batch less that on this one.
- The reward belongs to the last sample of a batch and is discounted towards the first one. Then the advantages are
  normalized over the batch, so that they add up to 0. Beside the terms of V, only the sign of the reward remains, and
  the position in the batch decides the sign of a sample's advantage. The redistributed reward is computed and not used,
  since the second `finish_path` has an empty range. Here it is used, and a sample's advantage depends on its own part
  only: the state of the next sample does not follow from its action.
- The redistribution takes differences between neighbors in the batch of a network without memory, so that a good action
  lowers the reward of the next sample. Here a sample's part is its own h(s, x).
- The networks that redistribute are linear, and are fitted to the square of a mean error over one batch. Here h is a
  perceptron, fitted to the rewards of 64 batches.
- The detector of critical states multiplies the states, and the term that should train it is a cross-entropy over one
  class, which is 0: the other term drives all states to 0. It is left out.
- The factor on the reward that is meant to encourage exploration cancels out of normalized advantages. It is left out.

Other differences: accuracy is the mean over samples, not over classes. Rewards are standardized over 64 batches. The
agent acts and learns from the first step on, not from epoch 20 and in every 20th epoch (`start_epoch`, `every`). The
exploration strategy, which mixes training images between epochs, is not there.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Annotated, Literal, NamedTuple

import torch
from pydantic import Field
from torch import Tensor, nn

from kdcache.losses.controllers import Control, Controller, TemperatureRange, between, confidences
from kdcache.losses.options import Positive

_WIDTH, _REWARD_WIDTH = 256, 32
_REACH = 4.0
_FIRST_LOG_STD = -0.5
_LOG_STD = (-3.0, 0.5)
"""Bounds, so that a reward of noise alone can neither end the exploration nor make it a choice of the two ends."""


class ITKDOptions(TemperatureRange):
    """`itkd`: the temperature, chosen by an agent that learns from a reward (PPO)."""

    kind: Literal["itkd"] = "itkd"
    lr: Positive = 1e-4
    """Learning rate of the policy's optimizer, Adam."""
    critic_lr: Positive = 1e-3
    """Learning rate of the optimizer, Adam, of the value of a state and of the parts of the reward."""
    reward: Literal["training", "validation"] = "training"
    """What a step of the student has changed: `training`, the accuracy from one training batch to the next, as
    published; or `validation`, the loss on a batch of the validation split."""
    clip: Annotated[float, Field(gt=0, lt=1)] = 0.2
    """Epsilon of PPO: how far the ratio of the probabilities of an action may leave 1."""
    updates: Annotated[int, Field(ge=1)] = 5
    """Steps of policy and value per reward."""
    start_epoch: Annotated[int, Field(ge=1)] = 1
    """First epoch in which it sets temperatures; before, they are the constant one of the loss."""

    @property
    def acts_on_label(self) -> bool:
        """Whether it needs the one true class of each sample: for the accuracy."""
        return self.reward == "training"

    def make(self) -> TemperatureAgent:
        """Return the agent, with random weights."""
        return TemperatureAgent(self.low, self.high)


class Rollout(NamedTuple):
    """What an agent did with the samples of a batch.

    Attributes:
        states: [B, 3].
        actions: [B], x.
        log_likelihoods: [B], of the actions, by the policy that took them.
    """

    states: Tensor
    actions: Tensor
    log_likelihoods: Tensor

    @staticmethod
    def joined(parts: Sequence[Rollout]) -> Rollout:
        """Concatenate the parts of a batch."""
        return Rollout(*(torch.cat(values) for values in zip(*parts, strict=True)))


def _perceptron(inputs: int, width: int) -> nn.Sequential:
    """Return a perceptron to one number per sample; of width 256 for policy and value, as published."""
    layers = (nn.Linear(inputs, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU(), nn.Linear(width, 1))
    return nn.Sequential(*layers, nn.Flatten(0))


class TemperatureAgent(Controller):
    """Policy, value of a state, and parts of the reward.

    Args:
        low: lowest temperature.
        high: highest temperature.

    Attributes:
        policy: s -> the mean of x, before it is bounded.
        value: s -> V(s).
        reward: (s, x) -> h(s, x).
        log_std: [], of x.
    """

    def __init__(self, low: float, high: float) -> None:
        super().__init__()
        self.low, self.high = low, high
        self.policy, self.value = _perceptron(3, _WIDTH), _perceptron(3, _WIDTH)
        self.reward = _perceptron(4, _REWARD_WIDTH)
        self.log_std = nn.Parameter(torch.tensor(_FIRST_LOG_STD))

    def forward(self, student_logits: Tensor, teacher_logits: Tensor, labels: Tensor) -> Control:
        """Return the temperature of the mean action; see `Controller.forward`."""
        mean, _ = self.distribution(self.observe(student_logits, teacher_logits))
        return Control(temperature=self.temperature(mean))

    def observe(self, student_logits: Tensor, teacher_logits: Tensor) -> Tensor:
        """Return the states [B, 3] of samples with logits [B, C]."""
        return confidences(student_logits, teacher_logits).to(self.log_std.dtype)

    def distribution(self, states: Tensor) -> tuple[Tensor, Tensor]:
        """Return the mean [B] of the actions in states [B, 3], and the logarithm [] of their standard deviation."""
        return _REACH * torch.tanh(self.policy(states) / _REACH), self.log_std.clamp(*_LOG_STD)

    def log_likelihoods(self, states: Tensor, actions: Tensor) -> Tensor:
        """Return the logarithm of the density of actions [B] in states [B, 3], [B]."""
        mean, log_std = self.distribution(states)
        distance = (actions - mean) * (-log_std).exp()
        return -distance.square() / 2 - log_std - math.log(2 * math.pi) / 2

    def act(self, states: Tensor, noise: Tensor) -> Rollout:
        """Return the actions in states [B, 3] for standard normal noise [B]."""
        mean, log_std = self.distribution(states)
        actions = mean + log_std.exp() * noise
        return Rollout(states, actions, self.log_likelihoods(states, actions))

    def temperature(self, actions: Tensor) -> Tensor:
        """Return the temperatures [B] of actions [B]."""
        return between(self.low, self.high, actions)

    def parts_of_reward(self, rollout: Rollout) -> Tensor:
        """Return h(s, x) of each sample, [B]."""
        parts: Tensor = self.reward(torch.cat([rollout.states, rollout.actions[:, None]], dim=1))
        return parts


def clipped_objective(log_likelihoods: Tensor, before: Tensor, advantages: Tensor, clip: float) -> Tensor:
    """Return the objective that a policy goes up, [].

        mean of min(w A, clip(w, 1 - clip, 1 + clip) A),    w = exp(log_likelihood - before)

    Source: PPO (Schulman et al. 2017, 1707.06347, eq. 7).

    Args:
        log_likelihoods: [B], of the actions, by the present policy.
        before: [B], by the policy that took them.
        advantages: [B], A.
        clip: epsilon.
    """
    ratio = (log_likelihoods - before).exp()
    return torch.minimum(ratio * advantages, ratio.clamp(1 - clip, 1 + clip) * advantages).mean()


def normalized(advantages: Tensor) -> Tensor:
    """Return advantages [B] with mean 0 and standard deviation 1; 0 if all are equal, where the published code has NaN.

    Source: Zhengbo-Zhang/ITKD@0183c6c, utils/rl/agents/utils/ppo_utils.py, ReplayBufferPPO.get.
    """
    centered = advantages - advantages.mean()
    std = centered.square().mean().sqrt()
    return centered / std.clamp_min(torch.finfo(std.dtype).eps)


def calibrated(parts: Tensor, reward: float | Tensor) -> Tensor:
    """Return the reward of each sample, [B]: its part h, and an equal share of what the parts lack of the batch's.

        r_i = h_i + (reward - sum of h) / B

    Source: the instance reward calibration of Zhengbo-Zhang/ITKD@0183c6c, utils/trainer.py, get_prediction.

    Args:
        parts: [B], h.
        reward: of the batch; the sum of the result.
    """
    return parts + (reward - parts.sum()) / len(parts)


def standardized(rewards: Sequence[float], sizes: Sequence[int]) -> list[float] | None:
    """Return the rewards of batches with mean 0, on the scale of a sum of B independent parts of variance 1.

    That is sqrt(B) (reward - mean) / std, so that neither the unit of the reward nor the size of a batch matters.

    Args:
        rewards: of each batch.
        sizes: B of each batch.

    Returns:
        As many rewards; None if all are equal: nothing is known about actions.
    """
    mean = sum(rewards) / len(rewards)
    std = math.sqrt(sum((reward - mean) ** 2 for reward in rewards) / len(rewards))
    if std <= 1e-12 * abs(mean) or std == 0:
        return None
    return [math.sqrt(size) * (reward - mean) / std for reward, size in zip(rewards, sizes, strict=True)]


def return_loss(parts: Tensor, rewards: Tensor, sizes: Sequence[int]) -> Tensor:
    """Return how far the sums of the parts are from the rewards of their batches, [].

        mean over the batches of (sum of h - reward)^2 / B

    Source: return decomposition (RUDDER: Arjona-Medina et al. 2019, 1806.07857), of sequences whose order says nothing.

    Args:
        parts: [N], h of the samples of all batches, one batch after the other.
        rewards: [M], as `standardized`.
        sizes: B of each batch; their sum is N.
    """
    sums = torch.stack([part.sum() for part in torch.split(parts, list(sizes))])
    return ((sums - rewards).square() / torch.tensor(sizes, device=parts.device)).mean()

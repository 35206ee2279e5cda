"""The training of the agent that sets temperatures: a reward for each step of the student, and PPO.

An agent needs no second derivatives: it is trained with accumulated micro-batches and in mixed precision too, always in
the precision of its own weights.
"""

from __future__ import annotations

import math
from collections import deque
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from kdcache.data.views import Batch
from kdcache.losses.controllers import Control
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
from kdcache.train.batches import LabeledBatches
from kdcache.train.controller import ComingStep
from kdcache.train.passes import MicroBatch

_REMEMBERED = 64
"""Batches whose rewards are divided over their samples together."""
_REWARD_UPDATES = 10
"""Steps of the network that divides the reward, per reward: that of the published code."""
_MAX_GRAD_NORM = 2.0
"""That of the published code."""


class AgentTraining:
    """An agent with its optimizers, what it did, and the rewards of that.

    Args:
        agent: the networks.
        options: learning rates, reward, and how often it is trained.
        validation: labeled images that the reward is measured on; None if it is that of training batches.
        seed: of the noise on its actions.

    Attributes:
        controller: the networks.
    """

    def __init__(
        self, agent: TemperatureAgent, options: ITKDOptions, validation: LabeledBatches | None, seed: int
    ) -> None:
        self.controller, self._options, self._validation, self._seed = agent, options, validation, seed
        policy = [*agent.policy.parameters(), agent.log_std]
        critic = [*agent.value.parameters(), *agent.reward.parameters()]
        self._policy_optimizer = torch.optim.Adam(policy, options.lr, weight_decay=options.weight_decay)
        self._critic_optimizer = torch.optim.Adam(critic, options.critic_lr, weight_decay=options.weight_decay)
        self._steps, self._epoch, self._explores = 0, 0, False
        self._remembered: deque[tuple[Rollout, float]] = deque(maxlen=_REMEMBERED)
        self._before: tuple[Rollout, float] | None = None  # the step before, and the accuracy on its batch
        # Of the present step:
        self._noise, self._parts = torch.empty(0), list[Rollout]()
        self._counts: list[Tensor] = []
        self._held_out: tuple[Batch, float] | None = None

    def prepare(self, model: nn.Module, coming: ComingStep) -> None:
        """Begin a step of the student."""
        self._steps, self._epoch = self._steps + 1, coming.epoch
        self._explores = coming.epoch >= self._options.start_epoch and self._steps % self._options.every == 0
        generator = torch.Generator().manual_seed(self._seed * 1_000_003 + self._steps)
        self._noise = torch.randn(sum(len(part.labels) for part in coming.micro_batches), generator=generator)
        self._parts, self._counts, self._held_out = [], [], None
        if self._explores and self._validation is not None:
            device = coming.micro_batches[0].images.device
            batch = self._validation.batch(self._steps // self._options.every - 1, device)
            self._held_out = batch, _loss_on(batch, model)

    def control(self, student_logits: Tensor, batch: MicroBatch) -> Control:
        """Return what is set for a micro-batch of the student with logits [B, C], without a gradient.

        In a step that is judged, actions are drawn; in any other, they are the means.
        """
        if batch.teacher_logits is None:
            raise TypeError("an agent needs the teacher's logits")
        if self._validation is None:
            hits = (student_logits.detach().argmax(dim=1) == batch.labels).sum()
            self._counts.append(torch.stack([hits, (batch.labels >= 0).sum()]))
        if self._epoch < self._options.start_epoch:
            return Control()
        with torch.no_grad():
            if not self._explores:
                control: Control = self.controller(student_logits, batch.teacher_logits, batch.labels)
                return control
            noise, self._noise = self._noise.tensor_split([len(batch.labels)])
            states = self.controller.observe(student_logits, batch.teacher_logits)
            self._parts.append(self.controller.act(states, noise.to(states)))
            return Control(temperature=self.controller.temperature(self._parts[-1].actions))

    def step(self, model: nn.Module) -> None:
        """End a step of the student, and learn from the reward that is known now."""
        rollout = Rollout.joined(self._parts) if self._parts else None
        if self._validation is not None:
            if self._held_out is not None and rollout is not None:
                batch, loss = self._held_out
                self.learn(rollout, loss - _loss_on(batch, model))
            return
        hits, labeled = torch.stack(self._counts).sum(dim=0).tolist()
        accuracy = hits / labeled if labeled else math.nan
        if self._before is not None:
            taken, was = self._before
            self.learn(taken, accuracy - was)
        self._before = None if rollout is None else (rollout, accuracy)

    def learn(self, rollout: Rollout, reward: float) -> None:
        """Take the steps of all networks, for what was done and its reward.

        None is taken if the reward is not finite, and none as long as all rewards are equal.
        """
        if not math.isfinite(reward):
            return
        self._remembered.append((rollout, reward))
        sizes = [len(each.actions) for each, _ in self._remembered]
        rewards = standardized([of for _, of in self._remembered], sizes)
        if rewards is None:
            return
        agent, options = self.controller, self._options
        together = Rollout.joined([each for each, _ in self._remembered])
        targets = torch.tensor(rewards).to(together.actions)
        for _ in range(_REWARD_UPDATES):
            self._descend(self._critic_optimizer, return_loss(agent.parts_of_reward(together), targets, sizes))
        with torch.no_grad():
            of_samples = calibrated(agent.parts_of_reward(rollout), targets[-1])
            advantages = normalized(of_samples - agent.value(rollout.states))
        for _ in range(options.updates):
            self._descend(self._critic_optimizer, F.mse_loss(agent.value(rollout.states), of_samples))
            now = agent.log_likelihoods(rollout.states, rollout.actions)
            objective = clipped_objective(now, rollout.log_likelihoods, advantages, options.clip)
            self._descend(self._policy_optimizer, -objective)

    @staticmethod
    def _descend(optimizer: torch.optim.Optimizer, loss: Tensor) -> None:
        optimizer.zero_grad()
        torch.autograd.backward(loss)
        nn.utils.clip_grad_norm_(optimizer.param_groups[0]["params"], _MAX_GRAD_NORM)
        optimizer.step()

    def state_dict(self) -> dict[str, Any]:
        """Return all that the next step depends on."""
        return {
            "controller": self.controller.state_dict(),
            "policy_optimizer": self._policy_optimizer.state_dict(),
            "critic_optimizer": self._critic_optimizer.state_dict(),
            "steps": self._steps,
            "remembered": [(*rollout, reward) for rollout, reward in self._remembered],
            "before": None if self._before is None else (*self._before[0], self._before[1]),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what `state_dict` returned."""
        self.controller.load_state_dict(state["controller"])
        self._policy_optimizer.load_state_dict(state["policy_optimizer"])
        self._critic_optimizer.load_state_dict(state["critic_optimizer"])
        self._steps = state["steps"]
        self._remembered = deque(map(self._restored, state["remembered"]), maxlen=_REMEMBERED)
        self._before = None if state["before"] is None else self._restored(state["before"])

    def _restored(self, values: tuple[Tensor, Tensor, Tensor, float]) -> tuple[Rollout, float]:
        *tensors, number = values
        return Rollout(*(value.to(self.controller.log_std) for value in tensors)), number


def _loss_on(batch: Batch, model: nn.Module) -> float:
    """Return the cross-entropy of a network on a batch; nothing of the network changes, batch statistics included."""
    was_training = model.training
    model.eval()
    with torch.no_grad():
        loss = float(F.cross_entropy(model(batch.images), batch.labels))
    model.train(was_training)
    return loss

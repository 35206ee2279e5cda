"""The training of ITKD's agent: what it learns from rewards, and a student's steps against a plain loop."""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers.teachers import FunctionTeacher
from helpers.tiny import tiny_samples
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import SGD, Adam

from kdcache import dump_teacher, load_split
from kdcache.config.schema import Pipeline, TrainSpec
from kdcache.data.views import View
from kdcache.errors import UsageError
from kdcache.losses import Loss
from kdcache.losses.temperature_agent import ITKDOptions, Rollout, TemperatureAgent
from kdcache.models import build_model
from kdcache.train.batches import LabeledBatches
from kdcache.train.controller import ComingStep
from kdcache.train.held_out import held_out_ids
from kdcache.train.learned import LearnedParts, make_controller
from kdcache.train.passes import MicroBatch
from kdcache.train.step import Trainer
from kdcache.train.temperature_agent import AgentTraining
from kdcache.train.train import train_student

COUNT, BATCH, EPOCHS, C = 36, 12, 3, 10
SPEC = TrainSpec(
    epochs=EPOCHS, batch_size=BATCH, lr=0.5, weight_decay=0.0, momentum=0.0, nesterov=False, schedule="constant"
)


def view(seed: int = 0, labels: list[int] | None = None) -> View:
    return View(tiny_samples(COUNT, labels=labels or [(index + seed) % C for index in range(COUNT)]), [])


def said(ids: Tensor) -> Tensor:
    """[B] -> the logits of the teacher, [B, C]."""
    table = torch.randn(COUNT, C, generator=torch.Generator().manual_seed(9), dtype=torch.float64)
    return 2 * table[ids]


TEACHER = FunctionTeacher(lambda ids, _: said(ids), COUNT)


class Double(nn.Module):
    """In float64, with batch statistics that nothing but training may change, or without any."""

    def __init__(self, norm: bool = True) -> None:
        super().__init__()
        torch.manual_seed(2)
        between = nn.BatchNorm1d(7) if norm else nn.Tanh()
        self.layers = nn.Sequential(nn.Flatten(), nn.Linear(16, 7), between, nn.Linear(7, C)).double()

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.layers(images.double())
        return logits


def loss_with(**options: Any) -> Loss:
    controller = {"kind": "itkd", "lr": 0.01, "critic_lr": 0.01, **options}
    return Loss.model_validate({"name": "kd", "ce_weight": 1.0, "kd_weight": 1.0, "controller": controller})


class Recorded(AgentTraining):
    """Keeps what the agent learns from."""

    def __init__(self, options: ITKDOptions, validation: LabeledBatches | None) -> None:
        torch.manual_seed(7)
        super().__init__(options.make().double(), options, validation, SPEC.seed)
        self.learned_from: list[tuple[Rollout, float]] = []

    def learn(self, rollout: Rollout, reward: float) -> None:
        self.learned_from.append((rollout, reward))
        super().learn(rollout, reward)


def agent_of(loss: Loss) -> Recorded:
    assert isinstance(loss.controller, ITKDOptions)
    batches = LabeledBatches(view(3), BATCH, SPEC.seed) if loss.controller.reward == "validation" else None
    return Recorded(loss.controller, batches)


def trained(loss: Loss, spec: TrainSpec = SPEC, norm: bool = True) -> tuple[Double, Recorded]:
    model, training = Double(norm), agent_of(loss)
    trainer = Trainer(model, spec, loss, COUNT, learned=LearnedParts(controller=training))
    for number in range(1, EPOCHS + 1):
        trainer.epoch(view(), number, TEACHER)
    return model, training


def by_hand(loss: Loss) -> tuple[Double, list[float], list[Tensor]]:
    """The loop that a user would write: the student, the reward of each step, and the temperatures of each step.

    The agent is another one that learns from the rewards that are measured here.
    """
    assert isinstance(loss.controller, ITKDOptions)
    model, options, agent = Double(), loss.controller, agent_of(loss)
    optimizer, train, held = SGD(model.parameters(), lr=SPEC.lr), view(), view(3)
    rewards: list[float] = []
    temperatures: list[Tensor] = []
    steps, before = 0, None
    for number in range(1, EPOCHS + 1):
        order = torch.randperm(COUNT, generator=torch.Generator().manual_seed(number))
        for ids in torch.split(order, BATCH):
            steps += 1
            batch, u = train.__getitems__(ids.tolist()), said(ids)
            in_order = torch.randperm(COUNT, generator=torch.Generator().manual_seed((steps - 1) // 3))
            validation = held.__getitems__(in_order[(steps - 1) % 3 * BATCH :][:BATCH].tolist())

            def validation_loss(held: Any = validation) -> float:
                with torch.no_grad():
                    return float(F.cross_entropy(copy.deepcopy(model).eval()(held.images), held.labels))

            loss_before = validation_loss()
            v = model(batch.images)
            accuracy = float((v.argmax(1) == batch.labels).double().mean())
            noise = torch.randn(BATCH, generator=torch.Generator().manual_seed(SPEC.seed * 1_000_003 + steps))
            with torch.no_grad():
                rollout = agent.controller.act(agent.controller.observe(v, u), noise.double())
                t = 1 + 9 * torch.sigmoid(rollout.actions)
            temperatures.append(t)
            kl = t**2 * F.kl_div((v / t[:, None]).log_softmax(1), (u / t[:, None]).softmax(1), reduction="none").sum(1)
            optimizer.zero_grad()
            torch.autograd.backward((F.cross_entropy(v, batch.labels, reduction="none") + kl).mean())
            optimizer.step()
            if options.reward == "validation":
                rewards.append(loss_before - validation_loss())
                agent.learn(rollout, rewards[-1])
            elif before is not None:
                rewards.append(accuracy - before[1])
                agent.learn(before[0], rewards[-1])
            before = rollout, accuracy
    return model, rewards, temperatures


@pytest.mark.slow
@pytest.mark.parametrize("reward", ["training", "validation"])
def test_student_and_rewards_are_those_of_a_plain_loop(reward: str) -> None:
    loss = loss_with(reward=reward)
    model, training = trained(loss)
    again, rewards, temperatures = by_hand(loss)
    assert [of for _, of in training.learned_from] == pytest.approx(rewards, abs=1e-9)
    assert len(rewards) == EPOCHS * 3 - (reward == "training") and len(set(rewards)) > 2
    for (rollout, _), expected in zip(training.learned_from, temperatures, strict=False):
        torch.testing.assert_close(1 + 9 * rollout.actions.sigmoid(), expected, rtol=1e-7, atol=1e-9)
    torch.testing.assert_close([*model.parameters()], [*again.parameters()], rtol=1e-6, atol=1e-8)
    torch.testing.assert_close([*model.buffers()], [*again.buffers()], rtol=1e-6, atol=1e-8)


def descend(optimizer: Adam, weights: Sequence[Tensor], loss: Tensor) -> None:
    """Take a step with the norm of the gradient clipped to 2, as torch does it."""
    slopes = torch.autograd.grad(loss, weights)
    norm = float(torch.stack([slope.square().sum() for slope in slopes]).sum().sqrt())
    for weight, slope in zip(weights, slopes, strict=True):
        weight.grad = slope * min(1.0, 2 / (norm + 1e-6))
    optimizer.step()
    for weight in weights:
        weight.grad = None


@pytest.mark.slow
def test_a_reward_is_learned_from_as_in_a_plain_loop() -> None:
    """Two batches of different sizes: first the parts of the reward, then value and policy in turn."""
    training = agent_of(loss_with(clip=0.1))
    agent = copy.deepcopy(training.controller)
    with torch.no_grad():
        rollouts = [agent.act(torch.rand(size, 3).double(), torch.randn(size).double()) for size in (5, 7)]
    for rollout, reward in zip(rollouts, (0.2, 0.5), strict=True):
        training.learn(rollout, reward)
    policy, value, parts = ([*network.parameters()] for network in (agent.policy, agent.value, agent.reward))
    policy.append(agent.log_std)
    for_policy, for_value, for_parts = (Adam(weights, 0.01) for weights in (policy, value, parts))
    targets = [-math.sqrt(5), math.sqrt(7)]
    for _ in range(10):
        sums = [agent.reward(torch.cat([r.states, r.actions[:, None]], 1)).sum() for r in rollouts]
        apart = [(found - wanted) ** 2 / n for found, wanted, n in zip(sums, targets, (5, 7), strict=True)]
        descend(for_parts, parts, (apart[0] + apart[1]) / 2)
    states, actions, before = rollouts[1]
    with torch.no_grad():
        h = agent.reward(torch.cat([states, actions[:, None]], 1))
        rewards = h + (math.sqrt(7) - h.sum()) / 7
        advantages = rewards - agent.value(states)
        advantages = (advantages - advantages.mean()) / advantages.std(correction=0)
    for _ in range(5):
        descend(for_value, value, (agent.value(states) - rewards).square().mean())
        std = agent.log_std.exp()
        mean = 4 * torch.tanh(agent.policy(states) / 4)
        ratio = (-(((actions - mean) / std) ** 2) / 2 - std.log() - math.log(2 * math.pi) / 2 - before).exp()
        terms = [min(w * a, w.clamp(0.9, 1.1) * a) for w, a in zip(ratio, advantages, strict=True)]
        descend(for_policy, policy, -torch.stack(terms).mean())
    for key, weight in training.controller.state_dict().items():
        torch.testing.assert_close(weight, agent.state_dict()[key], rtol=1e-7, atol=1e-7)


class Bandit:
    """A world whose reward is minus the mean squared distance to the best temperature of each state."""

    def __init__(self, best: Callable[[Tensor], Tensor]) -> None:
        torch.manual_seed(0)
        self.best, self.generator = best, torch.Generator().manual_seed(1)
        options = ITKDOptions(lr=3e-3, critic_lr=1e-2)
        self.training = AgentTraining(options.make(), options, None, 0)
        self.agent: TemperatureAgent = self.training.controller

    def states(self, count: int) -> Tensor:
        sharpness = torch.where(torch.rand(count, 1, generator=self.generator) < 0.5, 0.5, 8.0)
        v = sharpness * torch.randn(count, C, generator=self.generator)
        return self.agent.observe(v, 3 * torch.randn(count, C, generator=self.generator))

    def error(self) -> float:
        """Return the mean distance of the mean action's temperature to the best."""
        states = self.states(256)
        with torch.no_grad():
            mean, _ = self.agent.distribution(states)
            return float((self.agent.temperature(mean) - self.best(states)).abs().mean())

    def play(self, rounds: int) -> None:
        for _ in range(rounds):
            with torch.no_grad():
                rollout = self.agent.act(self.states(32), torch.randn(32, generator=self.generator))
            distance = self.agent.temperature(rollout.actions) - self.best(rollout.states)
            self.training.learn(rollout, -float(distance.square().mean()))


@pytest.mark.slow
def test_the_agent_finds_the_best_temperature() -> None:
    bandit = Bandit(lambda states: torch.full((len(states),), 8.0))
    assert bandit.error() > 2
    bandit.play(60)
    assert bandit.error() < 0.6


@pytest.mark.slow
def test_the_agent_finds_the_best_temperature_of_each_state() -> None:
    """7 for students that are sure, 3 for others: a policy that ignores the state is 2 off."""
    bandit = Bandit(lambda states: torch.where(states[:, 0] > 0.6, 7.0, 3.0))
    bandit.play(120)
    assert bandit.error() < 0.8


def state_of(training: AgentTraining) -> dict[str, Tensor]:
    return copy.deepcopy(training.controller.state_dict())


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return all(torch.equal(value, other[key]) for key, value in one.items())


@pytest.mark.parametrize("reward", [float("nan"), float("inf")])
def test_nothing_is_learned_from_a_reward_that_is_not_known(reward: float) -> None:
    training = agent_of(loss_with())
    before = state_of(training)
    for _ in range(3):
        training.learn(training.controller.act(torch.rand(4, 3).double(), torch.randn(4).double()), reward)
    assert same(before, state_of(training))


def test_nothing_is_learned_while_all_rewards_are_equal() -> None:
    training = agent_of(loss_with())
    before = state_of(training)
    with torch.no_grad():
        rollout = training.controller.act(torch.rand(4, 3).double(), torch.randn(4).double())
    training.learn(rollout, 0.25)
    training.learn(rollout, 0.25)
    assert same(before, state_of(training))
    training.learn(rollout, 0.5)
    assert not same(before, state_of(training))


def test_a_batch_without_labels_has_no_reward() -> None:
    labels = [index % C for index in range(COUNT)]
    order = torch.randperm(COUNT, generator=torch.Generator().manual_seed(1))
    for index in order[BATCH : 2 * BATCH].tolist():
        labels[index] = -1
    model, training = Double(), agent_of(loss_with())
    trainer = Trainer(model, SPEC, loss_with(), COUNT, learned=LearnedParts(controller=training))
    trainer.epoch(view(labels=labels), 1, TEACHER)
    assert [math.isnan(reward) for _, reward in training.learned_from] == [True, True]
    assert not training.state_dict()["remembered"]


@pytest.mark.slow
def test_micro_batches_are_one_batch() -> None:
    weights = []
    for count in (1, 3):
        spec = SPEC.model_copy(update={"gradient_accumulation_steps": count})
        model, training = trained(loss_with(), spec, norm=False)
        assert len(training.learned_from) == EPOCHS * 3 - 1
        weights.append([*model.parameters(), *training.controller.parameters()])
    torch.testing.assert_close(*weights, rtol=1e-6, atol=1e-8)


def test_every_other_step_is_judged_and_the_mean_is_taken_in_between() -> None:
    loss = loss_with(every=2)
    _, training = trained(loss)
    assert len(training.learned_from) == EPOCHS * 3 // 2
    training = agent_of(loss)
    u = said(torch.arange(BATCH))
    micro_batch = MicroBatch(torch.rand(BATCH, 1, 4, 4), torch.arange(BATCH) % C, None, u)
    given = []
    for _ in range(3):
        training.prepare(Double(), ComingStep([micro_batch], loss, 1, 0.1))
        mean = training.controller(u / 2, u, micro_batch.labels).temperature
        given.append(training.control(u / 2, micro_batch).temperature == mean)
        training.step(Double())
    assert [bool(each.all()) for each in given] == [True, False, True]


def test_before_its_first_epoch_the_temperature_is_that_of_the_loss() -> None:
    loss = loss_with(start_epoch=2)
    plain = Loss.model_validate({"name": "kd", "ce_weight": 1.0, "kd_weight": 1.0})
    models = []
    for each in (loss, plain):
        model = Double()
        learned = LearnedParts(controller=agent_of(loss)) if each is loss else LearnedParts()
        trainer = Trainer(model, SPEC, each, COUNT, learned=learned)
        for number in (1, 2):
            trainer.epoch(view(), number, TEACHER)
            models.append(copy.deepcopy(model.state_dict()))
    # Without a controller the loss is computed by another path: up to rounding.
    torch.testing.assert_close(models[0], models[2], rtol=1e-12, atol=1e-12)
    with pytest.raises(AssertionError):
        torch.testing.assert_close(models[1], models[3], rtol=1e-4, atol=1e-4)


def test_batches_are_of_labeled_images() -> None:
    labels = [index % C if index % 3 else -1 for index in range(COUNT)]
    batches = LabeledBatches(view(labels=labels), 10, 0)
    for index in range(5):
        batch = batches.batch(index, "cpu")
        assert len(batch.labels) == 10 and bool((batch.labels >= 0).all())
    of_a_pass = torch.cat([LabeledBatches(view(labels=labels), 8, 0).batch(index, "cpu").ids for index in range(3)])
    assert sorted(of_a_pass.tolist()) == [index for index in range(COUNT) if index % 3]
    assert len(LabeledBatches(view(labels=labels), 100, 0).batch(7, "cpu").labels) == 24


def made(loss: Loss, train: View, validation: View | None, processes: int = 1, spec: TrainSpec = SPEC) -> Any:
    return make_controller(loss, spec, train, validation, TEACHER, processes, "cpu")


def test_what_has_no_reward_is_refused() -> None:
    unlabeled = view(labels=[-1] * COUNT)
    with pytest.raises(UsageError, match="accuracy on labeled training images, and there are none"):
        made(loss_with(), unlabeled, view())
    for validation in (None, unlabeled):
        with pytest.raises(UsageError, match="labeled validation images, and there are none"):
            made(loss_with(reward="validation"), view(), validation)
    with pytest.raises(UsageError, match="is trained in one process, and there are 2"):
        made(loss_with(), view(), view(), processes=2)
    with pytest.raises(UsageError, match="begins in epoch 9, and the run has 3"):
        made(loss_with(start_epoch=9), view(), view())


def test_what_needs_no_second_derivatives_is_allowed() -> None:
    spec = SPEC.model_copy(update={"gradient_accumulation_steps": 2, "precision": "bf16", "compile": True})
    assert isinstance(made(loss_with(), view(), None, spec=spec), AgentTraining)
    assert isinstance(made(loss_with(reward="validation"), view(labels=[-1] * COUNT), view(), spec=spec), AgentTraining)


@pytest.mark.slow
def test_a_run_in_bfloat16_with_micro_batches(tmp_path: Path) -> None:
    torch.manual_seed(0)
    cache = dump_teacher(build_model("small:mlp", 10, (1, 8, 8)), load_split("digits", "train"), tmp_path / "t.kdcache")
    train = {"epochs": 2, "lr": 0.02, "precision": "bf16", "gradient_accumulation_steps": 2}
    pipeline = Pipeline.model_validate(
        {
            "dataset": {"name": "digits"},
            "student": {"model": "small:mlp", "train": train},
            "loss": {"name": "kd", "controller": {"kind": "itkd", "low": 2.0, "high": 3.0, "start_epoch": 2}},
        }
    )
    train_student(pipeline, cache, tmp_path / "run")
    header, *lines = [line.split(",") for line in (tmp_path / "run/metrics.csv").read_text().splitlines()]
    first, second = (float(line[header.index("student_temperature")]) for line in lines)
    assert first == pytest.approx(4, abs=1e-5) and 2 < second < 3
    assert (tmp_path / "run/controller.safetensors").exists()


@pytest.mark.slow
def test_samples_that_are_held_out_are_no_steps_of_the_agent(tmp_path: Path) -> None:
    """Their loss is that of the constant temperature, in plain torch."""
    x = torch.randn(90, 6, generator=torch.Generator().manual_seed(0))
    np.savez(tmp_path / "x.npz", x=x.numpy(), y=x[:, :3].argmax(dim=1).numpy())
    (tmp_path / "net.py").write_text(
        "from torch import nn\ndef net(num_classes):\n    return nn.Linear(6, num_classes)\n"
    )
    given: dict[str, Any] = {
        "dataset": {"name": "npz", "root": str(tmp_path / "x.npz"), "validation_fraction": 0.0, "test_fraction": 0.0},
        "student": {
            "model": f"{tmp_path}/net.py:net",
            "train": {"epochs": 2, "batch_size": 15, "held_out_fraction": 1 / 3},
        },
        "loss": {"name": "kd", "controller": {"kind": "itkd"}},
    }
    pipeline = Pipeline.model_validate(given)
    samples, teacher = load_split(pipeline.dataset, "train"), nn.Linear(6, 3)
    cache = dump_teacher(teacher, samples, tmp_path / "t.kdcache", top_k="all", dtype="float32")
    train_student(pipeline, cache, tmp_path / "run")
    best = json.loads((tmp_path / "run/metrics.json").read_text())["best"]
    held, weights = held_out_ids(samples, 1 / 3), load_file(tmp_path / "run/model.safetensors")
    with torch.no_grad():
        student, said = F.linear(x[held], weights["weight"], weights["bias"]), teacher(x[held])
    labels = torch.from_numpy(samples.labels[held]).long()
    ce_weight, kd_weight = (Loss.model_validate({"name": "kd"}).model_dump()[key] for key in ("ce_weight", "kd_weight"))
    kl = F.kl_div((student / 4).log_softmax(1), (said / 4).log_softmax(1), log_target=True, reduction="batchmean")
    wanted = ce_weight * F.cross_entropy(student, labels) + kd_weight * 16 * kl
    assert best["validation_loss"] == pytest.approx(float(wanted), rel=1e-4)

"""Students with a gate over several caches, or with a controller: steps against plain loops, and whole runs."""

from __future__ import annotations

import copy
import os
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from helpers.interrupts import interrupt_after_checkpoints
from helpers.processes import exit_code
from helpers.teachers import FunctionTeacher
from helpers.tiny import tiny_samples
from helpers.trainers import meeting_place, together
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import SGD

from kdcache import Cache, dump_teacher, load_split
from kdcache.config.schema import Pipeline, TrainSpec
from kdcache.data.views import View
from kdcache.errors import KdcacheError, UsageError
from kdcache.losses import Loss
from kdcache.losses.controllers import Controller, HypergradientOptions, InstanceTemperatureOptions
from kdcache.losses.gate import Gate
from kdcache.models import build_model
from kdcache.runtime.progress import Silent
from kdcache.train.batches import LabeledBatches
from kdcache.train.controller import ComingStep, ControllerTraining
from kdcache.train.inputs import CacheOptions
from kdcache.train.learned import LearnedParts, make_controller
from kdcache.train.passes import MicroBatch
from kdcache.train.run_result import RunResult
from kdcache.train.step import Trainer
from kdcache.train.sweep_context import SweepContext
from kdcache.train.train import Student, train_student, train_together

COUNT, BATCH, EPOCHS, TEACHERS, C = 36, 12, 2, 3, 10
SPEC = TrainSpec(
    epochs=EPOCHS, batch_size=BATCH, lr=0.02, weight_decay=0.0, momentum=0.0, nesterov=False, schedule="constant"
)


def view(seed: int = 0) -> View:
    return View(tiny_samples(COUNT, labels=[(index + seed) % C for index in range(COUNT)]), [])


def said(ids: Tensor) -> Tensor:
    """[B] -> the logits of all teachers, [B, K, C]."""
    table = torch.randn(COUNT, TEACHERS, C, generator=torch.Generator().manual_seed(9), dtype=torch.float64)
    return 2 * table[ids]


class Double(nn.Module):
    """In float64, so that no difference is one of rounding."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(2)
        self.layers = nn.Sequential(nn.Flatten(), nn.Linear(16, 7), nn.Tanh(), nn.Linear(7, C)).double()

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.layers(images.double())
        return logits


def gate_of(teachers: int = TEACHERS) -> Gate:
    torch.manual_seed(4)
    return Gate(C, teachers).double()


GATES: dict[str, dict[str, Any]] = {
    "top": {"top": 2, "balance": 0.5},
    "mean": {"choose": "mean", "balance": 0.1},
}


def gated(name: str) -> Loss:
    return Loss.model_validate({"name": "kd", "ce_weight": 0.3, "kd_weight": 0.7, "gate": GATES[name]})


def gated_by_hand(name: str) -> list[Tensor]:
    """The loop that a user would write."""
    model, gate, train, options = Double(), gate_of(), view(), GATES[name]
    optimizer = SGD([*model.parameters(), *gate.parameters()], lr=SPEC.lr)
    for number in range(1, EPOCHS + 1):
        order = torch.randperm(COUNT, generator=torch.Generator().manual_seed(number))
        for ids in torch.split(order, BATCH):
            batch = train.__getitems__(ids.tolist())
            v, u = model(batch.images), said(ids)
            chances = gate(v)
            if name == "top":
                best = chances.topk(2, dim=1).indices
                chosen = [torch.stack([u[i, best[i, rank]] for i in range(len(u))]) for rank in range(2)]
            else:
                chosen = [torch.einsum("bk,bkc->bc", chances, u)]
            terms = [16 * F.kl_div((v / 4).log_softmax(1), (t / 4).softmax(1), reduction="batchmean") for t in chosen]
            uniform = torch.full((TEACHERS,), 1 / TEACHERS, dtype=torch.float64)
            balance = (uniform * (uniform.log() - chances.mean(0).log())).sum()
            total = 0.3 * F.cross_entropy(v, batch.labels) + 0.7 * torch.stack(terms).mean()
            optimizer.zero_grad()
            torch.autograd.backward(total + options["balance"] * balance)
            optimizer.step()
    return [value.detach() for value in (*model.parameters(), *gate.parameters())]


def gated_by_the_trainer(name: str, accumulate: int = 1) -> list[Tensor]:
    model, gate, train = Double(), gate_of(), view()
    teacher = FunctionTeacher(lambda ids, _: said(ids), COUNT)
    spec = SPEC.model_copy(update={"gradient_accumulation_steps": accumulate})
    trainer = Trainer(model, spec, gated(name), COUNT, learned=LearnedParts(gate=gate))
    for number in range(1, EPOCHS + 1):
        trainer.epoch(train, number, teacher)
    return [value.detach() for value in (*model.parameters(), *gate.parameters())]


@pytest.mark.parametrize("name", GATES)
@pytest.mark.parametrize("accumulate", [1, 3])
def test_a_gate_learns_as_in_a_plain_loop(name: str, accumulate: int) -> None:
    found = gated_by_the_trainer(name, accumulate)
    torch.testing.assert_close(found, gated_by_hand(name), rtol=1e-7, atol=1e-9)


def as_a_rank(rank: int, environment: dict[str, str], out: Path) -> None:
    os.environ.update(environment)
    torch.save({name: gated_by_the_trainer(name) for name in GATES}, out / f"{rank}.pt")


def test_processes_share_a_gate(tmp_path: Path) -> None:
    processes = together(store := meeting_place(), 2, as_a_rank, tmp_path)
    assert [exit_code(process) for process in processes] == [0, 0]
    assert store is not None
    for rank in range(2):
        for name, weights in torch.load(tmp_path / f"{rank}.pt", weights_only=True).items():
            torch.testing.assert_close(weights, gated_by_hand(name), rtol=1e-7, atol=1e-9, msg=name)


# Controllers


CONTROLLERS: dict[str, dict[str, Any]] = {
    "tgeo": {"kind": "tgeo", "lr": 0.05},
    "instance_temperature": {"kind": "instance_temperature", "low": 1.0, "high": 6.0},
}


def controlled(name: str, **more: Any) -> Loss:
    return Loss.model_validate(
        {"name": "kd", "ce_weight": 1.0, "kd_weight": 1.0, "controller": CONTROLLERS[name] | more}
    )


def controller_of(loss: Loss) -> Controller:
    assert isinstance(loss.controller, HypergradientOptions)
    torch.manual_seed(7)
    return loss.controller.make(C, torch.full((C, C), 1 / C)).double()


def one(ids: Tensor) -> Tensor:
    return said(ids)[:, 0]


def in_training(loss: Loss) -> ControllerTraining:
    assert isinstance(loss.controller, HypergradientOptions)
    return ControllerTraining(controller_of(loss), loss.controller, LabeledBatches(view(3), BATCH, 0))


@pytest.mark.parametrize("name", CONTROLLERS)
def test_the_gradient_is_that_of_the_validation_loss_after_a_step(name: str) -> None:
    """By differences in every direction of the controller's weights: no second derivative is taken."""
    loss, model = controlled(name), Double()
    training = in_training(loss)
    batch = view().__getitems__(list(range(BATCH)))
    micro_batch = MicroBatch(batch.images, batch.labels, None, one(torch.arange(BATCH)))
    training.prepare(model, ComingStep([micro_batch], loss, 1, 0.1))
    found = torch.cat(
        [parameter.grad.flatten() for parameter in training.controller.parameters() if parameter.grad is not None]
    )
    validation = view(3)
    order = torch.randperm(COUNT, generator=torch.Generator().manual_seed(0))[:BATCH]
    held = validation.__getitems__(order.tolist())

    def validation_loss(controller: nn.Module) -> float:
        student = copy.deepcopy(model)
        v, u = student(batch.images), one(torch.arange(BATCH))
        control = controller(v, u, batch.labels)
        tau = 4.0 if control.temperature is None else control.temperature[:, None]
        scale = 16.0 if control.temperature is None else control.temperature**2
        kl = scale * F.kl_div((v / tau).log_softmax(1), (u / tau).softmax(1), reduction="none").sum(1)
        ce = F.cross_entropy(v, batch.labels, reduction="none")
        total = (ce + kl).mean() if control.share is None else ((1 - control.share) * ce + control.share * kl).mean()
        slopes = torch.autograd.grad(total, [*student.parameters()])
        with torch.no_grad():
            for parameter, slope in zip(student.parameters(), slopes, strict=True):
                parameter.sub_(0.1 * slope)
            return float(F.cross_entropy(student(held.images), held.labels))

    generator = torch.Generator().manual_seed(0)
    for _ in range(5):
        direction = torch.randn(len(found), generator=generator, dtype=torch.float64)
        values = []
        for sign in (1, -1):
            moved = copy.deepcopy(training.controller)
            vector = nn.utils.parameters_to_vector(moved.parameters()) + sign * 1e-5 * direction
            nn.utils.vector_to_parameters(vector, moved.parameters())
            values.append(validation_loss(moved))
        assert float(found @ direction) == pytest.approx((values[0] - values[1]) / 2e-5, rel=1e-4, abs=1e-9)


def test_nothing_of_the_student_changes_while_the_gradient_is_computed() -> None:
    loss = controlled("tgeo")
    model = nn.Sequential(nn.Conv2d(1, 3, 3), nn.BatchNorm2d(3), nn.Dropout(0.3), nn.Flatten(), nn.Linear(12, C))
    before = copy.deepcopy(model.state_dict())
    assert isinstance(loss.controller, HypergradientOptions)
    controller = controller_of(loss).float()
    training = ControllerTraining(controller, loss.controller, LabeledBatches(view(3), BATCH, 0))
    batch = view().__getitems__(list(range(BATCH)))
    micro_batch = MicroBatch(batch.images, batch.labels, None, one(torch.arange(BATCH)).float())
    training.prepare(model, ComingStep([micro_batch], loss, 1, 0.1, 0.1))
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())
    assert sum(float(p.grad.abs().sum()) for p in controller.parameters() if p.grad is not None) > 0


@pytest.mark.parametrize("name", CONTROLLERS)
def test_the_student_gets_no_gradient_through_its_controller(name: str) -> None:
    """Two epochs, against a loop in which the controller's values are constants of each step."""
    loss, model, train = controlled(name), Double(), view()
    training = in_training(loss)
    trainer = Trainer(model, SPEC, loss, COUNT, learned=LearnedParts(controller=training))
    for number in range(1, EPOCHS + 1):
        trainer.epoch(train, number, FunctionTeacher(lambda ids, _: one(ids), COUNT))
    again, by_hand = in_training(loss), Double()
    optimizer = SGD(by_hand.parameters(), lr=SPEC.lr)
    for number in range(1, EPOCHS + 1):
        order = torch.randperm(COUNT, generator=torch.Generator().manual_seed(number))
        for ids in torch.split(order, BATCH):
            batch = train.__getitems__(ids.tolist())
            u = one(ids)
            micro_batch = MicroBatch(batch.images, batch.labels, None, u)
            again.prepare(by_hand, ComingStep([micro_batch], loss, number, SPEC.lr))
            v = by_hand(batch.images)
            with torch.no_grad():
                control = again.controller(v, u, batch.labels)
            tau = (
                torch.full((len(u),), 4.0, dtype=torch.float64) if control.temperature is None else control.temperature
            )
            t = tau[:, None]
            kl = tau**2 * F.kl_div((v / t).log_softmax(1), (u / t).softmax(1), reduction="none").sum(1)
            ce = F.cross_entropy(v, batch.labels, reduction="none")
            a = control.share
            optimizer.zero_grad()
            torch.autograd.backward(((ce + kl) if a is None else ((1 - a) * ce + a * kl)).mean())
            optimizer.step()
            again.step(by_hand)
    for pair in ((model, by_hand), (training.controller, again.controller)):
        here, there = ([*network.parameters()] for network in pair)
        torch.testing.assert_close(here, there, rtol=1e-7, atol=1e-9)


def test_the_published_controller_keeps_its_random_weights() -> None:
    for published in (True, False):
        loss, model = controlled("tgeo", published=published), Double()
        training = in_training(loss)
        before = copy.deepcopy(training.controller.state_dict())
        trainer = Trainer(model, SPEC, loss, COUNT, learned=LearnedParts(controller=training))
        trainer.epoch(view(), 1, FunctionTeacher(lambda ids, _: one(ids), COUNT))
        same = all(torch.equal(value, before[key]) for key, value in training.controller.state_dict().items())
        assert same == published


def test_a_controller_may_be_trained_at_every_other_step() -> None:
    loss = controlled("tgeo", every=2)
    training = in_training(loss)
    batch = view().__getitems__(list(range(BATCH)))
    micro_batch = MicroBatch(batch.images, batch.labels, None, one(torch.arange(BATCH)))
    moved = []
    for _ in range(4):
        before = copy.deepcopy(training.controller.state_dict())
        training.prepare(Double(), ComingStep([micro_batch], loss, 1, 0.1))
        training.step(Double())
        moved.append(not all(torch.equal(v, before[k]) for k, v in training.controller.state_dict().items()))
    assert moved == [False, True, False, True]


# Whole runs


class Runs(NamedTuple):
    """Three caches of the digits."""

    caches: list[Cache]

    def pipeline(self, loss: dict[str, Any], **given: Any) -> Pipeline:
        train = {"epochs": 3, "lr": 0.02, **given.pop("train", {})}
        return Pipeline.model_validate(
            {
                "dataset": {"name": "digits", **given.pop("dataset", {})},
                "student": {"model": "small:mlp", "train": train},
                "loss": loss,
                **given,
            }
        )


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Runs:
    folder, caches = tmp_path_factory.mktemp("gates"), []
    data = load_split("digits", "train")
    for seed in range(TEACHERS):
        torch.manual_seed(seed)
        teacher = build_model("small:mlp", 10, (1, 8, 8))
        caches.append(dump_teacher(teacher, data, folder / f"{seed}.kdcache"))
    return Runs(caches)


KINDS: dict[str, tuple[dict[str, Any], str, int]] = {
    "gate": ({"name": "kd", "gate": {"top": 2}}, "gate.safetensors", 3),
    "gate of means": ({"name": "dtkd", "gate": {"choose": "mean"}}, "gate.safetensors", 2),
    "tgeo": ({"name": "kd", "controller": {"kind": "tgeo"}}, "controller.safetensors", 1),
    "temperature": ({"name": "kd", "controller": {"kind": "instance_temperature"}}, "controller.safetensors", 1),
    "agent": ({"name": "kd", "controller": {"kind": "itkd"}}, "controller.safetensors", 1),
    "agent on validation": (
        {"name": "kd", "controller": {"kind": "itkd", "reward": "validation", "every": 2}},
        "controller.safetensors",
        1,
    ),
}


@pytest.mark.parametrize("kind", KINDS)
def test_an_interrupted_run_continues_to_the_same_weights(kind: str, runs: Runs, tmp_path: Path) -> None:
    loss, file, count = KINDS[kind]
    pipeline, caches = runs.pipeline(loss), runs.caches[:count]
    train_student(pipeline, caches, tmp_path / "whole")
    with pytest.MonkeyPatch.context() as patch:
        interrupt_after_checkpoints(2, patch)
        with pytest.raises(KeyboardInterrupt):
            train_student(pipeline, caches, tmp_path / "run")
    train_student(pipeline, caches, tmp_path / "run")
    for name in ("model.safetensors", file):
        whole, resumed = (load_file(tmp_path / run / name) for run in ("whole", "run"))
        assert whole.keys() == resumed.keys()
        assert all(torch.equal(value, resumed[key]) for key, value in whole.items()), name


REFUSED: list[tuple[str, dict[str, Any], int, dict[str, Any], type[KdcacheError], str]] = [
    ("gate", {}, 1, {}, UsageError, "chooses among several teachers .top 2., and the run has 1 cache"),
    ("gate", {"gate": {"top": 3}}, 2, {}, UsageError, r"\(top 3\), and the run has 2 caches"),
    ("gate", {}, 2, {"join": {"weights": [1.0, 2.0]}}, UsageError, "and `join` joins them"),
    ("tgeo", {}, 1, {"train": {"gradient_accumulation_steps": 2}}, UsageError, "gradient_accumulation_steps is set"),
    ("tgeo", {}, 1, {"train": {"precision": "bf16"}}, UsageError, "train.precision is set"),
]


@pytest.mark.parametrize(("kind", "change", "count", "given", "error", "words"), REFUSED)
def test_what_cannot_be_trained_is_refused(
    kind: str,
    change: dict[str, Any],
    count: int,
    given: dict[str, Any],
    error: type[KdcacheError],
    words: str,
    runs: Runs,
    tmp_path: Path,
) -> None:
    with pytest.raises(error, match=words):
        train_student(runs.pipeline(KINDS[kind][0] | change, **given), runs.caches[:count], tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_controller_needs_labels_and_one_process() -> None:
    loss, teacher = controlled("tgeo"), FunctionTeacher(lambda ids, _: one(ids), COUNT)
    unlabeled = View(tiny_samples(COUNT, labels=[-1] * COUNT), [])
    for validation in (None, unlabeled):
        with pytest.raises(UsageError, match="labeled validation images, and there are none"):
            make_controller(loss, SPEC, view(), validation, teacher, 1, "cpu")
    with pytest.raises(UsageError, match="is trained in one process, and there are 2"):
        make_controller(loss, SPEC, view(), view(), teacher, 2, "cpu")


def test_the_options_of_a_controller_are_those_of_the_run(runs: Runs, tmp_path: Path) -> None:
    pipeline = runs.pipeline({"name": "kd", "controller": {"kind": "instance_temperature", "high": 3.0}})
    train_student(pipeline, runs.caches[0], tmp_path / "run")
    lines = (tmp_path / "run/metrics.csv").read_text().splitlines()
    header = lines[0].split(",")
    temperatures = [float(line.split(",")[header.index("student_temperature")]) for line in lines[1:]]
    assert all(1 < value < 3 for value in temperatures)
    assert isinstance(pipeline.loss.controller, InstanceTemperatureOptions)


def test_students_that_are_trained_together_are_what_each_is_alone(runs: Runs, tmp_path: Path) -> None:
    """With a gate, with the mean of the same caches, and with a controller."""
    context = SweepContext(runs.caches[:2], "cpu", CacheOptions(), {})
    losses: list[dict[str, Any]] = [
        {"name": "kd", "gate": {"top": 1}},
        {"name": "kd"},
        {"name": "kd", "controller": {"kind": "tgeo"}},
        {"name": "kd", "controller": {"kind": "itkd"}},
    ]
    pipelines = [runs.pipeline(loss, train={"epochs": 2}) for loss in losses]
    outcomes: dict[int, Any] = {}
    students = [
        Student(pipeline, context.inputs(pipeline), tmp_path / f"together{number}", Silent())
        for number, pipeline in enumerate(pipelines)
    ]
    assert students[1].inputs is students[2].inputs and students[0].inputs is not students[1].inputs
    train_together(students, outcomes.__setitem__)
    for number, pipeline in enumerate(pipelines):
        assert isinstance(outcomes[number], RunResult), outcomes[number]
        train_student(pipeline, runs.caches[:2], tmp_path / f"alone{number}")
        together_, alone = (load_file(tmp_path / f"{how}{number}/model.safetensors") for how in ("together", "alone"))
        assert all(torch.equal(value, alone[key]) for key, value in together_.items())

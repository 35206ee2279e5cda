"""Gradients are measured and clipped as torch does it, and told of if they are not finite or explode."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import kdcache
from kdcache.config.schema import DatasetSpec, TrainSpec
from kdcache.data.datasets import load_split
from kdcache.data.views import View
from kdcache.errors import KdcacheError
from kdcache.losses import Loss
from kdcache.losses.presets import PARTS
from kdcache.models.small import SmallMLP
from kdcache.runtime.progress import Silent
from kdcache.train.epochs import Diverged
from kdcache.train.gradients import GradientMonitor
from kdcache.train.loop import fit


class Messages(Silent):
    """Keeps what it is told."""

    def __init__(self) -> None:
        self.said: list[str] = []

    def say(self, message: str) -> None:
        self.said.append(message)


def with_gradients(scale: float, dtype: torch.dtype = torch.float32) -> list[tuple[str, nn.Parameter]]:
    generator = torch.Generator().manual_seed(3)
    shapes: list[tuple[int, ...]] = [(7, 5), (7,), (), (3, 2, 1, 4), (1,)]
    named = []
    for number, shape in enumerate(shapes):
        parameter = nn.Parameter(torch.zeros(shape, dtype=dtype))
        parameter.grad = scale * torch.randn(shape, generator=generator).to(dtype)
        named.append((f"p{number}", parameter))
    return [*named, ("without", nn.Parameter(torch.zeros(2)))]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e6, float("inf")])
def test_clipping_is_that_of_torch_to_the_last_bit(scale: float, dtype: torch.dtype) -> None:
    for largest in (0.1, 1.0, 50.0):
        ours, torchs = with_gradients(scale, dtype), with_gradients(scale, dtype)
        GradientMonitor(ours, largest).measure()
        nn.utils.clip_grad_norm_([one for _, one in torchs], largest)
        for (_, one), (_, other) in zip(ours, torchs, strict=True):
            assert (one.grad is None) == (other.grad is None)
            if one.grad is not None and other.grad is not None:
                assert torch.equal(one.grad.nan_to_num(), other.grad.nan_to_num())


def steps(norms: list[float], **options: Any) -> tuple[GradientMonitor, list[str]]:
    """Return a monitor after steps whose gradients have some norms, and what it has reported."""
    said: list[str] = []
    parameters = [("body", nn.Parameter(torch.zeros(2))), ("head", nn.Parameter(torch.zeros(2)))]
    monitor = GradientMonitor(parameters, report=said.append, **options)
    for norm in norms:
        parameters[0][1].grad = torch.tensor([0.0, 0.0])
        parameters[1][1].grad = torch.tensor([norm, 0.0])
        monitor.measure()
        monitor.add(torch.tensor(0.5), epoch=1)
    monitor.check()
    return monitor, said


def test_the_first_step_that_is_wrong_is_told_of_once() -> None:
    nan, inf = float("nan"), float("inf")
    for norms, words in (
        ([1.0, 2.0, nan, nan, inf], "step 3 (epoch 1, loss 0.5) is not finite in head;"),
        ([inf, 1.0], "step 1 (epoch 1, loss 0.5) is not finite in head;"),
        (
            [0.5, 4000.0, 5001.0, 9e9],
            "step 3 (epoch 1, loss 0.5) has the norm 5e+03, and that of the first step has 0.5;",
        ),
        ([0.0, 0.5, 6e3], "step 3 (epoch 1, loss 0.5) has the norm 6e+03, and that of the first step has 0.5;"),
    ):
        for options in ({}, {"max_norm": 0.1}):
            monitor, said = steps(norms, **options)
            assert len(said) == 1
            assert words in said[0]
            assert monitor.warning == said[0]
    for norms in ([1.0, 5000.0, 0.0], [1e-9, 0.9, 1e-3], [0.0, 0.0]):
        assert steps(norms)[1] == []


def test_what_was_told_is_not_told_again_after_a_resume() -> None:
    monitor, _ = steps([0.5, 9e9])
    other, said = steps([])
    other.load_state_dict(json.loads(json.dumps(monitor.state_dict())))
    assert other.warning == monitor.warning
    assert said == []
    third, said = steps([])
    third.load_state_dict(steps([0.5, 3.0])[0].state_dict())
    third._parameters[0][1].grad = torch.tensor([1e5, 0.0])
    third.measure()
    third.add(torch.tensor(0.5), epoch=2)
    assert "step 3 (epoch 2, loss 0.5)" in said[0]


def pipeline(tmp_path: Path, loss: dict[str, Any], **train: Any) -> kdcache.Pipeline:
    path = tmp_path / "mine.yaml"
    given = {"epochs": 2, "batch_size": 256, **train}
    path.write_text(json.dumps(
        {"dataset": {"name": "digits"}, "student": {"model": "small:mlp", "train": given}, "loss": loss}
    ))  # fmt: skip
    return kdcache.load_pipeline(path)


LOSSES = """
import torch

def root(student_logits, teacher_logits, labels):
    distance = (student_logits - student_logits).abs().sum(dim=1)
    return distance.sqrt()

def norm_of_zero(student_logits, teacher_logits, labels):
    return (0 * student_logits).square().sum(dim=1).sqrt()

def power(student_logits, teacher_logits, labels):
    return (student_logits - student_logits.detach()).abs().pow(0.5).sum(dim=1)
"""


@pytest.mark.parametrize("name", ["root", "norm_of_zero", "power"])
@pytest.mark.parametrize("largest", [None, 1.0])
def test_a_loss_whose_gradient_is_infinite_is_told_of_where_it_begins(
    name: str, largest: float | None, tmp_path: Path
) -> None:
    (tmp_path / "losses.py").write_text(LOSSES)
    given = pipeline(tmp_path, {"name": f"{tmp_path}/losses.py:{name}"}, max_grad_norm=largest)
    samples, messages = load_split(given.dataset, "train"), Messages()
    cache = kdcache.dump_teacher(SmallMLP(10, 1, 8, 8), samples, tmp_path / "c.kdcache")
    with pytest.raises(KdcacheError, match="the loss became nan"):
        kdcache.train_student(given, cache, tmp_path / "run", progress=messages)
    told = [message for message in messages.said if message.startswith("warning")]
    assert len(told) == 1
    assert told[0].startswith("warning: the gradient of step 1 (epoch 1, loss ")
    assert "is not finite in hidden.weight and 3 more of 4 parameters;" in told[0]


def test_an_infinite_gradient_that_does_not_reach_the_loss_is_in_the_metrics(tmp_path: Path) -> None:
    (tmp_path / "nets.py").write_text(
        "import torch\nfrom torch import nn\n\nclass Net(nn.Module):\n    def __init__(self, num_classes):\n"
        "        super().__init__()\n        self.fc = nn.Linear(64, num_classes)\n"
        "        self.unused = nn.Parameter(torch.zeros(1))\n\n    def forward(self, x):\n"
        "        return self.fc(x.flatten(1)) + 0 * self.unused.abs().sqrt().clamp(min=0).nan_to_num()\n"
    )
    given = pipeline(tmp_path, {"name": "ce"})
    student = given.student.model_copy(update={"model": f"{tmp_path}/nets.py:Net"})  # type: ignore[union-attr]
    messages = Messages()
    kdcache.train_student(given.model_copy(update={"student": student}), None, tmp_path / "run", progress=messages)
    warnings = json.loads((tmp_path / "run" / "metrics.json").read_text())["warnings"]
    assert warnings == [message for message in messages.said if message.startswith("warning")]
    assert len(warnings) == 1
    assert "is not finite in unused;" in warnings[0]


def trained(loss: dict[str, Any], **options: Any) -> list[str]:
    messages = Messages()
    torch.manual_seed(0)
    spec = TrainSpec(**{"epochs": 3, "batch_size": 128, **options})
    try:
        fit(SmallMLP(10, 1, 8, 8), digits(), None, spec, Loss.model_validate(loss), progress=messages)
    except Diverged:
        messages.said.append("diverged")
    return messages.said


def digits() -> View:
    samples = load_split(DatasetSpec(name="digits"), "train")
    return View(samples, samples.transform)


@pytest.mark.parametrize("lr", [1e3, 1e8, 1e30])
@pytest.mark.parametrize("optimizer", ["sgd"])
def test_a_learning_rate_that_explodes_is_told_of(lr: float, optimizer: str) -> None:
    said = trained({"name": "ce"}, lr=lr, optimizer=optimizer, schedule="constant", momentum=0.0, weight_decay=0.1)
    assert len([message for message in said if message.startswith("warning: the gradient of step ")]) == 1


def test_nothing_is_told_of_a_usual_training(tmp_path: Path) -> None:
    samples = digits().samples
    torch.manual_seed(1)
    cache = kdcache.dump_teacher(SmallMLP(10, 1, 8, 8), samples, tmp_path / "c.kdcache")
    for name in [*PARTS, "ce"]:
        if name in ("truncated", "ff_g2m"):  # more than the classes of digits, and a graph
            continue
        given, messages = pipeline(tmp_path, {"name": name}, epochs=1, num_workers=0), Messages()
        kdcache.train_student(given, cache, tmp_path / name, progress=messages)
        assert [message for message in messages.said if "gradient" in message] == []
        assert json.loads((tmp_path / name / "metrics.json").read_text())["warnings"] == []


def test_the_same_training_has_the_same_weights_as_without_a_monitor() -> None:
    def weights(largest: float | None) -> Tensor:
        torch.manual_seed(0)
        model = SmallMLP(10, 1, 8, 8)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, nesterov=True, weight_decay=5e-4)
        view = digits()
        order = torch.randperm(len(view), generator=torch.Generator().manual_seed(1))
        for ids in torch.split(order, 512):
            batch = view.__getitems__(ids.tolist())
            optimizer.zero_grad()
            torch.autograd.backward(nn.functional.cross_entropy(model(batch.images), batch.labels))
            if largest is not None:
                nn.utils.clip_grad_norm_(model.parameters(), largest)
            optimizer.step()
        return torch.cat([one.detach().flatten() for one in model.parameters()])

    for largest in (None, 0.3):
        torch.manual_seed(0)
        model = SmallMLP(10, 1, 8, 8)
        spec = TrainSpec(epochs=1, batch_size=512, schedule="constant", max_grad_norm=largest)
        fit(model, digits(), None, spec, Loss.model_validate({"name": "ce"}))
        own = torch.cat([one.detach().flatten() for one in model.parameters()])
        torch.testing.assert_close(own, weights(largest), rtol=1e-6, atol=1e-7)

"""Training with losses on several outputs: the step, its parts over micro-batches and processes, and whole runs."""

from __future__ import annotations

import json
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
from torch.optim import SGD

from kdcache import Cache, dump_teacher, load_split
from kdcache.cache.teacher import TeacherWithOutputs
from kdcache.config.schema import Pipeline, StudentSpec, TrainSpec
from kdcache.data.samples import Samples
from kdcache.data.views import View
from kdcache.errors import KdcacheError, MismatchError, UsageError
from kdcache.losses import Loss, distillation_loss
from kdcache.losses.outputs import OUTPUT_LOSSES
from kdcache.models import build_model
from kdcache.runtime.progress import Silent
from kdcache.train.inputs import CacheOptions, inputs_from_caches
from kdcache.train.learned import LearnedParts
from kdcache.train.run_result import RunResult
from kdcache.train.step import Trainer
from kdcache.train.student_outputs import student_outputs
from kdcache.train.sweep_context import SweepContext
from kdcache.train.train import Student, train_on, train_student, train_together

COUNT, BATCH, EPOCHS, WIDTH = 36, 13, 2, 5
SPEC = TrainSpec(
    epochs=EPOCHS, batch_size=BATCH, lr=0.02, weight_decay=0.0, momentum=0.0, nesterov=False, schedule="constant"
)
VECTORS = [name for name, options in OUTPUT_LOSSES.items() if "vector" in options.kinds]


def samples() -> Samples:
    return tiny_samples(COUNT, labels=[index % 10 for index in range(COUNT)])


def said(ids: Tensor, width: int) -> Tensor:
    """What a teacher says of some samples, in float64."""
    table = torch.randn(COUNT, width, generator=torch.Generator().manual_seed(width), dtype=torch.float64)
    return table[ids]


class Double(nn.Module):
    """In float64, so that no difference is one of rounding."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(2)
        self.body = nn.Sequential(nn.Flatten(), nn.Linear(16, WIDTH), nn.Tanh()).double()
        self.head = nn.Linear(WIDTH, 10).double()

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.head(self.body(images.double()))
        return logits


class Case(NamedTuple):
    """A loss, and the width of the teacher's vectors."""

    loss: dict[str, Any]
    width: int = WIDTH

    @property
    def of(self) -> Loss:
        return Loss.model_validate(self.loss)

    def teacher(self) -> TeacherWithOutputs:
        of_logits = FunctionTeacher(lambda ids, _: said(ids, 10), COUNT) if self.of.uses_teacher else None
        return TeacherWithOutputs(of_logits, {"body": FunctionTeacher(lambda ids, _: said(ids, self.width), COUNT)})


CASES = {
    **{name: Case({"logits": {"name": "kd"}, "body": {"name": name, "weight": 0.5}}) for name in VECTORS},
    "mse, cross-entropy": Case({"body": {"name": "mse"}}),
    "mse, without logits": Case({"logits": False, "body": {"name": "mse"}}),
    "rkd, without logits": Case({"logits": False, "body": {"name": "rkd"}}),
    "sp, wider": Case({"logits": {"name": "dist"}, "body": {"name": "sp"}}, 7),
    "ccc": Case({"logits": {"name": "kd"}, "body": {"name": "ccc"}}),
}


def by_hand(case: Case) -> list[Tensor]:
    """The loop that a user would write, with the losses of the whole batch."""
    model, train, loss = Double(), View(samples(), []), case.of
    optimizer = SGD(model.parameters(), lr=SPEC.lr)
    for number in range(1, EPOCHS + 1):
        order = torch.randperm(COUNT, generator=torch.Generator().manual_seed(number))
        for ids in torch.split(order, BATCH):
            batch = train.__getitems__(ids.tolist())
            vectors = model.body(batch.images.double())
            of_logits = said(ids, 10) if loss.uses_teacher else None
            total = distillation_loss(model.head(vectors), of_logits, batch.labels, loss, number).total
            options = loss.outputs["body"]
            total = total + options.weight * options.values(vectors, said(ids, case.width)).mean()
            optimizer.zero_grad()
            torch.autograd.backward(total)
            optimizer.step()
    return [value.detach() for value in model.parameters()]


def by_the_trainer(case: Case, accumulate: int) -> list[Tensor]:
    model, train, teacher = Double(), View(samples(), []), case.teacher()
    spec = SPEC.model_copy(update={"gradient_accumulation_steps": accumulate})
    outputs = student_outputs(model, StudentSpec(model="small:mlp"), case.of, train, teacher)
    trainer = Trainer(model, spec, case.of, COUNT, learned=LearnedParts(outputs))
    for number in range(1, EPOCHS + 1):
        trainer.epoch(train, number, teacher)
    return [value.detach() for value in model.parameters()]


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("accumulate", [1, 3])
def test_a_step_is_that_of_the_whole_batch(name: str, accumulate: int) -> None:
    torch.testing.assert_close(by_the_trainer(CASES[name], accumulate), by_hand(CASES[name]), rtol=1e-7, atol=1e-9)


SHARED = ["mse", "rkd", "sp", "pkt", "ccc", "sp, wider", "mse, without logits", "rkd, without logits"]


def as_a_rank(rank: int, environment: dict[str, str], out: Path, names: list[str], pieces: list[int]) -> None:
    os.environ.update(environment)
    found = {(name, accumulate): by_the_trainer(CASES[name], accumulate) for name in names for accumulate in pieces}
    torch.save(found, out / f"{rank}.pt")


@pytest.mark.parametrize(("count", "pieces"), [(2, [1, 2]), (3, [1])])
def test_processes_that_share_a_batch_give_what_one_gives(count: int, pieces: list[int], tmp_path: Path) -> None:
    store = meeting_place()
    processes = together(store, count, as_a_rank, tmp_path, SHARED, pieces)
    assert [exit_code(process) for process in processes] == [0] * count
    for rank in range(count):
        found = torch.load(tmp_path / f"{rank}.pt", weights_only=True)
        for (name, accumulate), weights in found.items():
            expected = by_hand(CASES[name])
            torch.testing.assert_close(weights, expected, rtol=1e-7, atol=1e-9, msg=f"{name} {accumulate}")


# Whole runs


_CODE = """
from torch import nn

class Network(nn.Module):
    def __init__(self, num_classes, width):
        super().__init__()
        self.body = nn.Sequential(nn.Flatten(), nn.Linear(64, width), nn.ReLU())
        self.head = nn.Linear(width, num_classes)

    def forward(self, images):
        return self.head(self.body(images))

class Embedder(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.body = nn.Sequential(nn.Flatten(), nn.Linear(64, width))

    def forward(self, images):
        return {"embedding": self.body(images)}

class Twice(Network):
    def forward(self, images):
        self.body(images)
        return super().forward(images)

def network(num_classes, width=16):
    return Network(num_classes, width)

def embedder(num_classes, width=16):
    return Embedder(width)

def twice(num_classes, width=16):
    return Twice(num_classes, width)
"""


class Runs(NamedTuple):
    """A cache of the digits with vectors and scores, and the file of the students."""

    cache: Cache
    code: Path

    def pipeline(self, loss: dict[str, Any], function: str = "network", **student: Any) -> Pipeline:
        train = {"epochs": 3, "lr": 0.02, **student.pop("train", {})}
        return Pipeline.model_validate(
            {
                "dataset": {"name": "digits"},
                "student": {"model": f"{self.code}:{function}", "train": train, **student},
                "loss": loss,
            }
        )


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Runs:
    folder = tmp_path_factory.mktemp("outputs")
    code = folder / "students.py"
    code.write_text(_CODE)
    data = load_split(Pipeline.model_validate({"dataset": {"name": "digits"}}).dataset, "train")
    torch.manual_seed(0)
    teacher = build_model({"model": f"{code}:network", "args": {"width": 24}}, 10, (1, 8, 8))
    outputs: dict[str, Any] = {
        "features": {"encoding": "float32"},
        "scores": {"kind": "score", "source": "head"},
        "second": {"kind": "classes", "source": "head"},
    }
    return Runs(dump_teacher(teacher, data, folder / "c.kdcache", outputs=outputs), code)


def test_a_run_saves_the_linear_maps_beside_a_student_without_them(runs: Runs, tmp_path: Path) -> None:
    result = train_student(runs.pipeline({"features": {"name": "mse"}}), runs.cache, tmp_path / "run")
    maps = load_file(tmp_path / "run/projections.safetensors")
    assert {name: list(value.shape) for name, value in maps.items()} == {
        "features.weight": [24, 16],
        "features.bias": [24],
    }
    assert load_file(tmp_path / "run/model.safetensors").keys() == result.model.state_dict().keys()
    assert not any("projection" in name for name in result.model.state_dict())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in result.model.body.modules())  # type: ignore[union-attr]


def test_a_student_without_logits_learns_the_embeddings(runs: Runs, tmp_path: Path) -> None:
    loss = {"logits": False, "features": {"name": "mse"}}
    pipeline = runs.pipeline(loss, "embedder", outputs={"features": {"source": "embedding"}}, args={"width": 24})
    result = train_student(pipeline, runs.cache, tmp_path / "run")
    lines = (tmp_path / "run/metrics.csv").read_text().splitlines()[1:]
    losses = [float(line.split(",")[3]) for line in lines]
    assert losses[-1] < 0.5 * losses[0]
    assert (result.best.validation_accuracy, result.test) == (None, None)
    assert json.loads((tmp_path / "run/metrics.json").read_text())["test"] is None


def test_a_second_head_of_classes_is_distilled(runs: Runs, tmp_path: Path) -> None:
    """With the logits left out, the same head as an output of kind classes gives the student that kd would give."""
    taken = {"second": {"source": "head"}}
    second = runs.pipeline({"logits": False, "second": {"name": "kd", "tau": 4.0}}, outputs=taken)
    plain = runs.pipeline({"name": "kd", "ce_weight": 0.0, "kd_weight": 1.0}, train={"early_stopping_patience": None})
    train_student(second, runs.cache, tmp_path / "second")
    train_student(plain, runs.cache, tmp_path / "plain")
    losses = []
    for run in ("second", "plain"):
        lines = (tmp_path / run / "metrics.csv").read_text().splitlines()
        losses.append([float(line.split(",")[lines[0].split(",").index("distillation")]) for line in lines[1:]])
    assert losses[0] == pytest.approx(losses[1], rel=1e-3)
    assert losses[0][-1] < 0.7 * losses[0][0]


@pytest.mark.parametrize("name", ["mse", "rkd"])
def test_an_interrupted_run_continues_to_the_same_weights_and_maps(name: str, runs: Runs, tmp_path: Path) -> None:
    pipeline = runs.pipeline({"logits": {"name": "kd"}, "features": {"name": name}}, train={"epochs": 4})
    train_student(pipeline, runs.cache, tmp_path / "whole")

    with pytest.MonkeyPatch.context() as patch:
        interrupt_after_checkpoints(2, patch)
        with pytest.raises(KeyboardInterrupt):
            train_student(pipeline, runs.cache, tmp_path / "run")
    train_student(pipeline, runs.cache, tmp_path / "run")
    for file in ("model.safetensors", *(["projections.safetensors"] if name == "mse" else [])):
        whole, resumed = (load_file(tmp_path / run / file) for run in ("whole", "run"))
        assert whole.keys() == resumed.keys()
        assert all(torch.equal(value, resumed[key]) for key, value in whole.items())


def test_a_live_teacher_and_its_cache_teach_the_same(runs: Runs) -> None:
    """Vectors that are stored exactly give the student that the live teacher would give, to the bit."""
    data = load_split(runs.pipeline({"name": "ce"}).dataset, "train")
    train = View(data, [{"ToDtype": {"dtype": "float32"}}])
    torch.manual_seed(0)
    network = build_model({"model": f"{runs.code}:network", "args": {"width": 24}}, 10, (1, 8, 8)).eval()
    seen = View(data, runs.cache.manifest.plan.views.transform)

    def live(ids: Tensor, view: int) -> Tensor:
        with torch.no_grad():
            vectors: Tensor = network.body(seen.__getitems__(ids.tolist()).images)  # type: ignore[operator]
        return vectors

    weights: list[list[Tensor]] = []
    for teacher in (FunctionTeacher(live, len(data)), runs.cache.teacher("features")):
        torch.manual_seed(0)
        model = build_model({"model": f"{runs.code}:network"}, 10, (1, 8, 8))
        both = TeacherWithOutputs(None, {"features": teacher})
        loss = Loss.model_validate({"features": {"name": "rkd", "weight": 0.1}})
        outputs = student_outputs(model, StudentSpec(model="small:mlp"), loss, train, both)
        trainer = Trainer(model, TrainSpec(epochs=1, lr=0.01), loss, len(data), learned=LearnedParts(outputs))
        trainer.epoch(train, 1, both)
        weights.append([value.detach() for value in model.parameters()])
    torch.testing.assert_close(*weights, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("logits", [{"name": "kd"}, False])
def test_students_that_are_trained_together_are_what_each_is_alone(logits: Any, runs: Runs, tmp_path: Path) -> None:
    """Of other outputs, with maps of their own, and one whose weights are averaged."""
    losses = [{"features": {"name": "mse"}}, {"scores": {"name": "l1"}}, {"features": {"name": "rkd"}}]
    taken = {"scores": {"source": "head"}}
    pipelines = [
        runs.pipeline(
            {"logits": logits, **loss},
            outputs={name: taken[name] for name in loss if name in taken},
            train={"epochs": 2, "ema_decay": 0.9 if number else None},
        )
        for number, loss in enumerate(losses)
    ]
    outcomes: dict[int, Any] = {}
    # The first and the last share their batches and targets.
    of_first, of_second = (inputs_from_caches(pipeline, [runs.cache]) for pipeline in pipelines[:2])
    inputs = [of_first, of_second, of_first]
    students = [
        Student(pipeline, each, tmp_path / f"together{number}", Silent())
        for number, (pipeline, each) in enumerate(zip(pipelines, inputs, strict=True))
    ]
    train_together(students, outcomes.__setitem__)
    for number, (pipeline, each) in enumerate(zip(pipelines, inputs, strict=True)):
        assert isinstance(outcomes[number], RunResult), outcomes[number]
        train_on(pipeline, each, tmp_path / f"alone{number}")
        together_, alone = (load_file(tmp_path / f"{how}{number}/model.safetensors") for how in ("together", "alone"))
        assert all(torch.equal(value, alone[key]) for key, value in together_.items())


def test_students_of_a_sweep_have_the_outputs_of_their_own_losses(runs: Runs) -> None:
    """Of a plain loss, of one with features, and of one without a teacher, whatever was loaded before."""
    context = SweepContext([runs.cache], "cpu", CacheOptions(), {})
    plain, features, none = (
        runs.pipeline(loss) for loss in ({"name": "kd"}, {"logits": {"name": "kd"}, **MSE}, {"name": "ce"})
    )
    for pipeline, names in ((plain, None), (features, ["features"]), (none, None)):
        teacher = context.inputs(pipeline).teacher
        assert (teacher is None) == (pipeline is none)
        assert isinstance(teacher, TeacherWithOutputs) == (names is not None)
        if isinstance(teacher, TeacherWithOutputs):
            assert [*teacher.outputs] == names


MSE, SCORES = {"features": {"name": "mse"}}, {"scores": {"name": "mse"}}
BODY = {"outputs": {"features": {"source": "body"}}}
REFUSED: list[tuple[dict[str, Any], dict[str, Any], str, type[KdcacheError], str]] = [
    ({"feature": {"name": "mse"}}, {}, "network", UsageError, "uses the output feature, and .*did you mean features"),
    ({"features": {"name": "ccc"}}, {}, "network", UsageError, "loss ccc is for an output of kind score, and features"),
    ({"scores": {"name": "rkd"}}, {}, "network", UsageError, "loss rkd is for an output of kind vector, and scores is"),
    ({"second": {"name": "mse"}}, {}, "network", UsageError, "and second is of kind classes"),
    ({"scores": {"name": "margin_mse"}}, {}, "network", UsageError, "margin_mse compares 2 scores, and .* has 10"),
    (
        MSE,
        {"outputs": {"features": {"source": "boddy"}}},
        "network",
        MismatchError,
        "'boddy', did you mean body",
    ),
    (MSE, {"outputs": {"others": {}}}, "network", UsageError, "student.outputs names others, which the loss does not"),
    (
        {"scores": {"name": "mse"}},
        {},
        "network",
        MismatchError,
        "the student does not give the output scores: it has no",
    ),
    (MSE, BODY, "twice", MismatchError, "the module body of the student ran 2 times"),
    (SCORES, {"outputs": {"scores": {"source": "body"}}}, "network", MismatchError, "student has 16 numbers, that of"),
    (MSE, {"train": {"compile": True}}, "network", UsageError, "train.compile is true"),
    (
        {"logits": False, **MSE},
        {"train": {"early_stopping_patience": 2}},
        "network",
        UsageError,
        "early_stopping_patience has no effect",
    ),
]


@pytest.mark.parametrize(("loss", "student", "function", "error", "words"), REFUSED)
def test_what_cannot_be_compared_is_refused(
    loss: dict[str, Any],
    student: dict[str, Any],
    function: str,
    error: type[KdcacheError],
    words: str,
    runs: Runs,
    tmp_path: Path,
) -> None:
    with pytest.raises(error, match=words):
        train_student(runs.pipeline(loss, function, **student), runs.cache, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_outputs_of_several_caches_are_not_joined(runs: Runs, tmp_path: Path) -> None:
    with pytest.raises(MismatchError, match="2 caches are joined, and the loss uses the outputs features"):
        train_student(runs.pipeline({"features": {"name": "mse"}}), [runs.cache, runs.cache], tmp_path / "run")

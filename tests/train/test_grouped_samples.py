"""Students of scores of pairs, which are compared within the groups of a data set."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers.interrupts import interrupt_after_checkpoints
from helpers.processes import exit_code
from helpers.teachers import FunctionTeacher
from helpers.trainers import meeting_place, together
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.optim import SGD

from kdcache import Cache, dump_teacher, load_split
from kdcache.cache.teacher import TeacherWithOutputs
from kdcache.config.schema import Pipeline, StudentOutputSpec, StudentSpec, TrainSpec
from kdcache.data.images import ArrayImages
from kdcache.data.samples import Samples
from kdcache.data.views import View
from kdcache.errors import KdcacheError, UsageError
from kdcache.losses import Loss
from kdcache.models import build_model
from kdcache.train.learned import LearnedParts
from kdcache.train.step import Trainer
from kdcache.train.student_outputs import student_outputs
from kdcache.train.train import train_student

PAIRS, WIDTH, EPOCHS = 20, 3, 2
LOSSES = {"margin_mse": 2, "list_kl": 3, "mse": 2}
"""Names of the losses, each with the size of its groups."""


def samples(size: int) -> Samples:
    """Pairs, and groups with several pairs in common; one pair is in none."""
    generator = np.random.default_rng(size)
    groups = np.stack([generator.permutation(PAIRS - 1)[:size] for _ in range(15)])
    features = torch.from_numpy(generator.normal(size=(PAIRS, WIDTH)).astype(np.float32))
    return Samples("pairs", "train", ArrayImages(features), np.full(PAIRS, -1, np.int32), (), [], groups=groups)


def score(ids: Tensor) -> Tensor:
    """[B] -> the teacher's scores [B, 1]."""
    table = torch.randn(PAIRS, 1, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    return table[ids]


class Scorer(nn.Module):
    """One score per pair, in float64."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(2)
        self.head = nn.Linear(WIDTH, 1).double()

    def forward(self, pairs: Tensor) -> Tensor:
        scores: Tensor = self.head(pairs.double())
        return scores


def spec_of(size: int, accumulate: int = 1) -> TrainSpec:
    return TrainSpec(
        epochs=EPOCHS,
        batch_size=size * 6,
        lr=0.05,
        weight_decay=0.0,
        momentum=0.0,
        nesterov=False,
        schedule="constant",
        gradient_accumulation_steps=accumulate,
    )


def by_hand(name: str) -> list[Tensor]:
    """The loop over triples, or lists, that a user would write in plain torch."""
    size, model = LOSSES[name], Scorer()
    data = samples(size)
    assert data.groups is not None and isinstance(data.images, ArrayImages)
    groups, features = torch.from_numpy(data.groups), data.images.pixels
    optimizer = SGD(model.parameters(), lr=0.05)
    for number in range(1, EPOCHS + 1):
        order = torch.randperm(len(groups), generator=torch.Generator().manual_seed(number))
        for batch in torch.split(groups[order], 6):
            student = model(features[batch.flatten()].double()).reshape(batch.shape)
            teacher = score(batch.flatten()).reshape(batch.shape)
            if name == "margin_mse":
                loss = ((student[:, 0] - student[:, 1]) - (teacher[:, 0] - teacher[:, 1])).pow(2).mean()
            elif name == "list_kl":
                loss = nn.KLDivLoss(reduction="batchmean")(student.log_softmax(1), teacher.softmax(1))
            else:
                loss = nn.MSELoss()(student, teacher)
            optimizer.zero_grad()
            torch.autograd.backward(loss)
            optimizer.step()
    return [value.detach() for value in model.parameters()]


def by_the_trainer(name: str, accumulate: int) -> list[Tensor]:
    size, model = LOSSES[name], Scorer()
    train = View(samples(size), [])
    teacher = TeacherWithOutputs(None, {"scores": FunctionTeacher(lambda ids, _: score(ids), PAIRS)}, ["scores"])
    loss = Loss.model_validate({"logits": False, "scores": {"name": name}})
    outputs = student_outputs(
        model,
        StudentSpec(model="small:mlp", outputs={"scores": StudentOutputSpec(source="head")}),
        loss,
        train,
        teacher,
    )
    per_epoch = train.samples.per_epoch
    trainer = Trainer(model, spec_of(size, accumulate), loss, per_epoch, learned=LearnedParts(outputs), group_size=size)
    for number in range(1, EPOCHS + 1):
        trainer.epoch(train, number, teacher)
    return [value.detach() for value in model.parameters()]


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("accumulate", [1, 2, 3])
def test_a_step_is_that_of_the_loop_over_groups(name: str, accumulate: int) -> None:
    torch.testing.assert_close(by_the_trainer(name, accumulate), by_hand(name), rtol=1e-9, atol=1e-12)


def as_a_rank(rank: int, environment: dict[str, str], out: Path) -> None:
    os.environ.update(environment)
    torch.save({name: by_the_trainer(name, 1) for name in LOSSES}, out / f"{rank}.pt")


def test_processes_share_a_batch_by_groups(tmp_path: Path) -> None:
    store = meeting_place()
    processes = together(store, 3, as_a_rank, tmp_path)
    assert [exit_code(process) for process in processes] == [0] * 3
    for rank in range(3):
        found = torch.load(tmp_path / f"{rank}.pt", weights_only=True)
        for name, weights in found.items():
            torch.testing.assert_close(weights, by_hand(name), rtol=1e-7, atol=1e-9, msg=name)


@pytest.mark.parametrize(
    ("size", "accumulate", "words"),
    [
        (7, 1, "a batch of 7 samples .* does not divide into the data set's groups of 2"),
        (4, 3, "a batch of 2 groups of 2 samples cannot be divided into 3 micro-batches"),
    ],
)
def test_batches_that_would_divide_groups_are_refused(size: int, accumulate: int, words: str) -> None:
    spec = TrainSpec(batch_size=size, gradient_accumulation_steps=accumulate)
    loss = Loss.model_validate({"logits": False, "scores": {"name": "margin_mse"}})
    with pytest.raises(UsageError, match=words):
        Trainer(Scorer(), spec, loss, samples(2).per_epoch, group_size=2)


# Whole runs

_CODE = """
from torch import nn

def scorer(num_classes, width=4):
    return nn.Sequential(nn.Linear(6, width), nn.Tanh(), nn.Linear(width, 1))
"""


class Ranking:
    """A teacher of pairs, its cache, and an npz file of pairs and triples."""

    def __init__(self, folder: Path) -> None:
        generator = torch.Generator().manual_seed(0)
        self.folder, self.code = folder, folder / "scorers.py"
        self.code.write_text(_CODE)
        self.triples = torch.stack([torch.randperm(60, generator=generator)[:2] for _ in range(200)])
        self.features = torch.randn(60, 6, generator=generator)
        self.write(groups=self.triples.numpy())
        torch.manual_seed(1)
        self.teacher = build_model({"model": f"{self.code}:scorer", "args": {"width": 16}}, 0, (6,))
        data = load_split(self.pipeline({"name": "ce"}).dataset, "train")
        outputs: Any = {"scores": {"kind": "score", "source": "2"}}
        self.cache: Cache = dump_teacher(self.teacher, data, folder / "c.kdcache", outputs=outputs, logits=False)

    def write(self, **arrays: Any) -> None:
        np.savez(self.folder / "pairs.npz", x=self.features.numpy(), **arrays)

    def pipeline(self, loss: dict[str, Any], **train: Any) -> Pipeline:
        return Pipeline.model_validate(
            {
                "dataset": {
                    "name": "npz",
                    "root": str(self.folder / "pairs.npz"),
                    "validation_fraction": 0.0,
                    "test_fraction": 0.0,
                },
                "student": {
                    "model": f"{self.code}:scorer",
                    "train": {"epochs": 12, "batch_size": 40, "lr": 0.05, **train},
                },
                "loss": loss,
            }
        )


MARGINS = {"logits": False, "scores": {"name": "margin_mse"}}


@pytest.fixture
def ranking(tmp_path: Path) -> Ranking:
    return Ranking(tmp_path)


def test_a_student_learns_the_margins_from_the_cache(ranking: Ranking, tmp_path: Path) -> None:
    result = train_student(ranking.pipeline(MARGINS), ranking.cache, tmp_path / "run")
    with torch.no_grad():
        (positive, negative), (better, worse) = (
            model(ranking.features)[ranking.triples, 0].T for model in (result.model, ranking.teacher)
        )
    error = float(((positive - negative) - (better - worse)).var() / (better - worse).var())
    assert error < 0.2
    assert float(((positive > negative) == (better > worse)).float().mean()) > 0.85
    steps = (tmp_path / "run/metrics.csv").read_text().splitlines()
    assert len(steps) == 13


def test_an_interrupted_run_of_groups_continues_to_the_same_weights(ranking: Ranking, tmp_path: Path) -> None:
    train_student(ranking.pipeline(MARGINS, epochs=4), ranking.cache, tmp_path / "whole")
    with pytest.MonkeyPatch.context() as patch:
        interrupt_after_checkpoints(2, patch)
        with pytest.raises(KeyboardInterrupt):
            train_student(ranking.pipeline(MARGINS, epochs=4), ranking.cache, tmp_path / "run")
    train_student(ranking.pipeline(MARGINS, epochs=4), ranking.cache, tmp_path / "run")
    whole, resumed = (load_file(tmp_path / run / "model.safetensors") for run in ("whole", "run"))
    assert all(torch.equal(value, resumed[key]) for key, value in whole.items())


REFUSED: list[tuple[dict[str, Any], Any, type[KdcacheError], str]] = [
    (MARGINS, None, UsageError, "margin_mse compares several scores, the output scores has one per sample, and the"),
    ({"logits": False, "scores": {"name": "list_kl"}}, None, UsageError, "list_kl compares several scores"),
    (MARGINS, [[0, 1, 2]], UsageError, "margin_mse compares 2 scores, and the groups of the data set have 3"),
    (MARGINS, [[0, 60]], KdcacheError, "group 0 of .* is of the samples"),
]


@pytest.mark.parametrize(("loss", "groups", "error", "words"), REFUSED)
def test_what_cannot_be_compared_is_refused(
    loss: dict[str, Any], groups: Any, error: type[KdcacheError], words: str, ranking: Ranking, tmp_path: Path
) -> None:
    ranking.write(**({} if groups is None else {"groups": np.array(groups)}))
    with pytest.raises(error, match=words):
        train_student(ranking.pipeline(loss), ranking.cache, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_single_scores_of_groups_are_learned_too(ranking: Ranking, tmp_path: Path) -> None:
    ranking.write(groups=np.array([[0, 1, 2], [3, 4, 5], [0, 3, 6]]))
    loss = {"logits": False, "scores": {"name": "mse"}}
    train_student(ranking.pipeline(loss, batch_size=9, epochs=1), ranking.cache, tmp_path / "run")
    assert (tmp_path / "run/model.safetensors").exists()


def test_scores_alone_need_no_labels_if_the_logits_are_left_out(ranking: Ranking, tmp_path: Path) -> None:
    """Without `logits: false` the loss has a cross-entropy, for which there are no labels."""
    with pytest.raises(UsageError, match="no training sample has a label") as raised:
        train_student(ranking.pipeline({"scores": {"name": "margin_mse"}}), ranking.cache, tmp_path / "run")
    assert "loss={logits: false, scores: ...}" in raised.value.fix

"""What the trainer does for a loss that learns something itself, and what it refuses for the images it has."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from helpers.paths import ROOT
from helpers.teachers import FunctionTeacher
from helpers.tiny import TinyTeacher, tiny_samples
from torch import Tensor, nn

import kdcache
from kdcache.config.schema import Pipeline, TrainSpec
from kdcache.data.samples import Samples
from kdcache.data.views import View
from kdcache.errors import UsageError
from kdcache.losses import Loss, distillation_loss, learned_temperature
from kdcache.runtime.progress import Silent
from kdcache.train.loop import AnyEpoch, fit
from kdcache.train.step import Trainer

PLAIN = TrainSpec(epochs=3, batch_size=37, lr=0.5, momentum=0.0, nesterov=False, weight_decay=0.0, schedule="constant")


def live(ids: Tensor, view: int) -> Tensor:
    with torch.no_grad():
        logits: Tensor = TinyTeacher()(View(tiny_samples(), []).__getitems__(ids.tolist()).images)
    return logits


LIVE = FunctionTeacher(live, 37)


def network() -> nn.Module:
    torch.manual_seed(2)
    return nn.Sequential(nn.Flatten(), nn.Linear(16, 10))


def test_the_temperature_of_ctkd_is_trained_beside_the_student_and_against_it() -> None:
    loss = Loss.model_validate({"name": "ctkd", "temperature": {"ramp_epochs": 2.0}})
    model = network()
    trainer = Trainer(model, PLAIN, loss, 37)
    train = View(tiny_samples(), [])
    # By hand, a step an epoch: the student goes down the loss, theta up, by half its slope and then by all of it.
    by_hand, at = copy.deepcopy(model), torch.ones(1, requires_grad=True)
    batch = train.__getitems__(list(range(37)))
    for epoch, reversal in ((1, 0.5), (2, 1.0), (3, 1.0)):
        trainer.epoch(train, epoch, LIVE)
        tau = 1 + 20 * at.sigmoid()
        logits = by_hand(batch.images)
        p = (live(batch.ids, 0) / tau).softmax(dim=1)
        kd = (tau**2 * p * (p.log() - (logits / tau).log_softmax(dim=1))).sum(dim=1).mean()
        total = 0.1 * nn.functional.cross_entropy(logits, batch.labels) + 0.9 * kd
        *slopes, of_theta = torch.autograd.grad(total, [*by_hand.parameters(), at])
        with torch.no_grad():
            for parameter, slope in zip(by_hand.parameters(), slopes, strict=True):
                parameter.sub_(slope, alpha=0.5)
            at += 0.5 * reversal * of_theta
        assert abs(reversal * of_theta.item()) > 1e-3
        assert trainer.theta is not None
        torch.testing.assert_close(trainer.theta, at, rtol=1e-4, atol=1e-6, check_device=False)
    for ours, theirs in zip(model.parameters(), by_hand.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


def test_fit_gives_the_optimizer_what_ctkd_learns(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[nn.Parameter] = []

    def watched(loss: Loss, device: torch.device | str) -> nn.Parameter | None:
        theta = learned_temperature(loss, device)
        made.extend([] if theta is None else [theta])
        return theta

    monkeypatch.setattr("kdcache.train.step.learned_temperature", watched)
    for given in ({"name": "kd"}, {"name": "ctkd", "temperature": {"ramp_epochs": 1.0}}):
        fit(
            network(),
            View(tiny_samples(), []),
            None,
            PLAIN,
            Loss.model_validate(given),
            teacher=LIVE,
        )
    assert len(made) == 1
    assert abs(made[0].item() - 1) > 1e-3


class Recorder(Silent):
    def __init__(self) -> None:
        self.lines: list[str] = []

    def say(self, message: str) -> None:
        self.lines.append(message)


def digits() -> Samples:
    return kdcache.load_split(pipeline().dataset, "train")


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> kdcache.Cache:
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 10))
    return kdcache.dump_teacher(model, digits(), tmp_path_factory.mktemp("cache") / "digits.kdcache")


def pipeline(*overrides: str) -> Pipeline:
    recipe = ROOT / "pipelines" / "digits.yaml"
    return kdcache.load_pipeline(recipe, ["student.train.epochs=1", *overrides])


@pytest.mark.parametrize(
    ("words", "overrides"),
    [
        ("truncation to the top 16 has no effect: .* has 10 classes", ["loss.name=truncated"]),
        ("no training image has a label, and the divergence dkd needs labels",
         ["loss.name=dkd", "student.train.labels_per_class=0"]),
        ("loss.tail is 'student': it is for a teacher of tokens", ["loss.tail=student"]),
    ],
)  # fmt: skip
def test_a_loss_that_these_images_leave_nothing_to_is_refused(
    words: str, overrides: list[str], cache: kdcache.Cache, tmp_path: Path
) -> None:
    with pytest.raises(UsageError, match=words) as caught:
        kdcache.train_student(pipeline(*overrides), cache, tmp_path / "run")
    assert caught.value.fix
    assert list(tmp_path.iterdir()) == []


def mixing(*overrides: str) -> Pipeline:
    return pipeline("transform=[{ToDtype: {dtype: float32, scale: true}}, {MixUp: {alpha: 0.5}}]", *overrides)


@pytest.fixture(scope="module")
def mixed_cache(tmp_path_factory: pytest.TempPathFactory) -> kdcache.Cache:
    recipe, out = mixing(), tmp_path_factory.mktemp("mixed") / "mixed.kdcache"
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 10))
    return kdcache.dump_teacher(model, digits(), out, transform=recipe.transform)


@pytest.mark.parametrize("divergence", ["dkd", "plackett_luce", "ofa"])
def test_what_acts_on_the_label_is_refused_for_mixed_images(
    divergence: str, mixed_cache: kdcache.Cache, tmp_path: Path
) -> None:
    recipe = mixing(f"loss.divergence.kind={divergence}")
    with pytest.raises(UsageError, match=f"the divergence {divergence} acts on the one true class") as caught:
        kdcache.train_student(recipe, mixed_cache, tmp_path / "run")
    assert "such as kd or dtkd" in caught.value.fix
    batch = View(digits(), recipe.transform or []).__getitems__([0, 1])
    with pytest.raises(ValueError, match=f"the divergence {divergence} needs one label per image"):
        distillation_loss(torch.zeros(2, 10), torch.eye(10)[:2], batch.labels, recipe.loss, mixed=batch.mixed)


@pytest.mark.parametrize(("warmup", "epochs", "share"), [(20.0, 3, "15%"), (4.0, 1, "25%"), (2.0, 2, None)])
def test_a_warm_up_longer_than_the_run_is_reported(
    cache: kdcache.Cache, tmp_path: Path, warmup: float, epochs: int, share: str | None
) -> None:
    recorder = Recorder()
    given = pipeline("loss.name=dtkd", f"loss.warmup_epochs={warmup}", f"student.train.epochs={epochs}")
    kdcache.train_student(given, cache, tmp_path / "run", progress=recorder)
    notes = [line for line in recorder.lines if "lower loss.warmup_epochs" in line]
    assert len(notes) == (share is not None)
    assert all(f"reaches {share} of its value" in note for note in notes)


def test_a_student_is_told_that_dkd_leaves_out_what_has_no_label(cache: kdcache.Cache, tmp_path: Path) -> None:
    recorder = Recorder()
    few = pipeline("loss.name=dtkd+dkd", "student.train.labels_per_class=3")
    kdcache.train_student(few, cache, tmp_path / "run", progress=recorder)
    assert any("without a label, 970 images of the training split cannot contribute" in line for line in recorder.lines)


@pytest.mark.parametrize("name", ["ctkd+ka", "dtkd+dist", "zscore+truncated", "pld"])
def test_students_are_trained_with_products_of_the_axes(name: str, cache: kdcache.Cache, tmp_path: Path) -> None:
    top = ["loss.adjustment.top=3"] if "truncated" in name else []
    result = kdcache.train_student(pipeline(f"loss.name={name}", *top), cache, tmp_path / "run")
    assert result.test is not None
    assert kdcache.load_pipeline(tmp_path / "run" / "resolved.yaml").loss.name == name


def test_temperatures_are_told_as_means_over_the_samples() -> None:
    student, teacher = torch.randn(8, 5).abs() + 0.1, torch.randn(8, 5).abs() * 3 + 0.1
    labels = torch.arange(8) % 5
    parts = distillation_loss(student, teacher, labels, Loss.model_validate({"name": "dtkd"}))
    x, y = teacher.amax(dim=1), student.amax(dim=1)
    torch.testing.assert_close(parts.teacher_temperature, (2 * x * 4 / (x + y)).mean())
    torch.testing.assert_close(parts.student_temperature, (2 * y * 4 / (x + y)).mean())
    rows: list[AnyEpoch] = []
    for name, expected in (("kd", 4.0), ("ce", None)):
        rows.clear()
        loss = Loss.model_validate({"name": name})
        fit(
            network(),
            View(tiny_samples(), []),
            None,
            PLAIN,
            loss,
            teacher=LIVE,
            on_epoch=rows.append,
        )
        for who in ("student_temperature", "teacher_temperature"):
            assert [getattr(row, who) for row in rows] == pytest.approx([expected] * 3)

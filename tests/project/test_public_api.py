"""The public API as a user meets it: by name, with plain values, and with mistakes."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import TensorDataset

import kdcache
from kdcache.errors import MismatchError, UsageError
from kdcache.losses import Loss, distillation_loss, learned_temperature
from kdcache.losses.batch import batch_totals
from kdcache.losses.presets import PARTS


def logits(rows: int = 6, classes: int = 10, seed: int = 0) -> Tensor:
    return 2 * torch.randn(rows, classes, generator=torch.Generator().manual_seed(seed)) + 1


LABELS = torch.tensor([0, 1, 2, 3, 4, -1])


def net(classes: int = 10) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Sequential(nn.Flatten(), nn.Linear(64, classes))


class Named(TensorDataset):
    classes = ("a", "b", "c", "d", "e", "f", "g", "h", "i", "j", "k")


def pairs(kind: type[TensorDataset] = TensorDataset, labels: int = 7) -> TensorDataset:
    return kind(torch.rand(40, 1, 8, 8, generator=torch.Generator().manual_seed(1)), torch.arange(40) % labels)


def test_only_public_names_are_public() -> None:
    gone = {"Loss", "distillation_loss", "CacheSpec"}
    assert not gone & set(kdcache.__all__)
    for name in gone:
        with pytest.raises(AttributeError):
            getattr(kdcache, name)


def test_importing_kdcache_does_not_import_torch() -> None:
    script = "import sys, kdcache; print('torch' in sys.modules, 'pydantic' in sys.modules)"
    began = time.monotonic()
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout == "False False\n"
    assert time.monotonic() - began < 30


@pytest.mark.parametrize("arguments", [["--help"], ["dump-teacher", "--help"], ["info"], ["no-such-command"]], ids=str)
def test_help_and_usage_do_not_wait_for_torch(arguments: list[str]) -> None:
    script = (
        "import sys\nfrom kdcache.cli import main\n"
        f"try:\n    main({arguments!r})\nexcept SystemExit:\n    pass\n"
        "print(sorted({'torch', 'zarr', 'torchvision'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"


# Losses


@pytest.mark.parametrize("name", ["ce", *(name for name in PARTS if name != "truncated"), "ka+dtd", "zscore+ka"])
@pytest.mark.parametrize("epoch", [None, 1, 7])
def test_a_loss_by_name_is_that_of_the_pipeline(name: str, epoch: int | None) -> None:
    student, teacher = logits().requires_grad_(), logits(seed=1)
    loss, options = kdcache.loss(name), Loss.model_validate({"name": name})
    edges = torch.tensor([[0, 2, 1], [1, 0, 2]]) if options.uses_edges else None
    torch.manual_seed(0)  # for the noise of noisy teachers
    parts = loss(student, teacher if loss.uses_teacher else None, LABELS, epoch, edges)
    torch.manual_seed(0)
    whole = batch_totals(LABELS)._replace(edges=edges)
    theta = learned_temperature(options)
    expected = distillation_loss(student, teacher, LABELS, options, epoch, theta=theta, whole=whole)
    assert isinstance(parts, kdcache.LossParts)
    for one, other in zip(parts, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=0)
    assert parts.total.requires_grad
    assert not any(part.requires_grad for part in parts[1:])
    assert (loss.name, loss.uses_teacher, loss.needs_level) == (name, options.uses_teacher, options.needs_level)
    assert repr(loss) == f"DistillationLoss({name!r})"


def test_without_an_epoch_there_is_no_warmup() -> None:
    loss = kdcache.loss("dtkd")
    arguments = logits(), logits(seed=1), LABELS
    assert loss(*arguments).total == loss(*arguments, epoch=20).total == loss(*arguments, epoch=500).total
    first = loss(*arguments, epoch=1)
    torch.testing.assert_close(first.total, first.cross_entropy + first.distillation / 20)


@pytest.mark.parametrize(
    ("name", "options", "expected"),
    [
        ("dtkd", {"tau": 2}, {"temperature": {"tau": 2}}),
        ("kd", {"tau": 2, "ce_weight": 0.5}, {"temperature": {"tau": 2}, "ce_weight": 0.5}),
        ("dtd+dist", {"tau": 8, "temperature": {"beta": 3}, "divergence": {"gamma": 0.5}},
         {"temperature": {"tau": 8, "beta": 3}, "divergence": {"gamma": 0.5}}),
        ("ka+dkd", {"alpha": 2, "warmup_epochs": 0}, {"divergence": {"alpha": 2}, "warmup_epochs": 0}),
        ("lsr", {"smoothing": 0.3, "normalization": "z_score"},
         {"adjustment": {"smoothing": 0.3}, "normalization": "z_score"}),
        ("kd", {"temperature": {"kind": "dtkd"}, "center": True}, {"temperature": {"kind": "dtkd", "center": True}}),
        ("dtkd+pld", {"detach": True}, {"temperature": {"detach": True}}),
    ],
)  # fmt: skip
def test_options_are_those_of_the_section_or_of_an_axis(
    name: str, options: dict[str, Any], expected: dict[str, Any]
) -> None:
    assert kdcache.loss(name, **options).options == Loss.model_validate({"name": name, **expected})


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("hinton", {}, "unknown loss 'hinton'"),
        ("kd", {"beta": 3}, "the loss 'kd' has no option 'beta'"),
        ("dtd+dkd", {"beta": 3}, "beta is an option of both the temperature and the divergence"),
        ("kd", {"tau": 0}, r"temperature.tau: Input should be greater than 0"),
        ("kd", {"tau": "4"}, r"temperature.tau: Input should be a valid number"),
        ("kd", {"ce_weight": -1}, "ce_weight: Input should be greater than or equal to 0"),
        ("ce", {"tau": 4.5}, "would have no effect"),
        ("dtd+mse", {}, "cancels out of mse"),
        ("kd", {"temperature": {"kind": "warm"}}, "temperature: unknown kind 'warm'"),
    ],
)
def test_options_that_cannot_be_are_refused_with_a_remedy(name: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message) as caught:
        kdcache.loss(name, **options)
    assert caught.value.fix


WRONG: dict[str, tuple[Any, Any, Any, Any, str]] = {
    "one row for all": (logits(), logits(1), LABELS, 1, r"teacher_logits are \[1, 10\], student_logits \[6, 10\]"),
    "other classes": (logits(), logits(6, 9), LABELS, 1, r"teacher_logits are \[6, 9\], student_logits \[6, 10\]"),
    "a teacher's vector": (logits(), logits()[0], LABELS, 1, r"teacher_logits are torch.float32 \[10\]"),
    "no teacher": (logits(), None, LABELS, 1, "'kd' needs the teacher's logits"),
    "a student's map": (
        logits().reshape(6, 5, 2),
        logits(),
        LABELS,
        1,
        r"student_logits are torch.float32 \[6, 5, 2\]",
    ),
    "integers": (logits().long(), logits(), LABELS, 1, r"student_logits are torch.int64"),
    "a list": ([1.0], logits(), LABELS, 1, "student_logits is a list"),
    "soft labels": (logits(), logits(), logits().softmax(1), 1, "looks like soft labels"),
    "one-hot labels": (logits(), logits(), F.one_hot(LABELS.clamp_min(0), 10), 1, r"labels are torch.int64 \[6, 10\]"),
    "float labels": (logits(), logits(), LABELS.float(), 1, r"labels are torch.float32 \[6\]"),
    "a mask": (logits(), logits(), LABELS > 0, 1, r"labels are torch.bool \[6\]"),
    "one label": (logits(), logits(), LABELS[:1], 1, r"labels are torch.int64 \[1\] for student_logits \[6, 10\]"),
    "labels in a list": (logits(), logits(), [0] * 6, 1, "labels is a list"),
    "too large a label": (
        logits(),
        logits(),
        LABELS + 10,
        1,
        "labels run from 9 to 14",
    ),
    "an ignored label": (logits(), logits(), LABELS - 99, 1, "labels run from -100 to -95"),
    "epoch 0": (logits(), logits(), LABELS, 0, "the epoch is 0"),
    "epoch -1": (logits(), logits(), LABELS, -1, "the epoch is -1"),
    "epoch nan": (logits(), logits(), LABELS, float("nan"), "the epoch is nan"),
}


@pytest.mark.parametrize("case", WRONG)
def test_nothing_is_broadcast_or_guessed(case: str) -> None:
    *arguments, message = WRONG[case]
    with pytest.raises(UsageError, match=message) as caught:
        kdcache.loss("kd")(*arguments)
    assert caught.value.fix
    if case == "soft labels":
        assert "teacher_logits" in caught.value.fix


def test_the_temperature_of_ctkd_is_a_parameter_of_the_loss() -> None:
    assert [*kdcache.loss("dtkd").parameters()] == []
    loss, student = kdcache.loss("ctkd", ramp_epochs=1), net()
    assert [parameter.shape for parameter in loss.parameters()] == [(1,)]
    optimizer = torch.optim.SGD([*student.parameters(), *loss.parameters()], lr=0.1)
    images, labels = pairs().tensors
    parts = loss(student(images), logits(40, seed=3), labels, epoch=1)
    optimizer.zero_grad()
    parts.total.backward()
    optimizer.step()
    (theta,) = loss.parameters()
    assert theta.item() != 1
    assert "theta" in loss.state_dict()
    later = loss(student(images), logits(40, seed=3), labels)
    assert later.student_temperature.item() == pytest.approx(1 + 20 * torch.sigmoid(theta).item())


# Data


def test_a_split_by_name_by_mapping_and_with_options(tmp_path: Path) -> None:
    digits = kdcache.load_split("digits", "train")
    assert len(digits) == len(kdcache.load_split({"name": "digits"}, "train")) == 1000
    for split, folder in (("train", "one"), ("train", "two")):
        (tmp_path / split / folder).mkdir(parents=True)
        from PIL import Image

        for number in range(5):
            Image.new("RGB", (8, 8), (number, 0, 0)).save(tmp_path / split / folder / f"{number}.png")
    half = kdcache.load_split("image-folder", "validation", root=tmp_path, validation_fraction=0.5)
    assert len(half) == 5
    assert len(kdcache.load_split({"name": "image-folder", "root": str(tmp_path)}, "test", test_fraction=0.2)) == 2


@pytest.mark.parametrize(
    ("arguments", "options", "message"),
    [
        (("mnist", "train"), {}, "name: Input should be 'digits', 'cifar10'"),
        (("digits", "val"), {}, "there is no split 'val'"),
        (({"name": "digits", "split": 1}, "train"), {}, "split: unknown key"),
        (({}, "train"), {}, "name: is required"),
        (("digits", "train"), {"root": "here"}, "digits comes with kdcache and has no root"),
        (("digits", "train"), {"test_fraction": 2.0}, "test_fraction: Input should be less than 1"),
        (("npz", "train"), {}, "is needed for npz"),
    ],
)
def test_a_split_that_cannot_be_is_refused_with_a_remedy(
    arguments: tuple[Any, Any], options: dict[str, Any], message: str
) -> None:
    with pytest.raises(UsageError, match=message) as caught:
        kdcache.load_split(*arguments, **options)
    assert caught.value.fix


# Teachers and evaluation


def test_a_cache_of_any_data_set_of_pairs(tmp_path: Path) -> None:
    model = net()
    cache = kdcache.dump_teacher(model, pairs(), tmp_path / "mine.kdcache", dtype="float32", notes="mine")
    assert cache.num_classes == 10  # of the model: no sample has the last three
    assert cache.manifest.plan.notes == "mine"
    images, labels = pairs().tensors
    with torch.no_grad():
        torch.testing.assert_close(cache.teacher()(torch.arange(40)), model(images), rtol=1e-5, atol=1e-5)
    assert torch.equal(torch.from_numpy(cache.labels).long(), labels)
    assert len(kdcache.CachedDataset(pairs(), cache)) == 40
    named = kdcache.dump_teacher(net(11), pairs(Named), tmp_path / "named.kdcache", spec={"top_k": "all"}, seed=3)
    assert named.manifest.plan.dataset.class_names == Named.classes
    assert named.manifest.plan.views.seed == 3


def test_options_of_a_cache_are_plain_values(tmp_path: Path) -> None:
    samples = kdcache.wrap(pairs(), 10)
    for options in ({"vews": 2}, {"spec": {"vews": 2}}):
        with pytest.raises(UsageError, match="vews: unknown key, did you mean views"):
            kdcache.dump_teacher(net(), samples, tmp_path / "c.kdcache", **options)
    with pytest.raises(UsageError, match="top_k"):
        kdcache.dump_teacher(net(), samples, tmp_path / "c.kdcache", top_k=0)
    with pytest.raises(MismatchError, match="the teacher cannot take images"):
        kdcache.dump_teacher(nn.Linear(3, 10), pairs(), tmp_path / "c.kdcache")
    assert not (tmp_path / "c.kdcache").exists()


def test_a_network_is_evaluated_on_any_data() -> None:
    model = net().train()
    images, labels = pairs().tensors
    with torch.no_grad():
        outputs = model(images)
    for data in (pairs(), kdcache.wrap(pairs(), 10)):
        score = kdcache.evaluate(model, data, batch_size=16)
        assert score.accuracy == pytest.approx((outputs.argmax(1) == labels).float().mean().item())
        assert score.loss == pytest.approx(F.cross_entropy(outputs, labels).item(), rel=1e-5)
    assert model.training
    doubled = kdcache.evaluate(model, pairs(), transform=[{"Normalize": {"mean": [0.0], "std": [0.5]}}])
    with torch.no_grad():
        assert doubled.loss == pytest.approx(F.cross_entropy(model(2 * images), labels).item(), rel=1e-5)
    with pytest.raises(MismatchError, match="labels up to 6"):
        kdcache.evaluate(net(3), pairs())


def test_a_network_by_name() -> None:
    model = kdcache.build_model("small:mlp", 10, (1, 8, 8))
    assert model(torch.zeros(2, 1, 8, 8)).shape == (2, 10)
    wide = kdcache.build_model({"model": "small:mlp", "args": {"width": 5}}, 10, (1, 8, 8))
    assert sum(p.numel() for p in wide.parameters()) < sum(p.numel() for p in model.parameters())
    with pytest.raises(UsageError, match="arg: unknown key"):
        kdcache.build_model({"model": "small:mlp", "arg": {}}, 10, (1, 8, 8))

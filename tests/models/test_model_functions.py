"""How the functions and classes of the user that make networks are called, and what a wrong name is answered."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import kdcache
from kdcache.config.recipes import recipe
from kdcache.errors import KdcacheError, UsageError, did_you_mean

TEXT = """
import functools
from torch import nn

class Net(nn.Linear):
    def __init__(self, classes=5, depth=0):
        super().__init__(4, classes)
        self.depth = depth

def takes(num_classes): return Net(num_classes)
def has_default(num_classes=7, depth=1): return Net(num_classes, depth)
def keyword_only(*, num_classes): return Net(num_classes)
def any_keyword(**options): return Net(options["num_classes"])
def positional_only(num_classes, /, depth=0): return Net(num_classes, depth)
def nothing(): return Net()
def another_name(depth=0, nb_classes=6): return Net(nb_classes, depth)
def any_positional(*layers): return Net()
partial = functools.partial(has_default, depth=3)
bound_by_position = functools.partial(has_default, 9)
wrapped = functools.lru_cache(takes)

class ByClass(Net):
    def __init__(self, num_classes):
        super().__init__(num_classes)

class WithoutIt(Net):
    def __init__(self):
        super().__init__()

class WithMethod:
    @classmethod
    def of(cls, num_classes): return Net(num_classes)
    @staticmethod
    def plain(): return Net()
    def __call__(self, num_classes): return Net(num_classes)
method, plain, instance = WithMethod.of, WithMethod.plain, WithMethod()

class Unreadable:
    __signature__ = "of a compiled library"
    def __init__(self, function): self.function = function
    def __call__(self, *given, **options): return self.function(*given, **options)
unreadable, unreadable_without, unreadable_that_fails = Unreadable(takes), Unreadable(nothing), Unreadable(int)

def raises(num_classes): raise TypeError("of its own")
made = Net()
def returns_a_class(num_classes): return Net
"""

OUTPUTS = {
    "takes": 3, "has_default": 3, "keyword_only": 3, "any_keyword": 3, "positional_only": 3, "nothing": 5,
    "another_name": 6, "any_positional": 5, "partial": 3, "bound_by_position": 9, "wrapped": 3, "ByClass": 3,
    "WithoutIt": 5, "method": 3, "plain": 5, "instance": 3, "unreadable": 3, "unreadable_without": 5,
}  # fmt: skip


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "nets.py"
    path.write_text(TEXT)
    return path


def built(file: Path, name: str, **args: Any) -> Any:
    return kdcache.build_model({"model": f"{file}:{name}", "args": args}, num_classes=3)


@pytest.mark.parametrize("name", OUTPUTS)
def test_num_classes_is_passed_to_those_that_take_it(name: str, file: Path) -> None:
    assert built(file, name).out_features == OUTPUTS[name]


def test_arguments_of_the_pipeline_are_passed_too(file: Path) -> None:
    for name in ("has_default", "positional_only", "partial", "another_name"):
        assert built(file, name, depth=2).depth == 2
    assert built(file, "another_name", nb_classes=8).out_features == 8
    assert built(file, "takes", num_classes=3).out_features == 3


MISTAKES = {
    "another number": ("takes", {"num_classes": 7}, "sets 'num_classes' to 7, and kdcache sets it to 3, the number of"),
    "an unknown argument": ("takes", {"dept": 1}, "unexpected keyword argument 'dept'"),
    "a missing argument": ("WithMethod", {}, r"cannot be built|returned a WithMethod"),
    "an error of its own": ("raises", {}, r"TypeError: of its own \(.*/nets.py:\d+\)"),
    "an error without a signature": ("unreadable_that_fails", {}, "cannot be built|returned a int"),
    "a network": ("made", {}, "is a network, and every training needs a new one"),
    "a class": ("returns_a_class", {}, "returned a type"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistakes_are_named(mistake: str, file: Path) -> None:
    name, args, message = MISTAKES[mistake]
    with pytest.raises(UsageError, match=message) as caught:
        built(file, name, **args)
    assert caught.value.fix


def test_arguments_that_kdcache_sets_may_not_be_set_otherwise() -> None:
    for model, args, message in (
        ("cifar:resnet8", {"num_classes": 7}, "sets 'num_classes' to 7, and kdcache sets it to 10"),
        ("small:cnn", {"channels": 4}, "sets 'channels' to 4, and kdcache sets it to 1"),
        ("torchvision:resnet18", {"weights": "DEFAULT"}, "sets 'weights' to 'DEFAULT', and kdcache sets it to None"),
    ):
        with pytest.raises(UsageError, match=message):
            kdcache.build_model({"model": model, "args": args}, 10, (1, 8, 8))


def test_the_shape_is_needed_by_the_network_that_depends_on_it_only() -> None:
    for model in ("small:cnn", "cifar:resnet8", "torchvision:resnet18"):
        assert kdcache.build_model(model, 10).eval()(torch.rand(2, 3, 32, 32)).shape == (2, 10)
    with pytest.raises(UsageError, match="small:mlp needs the shape of the images") as caught:
        kdcache.build_model("small:mlp", 10)
    assert caught.value.fix == "pass shape=(channels, height, width)"
    assert kdcache.build_model("small:mlp", 10, (1, 8, 8))(torch.rand(2, 1, 8, 8)).shape == (2, 10)


@pytest.mark.parametrize(
    ("given", "meant"),
    [
        ("resnet18", "torchvision:resnet18"),
        ("mlp", "small:mlp"),
        ("resnet32x4", "cifar:resnet32x4"),
        ("torchvison:resnet18", "torchvision:resnet18"),
        ("torchvision:resnet-18", "resnet18"),
        ("torchvision:resnet50@IMAGENET1K_V3", "IMAGENET1K_V2"),
        ("cifar:resnet32x5", "resnet32x4"),
        ("cifar:mobilenetv2", "MobileNetV2"),
        ("small:cnnn", "cnn"),
    ],
)
def test_a_misspelled_model_is_answered_with_a_similar_one(given: str, meant: str) -> None:
    with pytest.raises(KdcacheError, match=rf", did you mean {meant}\?"):
        kdcache.build_model(given, 10)


@pytest.mark.parametrize(
    ("given", "meant"),
    [
        ("dataset.name=cifr10", "cifar10"),
        ("dataset.name=imagefolder", "image-folder"),
        ("dataset.validation_fractoin=0.2", "validation_fraction"),
        ("loss.name=dtkdd", "dtkd"),
        ("loss.name=zscor+kd", "zscore"),
        ("loss.temprature={tau: 2}", "temperature"),
        ("loss.tau=4", "loss.temperature.tau"),
        ("loss.temperature=4", "{tau: 4}"),
        ("loss.temperature=dtkd", "{kind: dtkd}"),
        ("loss.divergence={kind: mes}", "mse"),
        ("loss.alpha=2", "loss.divergence.alpha"),
        ("student.lr=0.1", "student.train.lr"),
        ("student.epoch=3", "student.train.epochs"),
        ("lr=0.1", "teacher.train.lr or student.train.lr"),
    ],
)
def test_a_misspelled_or_misplaced_key_is_answered_with_the_one_that_is_meant(
    given: str, meant: str, tmp_path: Path
) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text("dataset: {name: digits}\nstudent: {model: small:mlp}\nloss: {name: kd}\n")
    with pytest.raises(UsageError) as caught:
        kdcache.load_pipeline(path, [given])
    assert f", did you mean {meant}?" in caught.value.what
    assert f"--set {given}: {given.partition('=')[0]}" in caught.value.what


def test_options_of_a_loss_by_a_wrong_name_are_answered_with_the_right_one() -> None:
    for options, message in (
        ({"temperature": 4}, r"temperature: 4 is not a mapping, did you mean \{tau: 4\}\?"),
        ({"divergence": "mse"}, r"divergence: 'mse' is not a mapping, did you mean \{kind: mse\}\?"),
        ({"kd_wieght": 0.5}, r"has no option 'kd_wieght', did you mean kd_weight\?"),
    ):
        with pytest.raises(UsageError, match=message):
            kdcache.loss("kd", **options)
    with pytest.raises(UsageError, match=r"unknown loss 'dtkb', did you mean dtkd\?"):
        kdcache.loss("dtkb")


def test_a_misspelled_step_or_recipe_is_answered_with_a_similar_one() -> None:
    for name, meant in (("Normalise", "Normalize"), ("RandomCorp", "RandomCrop"), ("Mixup", "MixUp")):
        with pytest.raises(UsageError, match=rf"has no transform '{name}', did you mean {meant}\?"):
            kdcache.evaluate(torch.nn.Identity(), kdcache.load_split("digits", "test"), transform=[{name: {}}])
    with pytest.raises(UsageError, match=r"no recipe 'digit', did you mean digits\?"):
        recipe("digit")


def test_nothing_is_suggested_for_a_name_that_is_like_none() -> None:
    assert did_you_mean("xyz", ["digits", "cifar10"]) == ""
    assert did_you_mean("Digits", ["digits", "cifar10"]) == ", did you mean digits?"

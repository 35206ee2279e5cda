"""The recipes: what they say is what was published, their commands are commands, and each of them runs."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import click
import numpy as np
import pytest
import torch
import yaml
from click.testing import CliRunner
from helpers.paths import ROOT
from PIL import Image

from kdcache import Pipeline, dump_teacher, load_pipeline, train_student, train_teacher
from kdcache.cli import main
from kdcache.config.recipes import file_or_recipe, recipe, recipes
from kdcache.config.schema import ModelSpec
from kdcache.errors import UsageError
from kdcache.models import build_model, save_weights
from kdcache.models.teacher import load_teacher

# Of the authors' configuration files (JinYu1998/DTKD at 9ebaa97, megvii-research/mdistiller at a08d46f): alpha and beta
# of DTKD, learning rate, beta of DKD.
PAIRS = {
    ("resnet56", "resnet20"): (1.0, 0.5, 0.05, 2.0),
    ("resnet110", "resnet32"): (1.0, 0.5, 0.05, 2.0),
    ("wrn_40_2", "wrn_40_1"): (1.0, 0.5, 0.05, 6.0),
    ("wrn_40_2", "wrn_16_2"): (3.0, 1.0, 0.05, 6.0),
    ("resnet32x4", "resnet8x4"): (3.0, 1.0, 0.05, 8.0),
    ("vgg13", "vgg8"): (3.0, 1.0, 0.05, 6.0),
    ("vgg13", "MobileNetV2"): (3.0, 1.0, 0.01, 6.0),
    ("resnet32x4", "ShuffleNetV1"): (3.0, 1.0, 0.01, 8.0),
    ("resnet32x4", "ShuffleNetV2"): (3.0, 1.0, 0.01, 8.0),
    ("wrn_40_2", "ShuffleNetV1"): (2.0, 0.5, 0.01, 8.0),
    ("ResNet50", "MobileNetV2"): (3.0, 2.0, 0.01, 8.0),
}
CIFAR = [f"cifar100-{teacher}-{student}" for teacher, student in PAIRS]
LARGE = {
    **dict.fromkeys(("imagenet-bit_152x2-bit_50x1", "scenes-lite0"), "timm:test_resnet"),
    **dict.fromkeys(("cityscapes", "ade20k"), "torchvision:lraspp_mobilenet_v3_large"),
}
"""Teachers too large for a test, and what stands in for them."""
SEGMENTATION = ("cityscapes", "segmentation-folder")
"""Data sets of images and masks in files."""
CLASSES = {
    "cifar100": 100,
    "imagenet": 1000,
    "digits": 10,
    "image-folder": 3,
    "scenes": 8,
    "cityscapes": 19,
    "segmentation-folder": 150,
}


def commented(name: str) -> str:
    """What a recipe says before its first section."""
    return "".join(line for line in recipe(name).read_text().splitlines(keepends=True) if line.startswith("#"))


def losses(name: str) -> dict[str, list[str]]:
    """The other losses that a recipe names, with their `--set`."""
    found = re.findall(r"--loss ([\w+]+)((?: --set [\w.]+=[\w.]+)*)", commented(name))
    return {loss: re.findall(r"--set (\S+?)(?:,|$| )", sets + " ") for loss, sets in found}


@pytest.mark.parametrize(("pair", "published"), PAIRS.items(), ids=CIFAR)
def test_the_pairs_are_trained_as_published(pair: tuple[str, str], published: tuple[float, ...]) -> None:
    alpha, beta, lr, dkd_beta = published
    name = f"cifar100-{pair[0]}-{pair[1]}"
    read = load_pipeline(recipe(name))
    assert (read.section("teacher").model, read.section("student").model) == tuple(f"cifar:{one}" for one in pair)
    assert read.dataset.name == "cifar100"
    assert (
        read.loss.model_dump()
        == load_pipeline(
            recipe(name), [f"loss={{name: dtkd, kd_weight: {alpha}, plain_kd_weight: {beta}}}"]
        ).loss.model_dump()
    )
    assert (read.loss.ce_weight, read.loss.warmup_epochs, read.loss.tau) == (1.0, 20.0, 4.0)
    for section, rate in ((read.section("teacher"), 0.05), (read.section("student"), lr)):
        train = section.train.model_dump()
        said = {"epochs": 240, "batch_size": 64, "lr": rate, "milestones": [150, 180, 210], "gamma": 0.1}
        said |= {"schedule": "multistep", "momentum": 0.9, "nesterov": False, "weight_decay": 5e-4, "optimizer": "sgd"}
        assert {key: train[key] for key in said} == said
    others = losses(name)
    assert set(others) == {"kd", "dkd", "ka+dtd"}
    dkd = load_pipeline(recipe(name), others["dkd"], "dkd").loss
    assert dkd.divergence.model_dump() == {"kind": "dkd", "alpha": 1.0, "beta": dkd_beta}
    kd = load_pipeline(recipe(name), others["kd"], "kd").loss
    assert (kd.ce_weight, kd.kd_weight, kd.tau) == (0.1, 0.9, 4.0)


def test_imagenet_s_losses_are_the_published_ones() -> None:
    for name, beta in (("imagenet-resnet34-resnet18", 0.5), ("imagenet-resnet50-mobilenet_v2", 2.0)):
        kd = load_pipeline(recipe(name)).loss
        assert (kd.ce_weight, kd.kd_weight, kd.tau) == (0.5, 0.5, 1.0)
        dkd = load_pipeline(recipe(name), losses(name)["dkd"], "dkd").loss
        assert dkd.divergence.model_dump() == {"kind": "dkd", "alpha": 1.0, "beta": beta}
        assert (dkd.ce_weight, dkd.kd_weight, dkd.tau, dkd.warmup_epochs) == (1.0, 1.0, 1.0, 1.0)


@pytest.mark.parametrize("name", recipes())
def test_the_first_lines_are_commands_that_can_be_given(name: str, tmp_path: Path) -> None:
    """Each is parsed, with its options and the recipe's name, and not run."""
    lines = [line[2:].split() for line in commented(name).splitlines() if line.startswith("# kdcache ")]
    assert commented(name).startswith("# kdcache ")
    assert "train-student" in [line[1] for line in lines]
    for _, command, *arguments in lines:
        given = main.commands[command]
        if isinstance(given, click.Group):
            given = given.commands[arguments.pop(0)]
        said = given.make_context(command, arguments).params
        assert Path(said.get("pipeline") or said["name"]).stem in (name, "mine")


def test_nothing_in_a_recipe_is_unread() -> None:
    """Every key that a recipe spells is one that its commands use: a teacher, a student, a loss."""
    for name, path in recipes().items():
        said = yaml.safe_load(path.read_text())
        assert {"dataset", "teacher", "student", "loss"} <= said.keys(), name


def test_the_page_of_results_has_a_row_for_every_pair() -> None:
    page = (ROOT / "docs" / "RESULTS.md").read_text()
    rows = re.findall(r"^\| `([\w-]+)` \|(.*)\|$", page, flags=re.MULTILINE)
    assert sorted(name for name, _ in rows) == [
        name for name in recipes() if name.startswith(("cifar100-", "imagenet-"))
    ]
    assert all(figures.count("|") == 4 for _, figures in rows)


# Each is run, on a few generated images.


def generated(name: str, folder: Path) -> list[str]:
    """The data set of a recipe in small, and the `--set` that names it."""
    rng = np.random.default_rng(0)
    kind = load_pipeline(recipe(name)).dataset.name
    if kind == "image-folder":
        for number in range(12):
            path = folder / "images" / "train" / f"class{number % 3}" / f"{number}.jpg"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(rng.integers(0, 256, (80, 90, 3), np.uint8)).save(path)
        return [f"dataset.root={folder / 'images'}"]
    if kind in ("digits", "scenes"):
        return []
    if kind in SEGMENTATION:
        write_label_maps(kind, folder / "images", rng)
        return [f"dataset.root={folder / 'images'}"]
    classes, side = {"cifar100": (100, 32), "imagenet": (1000, 80)}[kind]
    images = rng.integers(0, 256, (12, side, side, 3), np.uint8)
    names = np.array([f"class {number}" for number in range(classes)])
    np.savez(folder / "images.npz", images=images, labels=rng.integers(0, classes, 12), class_names=names)
    return [
        f"dataset.root={folder / 'images.npz'}",
        "dataset.name=npz",
        "dataset.test_fraction=0.2",
        "dataset.validation_fraction=0.1",
    ]


def write_label_maps(kind: str, root: Path, rng: np.random.Generator) -> None:
    """Images and masks in the layout of Cityscapes or ADE20K."""
    for part, count in ((0, 12), (1, 4)):
        split = {"cityscapes": ("train", "val"), "segmentation-folder": ("training", "validation")}[kind][part]
        for number in range(count):
            if kind == "cityscapes":
                image = root / "leftImg8bit" / split / "ulm" / f"ulm_{number}_leftImg8bit.png"
                mask = root / "gtFine" / split / "ulm" / f"ulm_{number}_gtFine_labelIds.png"
            else:
                image, mask = root / "images" / split / f"{number}.jpg", root / "annotations" / split / f"{number}.png"
            for path, shape in ((image, (70, 140, 3)), (mask, (70, 140))):
                path.parent.mkdir(parents=True, exist_ok=True)
                Image.fromarray(rng.integers(0, 34, shape, np.uint8)).save(path)
    if kind == "segmentation-folder":
        (root / "classes.txt").write_text("\n".join(f"class {number}" for number in range(150)))


def in_small(name: str, folder: Path) -> Pipeline:
    """A recipe for one epoch of two steps on the first of two views: photographs of 64 pixels in place of 224, float32,
    no workers, no warm-up of the learning rate, and a teacher with random weights."""
    path = folder / f"{name}.yaml"
    text = recipe(name).read_text().replace("224", "64").replace("256", "72")
    path.write_text(text.replace("[512, 1024]", "[64, 128]").replace("512", "64").replace("96, frozen: true", "8"))
    sets = generated(name, folder)
    read = load_pipeline(path)
    batch = {"digits": 500, "scenes": 240}.get(read.dataset.name, 6)
    small = {"batch_size": batch, "num_workers": 0, "precision": "fp32"}
    for key, value in {**small, "views": 2}.items():
        sets.append(f"cache.{key}={value}")
    for who in ("teacher", "student"):
        for key, value in {**small, "epochs": 1, "warmup_epochs": 0}.items():
            sets.append(f"{who}.train.{key}={value}")
    model = LARGE.get(name, read.section("teacher").model.partition("@")[0])
    weights = folder / "teacher.safetensors"
    classes = CLASSES[read.dataset.name]
    shape = {"digits": (1, 8, 8), "scenes": (3, 48, 96)}.get(read.dataset.name, (3, 64, 64))
    made = build_model(ModelSpec(model=model, args=read.section("teacher").args), classes, shape)
    save_weights(made, weights)
    if name == "digits":  # whose transform draws nothing
        sets.append("cache.views=1")
    return load_pipeline(path, [*sets, f"teacher.model={model}", f"teacher.weights={weights}"])


@pytest.mark.parametrize("name", recipes())
def test_every_recipe_runs(name: str, tmp_path: Path) -> None:
    pipeline = in_small(name, tmp_path)
    loaded = load_teacher(pipeline)
    with torch.random.fork_rng():
        cache = dump_teacher(
            loaded.model,
            loaded.samples,
            tmp_path / "teacher.kdcache",
            name=loaded.identity,
            transform=loaded.transform,
            spec=pipeline.cache,
        )
    assert cache.manifest.plan.views.count == pipeline.cache.views
    trained = train_student(pipeline, cache, tmp_path / "run")
    printed = json.loads((tmp_path / "run" / "metrics.json").read_text())
    assert (printed["loss"], printed["epochs"]) == (pipeline.loss.name, 1)
    assert (trained.test is None) == (name == "ade20k")
    assert all(bool(tensor.isfinite().all()) for tensor in trained.model.state_dict().values())


def test_the_template_trains_a_teacher_of_one_s_own(tmp_path: Path) -> None:
    pipeline = in_small("image-folder", tmp_path)
    assert train_teacher(pipeline, tmp_path / "run").test is not None


# The command, and names in place of files.


def kdcache(*arguments: object) -> tuple[int, str]:
    done = CliRunner().invoke(main, [str(argument) for argument in arguments])
    return done.exit_code, done.output


def test_recipes_are_listed_shown_and_copied(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    code, listed = kdcache("pipelines", "list", "--json")
    printed: dict[str, dict[str, Any]] = json.loads(listed)
    shipped = {path.stem for path in (ROOT / "pipelines").glob("*.yaml")}
    assert (code, set(printed)) == (0, shipped)
    assert printed["digits"] == {
        "dataset": "digits",
        "teacher": "small:cnn",
        "student": "small:mlp",
        "loss": "kd",
        "views": "1",
    }
    assert all(name in kdcache("pipelines", "list")[1] for name in shipped)
    text = recipe("image-folder").read_text()
    assert kdcache("pipelines", "show", "image-folder") == (0, text)
    assert kdcache("pipelines", "copy", "image-folder") == (0, "image-folder.yaml\n")
    assert kdcache("pipelines", "copy", "image-folder", "mine.yaml")[0] == 0
    assert (tmp_path / "mine.yaml").read_text() == (tmp_path / "image-folder.yaml").read_text() == text
    code, said = kdcache("pipelines", "copy", "image-folder", "mine.yaml")
    assert (code, "mine.yaml already exists" in said) == (2, True)
    code, said = kdcache("pipelines", "show", "digit")
    assert (code, "no recipe 'digit'" in said, "smoke" in said) == (2, True, True)


def test_a_name_is_a_recipe_unless_a_file_has_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert file_or_recipe(Path("smoke")) == recipe("smoke")
    (tmp_path / "smoke").write_text("dataset: {name: digits}\n")
    assert file_or_recipe(Path("smoke")) == Path("smoke")
    for path in (Path("mine.yaml"), tmp_path / "digits", Path("folder/digits")):
        assert file_or_recipe(path) == path
    with pytest.raises(UsageError, match="no recipe 'nothing'") as caught:
        file_or_recipe(Path("nothing"))
    assert "the path of a pipeline file" in caught.value.fix


def test_commands_take_the_name_of_a_recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    cpu = ("--device", "cpu")
    assert kdcache("train-teacher", "smoke", "-o", "runs/smoke-teacher", *cpu)[0] == 0
    assert kdcache("plan", "smoke", *cpu)[0] == 0
    assert kdcache("dump-teacher", "smoke", "-o", "runs/smoke.kdcache", *cpu)[0] == 0
    given = ("smoke", "--cache", "runs/smoke.kdcache", *cpu)
    assert kdcache("train-student", *given, "-o", "runs/student")[0] == 0
    assert kdcache("sweep", *given, "-o", "runs/sweep", "--seeds", 1)[0] == 0
    assert kdcache("verify", "runs/smoke.kdcache", "smoke", "--replay", *cpu)[0] == 0
    code, said = kdcache("train-student", "smok", "--cache", "runs/smoke.kdcache", "-o", "runs/other")
    assert (code, "no recipe 'smok'" in said) == (2, True)

"""Students of label maps: from train-teacher to train-student, and what is refused."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import pytest
import torch
from helpers.cli import ok, refused
from helpers.scenes import scenes_folder
from torch import Tensor, nn
from torch.nn import functional as F

from kdcache import dump_teacher, load_pipeline, load_split, open_cache
from kdcache.config.cache import CacheSpec
from kdcache.data.views import View
from kdcache.losses.boundaries import body_kd, boundaries, boundary_kd
from kdcache.models.build import build_model
from kdcache.models.checkpoints import load_weights


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the data set, a pipeline, a trained teacher and its cache."""
    made = scenes_folder(tmp_path_factory.mktemp("dense"))
    ok("train-teacher", made / "p.yaml", "-o", made / "teacher")
    ok("dump-teacher", made / "p.yaml", "-o", made / "t.kdcache")
    return made


def lines(path: Path) -> list[dict[str, str]]:
    return list(csv.DictReader(path.read_text().splitlines()))


def test_a_teacher_of_pixels_is_selected_by_its_mean_iou(folder: Path) -> None:
    rows = lines(folder / "teacher" / "metrics.csv")
    metrics = json.loads((folder / "teacher" / "metrics.json").read_text())
    best = max(rows, key=lambda row: float(row["validation_mean_iou"]))
    assert metrics["best"]["epoch"] == int(best["epoch"])
    assert metrics["test"]["mean_iou"] == pytest.approx(sum(metrics["test"]["iou"]) / 3)
    assert metrics["test"]["mean_iou"] > 0.5


def test_maps_of_the_cache_are_those_of_the_teacher(folder: Path) -> None:
    pipeline, cache = load_pipeline(folder / "p.yaml"), open_cache(folder / "t.kdcache")
    samples = load_split(pipeline.dataset, "train")
    network = build_model(pipeline.section("teacher"), 3, (3, 24, 32))
    load_weights(network, str(folder / "teacher" / "model.safetensors"))
    network.eval()
    for view in (0, 1):
        batch = View(samples, pipeline.transform or [], cache.manifest.plan.views.seed).batch([3, 9], view)
        with torch.no_grad():
            truth = network(batch.images)
        decoded = cache.teacher("pixels")(torch.tensor([3, 9]), view)
        assert decoded.shape == (2, 3, 6, 8)
        assert float((decoded.softmax(1) - truth.softmax(1)).abs().sum(1).mean()) / 2 < 0.02


@pytest.mark.parametrize("loss", ["kd", "dtkd", "ka", "ce"])
def test_a_student_learns_from_maps(loss: str, folder: Path, tmp_path: Path) -> None:
    cache = [] if loss == "ce" else ["--cache", folder / "t.kdcache"]
    printed = ok("train-student", folder / "p.yaml", *cache, "--loss", loss, "-o", tmp_path / "run")
    assert "validation mIoU" in printed and "pixel accuracy" in printed
    metrics = json.loads((tmp_path / "run" / "metrics.json").read_text())
    assert metrics["test"]["mean_iou"] > 0.4
    rows = lines(tmp_path / "run" / "metrics.csv")
    assert (float(rows[0]["distillation"]) > 0) == (loss != "ce")


def test_the_first_step_is_the_loss_of_the_formula(folder: Path, tmp_path: Path) -> None:
    """One step of all images: the loss of metrics.csv is that of the plain computation on decoded maps."""
    one = ["--set", "student.train.epochs=1", "--set", "student.train.batch_size=64"]
    ok("train-student", folder / "p.yaml", "--cache", folder / "t.kdcache", *one, "-o", tmp_path / "whole")
    (row,) = lines(tmp_path / "whole" / "metrics.csv")
    pipeline, cache = load_pipeline(folder / "p.yaml"), open_cache(folder / "t.kdcache")
    samples = load_split(pipeline.dataset, "train")
    torch.manual_seed(0)
    student = build_model(pipeline.section("student"), 3, (3, 24, 32)).train()
    batch = View(samples, pipeline.transform or [], cache.manifest.plan.views.seed).batch(list(range(64)), 0)
    with torch.no_grad():
        said = student(batch.images)
    teacher = cache.teacher("pixels")(torch.arange(64), 0)
    assert batch.maps is not None
    ce = F.cross_entropy(F.interpolate(said, (24, 32), mode="bilinear"), batch.maps, ignore_index=-1)
    kl = F.kl_div(said.log_softmax(1), teacher.log_softmax(1), log_target=True, reduction="none").sum(1).mean()
    assert float(row["cross_entropy"]) == pytest.approx(float(ce), rel=1e-5)
    assert float(row["loss"]) == pytest.approx(float(0.1 * ce + 0.9 * kl), rel=1e-5)


class Finer(nn.Module):
    """Another network, with places of half the size."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(7)
        self.first, self.last = nn.Conv2d(3, 8, 3, stride=2, padding=1), nn.Conv2d(8, 3, 1)

    def forward(self, images: Tensor) -> Tensor:
        said: Tensor = self.last(self.first(images).relu())
        return said


def test_maps_of_two_caches_are_joined(folder: Path, tmp_path: Path) -> None:
    """One step of all images: the mean of the probabilities of two teachers, at the places of the finer one."""
    pipeline, cache = load_pipeline(folder / "p.yaml"), open_cache(folder / "t.kdcache")
    samples, transform = load_split(pipeline.dataset, "train"), pipeline.transform or []
    outputs = {"fine": {"kind": "classes", "places": "grid", "source": "last"}}
    spec = CacheSpec.model_validate({**pipeline.cache.model_dump(), "outputs": outputs})
    other = dump_teacher(Finer().eval(), samples, tmp_path / "fine.kdcache", transform=transform, spec=spec)
    both = ["--cache", folder / "t.kdcache", "--cache", tmp_path / "fine.kdcache"]
    one = ["--set", "student.train.epochs=1", "--set", "student.train.batch_size=64"]
    joining = ["--set", "join={combine: probabilities, weights: [3, 1]}"]
    ok("train-student", folder / "p.yaml", *both, *one, *joining, "-o", tmp_path / "run")
    (row,) = lines(tmp_path / "run" / "metrics.csv")
    torch.manual_seed(0)
    student = build_model(pipeline.section("student"), 3, (3, 24, 32)).train()
    batch = View(samples, transform, cache.manifest.plan.views.seed).batch(list(range(64)), 0)
    with torch.no_grad():
        said = F.interpolate(student(batch.images), (12, 16), mode="bilinear")
    coarse = F.interpolate(cache.teacher("pixels")(torch.arange(64)), (12, 16), mode="bilinear")
    p = 0.75 * coarse.softmax(1) + 0.25 * other.teacher("fine")(torch.arange(64)).softmax(1)
    kl = (p * (p.log() - said.log_softmax(1))).sum(1).mean()
    assert float(row["distillation"]) == pytest.approx(float(0.9 * kl), rel=1e-4)


MAP_LOSSES = {
    "bpkd": "{name: bpkd, weight: 0.02}",
    "pixel_kd": "{name: pixel_kd}",
    "cwd": "{name: cwd}",
}


@pytest.mark.parametrize("name", MAP_LOSSES)
def test_losses_of_maps_are_trained_beside_the_cross_entropy_of_pixels(name: str, folder: Path, tmp_path: Path) -> None:
    options = ["--set", "student.train.epochs=1", "--set", "student.train.batch_size=64"]
    options += ["--set", f"loss={{name: ce, outputs: {{pixels: {MAP_LOSSES[name]}}}}}"]
    options += ["--set", "student.outputs={pixels: {source: classifier}}"]
    ok("train-student", folder / "p.yaml", "--cache", folder / "t.kdcache", *options, "-o", tmp_path / "run")
    (row,) = lines(tmp_path / "run" / "metrics.csv")
    pipeline, cache = load_pipeline(folder / "p.yaml"), open_cache(folder / "t.kdcache")
    samples = load_split(pipeline.dataset, "train")
    torch.manual_seed(0)
    student = build_model(pipeline.section("student"), 3, (3, 24, 32)).train()
    batch = View(samples, pipeline.transform or [], cache.manifest.plan.views.seed).batch(list(range(64)), 0)
    with torch.no_grad():
        said = student(batch.images)
    teacher = cache.teacher("pixels")(torch.arange(64), 0)
    assert batch.maps is not None
    if name == "bpkd":
        edges = boundaries(batch.maps, 3, (6, 8), ignore_index=-1)
        value = 0.02 * (50 * boundary_kd(said, teacher, edges) + 20 * body_kd(said, teacher, edges)).mean()
    elif name == "cwd":
        log_p, log_q = ((z / 4).flatten(2).log_softmax(2) for z in (teacher, said))
        value = 16 * F.kl_div(log_q, log_p, log_target=True, reduction="none").sum(2).mean()
    else:
        value = F.kl_div(said.log_softmax(1), teacher.log_softmax(1), log_target=True, reduction="none").sum(1).mean()
    assert float(row["distillation"]) == pytest.approx(float(value), rel=1e-4)
    assert float(row["loss"]) == pytest.approx(float(value) + float(row["cross_entropy"]), rel=1e-4)


def test_bpkd_needs_label_maps(folder: Path, tmp_path: Path) -> None:
    (folder / "images.py").write_text(
        "import torch\n"
        "from scenes import make as of_pixels\n"
        "class Images(torch.utils.data.Dataset):\n"
        "    classes = ('ground', 'box', 'disc')\n"
        "    def __init__(self, pairs): self.pairs = pairs\n"
        "    def __len__(self): return len(self.pairs)\n"
        "    def __getitem__(self, i): return self.pairs[i][0], i % 3\n"
        "def make(split): return Images(of_pixels(split))\n"
    )
    images = ["--set", f"dataset.name={folder}/images.py:make"]
    ok("dump-teacher", folder / "p.yaml", *images, "-o", tmp_path / "i.kdcache")
    options = ["--set", "loss={logits: false, pixels: {name: bpkd}}"]
    options += ["--set", "student.outputs={pixels: {source: classifier}}"]
    command = ["train-student", folder / "p.yaml", *images, "--cache", tmp_path / "i.kdcache", *options]
    assert "needs a class per pixel" in " ".join(refused(2, *command, "-o", tmp_path / "run").split())


def test_micro_batches_make_the_step_of_the_batch(folder: Path, tmp_path: Path) -> None:
    losses = []
    for parts in (1, 4):
        options = ["--set", "student.train.epochs=1", "--set", "student.train.batch_size=64"]
        options += ["--set", f"student.train.gradient_accumulation_steps={parts}"]
        # Without batch normalization, whose statistics are of a micro-batch.
        options += ["--set", f"student.model={folder}/plain.py:make", "--set", "student.args={}"]
        (folder / "plain.py").write_text(
            "import torch\n"
            "def make(num_classes):\n"
            "    return torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3, stride=2, padding=1), torch.nn.ReLU(),\n"
            "                               torch.nn.Conv2d(8, num_classes, 1))\n"
        )
        out = tmp_path / str(parts)
        ok("train-student", folder / "p.yaml", "--cache", folder / "t.kdcache", *options, "-o", out)
        (row,) = lines(out / "metrics.csv")
        losses.append([float(row[key]) for key in ("loss", "cross_entropy", "distillation", "validation_loss")])
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


REFUSED: dict[str, tuple[int, list[str], str]] = {
    "network of images": (4, ["student.model=small:cnn"], "the network returned [1, 3] for 1 image"),
    "own transform": (
        2,
        ["student.transform=[{RandomHorizontalFlip: {}}, {ToDtype: {dtype: float32, scale: true}}]"],
        "student.transform would move the pixels",
    ),
    "mixed images": (2, ["eval_transform=[{MixUp: {alpha: 0.2}}]"], "mixes images"),
    "controller": (2, ["loss.controller={kind: tgeo}"], "loss.controller is of whole images"),
    "hidden labels": (2, ["student.train.labels_per_class=1"], "train.labels_per_class hides labels of images"),
    "misspelled mask": (
        4,
        ["loss={name: kd, outputs: {pixels: {name: pixel_kd, mask: label}}}"],
        "set `mask` of the loss of pixels to a part of what the student returns or to a module, or to labels",
    ),
    "no such source": (
        4,
        ["loss={name: kd, outputs: {pixels: {name: pixel_kd}}}", "student.outputs={pixels: {source: classifer}}"],
        "did you mean classifier?; it returns",
    ),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_what_is_not_defined_for_maps_is_refused(kind: str, folder: Path, tmp_path: Path) -> None:
    code, settings, said = REFUSED[kind]
    options = [word for setting in settings for word in ("--set", setting)]
    command = ["train-student", folder / "p.yaml", "--cache", folder / "t.kdcache", *options, "-o", tmp_path / "run"]
    assert said in " ".join(refused(code, *command).split())
    assert not (tmp_path / "run").exists()


def test_classes_in_another_order_are_refused_and_other_names_are_noted(folder: Path, tmp_path: Path) -> None:
    code = (folder / "scenes.py").read_text()
    names = '("ground", "box", "disc")'
    assert names in code
    pipeline = (folder / "p.yaml").read_text()
    for new, word in (('("ground", "disc", "box")', "order"), ('("ground", "cube", "disc")', "names")):
        (tmp_path / f"{word}.py").write_text(code.replace(names, new))
        (tmp_path / f"{word}.yaml").write_text(pipeline.replace(f"{folder}/scenes.py", f"{tmp_path}/{word}.py"))
    first = "class 1 is 'box' in "
    given = ["train-student", tmp_path / "order.yaml", "--cache", folder / "t.kdcache", "-o", tmp_path / "run"]
    said = " ".join(refused(4, *given).split())
    assert "has the classes of the cache in another order: " + first in said
    said = " ".join(refused(4, "verify", folder / "t.kdcache", tmp_path / "order.yaml").split())
    assert first in said and "'disc' in" in said
    checked = ok("verify", folder / "t.kdcache", tmp_path / "names.yaml")
    assert "the same 64 samples" in checked


def test_a_training_without_any_label_is_an_error(folder: Path, tmp_path: Path) -> None:
    code = (folder / "scenes.py").read_text()
    (tmp_path / "scenes.py").write_text(code.replace("mask[0] = 255", "mask[:] = 255 if self.seed == 1 else mask"))
    text = (folder / "p.yaml").read_text().replace(f"{folder}/scenes.py", f"{tmp_path}/scenes.py")
    (tmp_path / "p.yaml").write_text(text)
    said = " ".join(refused(2, "train-teacher", tmp_path / "p.yaml", "-o", tmp_path / "run").split())
    assert "has a label, and the loss uses no teacher" in said and "dataset.ignore" in said
    assert not (tmp_path / "run").exists()


def test_a_student_without_class_logits_is_compared_with_the_teacher(folder: Path, tmp_path: Path) -> None:
    """Its map needs no source: it is the tensor that it returns, with and without a loss of its own."""
    for name, logits in (("alone", "false"), ("beside", "{name: ce}")):
        one = ["--set", "student.train.epochs=1", "--set", f"loss={{logits: {logits}, pixels: {{name: pixel_kd}}}}"]
        ok("train-student", folder / "p.yaml", "--cache", folder / "t.kdcache", *one, "-o", tmp_path / name)
    said = ok("evaluate", tmp_path / "alone", "--cache", folder / "t.kdcache")
    assert "same top class as the teacher" in said
    assert "mIoU" in ok("evaluate", tmp_path / "beside", "--cache", folder / "t.kdcache")
    refusal = refused(2, "evaluate", tmp_path / "alone")
    assert "--cache CACHE" in refusal


def test_a_cache_without_maps_is_refused(folder: Path, tmp_path: Path) -> None:
    outputs = "cache.outputs={features: {source: features, pool: mean}}"
    ok("dump-teacher", folder / "p.yaml", "--set", outputs, "-o", tmp_path / "f.kdcache")
    command = ["train-student", folder / "p.yaml", "--cache", tmp_path / "f.kdcache", "-o", tmp_path / "run"]
    said = " ".join(refused(2, *command).split())
    assert "needs the teacher's logits of every place" in said and "has none" in said and "places: grid" in said


def test_dtkd_needs_the_level_of_each_place(folder: Path, tmp_path: Path) -> None:
    outputs = "cache.outputs={pixels: {kind: classes, places: grid, source: classifier}}"
    ok("dump-teacher", folder / "p.yaml", "--set", outputs, "-o", tmp_path / "l.kdcache")
    command = ["train-student", folder / "p.yaml", "--cache", tmp_path / "l.kdcache", "--loss", "dtkd"]
    said = " ".join(refused(2, *command, "-o", tmp_path / "run").split())
    assert "without the level of each place" in said and "over_places=true" in said


def test_the_doctor_finds_nothing_wrong_with_a_pipeline_of_pixels(folder: Path) -> None:
    printed = ok("doctor", folder / "p.yaml")
    assert "PROBLEM" not in printed and "for the first micro-batch" in printed


def test_a_dump_of_class_logits_of_images_is_refused_with_what_to_keep(folder: Path, tmp_path: Path) -> None:
    command = ["dump-teacher", folder / "p.yaml", "--set", "cache.logits=true", "--set", "cache.outputs={}"]
    said = " ".join(refused(4, *command, "-o", tmp_path / "c.kdcache").split())
    assert "places: grid" in said
    assert not (tmp_path / "c.kdcache").exists()

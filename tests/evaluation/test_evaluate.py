"""`kdcache evaluate`: measures against loops in NumPy, costs against published ones, and who is refused."""

from __future__ import annotations

import json
import re
import time
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
import torchvision
from helpers.cli import RECIPE, kdcache, ok, refused
from helpers.networks import CLEAN, TURN, Values, network, rearranged, reference, softmax
from torch import Tensor, nn
from torchvision.models.vision_transformer import VisionTransformer

from kdcache import Cache, dump_teacher, load_split
from kdcache.cache.planner import pilot_ids
from kdcache.config.cache import CacheSpec
from kdcache.config.schema import DatasetSpec, Pipeline
from kdcache.config.transform import Transform
from kdcache.data.transforms import build_transform
from kdcache.data.views import View
from kdcache.evaluation import costs, scorecard
from kdcache.evaluation.metrics import expected_calibration_error, negative_log_likelihood, top_k_accuracy
from kdcache.evaluation.networks import from_run
from kdcache.models import save_weights
from kdcache.models.small import SmallMLP

# Measures.


@pytest.mark.parametrize("scale", [0.01, 1.0, 8.0])
def test_measures_are_those_of_a_loop(scale: float) -> None:
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 12, 700)
    logits = (scale * (rng.normal(size=(700, 12)) + 2 * np.eye(12)[labels])).astype(np.float32)
    expected = reference(logits, labels)
    given = torch.from_numpy(logits), torch.from_numpy(labels)
    assert top_k_accuracy(*given, 1) == pytest.approx(expected["top1"])
    assert top_k_accuracy(*given, 5) == pytest.approx(expected["top5"])
    assert negative_log_likelihood(*given) == pytest.approx(expected["negative_log_likelihood"])
    assert expected_calibration_error(*given) == pytest.approx(expected["calibration_error"])


def log_of(*probabilities: tuple[float, ...]) -> Tensor:
    return torch.tensor(probabilities).log()


def test_calibration_error_by_hand() -> None:
    logits = log_of((0.8, 0.2), (0.2, 0.8), (0.6, 0.4))
    # Two rows at 0.8, of which one is right, and one at 0.6 that is.
    assert expected_calibration_error(logits, torch.tensor([0, 0, 0])) == pytest.approx((0.6 + 0.4) / 3)
    # Bins are closed above: 0.5 is in the first of two, 0.6 in the second, and their errors do not cancel.
    logits = log_of((0.5, 0.5), (0.6, 0.4))
    assert expected_calibration_error(logits, torch.tensor([0, 1]), bins=2) == pytest.approx((0.5 + 0.6) / 2)
    assert expected_calibration_error(logits, torch.tensor([0, 1]), bins=1) == pytest.approx(0.1 / 2)


def test_of_equal_logits_the_lower_class_comes_first() -> None:
    labels = torch.arange(8)
    assert top_k_accuracy(torch.zeros(8, 8), labels, 1) == 1 / 8
    assert top_k_accuracy(torch.zeros(8, 8), labels, 5) == 5 / 8
    assert negative_log_likelihood(torch.zeros(8, 8), labels) == pytest.approx(np.log(8))


# Costs.


@pytest.mark.parametrize("name", ["resnet18", "mobilenet_v2", "vit_b_16", "swin_t"])
def test_parameters_and_multiply_adds_are_the_published_ones(name: str) -> None:
    published = torchvision.models.get_model_weights(name).DEFAULT.meta
    with torch.device("meta"):
        network, image = torchvision.models.get_model(name), torch.empty(1, 3, 224, 224)
    network.eval()
    assert costs.count_parameters(network) == published["num_params"]
    assert costs.count_multiply_adds(network, image) / 1e9 == pytest.approx(published["_ops"], abs=5e-4)
    if name == "resnet18":
        assert f"{costs.count_multiply_adds(network, image):.3g}" == "1.81e+09"


def test_attention_is_counted_where_torch_would_fuse_it() -> None:
    network = VisionTransformer(16, 8, num_layers=2, num_heads=2, hidden_dim=12, mlp_dim=20, num_classes=7)
    tokens, width = 5, 12
    of_layer = tokens * (4 * width * width + 2 * width * 20) + 2 * tokens * tokens * width
    assert (
        costs.count_multiply_adds(network, torch.zeros(1, 3, 16, 16))
        == 4 * 3 * 8 * 8 * width + 2 * of_layer + width * 7
    )
    assert network.training
    assert torch.backends.mha.get_fastpath_enabled()


class Sleeper(nn.Module):
    """Takes ten milliseconds for each call and one for each image; the first calls take longer."""

    def __init__(self) -> None:
        super().__init__()
        self.calls = 0

    def forward(self, images: Tensor) -> Tensor:
        """[B, channels, H, W] -> the same."""
        assert not self.training
        assert torch.is_inference_mode_enabled()
        self.calls += 1
        time.sleep(0.01 + 0.001 * len(images) + (0.2 if self.calls == 1 else 0))
        return images


def test_speed_is_that_of_a_warm_network() -> None:
    network = Sleeper()
    speed = costs.measure_speed(network, torch.zeros(1, 1, 2, 2), min_run_time=0.2)
    assert 11 <= speed.milliseconds < 60
    assert 64 / 0.3 < speed.images_per_second <= 64 / 0.074
    assert network.training


# Networks side by side.


class Work(NamedTuple):
    """A data set of eight classes, some images without a label, the cache of a teacher, and two runs."""

    folder: Path
    pipeline: Pipeline
    cache: Cache
    student: nn.Module
    teacher: nn.Module

    def seen(self, split: Any, transform: Transform | None = None) -> tuple[Tensor, Values]:
        """Every image of a split as a network sees it, and the labels."""
        samples = load_split(self.pipeline.dataset, split)
        made = build_transform(samples.transform if transform is None else transform)
        return torch.stack([made(samples.images.picture(i)) for i in range(len(samples))]), samples.labels


def run(folder: Path, pipeline: Pipeline, model: nn.Module, **metrics: str) -> Path:
    folder.mkdir()
    save_weights(model, folder / "model.safetensors")
    (folder / "resolved.yaml").write_text(pipeline.to_yaml())
    (folder / "metrics.json").write_text(json.dumps(metrics))
    return folder


def pixels(path: Path, seed: int = 0, **changed: Values) -> Path:
    """An npz of 120 images of eight classes; every tenth has no label."""
    rng = np.random.default_rng(seed)
    labels = np.where(np.arange(120) % 10, rng.integers(0, 8, 120), -1)
    np.savez(path, **{"images": rng.integers(0, 255, (120, 4, 4), np.uint8), "labels": labels, **changed})  # type: ignore[arg-type]  # numpy's stub takes the names for its flags
    return path


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Work:
    folder = tmp_path_factory.mktemp("work")
    pipeline = Pipeline.model_validate(
        {
            "dataset": {
                "name": "npz",
                "root": str(pixels(folder / "mine.npz")),
                "validation_fraction": 0.2,
                "test_fraction": 0.3,
            },
            "transform": TURN,
            "eval_transform": CLEAN,
            "teacher": {
                "model": "small:mlp",
                "args": {"width": 24},
                "weights": str(folder / "t" / "model.safetensors"),
            },
            "student": {"model": "small:mlp", "args": {"width": 6}},
        }
    )
    student, teacher = network(1, 6), network(2, 24)
    run(folder / "s", pipeline, student, network="student")
    run(folder / "t", pipeline, teacher, network="teacher")
    (folder / "mine.yaml").write_text(pipeline.to_yaml())
    samples = load_split(pipeline.dataset, "train")
    spec = CacheSpec(views=2, dtype="float32", top_k="all")
    cache = dump_teacher(teacher, samples, folder / "t.kdcache", transform=TURN, spec=spec)
    return Work(folder, pipeline, cache, student, teacher)


def told(*arguments: object) -> Any:
    return json.loads(ok("evaluate", *arguments, "--json", "--device", "cpu"))


@pytest.mark.parametrize("split", ["test", "validation"])
def test_figures_are_those_of_the_networks_on_the_split(split: str, work: Work) -> None:
    found = told(work.folder / "s", work.folder / "t", "--split", split)
    images, labels = work.seen(split, CLEAN)
    known = labels >= 0
    assert 0 < known.sum() < len(labels) == found["images"]
    assert (found["split"], found["labeled"]) == (split, known.sum())
    for score, model, width in zip(found["scores"], (work.student, work.teacher), (6, 24), strict=True):
        logits = model(images).detach().numpy()[known]
        for measure, value in reference(logits, labels[known]).items():
            assert score[measure] == pytest.approx(value, abs=1e-6)
        assert score["parameters"] == 17 * width + (width + 1) * 8
        assert score["multiply_adds"] == 16 * width + width * 8
        assert score["image"] == [1, 4, 4]
        assert score["teacher"] is None
    assert [score["name"] for score in found["scores"]] == [str(work.folder / "s"), str(work.folder / "t")]


@pytest.mark.parametrize("rows", [7, 4096])
def test_agreement_is_with_the_teacher_on_the_pixels_that_it_saw(rows: int, work: Work) -> None:
    found = told(work.folder / "s", work.folder / "t", "--cache", work.cache.path, "--rows", rows)
    samples = load_split(work.pipeline.dataset, "train")
    assert rows < len(samples) == 60 or rows > len(samples)
    chosen = pilot_ids(60, rows) if rows < 60 else range(60)
    images = torch.cat([View(samples, TURN)[i].images for i in chosen])
    student, teacher = (model(images).detach().numpy() for model in (work.student, work.teacher))
    expected = {
        "rows": min(rows, 60),
        "same_class": np.mean(student.argmax(axis=1) == teacher.argmax(axis=1)),
        **{f"total_variation_t{t}": 0.5 * abs(softmax(student, t) - softmax(teacher, t)).sum(1).mean() for t in (1, 4)},
    }
    assert found["scores"][0]["teacher"] == pytest.approx(expected, abs=1e-6)
    assert 0.01 < expected["total_variation_t4"] < expected["total_variation_t1"]
    itself = {"rows": min(rows, 60), "same_class": 1, "total_variation_t1": 0, "total_variation_t4": 0}
    assert found["scores"][1]["teacher"] == pytest.approx(itself, abs=1e-5)
    assert found["cache"] == work.cache.manifest.digest


def test_a_data_set_in_another_order_agrees_with_the_cache_as_much(work: Work, tmp_path: Path) -> None:
    moved = rearranged(work.pipeline, tmp_path / "mine.npz", [*reversed(range(60))])
    reversed_run = run(tmp_path / "s", moved, work.student, network="student")
    told_of = ("--cache", work.cache.path, "--rows", 23)
    straight, turned = told(work.folder / "s", *told_of), told(reversed_run, *told_of)
    assert turned["scores"][0]["teacher"] == straight["scores"][0]["teacher"]
    assert turned["scores"][0]["top1"] == straight["scores"][0]["top1"]
    assert turned["matched"] == straight["matched"] == 60


def test_agreement_on_a_part_of_the_cache_is_with_the_teacher_there(work: Work, tmp_path: Path) -> None:
    part = [i for i in np.random.default_rng(3).permutation(60).tolist() if i % 3]
    moved = rearranged(work.pipeline, tmp_path / "mine.npz", part, more=7)
    some = run(tmp_path / "s", moved, work.student, network="student")
    made = kdcache("evaluate", some, "--cache", work.cache.path, "--json", "--device", "cpu")
    assert "40 samples of the cache are in mine/train, 20 are missing (sample 0 of the cache, " in made.stderr
    assert "7 of its own are left out" in made.stderr
    whole = load_split(work.pipeline.dataset, "train")
    images = torch.cat([View(whole, TURN)[i].images for i in sorted(part)])
    student, teacher = (softmax(model(images).detach().numpy()) for model in (work.student, work.teacher))
    found = json.loads(made.stdout)
    assert found["matched"] == found["scores"][0]["teacher"]["rows"] == 40
    assert found["scores"][0]["teacher"]["total_variation_t1"] == pytest.approx(
        0.5 * abs(student - teacher).sum(1).mean(), abs=1e-6
    )


def test_the_table_says_what_json_says(work: Work) -> None:
    arguments = (work.folder / "s", work.folder / "t", "--cache", work.cache.path)
    text, found = ok("evaluate", *arguments), told(*arguments)
    lines = text.splitlines()
    assert f"{found['labeled']} labeled images" in lines[0]
    assert f"{found['images'] - found['labeled']} images without a label" in text
    assert "15 bins" in text
    assert "on 60 of its 60 images, view 0" in text
    for line, score in zip(lines[2:4], found["scores"], strict=True):
        assert line.startswith(score["name"])
        for shown in (
            f" {score['top1']:.2%}",
            f" {score['top5']:.2%}",
            f" {score['negative_log_likelihood']:.4f}",
            f" {score['calibration_error']:.4f}",
            f" {score['parameters']} ",
            f" {score['multiply_adds']} ",
            f" {score['teacher']['same_class']:.2%}",
            f" {score['teacher']['total_variation_t4']:.4f}",
        ):
            assert shown in line


def test_top5_is_left_out_where_there_are_five_classes(tmp_path: Path) -> None:
    pixels(tmp_path / "five.npz", labels=np.arange(120) % 5)
    pipeline = Pipeline.model_validate(
        {"dataset": {"name": "npz", "root": str(tmp_path / "five.npz")}, "student": {"model": "small:mlp"}}
    )
    made = run(tmp_path / "run", pipeline, SmallMLP(5, 1, 4, 4), network="student")
    assert told(made)["scores"][0]["top5"] is None
    text = ok("evaluate", made)
    assert "top-5" not in text
    assert "without a label" not in text


def test_a_checkpoint_of_a_pipeline_is_what_its_run_is(work: Work) -> None:
    timeless = [told(work.folder / name)["scores"][0] for name in ("s", "t")]
    for name, expected in zip(("student", "teacher"), timeless, strict=True):
        folder = work.folder / name[0]
        torch.save({"state_dict": getattr(work, name).state_dict()}, work.folder / f"{name}.pt")
        for checkpoint in (folder / "model.safetensors", work.folder / f"{name}.pt"):
            found = told("--pipeline", work.folder / "mine.yaml", "--network", name, checkpoint)["scores"]
            assert found[0]["name"] == str(checkpoint)
            assert found[0]["negative_log_likelihood"] == expected["negative_log_likelihood"]


def test_the_teacher_that_a_pipeline_names_stands_beside_runs(work: Work) -> None:
    found = told(work.folder / "s", "--pipeline", work.folder / "mine.yaml", "--network", "teacher")["scores"]
    assert [score["name"] for score in found] == ["small:mlp", str(work.folder / "s")]
    assert found[0]["top1"] == told(work.folder / "t")["scores"][0]["top1"]
    member = f"{{model: 'small:mlp', args: {{width: 24}}, weights: {work.folder / 't' / 'model.safetensors'}}}"
    several = ("--set", f"teacher=[{member}, {member}]", "--network", "teacher")
    both = told("--pipeline", work.folder / "mine.yaml", *several, "--cache", work.cache.path)["scores"]
    assert both[0]["name"] == "small:mlp + small:mlp"
    assert both[0]["parameters"] == 2 * found[0]["parameters"]
    assert both[0]["teacher"]["total_variation_t1"] < 1e-5
    picked = "teacher={model: 'small:mlp', args: {width: 24}, outputs: 8, classes: [1, 0, 2, 3, 4, 5, 6, 7]}"
    checkpoint = work.folder / "t" / "model.safetensors"
    others = told("--pipeline", work.folder / "mine.yaml", "--network", "teacher", "--set", picked, checkpoint)[
        "scores"
    ]
    assert others[0]["negative_log_likelihood"] != found[0]["negative_log_likelihood"]


def test_a_run_of_an_older_kdcache_is_refused_with_what_works(work: Work, tmp_path: Path) -> None:
    older = run(tmp_path / "older", work.pipeline, work.student, loss="kd")
    said = refused(2, "evaluate", older)
    assert "does not say which network" in said
    fix = said.split("kdcache evaluate ")[1].split(" (or")[0].split()
    assert told(*fix)["scores"][0]["top1"] == told(work.folder / "s")["scores"][0]["top1"]


def test_what_is_no_finished_run_is_refused(work: Work, tmp_path: Path) -> None:
    assert "run folder not found" in refused(2, "evaluate", tmp_path / "nowhere")
    assert "has no model.safetensors" in refused(2, "evaluate", work.cache.path)
    broken = run(tmp_path / "broken", work.pipeline, work.student)
    for text in ("{", "[]"):
        (broken / "metrics.json").write_text(text)
        assert "cannot read" in refused(5, "evaluate", broken)
    (broken / "metrics.json").unlink()
    assert "is not a finished run: it has no metrics.json" in refused(2, "evaluate", broken)


@pytest.fixture
def sweep(work: Work, tmp_path: Path) -> Path:
    """The folder of a sweep: two combinations, one with an unfinished student."""
    for point, seeds in (("loss=kd", (0, 1)), ("loss=ce", (0,))):
        (tmp_path / "sweep" / point).mkdir(parents=True)
        (tmp_path / "sweep" / point / "point.json").write_text("{}")
        for seed in seeds:
            run(tmp_path / "sweep" / point / f"seed{seed}", work.pipeline, network(seed, 6), network="student")
    unfinished = tmp_path / "sweep" / "loss=ce" / "seed1.partial"
    unfinished.mkdir()
    (unfinished / "resolved.yaml").write_text(work.pipeline.to_yaml())
    (tmp_path / "sweep" / "sweep.json").write_text("{}")
    return tmp_path / "sweep"


def test_every_student_of_a_sweep_is_evaluated(sweep: Path, work: Work) -> None:
    names = ["loss=ce/seed0", "loss=kd/seed0", "loss=kd/seed1"]
    expected = [told(sweep / name)["scores"][0]["top1"] for name in names]
    for given in (sweep, sweep / "sweep.json"):
        scores = told(given)["scores"]
        assert [score["name"] for score in scores] == [str(sweep / name) for name in names]
        assert [score["top1"] for score in scores] == expected
    assert [score["top1"] for score in told(sweep / "loss=kd")["scores"]] == expected[1:]
    assert len(told(work.folder / "s", sweep, sweep / "loss=kd")["scores"]) == 4
    done = kdcache("evaluate", sweep, "--device", "cpu")
    assert f"note: {sweep / 'loss=ce' / 'seed1.partial'} is not finished and is left out" in done.stderr


def test_a_path_that_is_not_a_run_says_what_to_pass(sweep: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    unfinished = sweep / "loss=ce" / "seed1.partial"
    for given in (unfinished, unfinished.with_name("seed1")):
        said = refused(2, "evaluate", given)
        assert f"{unfinished} is a run that is not finished" in said
        assert f"then pass {unfinished.with_name('seed1')}" in said
    assert f"pass those in it: {sweep}" in refused(2, "evaluate", sweep.parent)
    assert "point.json is a file, not a run folder" in refused(2, "evaluate", sweep / "loss=kd" / "point.json")
    monkeypatch.chdir(sweep.parent)
    assert f"pass those in it: {sweep}" in refused(2, "evaluate", ".")
    monkeypatch.chdir(sweep)
    assert len(told(".")["scores"]) == 3


def test_arguments_that_do_not_go_together_are_refused(work: Work) -> None:
    checkpoint, pipeline = work.folder / "s" / "model.safetensors", work.folder / "mine.yaml"
    assert "is a checkpoint" in refused(2, "evaluate", checkpoint)
    assert "no RUN is given" in refused(2, "evaluate")
    assert "options are missing" in refused(2, "evaluate", work.folder / "s", "--pipeline", pipeline)
    assert "options are missing" in refused(2, "evaluate", work.folder / "s", "--set", "student.args.width=3")
    assert "does not name the weights of a student" in refused(
        2, "evaluate", "--pipeline", pipeline, "--network", "student"
    )
    wrong = refused(4, "evaluate", "--pipeline", pipeline, "--network", "teacher", checkpoint)
    assert "does not fit the network" in wrong
    ensemble = ("--set", "teacher=['small:mlp', 'small:mlp']", "--network", "teacher")
    assert "an ensemble of 2" in refused(2, "evaluate", "--pipeline", pipeline, *ensemble, checkpoint)


def test_networks_of_different_data_sets_are_refused_and_of_one_at_two_paths_not(work: Work, tmp_path: Path) -> None:
    def elsewhere(name: str, seed: int, **split: float) -> Path:
        dataset = {**work.pipeline.dataset.model_dump(), "root": str(pixels(tmp_path / f"{name}.npz", seed)), **split}
        moved = work.pipeline.model_copy(update={"dataset": DatasetSpec.model_validate(dataset)})
        return run(tmp_path / name, moved, work.student, network="student")

    same = told(work.folder / "s", elsewhere("mine", seed=0))["scores"]
    assert same[0]["top1"] == same[1]["top1"]
    for other in (elsewhere("other", seed=1), elsewhere("shorter", seed=0, test_fraction=0.2)):
        assert "trained on different data sets" in refused(4, "evaluate", work.folder / "s", other)
    assert "no sample of other/train is in" in refused(4, "evaluate", tmp_path / "other", "--cache", work.cache.path)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_log_probabilities_are_used_if_a_network_returns_probabilities(work: Work, dtype: torch.dtype) -> None:
    view = View(load_split(work.pipeline.dataset, "train"), CLEAN)
    ids = [*range(len(view))]
    logits = work.student(view.__getitems__(ids).images).detach()

    class Probabilities(nn.Module):
        """Returns the softmax of the student's logits times `scale`."""

        def __init__(self, scale: float) -> None:
            super().__init__()
            self.scale = scale

        def forward(self, images: Tensor) -> Tensor:
            probabilities: Tensor = (self.scale * work.student(images)).softmax(dim=1)
            return probabilities.to(dtype)

    found = scorecard.logits_of(from_run(work.folder / "s"), Probabilities(0.1), view, ids, "cpu")
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, (0.1 * logits).log_softmax(dim=1), atol=2e-3, rtol=0)
    underflowed = scorecard.logits_of(from_run(work.folder / "s"), Probabilities(1000.0), view, ids, "cpu")
    assert underflowed.min().item() == pytest.approx(np.log(torch.finfo(dtype).tiny))
    assert torch.equal(underflowed.argmax(dim=1), logits.argmax(dim=1))


def test_what_cannot_be_measured_is_refused(work: Work, tmp_path: Path) -> None:
    diverged = network(1, 6)
    nn.init.constant_(diverged.get_submodule("classifier").bias, torch.nan)  # type: ignore[arg-type]  # a tensor it is
    failed = run(tmp_path / "diverged", work.pipeline, diverged, network="student")
    assert f"{failed} returned NaN or infinite logits for sample" in refused(5, "evaluate", failed)

    def changed(name: str, **sections: Any) -> Path:
        pipeline = Pipeline.model_validate({**work.pipeline.model_dump(), **sections})
        return run(tmp_path / name, pipeline, work.student, network="student")

    dataset = work.pipeline.dataset.model_dump()
    none = changed("none", dataset={**dataset, "test_fraction": 0})
    assert "has no test split" in refused(2, "evaluate", none)
    blind = pixels(tmp_path / "blind.npz", labels=np.full(120, -1), class_names=np.array(list("abcdefgh")))
    unlabeled = changed("unlabeled", dataset={**dataset, "root": str(blind)})
    assert "has a label" in refused(2, "evaluate", unlabeled)
    assert "the transform is random" in refused(2, "evaluate", changed("random", eval_transform=None))
    assert "mixes images" in refused(2, "evaluate", changed("mixed", eval_transform=[*CLEAN, {"MixUp": {}}]))


def test_pixels_that_the_teacher_did_not_see_are_refused(work: Work, monkeypatch: pytest.MonkeyPatch) -> None:
    made = View._apply
    monkeypatch.setattr(View, "_apply", lambda *given: made(*given) + 0.5)
    assert "is not what the teacher" in refused(4, "evaluate", work.folder / "s", "--cache", work.cache.path)


def test_the_commands_own_runs_are_scored_as_they_scored_themselves(tmp_path: Path) -> None:
    short = ("--set", "teacher.train.epochs=1", "--set", "student.train.epochs=1", "--device", "cpu")
    ok("train-teacher", RECIPE, "-o", tmp_path / "t", *short)
    ok("train-student", RECIPE, "--loss", "ce", "-o", tmp_path / "s", *short)
    for score, name in zip(told(tmp_path / "t", tmp_path / "s")["scores"], "ts", strict=True):
        metrics = json.loads((tmp_path / name / "metrics.json").read_text())
        assert score["top1"] == metrics["test"]["accuracy"]
        assert score["negative_log_likelihood"] == pytest.approx(metrics["test"]["loss"], rel=1e-5)
        assert score["parameters"] == metrics["parameters"]
    assert kdcache("evaluate", "--help").exit_code == 0


def test_a_run_is_not_evaluated_on_classes_of_other_names_or_another_order(tmp_path: Path) -> None:
    names = np.array(["cat", "dog", "owl"])
    images = np.random.default_rng(0).integers(0, 255, (90, 4, 4), np.uint8)

    def write(class_names: np.ndarray[Any, Any]) -> None:
        np.savez(tmp_path / "pets.npz", images=images, labels=np.arange(90) % 3, class_names=class_names)

    write(names)
    (tmp_path / "pets.yaml").write_text(
        f"dataset: {{name: npz, root: {tmp_path / 'pets.npz'}}}\n"
        "teacher: {model: 'small:mlp', train: {epochs: 1}}\n"
        "student: {model: 'small:mlp', train: {epochs: 1}}\nloss: {name: ce}\n"
    )
    for command, out in (("train-student", "student"), ("train-teacher", "teacher")):
        write(names)
        assert kdcache(command, tmp_path / "pets.yaml", "-o", tmp_path / out, "--device", "cpu").exit_code == 0
        assert json.loads((tmp_path / out / "metrics.json").read_text())["class_names"] == ["cat", "dog", "owl"]
        assert kdcache("evaluate", tmp_path / out, "--device", "cpu").exit_code == 0
        for others, words in (
            (np.array(["cat", "emu", "owl"]), "class 1 of .* is 'dog', and that of pets/test is 'emu'"),
            (np.array(["owl", "dog", "cat"]), "class 0 of .* is 'cat', and that of pets/test is 'owl'"),
            (np.array(["cat", "dog", "owl", "yak"]), "with 3 classes, and pets/test has 4"),
        ):
            write(others)
            done = kdcache("evaluate", tmp_path / out, "--device", "cpu")
            assert done.exit_code == 4
            assert re.search(words, done.stderr), done.stderr

"""Many students from one cache: each is what it would be alone, and none is trained twice."""

from __future__ import annotations

import json
import multiprocessing
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner, Result
from helpers.forked import forked_workers
from helpers.paths import ROOT
from helpers.processes import FORKS
from safetensors.torch import load_file

import kdcache
from kdcache.cli import main
from kdcache.data.datasets import load_split
from kdcache.data.images import ArrayImages, map_images
from kdcache.errors import MismatchError, UsageError
from kdcache.models.small import SmallMLP
from kdcache.runtime.resources import available_cores
from kdcache.train.sweep import sweep
from kdcache.train.sweep_context import read_result
from kdcache.train.sweep_points import Point, combinations
from kdcache.train.sweep_worker import ProgressQueue, enter_worker

RECIPE = ROOT / "pipelines" / "digits.yaml"
SHORT = ["student.train.epochs=2"]


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> kdcache.Cache:
    torch.manual_seed(3)
    samples = load_split(kdcache.load_pipeline(RECIPE).dataset, "train")
    out = tmp_path_factory.mktemp("cache") / "digits.kdcache"
    return kdcache.dump_teacher(SmallMLP(10, 1, 8, 8), samples, out)


def command(cache: kdcache.Cache, out: Path, *options: object) -> Result:
    arguments = ["sweep", RECIPE, "--cache", cache.path, "-o", out, "--set", SHORT[0], "--device", "cpu", *options]
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


def test_a_sweep_has_all_combinations() -> None:
    points = combinations(RECIPE, SHORT, ["loss=kd,dtkd", "student.train.lr=[0.1, 1e-2]", "student.args={width: 8}"])
    assert [point.name for point in points] == [
        "loss=kd,lr=0.1,args=width-8",
        "loss=kd,lr=0.01,args=width-8",
        "loss=dtkd,lr=0.1,args=width-8",
        "loss=dtkd,lr=0.01,args=width-8",
    ]
    students = [point.pipeline.section("student") for point in points]
    assert [student.train.lr for student in students] == [0.1, 0.01, 0.1, 0.01]
    assert {student.train.epochs for student in students} == {2}
    assert all(student.args == {"width": 8} for student in students)
    assert [point.pipeline.loss.temperature.kind for point in points] == ["constant", "constant", "dtkd", "dtkd"]
    assert [point.name for point in combinations(RECIPE, [], [])] == ["student"]


def test_a_sweep_goes_over_whole_sections_of_the_loss() -> None:
    points = combinations(
        RECIPE, SHORT, ["loss=[kd, {name: kd, gate: {top: 2}}, {logits: {name: dtkd}, x: {name: sp}}]"]
    )
    plain, gated, several = (point.pipeline.loss for point in points)
    assert (plain.gate, several.gate) == (None, None) and gated.gate is not None and gated.gate.top == 2
    assert (several.name, [*several.outputs]) == ("dtkd", ["x"])
    assert len({point.name for point in points}) == 3


def test_values_whose_names_are_alike_get_folders_of_their_own() -> None:
    points = combinations(RECIPE, [], ["teacher.weights=[a/b, a-b]"])
    assert len({point.name for point in points}) == 2


@pytest.mark.parametrize(
    ("over", "words"),
    [
        (["loss"], "is not KEY=VALUE,VALUE"),
        (["loss="], "is not KEY=VALUE,VALUE"),
        (["loss=kd", "loss=dtkd"], "names a key twice"),
        (["loss=kd,nonsense"], "nonsense"),
        (["student.train.lrr=1,2"], "did you mean lr"),
        (["losses=kd,dtkd"], "--over losses=kd,dtkd: losses: unknown key, did you mean loss"),
        (["loss=kd,nonsense"], "--over loss=kd,nonsense: loss.name: unknown loss"),
        (["student.train.lr=[0.1, -1]"], r"--over student.train.lr=\[0.1, -1\]: student.train.lr: Input should be gr"),
        (["student=1", "loss=kd"], "--over student=1: student: must have keys"),
    ],
)
def test_invalid_sweep_axes_are_refused(over: list[str], words: str) -> None:
    with pytest.raises(UsageError, match=words) as error:
        combinations(RECIPE, [], over)
    assert "--set" not in error.value.what
    assert "--loss" not in error.value.what


@pytest.mark.parametrize("processes", [1, 2])
def test_each_student_of_a_sweep_equals_a_single_run(processes: int, cache: kdcache.Cache, tmp_path: Path) -> None:
    points = combinations(RECIPE, SHORT, ["loss=ce,dtkd"])
    found = sweep(points, 2, [cache], tmp_path / "sweep", processes=processes)
    assert [(student.point, student.seed) for summary in found for student in summary.students] == [
        ("loss=ce", 0), ("loss=ce", 1), ("loss=dtkd", 0), ("loss=dtkd", 1)]  # fmt: skip
    for summary, point in zip(found, points, strict=True):
        assert summary.mean == pytest.approx(sum(summary.accuracies) / 2)
        assert summary.spread == pytest.approx(abs(summary.accuracies[0] - summary.accuracies[1]) / 2**0.5)
        for student in summary.students:
            alone = kdcache.load_pipeline(
                RECIPE, [*SHORT, f"student.train.seed={student.seed}"], point.pipeline.loss.name
            )
            result = kdcache.train_student(alone, cache, tmp_path / "alone" / student.point / str(student.seed))
            assert result.test is not None
            assert result.test.accuracy == student.test
            ours, theirs = load_file(Path(student.run) / "model.safetensors"), load_file(result.checkpoint)
            for name, value in ours.items():
                torch.testing.assert_close(value, theirs[name], rtol=1e-5, atol=1e-6)


def test_all_students_share_one_cache_and_data_set(
    cache: kdcache.Cache, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded: list[str] = []

    def counted(name: str, function: Callable[..., object]) -> Callable[..., object]:
        def inner(*args: object, **kwargs: object) -> object:
            loaded.append(name)
            return function(*args, **kwargs)

        return inner

    monkeypatch.setattr("kdcache.train.inputs.load_split", counted("data", load_split))
    monkeypatch.setattr("kdcache.cache.reader.Cache.teacher", counted("rows", kdcache.Cache.teacher))
    found = sweep(combinations(RECIPE, SHORT, ["loss=kd,dtkd"]), 2, [cache], tmp_path)
    assert loaded == ["data", "rows"]
    assert sum(len(summary.accuracies) for summary in found) == 4


@pytest.mark.usefixtures("real_pictures")
def test_a_sweep_resumes_with_the_students_that_are_missing(cache: kdcache.Cache, tmp_path: Path) -> None:
    assert command(cache, tmp_path, "--over", "loss=kd", "--seeds", 1).exit_code == 0
    first = (tmp_path / "loss=kd" / "seed0" / "model.safetensors").stat()
    done = command(cache, tmp_path, "--over", "loss=kd,ce", "--seeds", 2, "--json")
    assert done.exit_code == 0, done.output
    assert "trained already: 1 of 4 students" in done.stderr
    assert (tmp_path / "loss=kd" / "seed0" / "model.safetensors").stat() == first
    content = json.loads(done.stdout)
    assert content == json.loads((tmp_path / "sweep.json").read_text())
    for point in content["points"]:
        tests = [student["test"] for student in point["students"]]
        assert point["test_mean"] == pytest.approx(sum(tests) / 2)
        for student in point["students"]:
            metrics = json.loads((Path(student["run"]) / "metrics.json").read_text())
            assert (metrics["test"]["accuracy"], metrics["seed"]) == (student["test"], student["seed"])
    assert (tmp_path / "sweep.png").read_bytes()[:4] == b"\x89PNG"


def test_students_of_another_pipeline_are_not_reused(cache: kdcache.Cache, tmp_path: Path) -> None:
    assert command(cache, tmp_path, "--over", "loss=ce", "--seeds", 1).exit_code == 0
    done = command(cache, tmp_path, "--over", "loss=ce", "--seeds", 1, "--set", "student.train.lr=0.5")
    assert done.exit_code == 4
    assert "with other settings: student.train.lr was 0.05, and is 0.5 now" in done.stderr


def test_all_settings_in_which_a_sweep_differs_are_named(cache: kdcache.Cache, tmp_path: Path) -> None:
    def points(*changes: str) -> list[Point]:
        return [Point("ce", kdcache.load_pipeline(RECIPE, ["loss={name: ce}", "student.train.epochs=1", *changes]))]

    sweep(points(), 1, [], tmp_path)
    changes = ["student.train.batch_size=32", "student.args.width=9", "dataset.test_fraction=0.3"]
    with pytest.raises(MismatchError) as error:
        sweep(points(*changes), 1, [], tmp_path)
    for words in ("batch_size was 64, and is 32 now", "width was 32, and is 9 now", "test_fraction was "):
        assert words in error.value.what
    with pytest.raises(MismatchError, match=r"caches was \[\], and is \['sha256:"):
        sweep(points(), 1, [cache], tmp_path)


def test_a_failed_student_does_not_stop_the_others(cache: kdcache.Cache, tmp_path: Path) -> None:
    done = command(cache, tmp_path, "--over", "student.train.lr=1e30,0.05", "--seeds", 1, "--json")
    assert done.exit_code == 3
    assert "1 of 2 students failed; lr=1e" in done.stderr
    assert "seed 0: the loss became" in done.stderr
    broken, well = json.loads(done.stdout)["points"]
    assert broken["test_mean"] is None
    assert "the loss became" in broken["students"][0]["failed"]
    assert well["test_mean"] > 0


def test_an_interrupted_sweep_keeps_finished_students(
    cache: kdcache.Cache, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trained: list[str] = []
    original = read_result

    def interrupted(job: Any) -> object:
        trained.append("")
        if len(trained) == 2:
            raise KeyboardInterrupt
        return original(job)

    monkeypatch.setattr("kdcache.train.sweep_context.read_result", interrupted)
    done = command(cache, tmp_path, "--over", "loss=ce,kd", "--seeds", 2)
    assert done.exit_code == 130
    assert f"the trained students are kept in {tmp_path}" in done.stderr
    monkeypatch.undo()
    assert command(cache, tmp_path, "--over", "loss=ce,kd", "--seeds", 2).exit_code == 0


def test_a_teacher_is_needed_and_must_fit(cache: kdcache.Cache, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="loss=kd needs a teacher"):
        sweep(combinations(RECIPE, SHORT, ["loss=kd"]), 1, [], tmp_path)
    other = kdcache.load_pipeline(RECIPE, ["transform=[{ToDtype: {dtype: float32, scale: true}}]"])
    with pytest.raises(MismatchError, match="transform is not that of the cache"):
        sweep([Point("other", other)], 1, [cache], tmp_path)


def test_mapped_images_are_equal(tmp_path: Path) -> None:
    pixels = torch.randint(256, (5, 3, 4, 6), dtype=torch.uint8)
    images = map_images(ArrayImages(pixels), tmp_path / "pixels")
    assert torch.equal(images.pixels, pixels)
    assert images.content(2) == ArrayImages(pixels).content(2)


def test_processes_share_a_mapped_cache(cache: kdcache.Cache, tmp_path: Path) -> None:
    with forked_workers():
        done = command(cache, tmp_path, "--over", "loss=kd", "--seeds", 2, "-j", 2)
    assert done.exit_code == 0, done.output
    assert "placement of the cache: mmap" in done.stderr


def _how_it_works() -> tuple[str, int, int]:
    return multiprocessing.get_start_method(), torch.get_num_threads(), available_cores()


def test_a_worker_starts_processes_as_its_parent_does_and_takes_its_share_of_the_cores() -> None:
    given = (None, ProgressQueue(), 2, "fork")
    with ProcessPoolExecutor(1, FORKS, enter_worker, given) as pool:
        method, threads, cores = pool.submit(_how_it_works).result()
    assert method == "fork"
    assert threads >= 1
    assert cores == max(available_cores() // 2, 1)

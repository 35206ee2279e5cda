"""Students that are trained in one pass are those of separate runs, to the byte, however some of them end."""

from __future__ import annotations

import json
import signal
import weakref
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.forked import forked_workers
from helpers.processes import command_line, exit_code, in_a_process, kill_at
from helpers.students import EPOCHS, STEPS, command, contents, write_home

import kdcache
from kdcache.data.views import View
from kdcache.errors import MismatchError, UsageError
from kdcache.train.sweep import sweep
from kdcache.train.sweep_groups import all_jobs, divided, grouped, with_one_order
from kdcache.train.sweep_points import Point
from kdcache.train.sweep_results import SweepSummary


@pytest.fixture(scope="module")
def home_of_all(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A pipeline over 120 images in two views, and its cache."""
    return write_home(tmp_path_factory.mktemp("together"))


def point(home: Path, name: str, loss: str, *settings: str) -> Point:
    return Point(name, kdcache.load_pipeline(home / "tiny.yaml", [f"student.{one}" for one in settings], loss))


def points_of_all_kinds(home: Path) -> list[Point]:
    return [
        point(home, "ce", "ce"),
        point(home, "dtkd", "dtkd", "train.lr=0.01", "train.schedule=onecycle"),
        point(home, "ka", "ka", "train.label_smoothing=0.1", "train.ema_decay=0.8"),
        point(home, "dkd", "dkd", "train.max_grad_norm=0.5", "train.optimizer=adamw", "train.lr=0.01"),
        point(home, "ctkd", "ctkd", "args.width=7", "train.epochs=2"),
        point(home, "patient", "kd", "train.lr=1e-9", "train.early_stopping_patience=1"),
    ]


def together(home: Path, points: Sequence[Point], out: Path, seeds: int = 1, **options: Any) -> list[SweepSummary]:
    return sweep(points, seeds, [kdcache.open_cache(home / "tiny.kdcache")], out, together=True, **options)


def assert_as_alone(home: Path, run: Path, out: Path) -> None:
    """Train the resolved pipeline of a run into a folder of its own, and compare all files."""
    placement = json.loads((run / "metrics.json").read_text())["placement"]
    options = kdcache.CacheOptions(*placement)
    kdcache.train_student(
        kdcache.load_pipeline(run / "resolved.yaml"), kdcache.open_cache(home / "tiny.kdcache"), out, options
    )
    assert contents(run) == contents(out)


class Said:
    """A progress reporter that keeps what is said."""

    def __init__(self) -> None:
        self.lines: list[str] = []

    def task(self, what: str, total: int, unit: str) -> Any:
        return kdcache.runtime.progress.Silent().task(what, total, unit)

    def say(self, message: str) -> None:
        self.lines.append(message)


def test_students_of_one_pass_are_those_of_separate_runs_and_each_batch_is_loaded_once(
    home_of_all: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[tuple[int, int]] = []
    original = View.batch

    def counted(view: View, ids: Sequence[int], index: int) -> Any:
        asked.append((len(view), len(ids)))
        return original(view, ids, index)

    monkeypatch.setattr(View, "batch", counted)
    said = Said()
    points = points_of_all_kinds(home_of_all)
    found = together(home_of_all, points, tmp_path / "sweep", seeds=2, progress=said)
    monkeypatch.undo()
    assert "training 12 students together in 1 group (12): each batch is loaded once for a group" in said.lines
    assert any("in the same order, that of the first (train.data_seed" in line for line in said.lines)
    # Some images are replayed first, by eight, and each network is tried on one or two.
    assert [size for length, size in asked if length == 84 and size in (20, 4)] == EPOCHS * [20, 20, 20, 20, 4]
    assert [size for length, size in asked if length == 24] == EPOCHS * [24]
    assert [size for length, size in asked if length == 12] == 2 * [12], "after two epochs, and after three"
    epochs = {summary.point: json.loads(Path(summary.students[0].run, "metrics.json").read_text()) for summary in found}
    assert {name: metrics["epochs"] for name, metrics in epochs.items()} == {
        "ce": 3, "dtkd": 3, "ka": 3, "dkd": 3, "ctkd": 2, "patient": 2}  # fmt: skip
    for summary in found:
        for student in summary.students:
            train = kdcache.load_pipeline(Path(student.run) / "resolved.yaml").section("student").train
            assert (train.seed, train.data_seed) == (student.seed, None if student.seed == 5 else 5)
            assert_as_alone(home_of_all, Path(student.run), tmp_path / "alone" / student.point / str(student.seed))
    again = Said()
    assert together(home_of_all, points, tmp_path / "sweep", seeds=2, progress=again) == found
    assert again.lines == ["trained already: 12 of 12 students"]


@pytest.mark.parametrize(
    "more", [["gradient_accumulation_steps=2"], ["channels_last=true"], ["precision=bf16"], ["num_workers=2"]]
)
def test_micro_batches_and_batches_of_other_formats_are_shared(
    more: list[str], home_of_all: Path, tmp_path: Path
) -> None:
    settings = [f"train.{one}" for one in more]
    points = [point(home_of_all, loss, loss, *settings) for loss in ("dtd+dist", "ce", "kd")]
    for summary in together(home_of_all, points, tmp_path / "sweep"):
        (student,) = summary.students
        assert_as_alone(home_of_all, Path(student.run), tmp_path / student.point)


def test_a_student_that_diverges_or_raises_leaves_the_others_untouched(home_of_all: Path, tmp_path: Path) -> None:
    said = Said()
    mine = f"{home_of_all / 'code.py'}:fails_in_step_3"
    points = [
        point(home_of_all, "first", "kd"),
        point(home_of_all, "diverges", "kd", "train.lr=1e30"),
        point(home_of_all, "raises", mine),
        point(home_of_all, "last", "dtkd"),
    ]
    found = together(home_of_all, points, tmp_path / "sweep", progress=said)
    failed = [summary.students[0].failed for summary in found]
    assert failed[0] is failed[3] is None
    assert failed[1] is not None
    assert "the loss became" in failed[1]
    assert failed[2] is not None
    assert "raised ValueError: no more" in failed[2]
    assert [line.partition(": failed: ")[0] for line in said.lines if ": failed: " in line] == [
        "raises, seed 5",  # in its third step, and the other at the end of its first epoch
        "diverges, seed 5",
    ]
    for name in ("first", "last"):
        assert_as_alone(home_of_all, tmp_path / "sweep" / name / "seed5", tmp_path / name)
    for name in ("diverges", "raises"):
        assert [path.name for path in (tmp_path / "sweep" / name).iterdir()] == ["point.json"]


def test_an_unexpected_error_of_one_student_is_raised_when_the_others_have_ended(
    home_of_all: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HAPPENS", "raise RuntimeError('out of memory')")
    points = [point(home_of_all, "fails", "kd", "args.fails_at=9"), point(home_of_all, "well", "kd")]
    with pytest.raises(RuntimeError, match="out of memory"):
        together(home_of_all, points, tmp_path / "sweep")
    assert_as_alone(home_of_all, tmp_path / "sweep" / "well" / "seed5", tmp_path / "well")
    # It failed in its second epoch, and is resumed after the first.
    monkeypatch.setenv("HAPPENS", "pass")
    found = together(home_of_all, points, tmp_path / "sweep")
    assert [summary.students[0].failed for summary in found] == [None, None]
    assert_as_alone(home_of_all, tmp_path / "sweep" / "fails" / "seed5", tmp_path / "fails")


def test_a_network_that_changes_its_images_does_not_change_those_of_the_others(
    home_of_all: Path, tmp_path: Path
) -> None:
    points = [
        point(home_of_all, "changes", "kd", "args.changes_images=true"),
        point(home_of_all, "second", "kd"),
        point(home_of_all, "changes too", "ce", "args.changes_images=true"),
        point(home_of_all, "third", "ce"),
    ]
    for summary in together(home_of_all, points, tmp_path / "sweep"):
        assert_as_alone(home_of_all, Path(summary.students[0].run), tmp_path / summary.point)


def sweep_command(home: Path, out: Path, *more: object) -> list[object]:
    over = ["--over", "loss=ce,dtkd,ctkd", "--over", "student.train.ema_decay=[null, 0.8]"]
    given = ["--cache", home / "tiny.kdcache", "--seeds", 2, "--together", "-o", out]
    return ["sweep", home / "tiny.yaml", *given, *over, *more]


def run_killed(log: Path, killed_at: Path, *arguments: object) -> None:
    kill_at(killed_at, "/state.pt.partial", False)
    command_line(log, {}, *arguments, "--device", "cpu")


@pytest.mark.parametrize("processes", [1, 2])
def test_a_sweep_that_is_killed_resumes_to_the_same_students(processes: int, home_of_all: Path, tmp_path: Path) -> None:
    out, arguments = tmp_path / "sweep", sweep_command(home_of_all, tmp_path / "sweep", "-j", processes)
    if processes == 1:
        # Killed when some have finished the first epoch, and others have not.
        folder = out / "loss=dtkd,ema_decay=0.8" / "seed5.partial"
        killed = in_a_process(run_killed, tmp_path / "log", folder, *arguments)
        assert exit_code(killed) == -signal.SIGKILL, (tmp_path / "log").read_text()
        held = {path.parent.name: torch.load(path, weights_only=True) for path in out.rglob("state.pt")}
        assert held
        states = sorted(path.parent.parent.name for path in out.rglob("state.pt"))
        assert 0 < len(states) < 12
    with forked_workers():
        done = command(*arguments)
    assert done.exit_code == 0, done.output
    assert "training 12 students together in 1 group (12)" in done.stderr
    if processes == 1:
        assert done.stderr.count("resuming after epoch 1 of 3") == len(states)
    runs = sorted(out.glob("*/seed*"))
    assert len(runs) == 12
    for run in runs:
        assert_as_alone(home_of_all, run, tmp_path / "alone" / run.parent.name / run.name)


def test_ctrl_c_keeps_every_student_at_its_last_epoch(
    home_of_all: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HAPPENS", "import signal; os.kill(os.getpid(), signal.SIGINT)")
    out = tmp_path / "sweep"
    arguments = sweep_command(home_of_all, out, "--set", f"student.args.fails_at={STEPS + 2}")
    stopped = command(*arguments)
    assert stopped.exit_code == 130
    assert f"the trained students are kept in {out}" in stopped.stderr
    assert len(list(out.glob("*/seed*.partial/state.pt"))) == 12
    monkeypatch.setenv("HAPPENS", "pass")
    done = command(*arguments)
    assert done.exit_code == 0, done.output
    assert done.stderr.count("resuming after epoch 1 of 3") == 12
    for run in sorted(out.glob("*/seed6")):
        assert_as_alone(home_of_all, run, tmp_path / "alone" / run.parent.name)


def test_memory_is_that_of_one_batch(home_of_all: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    alive: list[weakref.ref[torch.Tensor]] = []
    most = 0
    original = View.batch

    def tracked(view: View, ids: Sequence[int], index: int) -> Any:
        nonlocal most
        batch = original(view, ids, index)
        alive.append(weakref.ref(batch.images))
        most = max(most, sum(images() is not None for images in alive))
        return batch

    monkeypatch.setattr(View, "batch", tracked)
    losses = ("ce", "kd", "dtkd", "dkd")
    together(home_of_all, [point(home_of_all, loss, loss) for loss in losses], tmp_path / "sweep", seeds=2)
    assert 0 < most <= 2, "the batch that is loaded, and the one before it"


def test_an_image_that_cannot_be_read_is_an_error_of_each_student(home_of_all: Path, tmp_path: Path) -> None:
    (tmp_path / "step.py").write_text(
        "import pathlib\n\n"
        "def step(image):\n"
        "    if (pathlib.Path(__file__).parent / 'broken').exists():\n"
        "        raise ValueError('this image is broken')\n"
        "    return image\n"
    )
    changes = [
        f"transform=[ToDtype: {{dtype: float32}}, '{tmp_path / 'step.py'}:step': {{}}]".replace("'", '"'),
        "student.train.epochs=200",
    ]
    pipelines = [
        kdcache.load_pipeline(home_of_all / "tiny.yaml", [*changes, f"student.train.lr={lr}"], "ce")
        for lr in (0.1, 0.2)
    ]
    points = [Point(f"lr{n}", pipeline) for n, pipeline in enumerate(pipelines)]

    class Breaks(Said):
        def say(self, message: str) -> None:
            super().say(message)

    done = 0
    original = View.batch

    def breaking(view: View, ids: Sequence[int], index: int) -> Any:
        nonlocal done
        done += len(ids) == 20
        if done == STEPS + 2:
            (tmp_path / "broken").touch()
        return original(view, ids, index)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(View, "batch", breaking)
        found = sweep(points, 1, [], tmp_path / "sweep", together=True)
    for summary in found:
        assert "this image is broken" in str(summary.students[0].failed)
        assert (tmp_path / "sweep" / summary.point / "seed5.partial" / "state.pt").is_file()


def test_a_sweep_with_another_order_of_images_is_not_mixed_with_this_one(home_of_all: Path, tmp_path: Path) -> None:
    cache = kdcache.open_cache(home_of_all / "tiny.kdcache")
    points = [point(home_of_all, "kd", "kd", "train.epochs=1")]
    sweep(points, 1, [cache], tmp_path)
    together(home_of_all, points, tmp_path, seeds=2)  # the student of the first seed is the same in both
    with pytest.raises(MismatchError, match=r"was trained with train\.data_seed 5, and it is None") as error:
        sweep(points, 2, [cache], tmp_path)
    assert "--together" in error.value.fix


def jobs_of(home: Path, *points: Point, seeds: int = 2) -> list[list[str]]:
    return [[job.name for job in group] for group in grouped(all_jobs(points, seeds, home))]


def test_only_students_whose_batches_agree_are_in_a_group(home_of_all: Path) -> None:
    def points(*settings: str) -> list[Point]:
        return [point(home_of_all, "a", "kd"), point(home_of_all, "b", "dtkd", *settings)]

    whole = [["a, seed 5", "a, seed 6", "b, seed 5", "b, seed 6"]]
    apart = [["a, seed 5", "a, seed 6"], ["b, seed 5", "b, seed 6"]]
    for settings in ("train.lr=0.2", "train.epochs=9", "args.width=3", "train.trackers=[tensorboard]", "train.seed=5"):
        assert jobs_of(home_of_all, *points(settings)) == whole, settings
    for settings in (
        "train.batch_size=21",
        "train.view_order=cycle",
        "train.precision=bf16",
        "train.num_workers=0",
        "train.data_seed=1",
        "train.gradient_accumulation_steps=2",
    ):
        assert jobs_of(home_of_all, *points(settings)) == apart, settings
    # Which labels are shown follows from the seed; a tracker that logs one run at a time is alone.
    few = [point(home_of_all, name, "kd", "train.labels_per_class=3") for name in ("a", "b")]
    assert jobs_of(home_of_all, *few) == [["a, seed 5", "b, seed 5"], ["a, seed 6", "b, seed 6"]]
    tracked = [point(home_of_all, name, "kd", "train.trackers=[wandb]") for name in ("a", "b")]
    assert jobs_of(home_of_all, *tracked, seeds=1) == [["a, seed 5"], ["b, seed 5"]]


def test_groups_have_one_order_and_are_divided_evenly(home_of_all: Path) -> None:
    given = [point(home_of_all, "a", "kd", "train.data_seed=9"), point(home_of_all, "b", "kd")]
    jobs = [job for group in grouped(all_jobs(given, 3, home_of_all)) for job in with_one_order(group)]
    assert [(job.seed, job.data_seed) for job in jobs] == [(5, 9), (6, 9), (7, 9), (5, None), (6, 5), (7, 5)]
    trains = [job.pipeline.section("student").train for job in jobs]
    assert [train.seed_of_data for train in trains] == [9, 9, 9, 5, 5, 5]
    sizes = {
        (parts, tuple(groups)): [len(part) for part in divided([jobs[:1] * size for size in groups], parts)]
        for parts, groups in ((1, [6]), (2, [6]), (4, [6]), (2, [8, 1, 1]), (3, [2, 1]), (9, [2, 2]), (2, [0, 3]))
    }
    assert sizes == {
        (1, (6,)): [6],
        (2, (6,)): [3, 3],
        (4, (6,)): [2, 2, 1, 1],
        (2, (8, 1, 1)): [4, 4, 1, 1],
        (3, (2, 1)): [1, 1, 1],
        (9, (2, 2)): [1, 1, 1, 1],
        (2, (0, 3)): [2, 1],
    }


def test_a_students_own_augmentation_follows_the_seed_of_the_data(home_of_all: Path, tmp_path: Path) -> None:
    fixed = ["transform=[{ToDtype: {dtype: float32}}]", "cache.views=1"]
    cache = tmp_path / "fixed.kdcache"
    changes = [word for change in fixed for word in ("--set", change)]
    assert command("dump-teacher", home_of_all / "tiny.yaml", "-o", cache, *changes).exit_code == 0
    own = "student.transform=[{RandomHorizontalFlip: {}}, {ToDtype: {dtype: float32}}]"
    pipeline = kdcache.load_pipeline(home_of_all / "tiny.yaml", [*fixed, own], "dtkd")
    (summary,) = sweep([Point("own", pipeline)], 3, [kdcache.open_cache(cache)], tmp_path / "sweep", together=True)
    for student in summary.students:
        resolved = kdcache.load_pipeline(Path(student.run) / "resolved.yaml")
        out = tmp_path / "alone" / str(student.seed)
        kdcache.train_student(resolved, kdcache.open_cache(cache), out)
        assert contents(Path(student.run)) == contents(out)


def test_several_ranks_are_refused(home_of_all: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UsageError, match="torchrun started 2"):
        together(home_of_all, [point(home_of_all, "kd", "kd")], tmp_path)

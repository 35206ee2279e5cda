"""Both stages on real data: train a teacher, run it once, train students with several losses from its cache."""

from __future__ import annotations

import json
import shutil
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from kdcache.config.loader import load_pipeline
from kdcache.dump.dump import dump_teacher
from kdcache.errors import InterruptedRun
from kdcache.models.teacher import load_teacher
from kdcache.runtime.atomic_write import write_file
from kdcache.runtime.package_data import package_data
from kdcache.runtime.progress import Progress
from kdcache.train.plots import draw_accuracies
from kdcache.train.run_folder import check_free
from kdcache.train.sweep import sweep
from kdcache.train.sweep_points import Point
from kdcache.train.sweep_results import SweepSummary
from kdcache.train.train import train_teacher

LOSSES = ("ce", "kd", "dtkd", "ka+dtd")


@dataclass(frozen=True)
class Demo:
    """Results of the demo; times in seconds, sizes in bytes, accuracies in [0, 1]."""

    teacher_accuracy: float
    teacher_accuracy_on_cached: float
    teacher_training_seconds: float
    stage_one_seconds: float
    rows: int
    cache_bytes: int
    digest: str
    teacher_labels: int
    student_labels: int
    students: list[SweepSummary]


def run_demo(out: Path, seeds: int, device: torch.device | str, progress: Progress) -> Demo:
    """Run both stages of `pipelines/digits.yaml`, and write teacher, cache, runs, table and picture to `out`.

    Args:
        out: a folder that does not exist yet.
        seeds: number of students per loss.
        device: for training.
        progress: progress reporter.

    Raises:
        UsageError: if `out` exists.
    """
    check_free(out)
    try:
        return _run(out, seeds, device, progress)
    except BaseException as error:
        shutil.rmtree(out, ignore_errors=True)
        if isinstance(error, InterruptedRun):
            raise KeyboardInterrupt from None  # its message says what is kept, and nothing is
        raise


def _run(out: Path, seeds: int, device: torch.device | str, progress: Progress) -> Demo:
    """Run both stages; what is written stays if something fails."""
    recipe = package_data("pipelines/digits.yaml")
    pipeline = load_pipeline(recipe, [f"teacher.weights={json.dumps(str(out / 'teacher' / 'model.safetensors'))}"])
    progress.say("stage one: train a teacher, and run it once on the training images")
    teacher = train_teacher(pipeline, out / "teacher", device=device, progress=progress)
    start = time.perf_counter()
    loaded = load_teacher(pipeline, progress)
    cache = dump_teacher(
        loaded.model,
        loaded.samples,
        out / "digits.kdcache",
        name=loaded.identity,
        transform=loaded.transform,
        spec=pipeline.cache,
        device=device,
        progress=progress,
    )
    stage_one = time.perf_counter() - start
    progress.say("stage two: train students from the cache, without the teacher")
    points = [Point(loss, load_pipeline(recipe, [f"loss.name={loss}"])) for loss in LOSSES]
    students = sweep(points, seeds, [cache], out / "students", device=str(device), progress=progress)
    classes = cache.num_classes
    spec = pipeline.section("student").train
    demo = Demo(
        teacher_accuracy=teacher.test.accuracy if teacher.test else 0.0,
        teacher_accuracy_on_cached=cache.manifest.summary.teacher_accuracy or 0.0,
        teacher_training_seconds=teacher.seconds,
        stage_one_seconds=stage_one,
        rows=len(cache),
        cache_bytes=cache.bytes_on_disk,
        digest=cache.manifest.digest,
        teacher_labels=(pipeline.section("teacher").train.labels_per_class or 0) * classes,
        student_labels=(spec.labels_per_class or 0) * classes,
        students=students,
    )
    write_file(out / "demo.json", json.dumps(asdict(demo), indent=2) + "\n")
    draw_accuracies(
        {summary.point: summary.accuracies for summary in students},
        demo.teacher_accuracy,
        f"digits: {demo.student_labels} labels for each student, cached logits of {demo.rows} images",
        out / "demo.png",
    )
    return demo

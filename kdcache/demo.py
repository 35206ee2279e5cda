"""The whole way on real data: train a teacher, run it once, train students with several losses from its cache."""

from __future__ import annotations

import json
import shutil
import statistics
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from kdcache.dump import dump_teacher
from kdcache.pipeline import load_pipeline
from kdcache.progress import Progress
from kdcache.report import draw_accuracies
from kdcache.runs import check_free
from kdcache.shipped import shipped
from kdcache.teachers import load_teacher
from kdcache.train import train_student, train_teacher

LOSSES = ("ce", "kd", "dtkd", "ka+dtd")


@dataclass(frozen=True)
class Students:
    """What came of one loss: test accuracies in [0, 1], one a seed, and the mean training time of a student."""

    loss: str
    accuracies: list[float]
    seconds: float

    @property
    def mean(self) -> float:
        """Mean test accuracy."""
        return statistics.mean(self.accuracies)

    @property
    def spread(self) -> float:
        """Standard deviation of the test accuracy over the seeds (n - 1); 0 for a single seed."""
        return statistics.stdev(self.accuracies) if len(self.accuracies) > 1 else 0.0


@dataclass(frozen=True)
class Demo:
    """What the demo found; times in seconds, sizes in bytes, accuracies in [0, 1]."""

    teacher_accuracy: float
    teacher_accuracy_on_cached: float
    teacher_training_seconds: float
    stage_one_seconds: float
    rows: int
    cache_bytes: int
    digest: str
    teacher_labels: int
    student_labels: int
    students: list[Students]


def run_demo(out: Path, seeds: int, device: torch.device | str, progress: Progress) -> Demo:
    """Run all three stages of `pipelines/digits.yaml`, and leave teacher, cache, runs, table and picture in `out`.

    Args:
        out: a folder that does not exist yet.
        seeds: students a loss.
        device: where to train.
        progress: who is told how it goes.

    Raises:
        UsageError: if `out` exists.
    """
    check_free(out)
    try:
        return _run(out, seeds, device, progress)
    except BaseException:
        shutil.rmtree(out, ignore_errors=True)
        raise


def _run(out: Path, seeds: int, device: torch.device | str, progress: Progress) -> Demo:
    recipe = shipped("pipelines/digits.yaml")
    pipeline = load_pipeline(recipe, [f"teacher.weights={json.dumps(str(out / 'teacher' / 'model.safetensors'))}"])
    progress.say("stage one: train a teacher, and run it once over the training images")
    teacher = train_teacher(pipeline, out / "teacher", device=device, progress=progress)
    began = time.perf_counter()
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
    stage_one = time.perf_counter() - began
    progress.say("stage two: train students from the cache, without the teacher")
    students = []
    with progress.task("students", len(LOSSES) * seeds, "students") as task:
        for loss in LOSSES:
            accuracies, seconds = [], []
            for seed in range(seeds):
                resolved = load_pipeline(recipe, [f"loss.name={loss}", f"student.train.seed={seed}"])
                run = out / "students" / loss / f"seed{seed}"
                trained = train_student(resolved, cache, run, device=device)
                accuracies.append(trained.test.accuracy if trained.test else 0.0)
                seconds.append(trained.seconds)
                task.advance(1, loss)
            students.append(Students(loss, accuracies, statistics.mean(seconds)))
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
    (out / "demo.json").write_text(json.dumps(asdict(demo), indent=2) + "\n", encoding="utf-8")
    draw_accuracies(
        {found.loss: found.accuracies for found in students},
        demo.teacher_accuracy,
        f"digits: {demo.student_labels} labels for the student, the cached teacher for {demo.rows} images",
        out / "demo.png",
    )
    return demo

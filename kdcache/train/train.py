"""Stage two: one training function for students and, with cross-entropy and without a cache, for teachers."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import nn

from kdcache.cache.reader import Cache
from kdcache.cache.teacher import Teacher, TeacherWithOutputs
from kdcache.config.loss import code_digest, load_function
from kdcache.config.schema import Pipeline, StudentSpec, TeacherSpec
from kdcache.config.transform import step_names
from kdcache.data.seeding import seeded
from kdcache.data.views import View
from kdcache.errors import InterruptedRun, UsageError
from kdcache.losses import Loss
from kdcache.models import build_for, save_weights
from kdcache.models.checks import try_network, try_training
from kdcache.models.graph_teacher import GraphTeacher
from kdcache.runtime.devices import check_device
from kdcache.runtime.launched import is_first, n_processes
from kdcache.runtime.paths import expand
from kdcache.runtime.progress import Progress
from kdcache.runtime.terminal import reporter
from kdcache.runtime.user_code import digests_of
from kdcache.train.accelerator import described_settings, hidden_settings, ignored_settings
from kdcache.train.edges import check_edges
from kdcache.train.inputs import CacheOptions, TrainingInputs, inputs_from_caches, inputs_without_teacher
from kdcache.train.learned import LearnedParts, make_controller, make_gate
from kdcache.train.loop import training_work
from kdcache.train.passes import Clock, Work, run_alone, run_together
from kdcache.train.plots import draw_curves
from kdcache.train.prepare import check_loss, divided_inputs, held_out_view, smallest_micro_batch, training_view
from kdcache.train.run_folder import CHECKPOINT, check_run, check_trackers, complete_run, run_folder
from kdcache.train.run_result import RunResult, result_of
from kdcache.train.scoring import testing_work
from kdcache.train.shared_views import SharedViews
from kdcache.train.student_outputs import StudentOutputs, student_outputs
from kdcache.train.student_transform import check_evaluation_shape, evaluation_transform

_NOTHING_KEPT = (
    "interrupted before the first epoch was complete; no partial file was kept",
    "run it again to start from the beginning",
)


def train_teacher(
    pipeline: Pipeline, out: str | Path, *, device: torch.device | str = "cpu", progress: Progress | bool | None = None
) -> RunResult:
    """Train the pipeline's teacher with cross-entropy, from random weights.

    If it is interrupted, the same call resumes after the last complete epoch.

    Args:
        pipeline: `dataset`, `transform` and `teacher` sections.
        out: run folder. If it holds a complete run of the same settings, that one is returned.
        device: where to train.
        progress: True to show progress on stderr, or a progress reporter; silent if None.

    Raises:
        MismatchError: if `out` holds a run with other settings.
        InterruptedRun: on Ctrl-C; a KeyboardInterrupt that says what is kept.
        KdcacheError: if the inputs are inconsistent; before the first complete epoch, nothing is left behind.
    """
    spec = pipeline.section("teacher")
    check_device(device)
    check_run(expand(out))
    loss = Loss.model_validate({"name": "ce"})
    try:
        inputs = inputs_without_teacher(pipeline, reporter(progress))
        return _train_alone(pipeline, spec, loss, inputs, expand(out), device, reporter(progress))
    except KeyboardInterrupt as interrupt:
        raise InterruptedRun.of(interrupt, *_NOTHING_KEPT) from None


def train_student(
    pipeline: Pipeline,
    cache: Cache | Sequence[Cache] | None,
    out: str | Path,
    options: CacheOptions | None = None,
    *,
    device: torch.device | str = "cpu",
    progress: Progress | bool | None = None,
) -> RunResult:
    """Train the pipeline's student from a cache; the teacher itself is not loaded.

    If it is interrupted, the same call resumes after the last complete epoch.

    Args:
        pipeline: `dataset`, `student`, `join` and `loss` sections.
        cache: one or several caches of the data set; None only for a loss that uses no teacher.
        out: run folder. If it holds a complete run of the same settings, that one is returned.
        options: placement of the cache's rows, and accepted differences from the data set; the defaults if None.
        device: where to train.
        progress: True to show progress on stderr, or a progress reporter; silent if None.

    Raises:
        MismatchError: if the cache belongs to other images, another order, other labels or another transform,
            replayed images are not those that the teacher saw, or `out` holds a run with other settings.
        InterruptedRun: on Ctrl-C; a KeyboardInterrupt that says what is kept.
        KdcacheError: if the inputs are inconsistent; before the first complete epoch, nothing is left behind.
    """
    pipeline.section("student")
    check_device(device)
    check_run(expand(out))
    caches = [] if cache is None else [cache] if isinstance(cache, Cache) else [*cache]
    try:
        inputs = _student_inputs(pipeline, caches, options or CacheOptions(), device, reporter(progress))
        return train_on(pipeline, inputs, out, device=device, progress=progress)
    except KeyboardInterrupt as interrupt:
        raise InterruptedRun.of(interrupt, *_NOTHING_KEPT) from None


def _student_inputs(
    pipeline: Pipeline,
    caches: Sequence[Cache],
    options: CacheOptions,
    device: torch.device | str,
    progress: Progress,
) -> TrainingInputs:
    """Load the data of a student, and its teacher if there are caches."""
    if caches:
        return inputs_from_caches(pipeline, caches, options, device=device, progress=progress)
    if options.by_content:
        raise UsageError("--align and --allow-missing match samples with a cache, and there is none", "pass --cache")
    if pipeline.loss.uses_cache:
        raise UsageError(f"the loss {pipeline.loss.name} needs a teacher", "pass its cache with --cache, or --loss ce")
    return inputs_without_teacher(pipeline, progress)


def train_on(
    pipeline: Pipeline,
    inputs: TrainingInputs,
    out: str | Path,
    *,
    device: torch.device | str = "cpu",
    progress: Progress | bool | None = None,
) -> RunResult:
    """Train the pipeline's student on inputs that several students may share; see `train_student`."""
    spec = pipeline.section("student")
    return _train_alone(pipeline, spec, pipeline.loss, inputs, expand(out), device, reporter(progress))


class Student(NamedTuple):
    """A student that is trained together with others.

    Attributes:
        pipeline: `student` and `loss` sections.
        inputs: may be those of other students, too.
        out: run folder.
        progress: progress reporter of this student.
    """

    pipeline: Pipeline
    inputs: TrainingInputs
    out: Path
    progress: Progress


def train_together(
    students: Sequence[Student],
    on_end: Callable[[int, RunResult | Exception], None],
    *,
    device: torch.device | str = "cpu",
) -> None:
    """Train several students in one process: each batch is loaded once for all whose next step is of this batch.

    Each student is what it would be alone: its weights to the bit on a CPU, its run folder, how it is resumed, and how
    it fails.

    Args:
        students: best of equal data, batch sizes and orders of images (`train.data_seed`), and of one precision.
        on_end: called with the index of a student and its result, or the error that ended it, as soon as it has ended.
        device: where to train.
    """
    views, ignored = SharedViews(), ignored_settings()

    def start(student: Student) -> Callable[[Clock], Work[RunResult]]:
        spec, loss = student.pipeline.section("student"), student.pipeline.loss
        return lambda clock: _train(
            student.pipeline, spec, loss, student.inputs, student.out, device, student.progress, clock, views, ignored
        )

    with hidden_settings():
        run_together([start(student) for student in students], on_end, device)


def _train_alone(
    pipeline: Pipeline,
    spec: TeacherSpec | StudentSpec,
    loss: Loss,
    inputs: TrainingInputs,
    out: Path,
    device: torch.device | str,
    progress: Progress,
) -> RunResult:
    """Train a network that shares nothing; see `_train`."""
    ignored = ignored_settings()

    def start(clock: Clock) -> Work[RunResult]:
        return _train(pipeline, spec, loss, inputs, out, device, progress, clock, SharedViews(), ignored)

    with hidden_settings():
        return run_alone(start, device)


def _train(
    pipeline: Pipeline,
    spec: TeacherSpec | StudentSpec,
    loss: Loss,
    inputs: TrainingInputs,
    out: Path,
    device: torch.device | str,
    progress: Progress,
    clock: Clock,
    views: SharedViews,
    ignored: dict[str, str],
) -> Work[RunResult]:
    """Check the inputs of a run, train, evaluate on the test split, and write the run folder."""
    loss = load_function(loss)
    check_run(out)
    inputs, held_inputs = divided_inputs(spec.train, loss, inputs, views, progress)
    samples = inputs.samples
    train, n_views, teacher = training_view(spec, loss, inputs, views, progress)
    check_loss(loss, train, inputs.level_known, spec.train.epochs, progress)
    check_edges(loss, samples, spec.train, progress)
    check_trackers(spec.train.trackers)
    if ignored:
        progress.say(f"note: {described_settings(ignored)}")
    eval_transform = evaluation_transform(pipeline, spec, inputs.transform)
    validation, test = (
        # Without class logits there is nothing that a split without a teacher can be scored by: see held_out.py.
        None if split is None or not loss.uses_logits else views.view(split, eval_transform)
        for split in (inputs.validation, inputs.test)
    )
    held = None if held_inputs is None else held_out_view(spec, loss, held_inputs, eval_transform, views)
    if isinstance(spec, StudentSpec) and spec.transform is not None and pipeline.eval_transform is None:
        for view in (validation, test):
            if view is not None:
                check_evaluation_shape(spec.transform, train, view)
        if eval_transform != spec.transform:
            progress.say(f"note: without eval_transform, the student is evaluated with {json.dumps(eval_transform)}")
    used = pipeline.model_copy(update={"transform": inputs.transform, "eval_transform": eval_transform, "loss": loss})
    torch_device = torch.device(device)
    own = spec.transform if isinstance(spec, StudentSpec) else None
    steps = [name for transform in (inputs.transform, eval_transform, own) for name in step_names(transform)]
    code = code_digest(loss) | digests_of([spec.model, pipeline.dataset.name, *steps])
    made_from = {
        "network": "student" if isinstance(spec, StudentSpec) else "teacher",
        "caches": inputs.record.get("caches", []),
        "class_names": list(samples.class_names),
        **({"code": code} if code else {}),
    }
    if out.exists():
        metrics = complete_run(out, used, made_from)
        complete = result_of(out, spec, samples, train.shape(), metrics)
        progress.say(f"{out} is complete: nothing to do")
        return complete
    begun_with = {
        **made_from,
        "device": torch_device.type,
        # Rows that are read as a stream come in another order.
        "streamed": "stream" in inputs.record.get("placement", []),
    }
    with (
        run_folder(out, used, begun_with, spec.train.trackers) as run,
        torch.random.fork_rng([torch_device] if torch_device.type == "cuda" else []),
        seeded(spec.train.seed),
    ):
        torch.manual_seed(spec.train.seed)
        pretrained = isinstance(spec, StudentSpec) and (spec.weights is not None or spec.names_weights)
        model = build_for(spec, samples, train.shape(), trained=pretrained, progress=progress)
        learned = LearnedParts(
            _outputs_of_student(model, spec, loss, train, teacher),
            make_gate(loss, teacher, samples.num_classes, torch_device),
            make_controller(loss, spec.train, train, validation, teacher, n_processes(), torch_device),
        )
        if loss.uses_logits:
            try_network(model, train, "cpu", "network")
            try_training(model, train, "network", smallest_micro_batch(spec.train, samples.per_epoch))
        trained = yield from training_work(
            model,
            train,
            validation,
            spec.train,
            loss,
            teacher=teacher,
            views=n_views,
            device=device,
            on_epoch=run.epoch,
            checkpointer=run,
            progress=progress,
            clock=clock,
            learned=learned,
            held=held,
        )
        if is_first():
            learned.save(run.folder)
        score = None
        if test is not None and is_first():
            score = yield from testing_work(model, test, spec.train, len(trained.epochs), device, progress)
        run.finish(
            lambda folder: _save(model, folder),
            draw_curves,
            {
                **made_from,
                "loss": loss.title,
                "seed": spec.train.seed,
                "data_seed": spec.train.data_seed,
                "best": trained.best._asdict(),
                "epochs": len(trained.epochs),
                "test": score._asdict() if score else None,
                "labeled": int((train.labels >= 0).sum()),
                "held_out": 0 if held is None else len(held.view),
                "parameters": sum(p.numel() for p in model.parameters()),
                "seconds": round(trained.seconds, 3),
                "ignored_environment": ignored,
                "warnings": trained.warnings,
                **inputs.record,
            },
        )
    return RunResult(model, trained.best, score, trained.seconds, out / CHECKPOINT)


def _save(model: nn.Module, folder: Path) -> None:
    """Write the weights of a network into the folder of its run."""
    save_weights(model.network if isinstance(model, GraphTeacher) else model, folder / CHECKPOINT)


def _outputs_of_student(
    model: nn.Module, spec: TeacherSpec | StudentSpec, loss: Loss, train: View, teacher: Teacher | None
) -> StudentOutputs | None:
    """Return the outputs that a loss compares beside the class logits; None if there are none."""
    if not loss.outputs or not isinstance(spec, StudentSpec) or not isinstance(teacher, TeacherWithOutputs):
        return None
    return student_outputs(model, spec, loss, train, teacher)

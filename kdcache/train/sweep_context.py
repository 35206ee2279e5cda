"""What the students of a sweep share: data, caches, device; and their training in one process."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from kdcache.cache.reader import Cache
from kdcache.config.schema import TEXT, Pipeline
from kdcache.config.text import TextPipeline
from kdcache.errors import KdcacheError, MismatchError
from kdcache.runtime.progress import Progress, Silent
from kdcache.train.inputs import CacheOptions, TrainingInputs, inputs_from_caches, inputs_without_teacher
from kdcache.train.run_folder import read_json
from kdcache.train.run_result import RunResult
from kdcache.train.sweep_groups import Job
from kdcache.train.sweep_results import PixelStudentResult, StudentResult, TextStudentResult
from kdcache.train.sweep_worker import StudentProgress
from kdcache.train.tokens.inputs import TokenInputs, check_token_pipeline, inputs_of_sequences, one_cache
from kdcache.train.tokens.train import LanguageRunResult, train_on_sequences
from kdcache.train.train import Student, train_together


@dataclass(frozen=True)
class SweepContext:
    """What the students of a sweep share.

    Attributes:
        caches: opened.
        device: where to train.
        options: see `train_student`.
        inputs_by_key: inputs by the sections of the pipeline that they depend on, loaded once each.
    """

    caches: Sequence[Cache]
    device: str
    options: CacheOptions
    inputs_by_key: dict[str, TrainingInputs | TokenInputs]

    def inputs(self, pipeline: Pipeline, progress: Progress | None = None) -> TrainingInputs:
        """Return the inputs of a pipeline, loaded at the first call."""
        sections = pipeline.model_dump_json(include={"dataset", "transform", "join"})
        loss = pipeline.loss
        of_outputs = sorted((name, options.name) for name, options in loss.outputs.items())
        key = f"{loss.uses_teacher} {loss.gate} {of_outputs} {sections}"
        found = self.inputs_by_key.get(key)
        if not isinstance(found, TrainingInputs):
            with_teacher = self.inputs_by_key.get(f"True None [] {sections}")
            found = self.inputs_by_key[key] = (
                with_teacher.without_teacher()
                if isinstance(with_teacher, TrainingInputs) and not loss.uses_cache
                else inputs_from_caches(pipeline, self.caches, self.options, device=self.device, progress=progress)
                if self.caches
                else inputs_without_teacher(pipeline, progress)
            )
        return found

    def sequences(self, progress: Progress | None = None) -> TokenInputs:
        """Return the sequences of the cache, loaded at the first call."""
        found = self.inputs_by_key.get(TEXT)
        if not isinstance(found, TokenInputs):
            cache = one_cache(self.caches)
            found = inputs_of_sequences(cache, self.options, device=self.device, progress=progress or Silent())
            self.inputs_by_key[TEXT] = found
        return found

    def load(self, jobs: Iterable[Job], progress: Progress | None = None) -> None:
        """Load the inputs of some students, so that inconsistent ones are found before the first of them is trained.

        Raises:
            KdcacheError: if a pipeline and the caches are inconsistent.
        """
        # Inputs with a teacher serve losses without one, too.
        for job in sorted(jobs, key=lambda job: not job.point.pipeline.loss.uses_cache):
            pipeline = job.point.pipeline
            if isinstance(pipeline, TextPipeline):
                check_token_pipeline(pipeline, self.sequences(progress))
            else:
                self.inputs(pipeline, progress)

    def train(
        self, jobs: Sequence[Job], reporters: Sequence[StudentProgress], on_end: Callable[[Job, StudentResult], None]
    ) -> None:
        """Train students that share their batches; an error of kdcache of one student is part of its result.

        Any other error of a student is raised when the others have ended.
        """
        unexpected: list[Exception] = []

        def ended(index: int, outcome: RunResult | LanguageRunResult | Exception) -> None:
            job, reporter = jobs[index], reporters[index]
            if isinstance(outcome, KdcacheError):
                is_text = isinstance(job.point.pipeline, TextPipeline)
                kind = TextStudentResult if is_text else StudentResult
                result = kind(job.point.name, job.seed, str(job.folder), None, None, 0.0, outcome.what)
                reporter.say(f"failed: {outcome.what}")
            elif isinstance(outcome, Exception):
                unexpected.append(outcome)
                return
            else:
                result = read_result(job)
            reporter.finish()
            on_end(job, result)

        students = []
        for index, (job, reporter) in enumerate(zip(jobs, reporters, strict=True)):
            pipeline = job.pipeline
            if isinstance(pipeline, TextPipeline):
                ended(index, self._train_on_sequences(pipeline, job, reporter))
            else:
                students.append(Student(pipeline, self.inputs(pipeline), job.folder, reporter))
        train_together(students, ended, device=self.device)
        if unexpected:
            raise unexpected[0]

    def _train_on_sequences(
        self, pipeline: TextPipeline, job: Job, reporter: StudentProgress
    ) -> LanguageRunResult | Exception:
        """Train a language model, and return its result or the error that ended it."""
        try:
            return train_on_sequences(pipeline, self.sequences(), job.folder, device=self.device, progress=reporter)
        except Exception as error:  # noqa: BLE001  # the other students are trained before it is raised
            return error


def finished_result(job: Job) -> StudentResult:
    """Return the result of a student that is trained already.

    Raises:
        MismatchError: if it saw the images in another order than this sweep shows them in.
    """
    before = read_json(job.folder / "metrics.json").get("data_seed")
    if before != job.data_seed:
        raise MismatchError(
            f"{job.folder} was trained with train.data_seed {before}, and it is {job.data_seed} in this sweep",
            "repeat the command with --together if it had it before, or else without; or write to another folder",
        )
    return read_result(job)


def read_result(job: Job) -> StudentResult:
    """Return the result of a student from its run folder."""
    metrics = read_json(job.folder / "metrics.json")
    if isinstance(job.point.pipeline, TextPipeline):
        return _text_result(job, metrics)
    known = job.point.name, job.seed, str(job.folder)
    if "validation_mean_iou" in metrics["best"]:
        test = metrics["test"] or {"mean_iou": None, "accuracy": None}
        validation = metrics["best"]["validation_mean_iou"]
        return PixelStudentResult(
            *known, test["mean_iou"], validation, metrics["seconds"], pixel_accuracy=test["accuracy"]
        )
    test = metrics["test"]["accuracy"] if metrics["test"] else None
    validation = metrics["best"]["validation_accuracy"]
    held_out = metrics["best"]["validation_loss"] if validation is None else None
    return StudentResult(*known, test, validation, metrics["seconds"], held_out=held_out)


def _text_result(job: Job, metrics: dict[str, Any]) -> TextStudentResult:
    """Return the result of a language model from its metrics."""
    best = metrics["best"]
    known = job.point.name, job.seed, str(job.folder)
    measures = {name: best[name] for name in ("perplexity", "kl", "agreement")}
    return TextStudentResult(*known, None, None, metrics["seconds"], held_out=best["held_out_loss"], **measures)

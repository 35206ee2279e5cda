"""References to trained networks: in a run folder, in a checkpoint of a pipeline, or named by a pipeline."""

from __future__ import annotations

import json
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from torch import nn

from kdcache.config.loader import load_pipeline
from kdcache.config.schema import ModelSpec, Pipeline, StudentSpec, TeacherSpec
from kdcache.config.transform import Transform
from kdcache.data.samples import Samples
from kdcache.data.transforms import transform_for_evaluation
from kdcache.data.views import View
from kdcache.errors import CorruptError, MismatchError, UsageError
from kdcache.models import build_for
from kdcache.models.teacher import load_teacher
from kdcache.runtime.atomic_write import SUFFIX, temporary
from kdcache.train.run_folder import CHECKPOINT
from kdcache.train.student_transform import evaluation_transform

Network = Literal["student", "teacher"]

_PIPELINE, _METRICS = "resolved.yaml", "metrics.json"

_SHOWN = 8
"""Runs that a message names."""


@dataclass(frozen=True)
class NetworkRef:
    """A trained network that is not built yet.

    Attributes:
        name: name for tables and messages.
        pipeline: configuration that it was trained with; it names the weights.
        network: section of the pipeline that describes it.
    """

    name: str
    pipeline: Pipeline
    network: Network
    class_names: tuple[str, ...] | None = None

    @property
    def workers(self) -> int | Literal["auto"]:
        """Number of processes that load images, from its section of the pipeline."""
        section = getattr(self.pipeline, self.network)
        has_training = isinstance(section, TeacherSpec | StudentSpec)
        return section.train.num_workers if has_training else self.pipeline.cache.num_workers

    @property
    def has_class_logits(self) -> bool:
        """Whether it was trained to return class logits."""
        return self.network == "teacher" or self.pipeline.loss.uses_logits

    @property
    def has_outputs(self) -> bool:
        """Whether it was trained with other outputs than class logits, or besides them."""
        return self.network == "student" and bool(self.pipeline.loss.outputs)

    def load(self, samples: Samples) -> tuple[nn.Module, View]:
        """Build the network with its weights, and a view of the samples with its evaluation transform.

        Raises:
            UsageError: if it was trained without class logits.
            KdcacheError: if the weights are missing or do not fit, or if the pipeline has no deterministic transform
                for evaluation.
        """
        self.check_class_logits()
        self.check_classes(samples)
        if self.network == "teacher":
            loaded = load_teacher(self.pipeline)
            return loaded.model, View(samples, self._transform(loaded.transform))
        view = View(samples, self._transform(samples.transform))
        return build_for(self.pipeline.section("student"), samples, view.shape(), trained=True), view

    def check_class_logits(self) -> None:
        """Check that it was trained with class logits.

        Raises:
            UsageError: if it was not.
        """
        if not self.has_class_logits:
            raise UsageError(
                f"{self.name} was trained without class logits (loss.logits is false), and these are what is measured",
                f"compare its outputs with the teacher's: kdcache evaluate {self.name} --cache CACHE",
            )

    def check_classes(self, samples: Samples) -> None:
        """Check that a data set has the classes that the network was trained with, in the same order.

        Raises:
            MismatchError: with the first class that differs, and both of its names.
        """
        trained, given = self.class_names, samples.class_names
        if trained is None or trained == given:
            return
        where = f"{samples.name}/{samples.split}"
        if len(trained) != len(given):
            what = f"{self.name} was trained with {len(trained)} classes, and {where} has {len(given)}"
        else:
            differ = [number for number, names in enumerate(zip(trained, given, strict=True)) if names[0] != names[1]]
            first = differ[0]
            what = (
                f"class {first} of {self.name} is {trained[first]!r}, and that of {where} is {given[first]!r} "
                f"({len(differ)} of {len(given)} class names differ)"
            )
        raise MismatchError(what, "use the data set that the network was trained on, or rename its classes back")

    def view_for_comparison(self, cached: View) -> View:
        """Return the samples of a cache as the network takes them: as the teacher saw them, or by its own transform.

        Args:
            cached: samples of the cache as its teacher saw them.
        """
        section = getattr(self.pipeline, self.network)
        if isinstance(section, StudentSpec) and section.transform is not None:
            return View(cached.samples, self._transform(cached.transform))
        return cached

    def _transform(self, default: Transform) -> Transform:
        seen = default if self.pipeline.transform is None else self.pipeline.transform
        section = getattr(self.pipeline, self.network)
        if isinstance(section, StudentSpec):
            return evaluation_transform(self.pipeline, section, seen)
        return transform_for_evaluation(self.pipeline.eval_transform, seen)


def from_run(folder: Path) -> NetworkRef:
    """Return the network of a run folder that `train-student` or `train-teacher` wrote.

    Raises:
        UsageError: if the folder is not a finished run, or its metrics do not name the network.
        CorruptError: if its metrics cannot be read.
    """
    if missing := [name for name in (CHECKPOINT, _PIPELINE, _METRICS) if not (folder / name).is_file()]:
        raise _not_a_run(folder, missing)
    try:
        metrics = json.loads((folder / _METRICS).read_text(encoding="utf-8"))
        network, class_names = metrics.get("network"), metrics.get("class_names")
    except (ValueError, AttributeError) as error:
        raise CorruptError(f"cannot read {folder / _METRICS}: {error}", _checkpoint_hint(folder)) from None
    if network not in ("student", "teacher"):
        raise UsageError(
            f"{folder / _METRICS} does not say which network the run trained: it was written by an older version",
            _checkpoint_hint(folder),
        )
    pipeline = load_pipeline(folder / _PIPELINE)
    names = tuple(map(str, class_names)) if class_names is not None else None
    return NetworkRef(str(folder), _with_weights(pipeline, network, folder / CHECKPOINT), network, names)


def _not_a_run(folder: Path, missing: Sequence[str]) -> UsageError:
    """Return the error for a path that is not a finished run: what it is, and what to pass instead."""
    folder = folder if folder.name else folder.absolute()
    for unfinished in (folder, temporary(folder)):
        if unfinished.name.endswith(SUFFIX) and (unfinished / _PIPELINE).is_file():
            return UsageError(
                f"{unfinished} is a run that is not finished",
                f"run the command that trains it again, which resumes it; then pass {_finished_name(unfinished)}",
            )
    inside = {path.parent for path in folder.glob(f"*/{_METRICS}")} | {
        path.parents[1] for path in folder.glob("*/*/point.json")
    }
    if inside:
        named = " ".join(shlex.quote(str(path)) for path in sorted(inside)[:_SHOWN])
        return UsageError(f"{folder} is not a run, but a folder of runs and sweeps", f"pass those in it: {named}")
    if not folder.exists():
        what = f"run folder not found: {folder}"
    elif folder.is_file():
        what = f"{folder} is a file, not a run folder"
    else:
        what = f"{folder} is not a finished run: it has no {' and no '.join(missing)}"
    return UsageError(
        what,
        "pass a folder that train-student, train-teacher or sweep wrote, "
        "or a checkpoint with its pipeline: --pipeline PIPELINE --network student CHECKPOINT",
    )


def _finished_name(unfinished: Path) -> Path:
    return unfinished.with_name(unfinished.name.removesuffix(SUFFIX))


def _checkpoint_hint(folder: Path) -> str:
    """Return the command that evaluates the checkpoint of a run without its metrics."""
    return (
        f"name it: kdcache evaluate --pipeline {folder / _PIPELINE} --network student {folder / CHECKPOINT} "
        "(or --network teacher)"
    )


def from_pipeline(pipeline: Pipeline, network: Network, checkpoint: Path | None) -> NetworkRef:
    """Return a network of a pipeline with the weights of a checkpoint.

    Args:
        pipeline: configuration of the network.
        network: its section.
        checkpoint: file with the weights; None for those that the teacher's section names.

    Raises:
        UsageError: if the pipeline has no such network, or the network is a student and no checkpoint is given.
    """
    if checkpoint is not None:
        return NetworkRef(str(checkpoint), _with_weights(pipeline, network, checkpoint), network)
    if network == "student":
        raise UsageError(
            "a pipeline does not name the weights of a student", "pass its checkpoint, RUN/model.safetensors"
        )
    return NetworkRef(" + ".join(spec.model for spec in pipeline.members), pipeline, network)


def _with_weights(pipeline: Pipeline, network: Network, checkpoint: Path) -> Pipeline:
    section = getattr(pipeline, network)
    if not isinstance(section, ModelSpec):
        section = pipeline.section(network)  # raises if there is no such network
    return pipeline.model_copy(update={network: section.model_copy(update={"weights": str(checkpoint)})})

"""Trained networks by where they lie: in a run folder, in a checkpoint of a pipeline, or as a pipeline names them."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from torch import nn

from kdcache.config.loader import load_pipeline
from kdcache.config.schema import ModelSpec, Pipeline, StudentSpec, TeacherSpec, Transform
from kdcache.data.samples import Samples
from kdcache.data.transforms import transform_for_evaluation
from kdcache.data.views import View
from kdcache.errors import CorruptError, MismatchError, UsageError
from kdcache.models import build_model
from kdcache.models.teacher import load_teacher
from kdcache.train.run_folder import CHECKPOINT
from kdcache.train.student_transform import evaluation_transform

Network = Literal["student", "teacher"]

_PIPELINE, _METRICS = "resolved.yaml", "metrics.json"


@dataclass(frozen=True)
class NetworkRef:
    """A network that has been trained, not yet built.

    Attributes:
        name: what to call it.
        pipeline: whose data set it was trained for; it names the weights.
        network: which section of it is meant.
        class_names: those that it was trained with, in the order of its outputs; None if they are not recorded.
    """

    name: str
    pipeline: Pipeline
    network: Network
    class_names: tuple[str, ...] | None = None

    @property
    def workers(self) -> int:
        """Processes that load images, as its pipeline has them for this network."""
        section = getattr(self.pipeline, self.network)
        trained = isinstance(section, TeacherSpec | StudentSpec)
        return section.train.num_workers if trained else self.pipeline.cache.num_workers

    def load(self, samples: Samples) -> tuple[nn.Module, View]:
        """The network with its weights, and the samples as it is to see them.

        Raises:
            KdcacheError: if the weights are not there or do not fit, or the pipeline does not say what images that are
                not for training go through.
        """
        self.check_classes(samples)
        if self.network == "teacher":
            loaded = load_teacher(self.pipeline)
            return loaded.model, View(samples, self._transform(loaded.transform))
        view = View(samples, self._transform(samples.transform))
        return build_model(self.pipeline.section("student"), samples.num_classes, view.shape(), trained=True), view

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
    """The network that `train-student` or `train-teacher` left in a run folder.

    Raises:
        UsageError: if it is no such folder, or does not say which network it holds.
        CorruptError: if its metrics cannot be read.
    """
    lacking = [name for name in (CHECKPOINT, _PIPELINE, _METRICS) if not (folder / name).is_file()]
    if lacking:
        raise UsageError(
            f"{folder} is not a finished run: it has no {' and no '.join(lacking)}"
            if folder.exists()
            else f"there is no run {folder}",
            "give a folder that train-student or train-teacher made, "
            "or a checkpoint and what it is of: --pipeline PIPELINE --network student CHECKPOINT",
        )
    try:
        metrics = json.loads((folder / _METRICS).read_text(encoding="utf-8"))
        network, class_names = metrics.get("network"), metrics.get("class_names")
    except (ValueError, AttributeError) as error:
        raise CorruptError(f"cannot read {folder / _METRICS}: {error}", _said(folder)) from None
    if network not in ("student", "teacher"):
        raise UsageError(
            f"{folder / _METRICS} does not say of which network the run is: an older kdcache made it", _said(folder)
        )
    pipeline = load_pipeline(folder / _PIPELINE)
    names = tuple(map(str, class_names)) if class_names is not None else None
    return NetworkRef(str(folder), _with_weights(pipeline, network, folder / CHECKPOINT), network, names)


def _said(folder: Path) -> str:
    """The way to a run's network that does not lead through its metrics."""
    return (
        f"say it: kdcache evaluate --pipeline {folder / _PIPELINE} --network student {folder / CHECKPOINT} "
        "(or --network teacher)"
    )


def from_pipeline(pipeline: Pipeline, network: Network, checkpoint: Path | None) -> NetworkRef:
    """A network of a pipeline, with the weights of a checkpoint; of the teacher, the pipeline may name them itself.

    Raises:
        UsageError: if the pipeline lacks the network, or a student's checkpoint is not given.
    """
    if checkpoint is not None:
        return NetworkRef(str(checkpoint), _with_weights(pipeline, network, checkpoint), network)
    if network == "student":
        raise UsageError("a student's weights are in no pipeline", "give its checkpoint, RUN/model.safetensors")
    return NetworkRef(" + ".join(spec.model for spec in pipeline.members), pipeline, network)


def _with_weights(pipeline: Pipeline, network: Network, checkpoint: Path) -> Pipeline:
    section = getattr(pipeline, network)
    if not isinstance(section, ModelSpec):
        section = pipeline.section(network)  # which says why there is no such network
    return pipeline.model_copy(update={network: section.model_copy(update={"weights": str(checkpoint)})})

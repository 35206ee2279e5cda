"""Load the teacher of a pipeline with its weights, and the images that it sees."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from kdcache.cache.format.verified_files import record_of
from kdcache.config.schema import EnsembleSpec, Pipeline, TrainedSpec
from kdcache.config.transform import Transform
from kdcache.data.check_images import check_images
from kdcache.data.datasets import load_split
from kdcache.data.samples import Samples
from kdcache.data.views import View
from kdcache.errors import KdcacheError, MismatchError, UsageError
from kdcache.models import (
    ChosenOutputs,
    Ensemble,
    build_for,
    check_run_classes,
    compare_names,
    from_hf,
    outputs_of,
    preset_transform,
    read_groups,
    record_of_groups,
)
from kdcache.models.digest import plain_state
from kdcache.models.prune import prune
from kdcache.runtime import user_code
from kdcache.runtime.progress import Progress, Silent


class TeacherIdentity(NamedTuple):
    """What distinguishes a teacher from another in addition to its weights; see `TeacherRecord`."""

    name: str
    arguments: dict[str, Any]
    code_digest: str | None


class FunctionNetwork(nn.Module):
    """A plain function as a network without weights, such as one that calls an ONNX Runtime session or a server.

    Args:
        function: images [B, channels, H, W] -> logits [B, C], a tensor on any device or a NumPy array, or a dictionary
            or tuple of such outputs.
    """

    def __init__(self, function: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.function = function

    def forward(self, images: Tensor) -> Any:
        """Return what the function returns; tensors on the device of the images."""
        return _as_tensors(self.function(images), images.device)


def _as_tensors(returned: Any, device: torch.device) -> Any:
    """Return what a function returned, with tensors on a device in place of arrays."""
    if isinstance(returned, np.ndarray):
        returned = torch.from_numpy(returned)
    if isinstance(returned, Tensor):
        return returned.to(device)
    if isinstance(returned, dict):
        return {name: _as_tensors(part, device) for name, part in returned.items()}
    if type(returned) in (tuple, list):
        return type(returned)(_as_tensors(part, device) for part in returned)
    return returned


def as_network(model: nn.Module | Callable[[Tensor], Any]) -> nn.Module:
    """Return a network as it is, and a plain function as a network.

    Raises:
        UsageError: if it is neither.
    """
    if isinstance(model, nn.Module):
        return model
    if isinstance(model, type) or not callable(model):
        raise UsageError(
            f"the teacher is {model!r}, neither a torch.nn.Module nor a function",
            "pass a network, or a function from images [B, channels, H, W] to logits [B, C]",
        )
    return FunctionNetwork(model)


def has_weights(model: nn.Module) -> bool:
    """Return whether a network, and each member of an ensemble, has parameters or buffers that its digest covers."""
    if isinstance(model, Ensemble):
        return all(has_weights(member) for member in model.members)
    if isinstance(model, ChosenOutputs):
        return has_weights(model.network)
    return bool(plain_state(model))


class LoadedTeacher(NamedTuple):
    """The teacher and the data of the `dataset` and `teacher` sections of a pipeline."""

    model: nn.Module
    identity: TeacherIdentity
    samples: Samples
    transform: Transform


def load_teacher(pipeline: Pipeline, progress: Progress | None = None) -> LoadedTeacher:
    """Return the trained teacher of a pipeline, and the training images that it sees.

    Raises:
        KdcacheError: if one is not found, or they do not fit.
    """
    specs = pipeline.members
    samples = load_split(pipeline.dataset, "train")
    transform = _preset(specs, samples) if pipeline.transform is None else pipeline.transform
    try:
        shape = View(samples, transform).shape()
    except KdcacheError:
        check_images(samples, progress or Silent())  # names all files that cannot be read, not only the first
        raise
    loaded = [_load(spec, samples, shape, progress or Silent()) for spec in specs]
    models, identities = [model for model, _ in loaded], [identity for _, identity in loaded]
    if not isinstance(pipeline.teacher, EnsembleSpec):
        return LoadedTeacher(models[0], identities[0], samples, transform)
    combine, members = pipeline.teacher.combine, pipeline.teacher.ensemble
    weights = [member.weight for member in members]
    model = Ensemble(models, weights, combine, [member.model for member in members], samples.num_classes)
    return LoadedTeacher(model, _together(identities, weights, combine), samples, transform)


def _preset(specs: list[TrainedSpec], samples: Samples) -> Transform:
    """Return the transform of the teacher's images if the pipeline does not set it."""
    first, *others = [(spec.model, preset_transform(spec) or samples.transform) for spec in specs]
    for name, preset in others:
        if preset != first[1]:
            raise MismatchError(
                f"the members of the teacher need different transforms\n  {first[0]}: {first[1]}\n  {name}: {preset}",
                "set `transform` to the one that all of them get",
            )
    return first[1]


def _load(
    spec: TrainedSpec, samples: Samples, shape: tuple[int, ...], progress: Progress
) -> tuple[nn.Module, TeacherIdentity]:
    """Return a network that returns logits of the data set's classes, and its identity for the record."""
    outputs, groups = samples.num_classes, None
    arguments = spec.args
    if spec.classes is not None:
        outputs = outputs_of(spec) or spec.outputs or outputs
        groups = read_groups(spec.classes, outputs, samples.num_classes)
        arguments = {"args": spec.args, "outputs": outputs, "classes": record_of_groups(groups)}
    beside = {key: value for key, value in (("output", spec.output), ("prune", spec.prune)) if value is not None}
    if beside:
        arguments = {**(arguments if spec.classes is not None else {"args": spec.args}), **beside}
    if remark := compare_names(spec, groups, samples.class_names):
        progress.say(remark)
    if groups is None and spec.weights is not None:
        check_run_classes(spec.weights, samples.class_names)
    model = build_for(spec, samples, shape, outputs=outputs, trained=True, progress=progress)
    if spec.prune is not None:
        prune(model, spec.prune)
    code = user_code.digest_of(spec.model) if user_code.is_user_code(spec.model) else None
    kind, _, folder = spec.model.partition(":")
    if kind == "hf":
        # The same weights compute something else with other settings, such as an activation.
        code = f"sha256:{record_of(Path(folder) / from_hf.CONFIG).sha256}"
    # Of a teacher from a file the name is recorded, not its folder on this machine.
    identity = TeacherIdentity(spec.model.rpartition("/")[2], _without_folders(arguments), code)
    return (model if groups is None else ChosenOutputs(model, outputs, groups)), identity


def _without_folders(given: Any) -> Any:
    """Return the arguments of a constructor with absolute paths replaced by the name of the file or folder."""
    if isinstance(given, dict):
        return {key: _without_folders(value) for key, value in given.items()}
    if isinstance(given, list):
        return [_without_folders(value) for value in given]
    return Path(given).name if isinstance(given, str) and Path(given).expanduser().is_absolute() else given


def _together(identities: list[TeacherIdentity], weights: list[float], combine: str) -> TeacherIdentity:
    """Return the identity of an ensemble for the record."""
    members = [{**one._asdict(), "weight": weight} for one, weight in zip(identities, weights, strict=True)]
    name = " + ".join(one.name for one in identities)
    return TeacherIdentity(name, {"members": members, "combine": combine}, None)

"""Build a network from its name.

    torchvision:resnet18                        random weights, as many outputs as the data set has classes
    torchvision:resnet50@IMAGENET1K_V2          with torchvision's weights
    timm:resnet18, timm:resnet50@a1_in1k        the same for timm, an optional extra; with args `features_only: true`
                                                the encoder of a segmentation network, which gets a new head
    cifar:resnet32x4, cifar:wrn_40_2, ...       models/cifar.py, the networks of the papers' CIFAR-100 pairs
    torchvision:deeplabv3_resnet50, ...         a segmentation network of torchvision, of which `out` is taken
    small:cnn, small:mlp, small:fcn             models/small.py
    hf:path/to/folder                           an image classifier of transformers, an optional extra, from a folder of
                                                save_pretrained; with its weights if trained ones are needed
    path/file.py:function                       function(num_classes=..., **args) -> torch.nn.Module; `num_classes` is
                                                passed only if the function takes it

Small and gray images are enlarged and repeated to three channels by a forward hook, which does not change the network
or its state dict.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import partial
from typing import Any

from torch import nn

from kdcache.config.schema import ModelSpec
from kdcache.config.section import validated
from kdcache.config.transform import Transform
from kdcache.errors import MismatchError, UsageError, counted, did_you_mean
from kdcache.models import cifar, from_hf, from_timm, from_torchvision
from kdcache.models.checkpoints import load_weights
from kdcache.models.construct import construct, construct_of_user
from kdcache.models.outputs import take_part
from kdcache.models.repeatable_weights import built_with_same_weights
from kdcache.models.small import SmallCNN, SmallFCN, SmallMLP
from kdcache.runtime import user_code
from kdcache.runtime.progress import Progress
from kdcache.runtime.terminal import reporter

_SIGNATURE = "function(num_classes=C, **args) -> torch.nn.Module"

_FIX = "set `weights:` beside `model:` to its checkpoint, or let the function load trained weights"

_KINDS = ("torchvision", "timm", "hf", "cifar", "small")
_SMALL = ("cnn", "mlp", "fcn")

_COLOR = 3
"""Channels of images without a given shape."""


def build_model(
    model: str | Mapping[str, Any] | ModelSpec,
    num_classes: int,
    shape: tuple[int, ...] | None = None,
    trained: bool = False,
    progress: Progress | bool | None = None,
) -> nn.Module:
    """Return a network by name, such as `small:cnn`, on the CPU.

    Args:
        model: its name, or a mapping with the keys `model`, `args`, `weights` and `output` as in a pipeline file.
        num_classes: C, the size of its output.
        shape: (channels, height, width) of the images that it gets, or the shape of other tensors. The networks of
            kdcache (`small:`, `cifar:`) have this number of channels, and `small:mlp` this size; those of libraries are
            checked to take them. None for color images; only `small:mlp` needs it.
        trained: load the weights that `model` names, and refuse a network that would have random ones.
        progress: True to print to stderr which weights were loaded if a checkpoint has several, or a progress reporter;
            silent if None.

    Raises:
        UsageError: for a name or arguments that are not known, or weights that are not found.
        MismatchError: for weights that do not fit.
    """
    spec = _spec_of(model)
    kind, _, name = spec.model.partition(":")
    channels = shape[0] if shape is not None else _COLOR
    if trained and spec.weights is None and not user_code.is_user_code(spec.model) and not spec.has_own_weights:
        build_model(spec, num_classes, shape, trained=False)  # if the name is wrong, that is the error to report
        raise UsageError(
            f"the teacher {spec.model} has no weights",
            "make some with `kdcache train-teacher`, and set teacher.weights to the checkpoint "
            "(`--set teacher.weights=RUN/model.safetensors`, in an ensemble `teacher.0.weights` and so on)",
        )
    if spec.names_weights:
        _check_named(spec, num_classes, trained)
    if kind == "torchvision":
        network = from_torchvision.build(name, spec, num_classes, channels)
    elif kind == "timm":
        network = from_timm.build(name, spec, num_classes, channels, complete=trained and spec.weights is not None)
    elif kind == "hf":
        network = from_hf.build(name, spec, num_classes, channels, trained, reporter(progress))
    elif kind == "cifar":
        network = cifar.build(name, spec, num_classes, channels)
    elif kind == "small":
        network = _small(name, spec, num_classes, shape)
    elif user_code.is_user_code(spec.model):
        code = user_code.load(spec.model, "model", _SIGNATURE)
        make = partial(construct_of_user, code.target, spec, num_classes)
        network = built_with_same_weights(make, spec.model, _FIX) if trained and spec.weights is None else make()
    else:
        raise UsageError(
            f"unknown model {spec.model!r}{_similar(spec.model)}",
            "write torchvision:NAME, torchvision:NAME@WEIGHTS, timm:NAME, timm:NAME@TAG, hf:FOLDER, cifar:NAME, "
            "small:cnn, small:mlp, small:fcn or path/file.py:function",
        )
    usual = from_torchvision.output_of(name) if kind == "torchvision" else None
    take_part(network, usual if spec.output is None else spec.output, spec.model)
    read_by_library = kind == "hf" and from_hf.weights_folder(spec) is not None
    if trained and spec.weights is not None and not read_by_library:
        load_weights(network, spec.weights, reporter(progress))
    return network


def _spec_of(model: str | Mapping[str, Any] | ModelSpec) -> ModelSpec:
    if isinstance(model, ModelSpec):
        return model
    return validated(ModelSpec, {"model": model} if isinstance(model, str) else dict(model), "the model")


def _check_named(spec: ModelSpec, num_classes: int, trained: bool) -> None:
    known = outputs_of(spec)
    if not trained:
        raise UsageError(
            f"{spec.model} names trained weights, and training starts from random ones",
            f"write {spec.model.partition('@')[0]}, or dump the trained network as a teacher",
        )
    if known != num_classes:
        raise MismatchError(
            f"{spec.model} has {counted(known or 0, 'class', 'classes')}, the data set has {num_classes}",
            "use a data set with the teacher's classes, map them with teacher.classes, or give a checkpoint that was "
            "trained on this data set (`weights:`)",
        )


def outputs_of(spec: ModelSpec) -> int | None:
    """Return the number of outputs of the weights that a model names; None if it names none.

    Raises:
        UsageError: if the weights do not exist.
    """
    kind, _, name = spec.model.partition(":")
    if kind == "hf" and spec.has_own_weights:
        return from_hf.outputs(name)
    if not spec.names_weights:
        return None
    return len(from_torchvision.categories(name)) if kind == "torchvision" else from_timm.outputs(name)


def categories_of(spec: ModelSpec) -> list[str] | None:
    """Return the class names of the weights that a model names; None for those of timm, and without names."""
    kind, _, name = spec.model.partition(":")
    if kind == "hf" and spec.has_own_weights:
        return from_hf.categories(name)
    return from_torchvision.categories(name) if kind == "torchvision" and spec.names_weights else None


def preset_transform(spec: ModelSpec) -> Transform | None:
    """Return the transform that a library evaluates the named weights with; None for a model that names none."""
    kind, _, name = spec.model.partition(":")
    if kind == "hf" and spec.has_own_weights:
        return from_hf.preset(name)
    if not spec.names_weights:
        return None
    return from_torchvision.preset(name) if kind == "torchvision" else from_timm.preset(name, spec.args)


def _similar(model: str) -> str:
    """Return a suggestion for the name of a model without a known kind, such as `resnet18` or `torchvison:resnet18`."""
    kind, colon, name = model.partition(":")
    if colon:
        similar = did_you_mean(kind, _KINDS)
        return similar.replace("?", f":{name}?")
    known = [f"{kind}:{model}" for kind, names in (("small", _SMALL), ("cifar", cifar.NETWORKS)) if model in names]
    known += [f"torchvision:{model}"] if model in from_torchvision.names() else []
    return f", did you mean {' or '.join(known)}?" if known else ""


def _small(name: str, spec: ModelSpec, num_classes: int, shape: tuple[int, ...] | None) -> nn.Module:
    if name == "cnn":
        return construct(SmallCNN, spec, num_classes=num_classes, channels=_COLOR if shape is None else shape[0])
    if name == "fcn":
        return construct(SmallFCN, spec, num_classes=num_classes, channels=_COLOR if shape is None else shape[0])
    if name == "mlp":
        if shape is None:
            raise UsageError("small:mlp needs the shape of the images", "pass shape=(channels, height, width)")
        # Features that are not images are flattened as pixels are.
        channels, height, width = shape if len(shape) == 3 else (math.prod(shape), 1, 1)
        sizes = {"channels": channels, "height": height, "width_of_image": width}
        return construct(SmallMLP, spec, num_classes=num_classes, **sizes)
    raise UsageError(
        f"there is no small network {name!r}{did_you_mean(name, _SMALL)}", "use small:cnn, small:mlp or small:fcn"
    )

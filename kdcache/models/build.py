"""From a name to a network.

    torchvision:resnet18                        random weights, as many outputs as the data set has classes
    torchvision:resnet50@IMAGENET1K_V2          with torchvision's weights
    timm:resnet18, timm:resnet50@a1_in1k        the same of timm, an optional extra
    cifar:resnet32x4, cifar:wrn_40_2, ...       models/cifar.py, the networks of the papers' CIFAR-100 pairs
    small:cnn, small:mlp                        models/small.py
    hf:path/to/folder                           an image classifier of transformers, an optional extra, as
                                                save_pretrained wrote it; with its weights where they are wanted
    path/file.py:function                       function(num_classes=..., **args) -> torch.nn.Module

Small images and gray ones need no change of the network: they are repeated to three channels and enlarged on their way
in, by a hook that leaves the network and its state dict as they are.
"""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

from torch import nn

from kdcache.config.schema import ModelSpec, Transform
from kdcache.errors import MismatchError, UsageError
from kdcache.models import cifar, from_hf, from_timm, from_torchvision
from kdcache.models.checkpoints import load_weights
from kdcache.models.construct import construct, place_of
from kdcache.models.outputs import take_part
from kdcache.models.small import SmallCNN, SmallMLP
from kdcache.runtime.progress import Progress


def build_model(
    spec: ModelSpec,
    num_classes: int,
    shape: tuple[int, int, int],
    trained: bool = False,
    progress: Progress | None = None,
) -> nn.Module:
    """The network that a pipeline file names, on the CPU.

    Args:
        spec: name, constructor arguments, and weights.
        num_classes: C, the size of its output.
        shape: (channels, height, width) of the images before the transform.
        trained: load the weights that `spec` names, and refuse a network that would have random ones.
        progress: progress reporter; names the weights that were loaded if a checkpoint has several. Silent if None.

    Raises:
        UsageError: for a name or arguments that cannot be, or weights that are not there.
        MismatchError: for weights that do not fit.
    """
    kind, _, name = spec.model.partition(":")
    if trained and spec.weights is None and not kind.endswith(".py") and kind != "hf" and not spec.names_weights:
        raise UsageError(
            f"the teacher {spec.model} has no weights",
            "make some with `kdcache train-teacher`, and set teacher.weights to the checkpoint "
            "(`--set teacher.weights=RUN/model.safetensors`, in an ensemble `teacher.0.weights` and so on)",
        )
    if spec.names_weights:
        _check_named(spec, num_classes, trained)
    if kind == "torchvision":
        model = from_torchvision.build(name, spec, num_classes, shape[0])
    elif kind == "timm":
        model = from_timm.build(name, spec, num_classes, shape[0])
    elif kind == "hf":
        model = from_hf.build(name, spec, num_classes, shape[0], trained, progress)
    elif kind == "cifar":
        model = cifar.build(name, spec, num_classes, shape[0])
    elif kind == "small":
        model = _small(name, spec, num_classes, shape)
    elif kind.endswith(".py"):
        model = _from_file(Path(kind), name, spec, num_classes)
    else:
        raise UsageError(
            f"unknown model {spec.model!r}",
            "write torchvision:NAME, torchvision:NAME@WEIGHTS, timm:NAME, timm:NAME@TAG, hf:FOLDER, cifar:NAME, "
            "small:cnn, small:mlp or path/file.py:function",
        )
    take_part(model, spec.output, spec.model)
    read_by_library = kind == "hf" and from_hf.weights_folder(spec) is not None
    if trained and spec.weights is not None and not read_by_library:
        load_weights(model, spec.weights, progress)
    return model


def _check_named(spec: ModelSpec, num_classes: int, trained: bool) -> None:
    known = outputs_of(spec)
    if not trained:
        raise UsageError(
            f"{spec.model} asks for trained weights where training starts from random ones",
            f"write {spec.model.partition('@')[0]}, or dump the trained network as a teacher",
        )
    if known != num_classes:
        raise MismatchError(
            f"{spec.model} knows {known} classes, the data set has {num_classes}",
            "use a data set of the teacher's classes, say in teacher.classes which outputs stand for these, or give a "
            "checkpoint that was trained on this data set (`weights:`)",
        )


def outputs_of(spec: ModelSpec) -> int | None:
    """Return how many outputs the weights have that a model names; None for a model that names none.

    Raises:
        UsageError: if there are no such weights.
    """
    kind, _, name = spec.model.partition(":")
    if spec.has_own_weights and kind == "hf":
        return from_hf.outputs(name)
    if not spec.names_weights:
        return None
    return len(from_torchvision.categories(name)) if kind == "torchvision" else from_timm.outputs(name)


def categories_of(spec: ModelSpec) -> list[str] | None:
    """What the outputs of the weights that a model names are called; None where torchvision does not say it."""
    kind, _, name = spec.model.partition(":")
    if spec.has_own_weights and kind == "hf":
        return from_hf.categories(name)
    return from_torchvision.categories(name) if kind == "torchvision" and spec.names_weights else None


def preset_transform(spec: ModelSpec) -> Transform | None:
    """How the weights that a model names are evaluated by their library, as data; None for a model that names none."""
    kind, _, name = spec.model.partition(":")
    if spec.has_own_weights and kind == "hf":
        return from_hf.preset(name)
    if not spec.names_weights:
        return None
    return from_torchvision.preset(name) if kind == "torchvision" else from_timm.preset(name, spec.args)


def _small(name: str, spec: ModelSpec, num_classes: int, shape: tuple[int, int, int]) -> nn.Module:
    channels, height, width = shape
    if name == "cnn":
        return construct(SmallCNN, spec, num_classes=num_classes, channels=channels)
    if name == "mlp":
        sizes = {"channels": channels, "height": height, "width_of_image": width}
        return construct(SmallMLP, spec, num_classes=num_classes, **sizes)
    raise UsageError(f"there is no small network {name!r}", "take small:cnn or small:mlp")


def _from_file(path: Path, function: str, spec: ModelSpec, num_classes: int) -> nn.Module:
    if not path.is_file():
        raise UsageError(
            f"there is no file {path} for the model {spec.model!r}", "give its path from the current folder"
        )
    module_spec = importlib.util.spec_from_file_location(f"kdcache_model_{path.stem}", path)
    if module_spec is None or module_spec.loader is None:
        raise UsageError(f"{path} is not a Python file", "write the model as path/file.py:function")
    module = importlib.util.module_from_spec(module_spec)
    sys.modules[module_spec.name] = module
    try:
        module_spec.loader.exec_module(module)
    except Exception as error:
        del sys.modules[module_spec.name]
        raise UsageError(
            f"{path} cannot be run: {type(error).__name__}: {error} ({place_of(error)})", "mend that file"
        ) from error
    make = getattr(module, function, None)
    if not callable(make):
        names = [name for name in vars(module) if callable(getattr(module, name)) and not name.startswith("_")]
        raise UsageError(f"{path} has no function {function!r}", f"it has: {', '.join(names) or 'none'}")
    return construct(make, spec, num_classes=num_classes)

"""From a name to a network.

    torchvision:resnet18                        random weights, as many outputs as the data set has classes
    torchvision:resnet50@IMAGENET1K_V2          with torchvision's weights
    small:cnn, small:mlp                        models/small.py
    path/file.py:function                       function(num_classes=..., **args) -> torch.nn.Module

Small images and grey ones need no change of the network: they are repeated to three channels and enlarged on their way
in, by a hook that leaves the network and its state dict as they are.
"""

from __future__ import annotations

import importlib.util
import sys
import traceback
from collections.abc import Callable
from http.client import HTTPException
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision import models as tv

from kdcache.datasets import photograph_transform
from kdcache.errors import KdcacheError, MismatchError, UsageError
from kdcache.models.checkpoints import load_weights
from kdcache.models.small import SmallCNN, SmallMLP
from kdcache.pipeline import ModelSpec, Transform

SMALLEST_SIDE = 32
"""Side, in pixels, up to which images are enlarged for torchvision's networks: their strides want large ones."""

_AUXILIARY = ("googlenet", "inception_v3")
"""These have further outputs in training, which no loss here takes; `args: {aux_logits: true}` keeps them."""


def build_model(spec: ModelSpec, num_classes: int, shape: tuple[int, int, int], trained: bool = False) -> nn.Module:
    """The network that a pipeline file names, on the CPU.

    Args:
        spec: name, constructor arguments, and weights.
        num_classes: C, the size of its output.
        shape: (channels, height, width) of the images before the transform.
        trained: load the weights that `spec` names, and refuse a network that would have random ones.

    Raises:
        UsageError: for a name or arguments that cannot be, or weights that are not there.
        MismatchError: for weights that do not fit.
    """
    kind, _, name = spec.model.partition(":")
    brings_its_own = kind.endswith(".py") or (kind == "torchvision" and "@" in name)
    if trained and spec.weights is None and not brings_its_own:
        raise UsageError(
            f"the teacher {spec.model} has no weights",
            "make some with `kdcache train-teacher`, and set teacher.weights to the checkpoint "
            "(`--set teacher.weights=RUN/model.safetensors`)",
        )
    if kind == "torchvision":
        model = _torchvision(name, spec, num_classes, shape[0], trained)
    elif kind == "small":
        model = _small(name, spec, num_classes, shape)
    elif kind.endswith(".py"):
        model = _from_file(Path(kind), name, spec, num_classes)
    else:
        raise UsageError(
            f"unknown model {spec.model!r}",
            "write torchvision:NAME, torchvision:NAME@WEIGHTS, small:cnn, small:mlp or path/file.py:function",
        )
    if trained and spec.weights is not None:
        load_weights(model, Path(spec.weights))
    return model


def _construct(make: Callable[..., Any], spec: ModelSpec, **arguments: Any) -> nn.Module:
    """Call a constructor with the user's arguments; what it cannot take is the user's mistake, not a crash."""
    try:
        model = make(**arguments, **spec.args)
    except KdcacheError:
        raise
    except Exception as error:
        raise UsageError(
            f"{spec.model} cannot be built: {type(error).__name__}: {error} ({_place(error)})",
            "correct the `args:` of the model, or the function that makes it",
        ) from error
    if not isinstance(model, nn.Module):
        raise UsageError(f"{spec.model} returned a {type(model).__name__}", "let it return a torch.nn.Module")
    return model


def _place(error: BaseException) -> str:
    """The line that raised an error."""
    if isinstance(error, SyntaxError):
        return f"{error.filename}:{error.lineno}"
    last = traceback.extract_tb(error.__traceback__)[-1]
    return f"{last.filename}:{last.lineno}"


def _small(name: str, spec: ModelSpec, num_classes: int, shape: tuple[int, int, int]) -> nn.Module:
    channels, height, width = shape
    if name == "cnn":
        return _construct(SmallCNN, spec, num_classes=num_classes, channels=channels)
    if name == "mlp":
        sizes = {"channels": channels, "height": height, "width_of_image": width}
        return _construct(SmallMLP, spec, num_classes=num_classes, **sizes)
    raise UsageError(f"there is no small network {name!r}", "take small:cnn or small:mlp")


def _torchvision(name: str, spec: ModelSpec, num_classes: int, channels: int, trained: bool) -> nn.Module:
    architecture, _, weights_name = name.partition("@")
    weights = _weights_enum(architecture, weights_name)
    if channels not in (1, 3):
        raise MismatchError(
            f"{spec.model} takes 1 or 3 channels, the images have {channels}", "take a network of your own"
        )
    if weights_name and not trained:
        raise UsageError(
            f"{spec.model} asks for trained weights where training starts from random ones",
            f"write torchvision:{architecture}, or dump the trained network as a teacher",
        )
    classes = len(weights.meta["categories"]) if weights_name else num_classes
    if classes != num_classes:
        raise MismatchError(
            f"{spec.model} knows {classes} classes, the data set has {num_classes}",
            "use a data set of the teacher's classes, or a checkpoint that was trained on this one (`weights:`)",
        )
    options: dict[str, Any] = {"name": architecture}
    if architecture in _AUXILIARY and "aux_logits" not in spec.args:
        options["aux_logits"] = False
    if weights_name:
        _fetch(spec, weights)
        model = _construct(tv.get_model, spec, **options, weights=weights)
    else:
        model = _construct(tv.get_model, spec, **options, weights=None, num_classes=num_classes)
    height, width = weights.meta["min_size"]
    if isinstance(model, tv.VisionTransformer):
        height = width = model.image_size  # which it takes and no other, and `args:` may set
    model.register_forward_pre_hook(_Fit(max(height, SMALLEST_SIDE), max(width, SMALLEST_SIDE)))
    return model


def _fetch(spec: ModelSpec, weights: Any) -> None:
    """Bring torchvision's weights into torch's own folder, where its constructors look first."""
    try:
        weights.get_state_dict(progress=False, check_hash=True)
    except (OSError, RuntimeError, HTTPException) as error:
        raise UsageError(
            f"the weights of {spec.model} are not on this machine and cannot be downloaded: {error}",
            f"put {weights.url} into {torch.hub.get_dir()}/checkpoints",
        ) from None


def _weights_enum(architecture: str, weights_name: str) -> Any:
    if architecture not in tv.list_models(module=tv):
        raise UsageError(
            f"torchvision has no network {architecture!r} that classifies images",
            "take a name from torchvision.models.list_models(module=torchvision.models)",
        )
    known = tv.get_model_weights(architecture)
    if weights_name and weights_name not in known.__members__:
        raise UsageError(
            f"torchvision has no weights {weights_name!r} of {architecture}", f"it has {', '.join(known.__members__)}"
        )
    return known[weights_name or "DEFAULT"]


class _Fit:
    """A forward pre-hook that repeats grey images to three channels and enlarges small ones."""

    def __init__(self, height: int, width: int) -> None:
        self.size = (height, width)

    def __call__(self, module: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        images, *others = inputs
        if images.shape[1] == 1:
            images = images.expand(-1, 3, -1, -1)
        height, width = images.shape[2:]
        scale = max(self.size[0] / height, self.size[1] / width)
        if scale > 1:
            images = F.interpolate(images, (round(height * scale), round(width * scale)), mode="bilinear")
        return images, *others


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
            f"{path} cannot be run: {type(error).__name__}: {error} ({_place(error)})", "mend that file"
        ) from error
    make = getattr(module, function, None)
    if not callable(make):
        names = [name for name in vars(module) if callable(getattr(module, name)) and not name.startswith("_")]
        raise UsageError(f"{path} has no function {function!r}", f"it has: {', '.join(names) or 'none'}")
    return _construct(make, spec, num_classes=num_classes)


def preset_transform(spec: ModelSpec) -> Transform | None:
    """How torchvision evaluates the weights that a model names, as data; None for a model without such weights."""
    kind, _, name = spec.model.partition(":")
    architecture, _, weights_name = name.partition("@")
    if kind != "torchvision" or not weights_name:
        return None
    preset = _weights_enum(architecture, weights_name).transforms()
    return photograph_transform(
        preset.resize_size[0], preset.crop_size[0], preset.mean, preset.std, preset.interpolation.value
    )

"""`timm:NAME` and `timm:NAME@TAG`: the networks of timm, which is an optional extra, and their weights."""

from __future__ import annotations

import math
from http.client import HTTPException
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from kdcache.config.schema import ModelSpec
from kdcache.config.transform import Transform
from kdcache.data.datasets import photograph_transform
from kdcache.errors import UsageError, did_you_mean
from kdcache.models.checkpoints import read_state
from kdcache.models.construct import SMALLEST_SIDE, Fit, check_channels, construct


def build(name: str, spec: ModelSpec, num_classes: int, channels: int) -> nn.Module:
    """Return a network of timm, with the weights that `name` names or with random ones.

    Raises:
        KdcacheError: without timm, for arguments that the network does not take, or weights that are not found.
    """
    config = _config(name)
    architecture, _, tag = name.partition("@")
    own_channels = spec.args.get("in_chans", 3)
    check_channels(spec, channels, own_channels)
    options: dict[str, Any] = {"model_name": f"{architecture}.{tag}" if tag else architecture}
    if tag:
        options["pretrained_cfg_overlay"] = {"state_dict": _weights(spec, f"{architecture}.{tag}", config)}
    model = construct(_timm().create_model, spec, **options, pretrained=bool(tag), num_classes=num_classes)
    vars(model)["pretrained_cfg"].pop("state_dict", None)  # a second copy of all weights
    if config.fixed_input_size:
        height, width = _side(spec.args, config)
    else:
        height, width = (max(side, SMALLEST_SIDE) for side in (config.min_input_size or (0, 0, 0))[1:])
    model.register_forward_pre_hook(Fit(height, width, own_channels))
    return model


def outputs(name: str) -> int:
    """Return the number of outputs of the weights that `name` names.

    Raises:
        UsageError: if timm has no such network or weights, or the weights are of a network without classes.
    """
    count = int(_config(name).num_classes)
    if not count:
        raise UsageError(
            f"the weights timm:{name} are of a network without classes",
            "use weights that were trained for classification",
        )
    return count


def preset(name: str, args: dict[str, Any]) -> Transform:
    """Return the transform that timm evaluates the weights that `name` names with.

    Raises:
        UsageError: if torchvision's transforms cannot express it.
    """
    config = _config(name)
    how = import_module("timm.data").resolve_data_config(pretrained_cfg=config.to_dict())
    height, width = _side(args, config)
    scaled = [math.floor(side / how["crop_pct"]) for side in (height, width)]
    crop, mean, std, interpolation = how["crop_mode"], how["mean"], how["std"], how["interpolation"]
    if crop == "squash":
        return [
            {"Resize": {"size": scaled, "interpolation": interpolation}},
            {"CenterCrop": {"size": [height, width]}},
            *photograph_transform(mean=mean, std=std)[2:],
        ]
    if crop != "center" or height != width:
        raise UsageError(
            f"torchvision has no transform like timm's for {name} ({crop} crop to {height} x {width})",
            "set `transform`",
        )
    return photograph_transform(scaled[0], height, mean, std, interpolation)


def _timm() -> Any:
    try:
        return import_module("timm")
    except ImportError:
        raise UsageError("networks of timm need the library timm", "pip install 'kdcache[timm]'") from None


def _config(name: str) -> Any:
    """Return timm's configuration of the weights that `name` names; of the default ones without `@`."""
    timm = _timm()
    architecture, at, tag = name.partition("@")
    if "." in architecture:
        raise UsageError(
            f"timm:{name} names weights in timm's notation", f"write timm:{architecture.replace('.', '@', 1)} instead"
        )
    if not timm.is_model(architecture):
        raise UsageError(
            f"timm has no network {architecture!r}{did_you_mean(architecture, timm.list_models())}",
            "use a name from timm.list_models()",
        )
    known = timm.list_pretrained(f"{architecture}.*")
    if at and f"{architecture}.{tag}" not in known:
        tags = [full.partition(".")[2] for full in known]
        raise UsageError(
            f"timm has no weights {tag!r} of {architecture}{did_you_mean(tag, tags)}",
            f"it has {', '.join(tags) or 'none'}",
        )
    return timm.get_pretrained_cfg(f"{architecture}.{tag}" if tag else architecture)


def _weights(spec: ModelSpec, full_name: str, config: Any) -> dict[str, Tensor]:
    """Return the weights, from torch's cache folder or downloaded."""
    folder = Path(torch.hub.get_dir()) / "checkpoints"
    of_hub = bool(config.hf_hub_id)
    url = f"https://huggingface.co/{config.hf_hub_id}/resolve/main/model.safetensors" if of_hub else config.url
    path = folder / (f"{full_name}.safetensors" if of_hub else url.rpartition("/")[2])
    try:
        if not path.is_file() and of_hub:
            path = Path(import_module("huggingface_hub").hf_hub_download(config.hf_hub_id, "model.safetensors"))
        elif not path.is_file():
            folder.mkdir(parents=True, exist_ok=True)
            torch.hub.download_url_to_file(url, str(path), progress=False)
    except (OSError, HTTPException) as error:
        raise UsageError(
            f"the weights of {spec.model} are not on this machine and cannot be downloaded: {error}",
            f"put {url} into {folder}, as {path.name}",
        ) from None
    return dict(read_state(path))


def _side(args: dict[str, Any], config: Any) -> tuple[int, int]:
    """Return the height and width of the images of a network: from `args:`, or as its weights were trained."""
    given = args.get("img_size")
    sides = [given, given] if isinstance(given, int) else given
    if isinstance(sides, list) and len(sides) == 2 and all(isinstance(side, int) for side in sides):
        return sides[0], sides[1]
    return config.input_size[1], config.input_size[2]

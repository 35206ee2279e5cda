"""`timm:NAME` and `timm:NAME@TAG`: the networks of timm, which is an optional extra, and their weights.

With `args: {features_only: true}` it is the encoder of a segmentation network: see `_encoder_with_head`.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator
from contextlib import contextmanager
from http.client import HTTPException
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from kdcache.config.schema import ModelSpec
from kdcache.config.section import Count, Section, validated
from kdcache.config.transform import Transform
from kdcache.data.datasets import photograph_transform
from kdcache.errors import MismatchError, UsageError, counted, did_you_mean
from kdcache.models.checkpoints import read_state
from kdcache.models.construct import SMALLEST_SIDE, Fit, check_channels, construct
from kdcache.models.map_head import EncoderWithHead

_FINEST_STEP = 4
"""Pixels of an image, in each direction, per place of the largest map that an encoder passes to its head."""


class _OneSize:
    """A forward pre-hook of an encoder that takes images of one size.

    Raises:
        MismatchError: for images of another one.
    """

    def __init__(self, name: str, height: int, width: int) -> None:
        self.name, self.size = name, (height, width)

    def __call__(self, module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        """Check the size of the images."""
        height, width = inputs[0].shape[2:]
        if (height, width) != self.size:
            raise MismatchError(
                f"{self.name} is made for images of {self.size[0]} x {self.size[1]} pixels, and these have {height} x "
                f"{width}",
                f"set img_size in its args: {{features_only: true, img_size: [{height}, {width}]}}",
            )


class _HeadArgs(Section):
    """Arguments of the head of an encoder."""

    width: Count = 128
    """Its channels."""
    frozen: bool = False
    """Train the head alone: the encoder stays as it is."""


def build(name: str, spec: ModelSpec, num_classes: int, channels: int, complete: bool = False) -> nn.Module:
    """Return a network of timm, with the weights that `name` names or with random ones.

    Args:
        name: of the network, and of its weights.
        spec: with the arguments.
        num_classes: size of the output.
        channels: of the images.
        complete: whether a checkpoint with all weights follows, so that an encoder's own are not looked for.

    Raises:
        KdcacheError: without timm, for arguments that the network does not take, or weights that are not found.
    """
    config = _config(name)
    architecture, _, tag = name.partition("@")
    own_channels = spec.args.get("in_chans", 3)
    check_channels(spec, channels, own_channels)
    head = _head_args(spec)
    options: dict[str, Any] = {"model_name": f"{architecture}.{tag}" if tag else architecture}
    options["pretrained"] = bool(tag) and not (head is not None and complete)
    if options["pretrained"]:
        options["pretrained_cfg_overlay"] = {"state_dict": _weights(spec, f"{architecture}.{tag}", config)}
    if head is not None:
        return _encoder_with_head(spec, head, config, options, num_classes, own_channels)
    model = construct(_timm().create_model, spec, **options, num_classes=num_classes)
    vars(model)["pretrained_cfg"].pop("state_dict", None)  # a second copy of all weights
    if config.fixed_input_size:
        height, width = _side(spec.args, config)
    else:
        height, width = (max(side, SMALLEST_SIDE) for side in (config.min_input_size or (0, 0, 0))[1:])
    model.register_forward_pre_hook(Fit(height, width, own_channels))
    return model


def _head_args(spec: ModelSpec) -> _HeadArgs | None:
    """Return the arguments of the head of an encoder; None for another network.

    Raises:
        UsageError: if they are invalid, or of a network without a head.
    """
    given = {key: spec.args[key] for key in _HeadArgs.model_fields if key in spec.args}
    if not spec.is_encoder:
        if given:
            raise UsageError(
                f"{next(iter(given))} in the args of {spec.model} is of the head of an encoder",
                f"add features_only: true, or remove {next(iter(given))}",
            )
        return None
    head = validated(_HeadArgs, given, f"the head of {spec.model} (`args:`)")
    if head.frozen and "@" not in spec.model:
        raise UsageError(
            f"the encoder {spec.model} is frozen, and has random weights",
            f"name weights of it, {spec.model}@TAG, or remove `frozen`",
        )
    return head


def _encoder_with_head(
    spec: ModelSpec, head: _HeadArgs, config: Any, options: dict[str, Any], num_classes: int, channels: int
) -> nn.Module:
    """Return an encoder of timm with a new head, which says a class of each place of the encoder's largest map.

    Arguments besides those of `_HeadArgs` are timm's. Its `out_indices` chooses the maps; without it, they are those at
    1/4 of the size of the images and below.

    Raises:
        UsageError: for arguments that the encoder does not take.
    """
    args = {key: value for key, value in spec.args.items() if key not in _HeadArgs.model_fields}

    def steps() -> list[int]:
        """Return the pixels per place of all maps, of an encoder without weights."""
        others = {key: value for key, value in args.items() if key != "out_indices"}
        untrained: Any = _made(spec, others, model_name=options["model_name"])
        return list(untrained.feature_info.reduction())

    if "out_indices" not in args:
        args["out_indices"] = [index for index, step in enumerate(steps()) if step >= _FINEST_STEP]
    with _missing_weights() as missing:
        try:
            encoder: Any = _made(spec, args, **options)
        except UsageError as error:
            if not isinstance(error.__cause__, IndexError):
                raise
            there = steps()
            raise UsageError(
                f"{spec.model} has {len(there)} maps, at 1/{', 1/'.join(map(str, there))} of the size of an image, and "
                f"out_indices is {args['out_indices']}",
                f"choose indices from 0 to {len(there) - 1}",
            ) from None
    _check_complete(encoder, missing, spec.model)
    last = str(getattr(encoder, "output_fmt", "NCHW")).endswith("NHWC")
    model = EncoderWithHead(encoder, num_classes, encoder.feature_info.channels(), head.width, last, head.frozen)
    if config.fixed_input_size and not args.get("dynamic_img_size"):
        model.register_forward_pre_hook(_OneSize(spec.model, *_side(args, config)))
    model.register_forward_pre_hook(Fit(SMALLEST_SIDE, SMALLEST_SIDE, channels))
    return model


def _made(spec: ModelSpec, args: dict[str, Any], **options: Any) -> nn.Module:
    """Return an encoder.

    Raises:
        UsageError: for arguments that it does not take; those that are nearly ones of the head are named.
    """
    try:
        return construct(_timm().create_model, spec.model_copy(update={"args": args}), **options)
    except UsageError as error:
        similar = [f"{key}{hint}" for key in args if (hint := did_you_mean(key, _HeadArgs.model_fields))]
        if not similar or not isinstance(error.__cause__, TypeError):
            raise
        raise UsageError(
            error.what, f"{similar[0]} Arguments of the head: {', '.join(_HeadArgs.model_fields)}"
        ) from None


@contextmanager
def _missing_weights() -> Iterator[list[str]]:
    """Yield a list that gets the names of the weights that timm does not find, which it only logs.

    What an encoder does not use of the weights, those of the classifier, is not printed.
    """
    logger, missing = logging.getLogger("timm.models._builder"), list[str]()
    set_to, shown = logger.level, logger.getEffectiveLevel()

    def other(record: logging.LogRecord) -> bool:
        message = record.getMessage()
        if message.startswith("Missing keys ("):
            missing.extend(message.partition("(")[2].partition(")")[0].split(", "))
        return record.levelno >= shown and not message.startswith("Unexpected keys")

    logger.addFilter(other)
    logger.setLevel(logging.INFO)
    try:
        yield missing
    finally:
        logger.setLevel(set_to)
        logger.removeFilter(other)


def _check_complete(encoder: nn.Module, missing: list[str], model: str) -> None:
    """Check that no weights of an encoder were missing.

    Raises:
        MismatchError: if some were.
    """
    # timm writes `layer1_0` in the names of some encoders for `layer1.0` in those of their networks.
    used = {name.replace(".", "_") for name in encoder.state_dict()}
    lacking = [name for name in missing if name.replace(".", "_") in used]
    if lacking:
        raise MismatchError(
            f"the file with the weights of {model} lacks {counted(len(lacking), 'tensor')} of the encoder, such as "
            f"{lacking[0]}",
            "download the file again",
        )


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

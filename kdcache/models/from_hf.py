"""`hf:FOLDER`: image classifiers of the library transformers, an optional extra, as `save_pretrained` wrote them.

Nothing is downloaded, and no code in the folder is run: the configuration names one of the library's own networks.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import nn

from kdcache.config.schema import ModelSpec, Transform
from kdcache.data.transforms import build_transform
from kdcache.errors import CorruptError, KdcacheError, MismatchError, UsageError
from kdcache.models.construct import SMALLEST_SIDE, Fit, check_channels, construct
from kdcache.runtime.progress import Progress, Silent

CONFIG, PROCESSOR = "config.json", "preprocessor_config.json"

_INTERPOLATIONS = {0: "nearest", 1: "lanczos", 2: "bilinear", 3: "bicubic", 4: "box", 5: "hamming"}
"""torchvision's names of Pillow's numbers."""

_COMPARED = ((300, 400), (257, 199), (96, 96))
"""Heights and widths of the images on which a transform is compared with the processor that it is translated from."""

_MEAN_ERROR, _LARGEST_ERROR = 0.5, 4.0
"""How far they may differ, in levels of 8-bit images: Pillow and torch round resized pixels differently."""


def build(
    folder: str, spec: ModelSpec, num_classes: int, channels: int, trained: bool, progress: Progress | None
) -> nn.Module:
    """Build a network from its folder; with the weights there if it is to be trained already, and `weights` is not set.

    Raises:
        KdcacheError: without transformers, for a folder that does not hold an image classifier, or weights of other
            classes.
    """
    config = _config(folder)
    unknown = [key for key in spec.args if not hasattr(config, key)]
    if unknown:
        raise UsageError(
            f"the configuration of {spec.model} has no {', '.join(unknown)}",
            f"set in `args:` only what {Path(folder) / CONFIG} has",
        )
    for key, value in spec.args.items():
        setattr(config, key, value)
    check_channels(spec, channels, getattr(config, "num_channels", 3))
    own_weights = trained and spec.weights is None
    if not own_weights:
        config.num_labels = num_classes
    elif config.num_labels != num_classes:
        raise MismatchError(
            f"{spec.model} has {config.num_labels} classes, the data set has {num_classes}",
            "use a data set of the teacher's classes, say in teacher.classes which outputs stand for these, or give a "
            "checkpoint that was trained on this data set (`weights:`)",
        )
    kind = _transformers().AutoModelForImageClassification
    with _quiet():
        if own_weights:
            model = _pretrained(kind, spec, folder, config, progress or Silent())
        else:
            model = construct(kind.from_config, spec.model_copy(update={"args": {}}), config=config)
    model.float()
    side = getattr(config, "image_size", None) or SMALLEST_SIDE
    height, width = (side, side) if isinstance(side, int) else side
    model.register_forward_pre_hook(Fit(height, width, getattr(config, "num_channels", 3)))
    return model


def outputs(folder: str) -> int:
    """Return how many classes the network of a folder has."""
    return int(_config(folder).num_labels)


def categories(folder: str) -> list[str] | None:
    """Return the names of its classes; None if the folder does not have them."""
    names = _config(folder).id2label
    ordered = [str(names[index]) for index in range(len(names))]
    return None if all(name == f"LABEL_{index}" for index, name in enumerate(ordered)) else ordered


def preset(folder: str) -> Transform:
    """Return what the folder's image processor does with an image, as data.

    The transform is compared with the processor on a few images.

    Raises:
        UsageError: if there is no processor, or torchvision's transforms have nothing like it.
    """
    path = Path(folder) / PROCESSOR
    if not path.is_file():
        raise UsageError(
            f"{folder} has no {PROCESSOR}: it does not say how its images are prepared",
            "say in `transform` what the teacher is to see",
        )
    try:
        processor = _transformers().AutoImageProcessor.from_pretrained(
            folder, local_files_only=True, trust_remote_code=False
        )
        settings = processor.to_dict()
    except Exception as error:  # whatever a file of another version or kind makes transformers stumble over
        raise UsageError(
            f"cannot read the image processor {path}: {_first_line(error)}",
            "say in `transform` what the teacher is to see",
        ) from error
    reasons = []
    for transform in _candidates(settings):
        reason = _difference(transform, processor, settings)
        if reason is None:
            return transform
        reasons.append(reason)
    raise UsageError(
        f"{type(processor).__name__} of {folder} prepares images as no transform of torchvision does: "
        f"{reasons[0] if reasons else 'its settings are not known'}",
        "say in `transform` what the teacher is to see",
    )


def _candidates(settings: dict[str, Any]) -> Iterator[Transform]:
    """Yield transforms that a processor may mean by its settings: some resize in their own way."""
    interpolation = _INTERPOLATIONS.get(int(settings.get("resample") or 0), "bilinear")
    crop = settings.get("crop_size") or {}
    crops: Transform = []
    if settings.get("do_center_crop") and {"height", "width"} <= crop.keys():
        crops = [{"CenterCrop": {"size": [crop["height"], crop["width"]]}}]
    for size, own_crop in _sizes(settings):
        resize: Transform = [{"Resize": {"size": size, "interpolation": interpolation}}] if size else []
        cut = crops if own_crop is None else [{"CenterCrop": {"size": own_crop}}]
        values = _values(settings)
        yield [{"ToImage": {}}, *resize, *cut, *values]
        yield [*resize, *cut, {"ToImage": {}}, *values]


def _sizes(settings: dict[str, Any]) -> Iterator[tuple[list[int] | None, list[int] | None]]:
    """Yield what images are resized to, and to what they are then cropped if not as the settings have it."""
    size = settings.get("size") or {}
    if not settings.get("do_resize"):
        yield None, None
    elif {"height", "width"} <= size.keys():
        yield [size["height"], size["width"]], None
    elif "shortest_edge" in size:
        side = int(size["shortest_edge"])
        if share := settings.get("crop_pct"):
            yield [int(side / share)], [side, side]  # ConvNext, small
            yield [side, side], None  # ConvNext, large
            yield [int(side / share)], None  # PoolFormer
        yield [side], None
        yield [int(256 / 224 * side)], None  # LeViT


def _values(settings: dict[str, Any]) -> Transform:
    """Return the steps that make numbers of pixels: scaling and normalization in one."""
    # Pixels / 255 are what ToDtype makes; everything that follows is (x - mean) / std of these.
    factor = 255 * settings.get("rescale_factor", 1 / 255) if settings.get("do_rescale") else 255.0
    offset = 1.0 if settings.get("rescale_offset") else 0.0
    mean, std = [0.0] * 3, [1.0] * 3
    if settings.get("do_normalize"):
        mean, std = list(settings["image_mean"]), list(settings["image_std"])
    means = [(value + offset) / factor for value in mean]
    # EfficientNet with `include_top` divides by the deviations once more.
    stds = [value ** (2 if settings.get("include_top") else 1) / factor for value in std]
    steps: Transform = [{"ToDtype": {"dtype": "float32", "scale": True}}]
    if any(means) or any(abs(value - 1) > 1e-9 for value in stds):
        steps.append({"Normalize": {"mean": means, "std": stds}})
    return steps


def _difference(transform: Transform, processor: Any, settings: dict[str, Any]) -> str | None:
    """Return how a transform differs from the processor on some images; None if it does not."""
    level = max(1.0, *(1 / value for value in settings.get("image_std") or [1.0])) / 255
    for height, width in _COMPARED:
        image = _image(height, width)
        try:
            wanted = torch.as_tensor(np.asarray(processor(images=image, return_tensors="np")["pixel_values"][0]))
            made = build_transform(transform)(image)
        except (KdcacheError, RuntimeError, ValueError, TypeError, KeyError) as error:
            return _first_line(error)
        if made.shape != wanted.shape:
            return f"images {list(wanted.shape)}, where a transform makes {list(made.shape)}"
        errors = (made - wanted).abs() / level
        if errors.mean() > _MEAN_ERROR or errors.max() > _LARGEST_ERROR:
            return f"pixels {errors.mean():.1f} levels from those of a transform"
    return None


def _image(height: int, width: int) -> Image.Image:
    """Return an image of smooth colors with some noise."""
    rows, columns = np.mgrid[0:height, 0:width]
    waves = [np.sin(rows / 17 + channel) * np.cos(columns / 23 - channel) for channel in range(3)]
    noise = np.random.default_rng(0).normal(size=(height, width, 3))
    return Image.fromarray((127 + 90 * np.stack(waves, axis=2) + 10 * noise).clip(0, 255).astype(np.uint8))


def _config(folder: str) -> Any:
    """Return the configuration of a folder.

    Raises:
        UsageError: without transformers, or a folder that does not hold an image classifier of it.
        CorruptError: if its configuration cannot be read.
    """
    path = Path(folder) / CONFIG
    if not path.is_file():
        raise UsageError(
            f"there is no {path}",
            "give a folder that save_pretrained wrote; from the Hugging Face Hub: hf download NAME --local-dir FOLDER",
        )
    library = _transformers()
    try:
        stored = json.loads(path.read_text(encoding="utf-8"))
        kind = stored["model_type"] if isinstance(stored, dict) else None
    except (ValueError, KeyError) as error:
        raise CorruptError(
            f"cannot read {path}: it is not the configuration of a network of transformers ({_first_line(error)})",
            "give a folder that save_pretrained of a transformers network wrote; a network of timm is timm:NAME",
        ) from None
    try:
        config = library.AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # of unknown types, and of values that its classes refuse
        raise UsageError(
            f"transformers cannot read {path}: {_first_line(error)}",
            "take a network that transformers knows without code of its own, or a newer transformers",
        ) from error
    if type(config) not in library.MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING:
        raise UsageError(
            f"{folder} holds a {kind} network, which is not an image classifier", "give the folder of one that is"
        )
    return config


def _pretrained(kind: Any, spec: ModelSpec, folder: str, config: Any, progress: Progress) -> nn.Module:
    """Return the network with the weights of its folder, every one of them."""
    try:
        model, report = kind.from_pretrained(
            folder, config=config, local_files_only=True, trust_remote_code=False, output_loading_info=True
        )
    except Exception as error:  # of weights that are missing, damaged or of other shapes
        raise MismatchError(
            f"the weights of {spec.model} cannot be loaded: {_first_line(error)}",
            "get the folder again, with config.json and all weights; for other weights set `weights:`",
        ) from error
    lacking = sorted(report.get("missing_keys", ()))
    if lacking:
        raise MismatchError(
            f"the weights of {spec.model} lack {', '.join(lacking[:3])}{' and others' if len(lacking) > 3 else ''}",
            "give the folder of a network that was trained to classify, or set `weights:`",
        )
    if unused := sorted(report.get("unexpected_keys", ())):
        progress.say(f"note: weights of {spec.model} that it does not use: {', '.join(unused[:3])}")
    return model  # type: ignore[no-any-return]  # transformers is loaded by name


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep transformers from drawing progress bars and tables."""
    logging = import_module("transformers.utils.logging")
    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity(logging.CRITICAL)
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()


def _transformers() -> Any:
    try:
        return import_module("transformers")
    except ImportError:
        raise UsageError(
            "`hf:` networks need the library transformers", "pip install 'kdcache[transformers]'"
        ) from None


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0] if lines else ''}"

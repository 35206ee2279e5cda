"""Build `hf:FOLDER`: networks of transformers, an optional extra, from folders of `save_pretrained`.

They are image classifiers and networks of semantic segmentation, whose logits are a map [B, C, h, w]. Nothing is
downloaded, and no code in the folder is run: the configuration names a network of the library.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple

from torch import nn

from kdcache.config.schema import ModelSpec
from kdcache.config.transform import Transform
from kdcache.errors import CorruptError, MismatchError, UsageError
from kdcache.models.checkpoints import FOLDER_FILES, some
from kdcache.models.construct import SMALLEST_SIDE, Fit, check_channels, construct
from kdcache.models.hf_processors import transform_of
from kdcache.runtime.paths import expand
from kdcache.runtime.progress import Progress, Silent
from kdcache.runtime.transformers_library import first_line, library, quiet

CONFIG, PROCESSOR = "config.json", "preprocessor_config.json"


class _Task(NamedTuple):
    """What a network of transformers is for.

    Attributes:
        auto: the library's class that builds such networks.
        mapping: the library's list of their configurations.
    """

    auto: str
    mapping: str


_CLASSIFICATION = _Task("AutoModelForImageClassification", "MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING")
_SEGMENTATION = _Task("AutoModelForSemanticSegmentation", "MODEL_FOR_SEMANTIC_SEGMENTATION_MAPPING")
_TASKS = (_CLASSIFICATION, _SEGMENTATION)


def build(
    folder: str, spec: ModelSpec, num_classes: int, channels: int, trained: bool, progress: Progress | None
) -> nn.Module:
    """Build a network from its folder; with its weights if `trained`, and `weights` is not set.

    Raises:
        KdcacheError: without transformers, for a folder that does not hold an image classifier, or weights of other
            classes.
    """
    config = _config(folder)
    unknown = [key for key in spec.args if not hasattr(config, key)]
    if unknown:
        raise UsageError(
            f"the configuration of {spec.model} has no {', '.join(unknown)}",
            f"set only keys of {Path(folder) / CONFIG} in `args:`",
        )
    for key, value in spec.args.items():
        setattr(config, key, value)
    check_channels(spec, channels, getattr(config, "num_channels", 3))
    source = weights_folder(spec) if trained else None
    if not trained or spec.weights is not None:
        config.num_labels = num_classes
    elif config.num_labels != num_classes:
        raise MismatchError(
            f"{spec.model} has {config.num_labels} classes, the data set has {num_classes}",
            "use a data set with the teacher's classes, map them with teacher.classes, or give a checkpoint that was "
            "trained on this data set (`weights:`)",
        )
    kind = getattr(library(), _task(config).auto)
    with quiet():
        if source is not None:
            model = pretrained(kind, source, config, progress or Silent())
        else:
            model = construct(kind.from_config, spec.model_copy(update={"args": {}}), config=config)
    model.float()
    side = getattr(config, "image_size", None) or SMALLEST_SIDE
    height, width = (side, side) if isinstance(side, int) else side
    model.register_forward_pre_hook(Fit(height, width, getattr(config, "num_channels", 3)))
    return model


def weights_folder(spec: ModelSpec) -> Path | None:
    """Return the folder from which transformers reads the weights: the network's, or that of `weights`.

    None if `weights` is another checkpoint, such as a run of kdcache. Files of transformers may have other keys than
    its networks; only the library can convert them.
    """
    if spec.weights is None:
        return expand(spec.model.partition(":")[2])
    path = expand(spec.weights)
    folder = path.parent if path.name in FOLDER_FILES else path
    return folder if (folder / CONFIG).is_file() else None


def outputs(folder: str) -> int:
    """Return the number of classes of the network of a folder."""
    return int(_config(folder).num_labels)


def categories(folder: str) -> list[str] | None:
    """Return the names of its classes; None if the folder does not have them."""
    names = _config(folder).id2label
    ordered = [str(names[index]) for index in range(len(names))]
    return None if all(name == f"LABEL_{index}" for index, name in enumerate(ordered)) else ordered


def preset(folder: str) -> Transform:
    """Return the transform of the folder's image processor.

    The transform is compared with the processor on a few images.

    Raises:
        UsageError: if the processor does not exist, or torchvision's transforms cannot express it.
    """
    path = Path(folder) / PROCESSOR
    if not path.is_file():
        raise UsageError(
            f"{folder} has no {PROCESSOR}: the transform of its images is not known",
            "set `transform` to that of the teacher's images",
        )
    try:
        processor = library().AutoImageProcessor.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        settings = processor.to_dict()
    except Exception as error:  # transformers raises errors of many types for files of other versions
        raise UsageError(
            f"cannot read the image processor {path}: {first_line(error)}",
            "set `transform` to that of the teacher's images",
        ) from error
    return transform_of(processor, settings, folder)


def _task(config: Any) -> _Task:
    """Return what the network of a configuration is for: some types have networks of both kinds."""
    names = getattr(config, "architectures", None) or []
    if any(name.endswith("ForSemanticSegmentation") for name in names):
        return _SEGMENTATION
    return next(task for task in _TASKS if type(config) in getattr(library(), task.mapping))


def _config(folder: str) -> Any:
    """Return the configuration of a folder with a network of images; see `configuration`."""
    mappings = tuple(task.mapping for task in _TASKS)
    return configuration(folder, mappings, "an image classifier or a network of semantic segmentation")


def configuration(folder: str, mappings: tuple[str, ...], what: str) -> Any:
    """Return the configuration of a folder.

    Args:
        folder: that `save_pretrained` wrote.
        mappings: names of the mappings of transformers that list the configurations of such networks.
        what: what such a network is called.

    Raises:
        UsageError: without transformers, or for a folder that does not hold such a network of it.
        CorruptError: if its configuration cannot be read.
    """
    path = expand(folder) / CONFIG
    if not path.is_file():
        raise UsageError(
            f"file not found: {path}",
            "give a folder that save_pretrained wrote; from the Hugging Face Hub: hf download NAME --local-dir FOLDER",
        )
    transformers = library()
    try:
        stored = json.loads(path.read_text(encoding="utf-8"))
        kind = stored["model_type"] if isinstance(stored, dict) else None
    except (ValueError, KeyError) as error:
        raise CorruptError(
            f"cannot read {path}: it is not the configuration of a network of transformers ({first_line(error)})",
            "give a folder that save_pretrained of a transformers network wrote; a network of timm is timm:NAME",
        ) from None
    try:
        config = transformers.AutoConfig.from_pretrained(path.parent, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # for unknown types, and for values that its classes refuse
        raise UsageError(
            f"transformers cannot read {path}: {first_line(error)}",
            "use a network that does not need custom code, or a newer version of transformers",
        ) from error
    if not any(type(config) in getattr(transformers, mapping) for mapping in mappings):
        raise UsageError(f"{folder} holds a {kind} network, which is not {what}", "give the folder of one that is")
    return config


def pretrained(kind: Any, folder: Path, config: Any, progress: Progress) -> nn.Module:
    """Return the network with all weights of a folder.

    Args:
        kind: one of the library's classes that build networks, such as AutoModelForCausalLM.
        folder: with the weights.
        config: of the network.
        progress: progress reporter, for a note about weights that the network does not use.

    Raises:
        MismatchError: for weights that are missing, damaged or of other shapes.
    """
    try:
        model, report = kind.from_pretrained(
            folder,
            config=config,
            local_files_only=True,
            trust_remote_code=False,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # so that they can be named
        )
    except Exception as error:  # for weights that are missing or damaged
        raise MismatchError(
            f"the weights in {folder} cannot be loaded: {first_line(error)}",
            "get the folder again, with config.json and all weights; for other weights set `weights:`",
        ) from error
    lacking = sorted(report.get("missing_keys", ()))
    shapes = [f"{key} {list(one)}, the network has {list(other)}" for key, one, other in report["mismatched_keys"]]
    if lacking or shapes:
        problems = [*some("missing", lacking), *some("of another shape", sorted(shapes))]
        raise MismatchError(
            "\n  ".join([f"the weights in {folder} do not fit the network:", *problems]),
            "give the folder of a network that was trained on these classes, and check `args:`",
        )
    if unused := sorted(report.get("unexpected_keys", ())):
        progress.say(f"note: weights in {folder} that the network does not use: {', '.join(unused[:3])}")
    return model  # type: ignore[no-any-return]  # transformers is loaded by name

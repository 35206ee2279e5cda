"""ml-dr's reinforcements: one file per image, with the crop, the flip and a few probabilities of each of its samples.

The files FOLDER/NUMBER.pth.tar, with the number of the training image, are written by torch.save:

    (NUMBER, [{"params": [(top, left, height, width), flip], "prob": ([k probabilities], [k classes])}, ...])

with boxes in pixels; `params` may also be a dict from the names of the transforms to the parameters of (the image, its
partner in mixing). FOLDER/config.pth.tar states the transforms with size and normalization. Reinforcement v is view v.

Samples that RandAugment, RandomErasing, MixUp or CutMix has changed can only be replayed by ml-dr's own code, and are
refused; samples that these have left unchanged are accepted.

Its files are pickles of protocol 4, which torch's `weights_only` does not read. They are read here by Python's own
unpickler without any globals, so that nothing can be called and memory is bounded by the file. Files are written with
protocol 2.

Source: github.com/apple/ml-dr at a21113c, reinforce.py (writer), dr/data.py, dr/transforms.py, dr/utils.py (readers).
"""

from __future__ import annotations

import io
import pickle
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch

from kdcache.cache.format.recorded_views import CROP, wrong_boxes
from kdcache.config.transform import Transform
from kdcache.curate.foreign.fkd import load_plain
from kdcache.curate.foreign.sparse_labels import OpenedSource, SparseSoftLabels, check_first, check_rows, malformed
from kdcache.data.samples import Samples
from kdcache.errors import MismatchError, UsageError

CONFIG = "config.pth.tar"
_CROP, _FLIP = "random_resized_crop", "random_horizontal_flip"
_MIXING = ("mixup", "cutmix")
_WITH_PARAMETERS = (_CROP, _FLIP, "rand_augment", "random_erase", *_MIXING)
"""In the order of compressed parameters."""

_WITHOUT_PARAMETERS = {"uint8", "to_tensor", "normalize"}
_MAX_BYTES = 2**26
_NESTED = (list, tuple, dict, set, frozenset)


class _PlainUnpickler(pickle._Unpickler):
    """An unpickler of lists, tuples, dicts, strings and numbers, without globals.

    It is the Python implementation, whose memo is a dict; the C implementation allocates a memo of a size that the file
    states. BYTEARRAY8 is left out because it allocates before it reads.
    """

    dispatch: ClassVar[dict[int, Any]] = {
        code: load for code, load in pickle._Unpickler.dispatch.items() if code != pickle.BYTEARRAY8[0]
    }

    def find_class(self, module: str, name: str) -> Any:
        raise pickle.UnpicklingError(f"{module}.{name} is not plain data")

    def persistent_load(self, pid: Any) -> Any:
        raise pickle.UnpicklingError("a persistent reference is not plain data")


@dataclass(frozen=True)
class MLDRFiles:
    """The files of ml-dr in a folder; `steps` are the random transforms, in their order."""

    folder: Path
    num_classes: int
    steps: tuple[str, ...]
    views: int
    top_k: int
    by_sample: bool = True

    def read(self, names: Sequence[str], views: Sequence[int]) -> SparseSoftLabels:
        """See `SoftLabelSource`."""
        of_samples = [self._read_sample(name) for name in names]
        return SparseSoftLabels(*(np.stack(values, axis=1)[list(views)] for values in zip(*of_samples, strict=True)))

    def _read_sample(self, name: str) -> SparseSoftLabels:
        """Read and check the file of one sample, as arrays [V, ...]."""
        path = self.folder / name
        number, reinforcements = _read(path)
        if name != name_of(number):
            raise malformed(path, f"is of sample {number}")
        if len(reinforcements) != self.views:
            raise malformed(path, f"holds {len(reinforcements)} reinforcements, the first file has {self.views}")
        # A pickle may refer to one list many times, so that a small file holds any number of values.
        if self.views * self.top_k > path.stat().st_size:
            raise malformed(path, f"is too small for {self.views} reinforcements of {self.top_k} classes")
        boxes = np.array(
            [_box(path, view, reinforcement, self.steps) for view, reinforcement in enumerate(reinforcements)],
            np.float32,
        )
        if (wrong := wrong_boxes(boxes, "pixels")).any():
            raise malformed(path, f"holds {boxes[wrong.argmax()].tolist()}, which is not a box in pixels")
        try:
            pairs = [reinforcement["prob"] for reinforcement in reinforcements]
            parts = [part for pair_values, pair_classes in pairs for part in (pair_values, pair_classes)]
            if any(len(part) != self.top_k or any(isinstance(value, _NESTED) for value in part) for part in parts):
                raise ValueError("not a list of that many numbers")
            probabilities = np.array([values for values, _ in pairs], np.float32)
            classes = np.array([indices for _, indices in pairs])
        except (ValueError, TypeError, OverflowError, KeyError):
            probabilities, classes = np.empty(0, np.float32), np.empty(0)
        if not probabilities.shape == classes.shape == (self.views, self.top_k) or classes.dtype.kind != "i":
            raise malformed(
                path, f"does not hold {self.top_k} probabilities and classes per reinforcement, as the first file"
            )
        check_rows(path, probabilities, classes.astype(np.int64), self.num_classes)
        return SparseSoftLabels(probabilities, classes.astype(np.int64), boxes)


def name_of(number: int) -> str:
    """Return the name of the file of a sample."""
    return f"{number}.pth.tar"


def open_ml_dr(folder: Path, samples: Samples) -> OpenedSource:
    """Open the files of the images of a data set, and read the transform from the config.

    Raises:
        KdcacheError: if there is no config, its transform does not start with a random resized crop, or the number of
            files is not that of the images.
    """
    check_first(folder, CONFIG, "ml-dr")
    config = load_plain(folder / CONFIG)
    try:
        steps = {
            name: {key: value for key, value in given.items() if key != "enable"}
            for name, given in config["reinforce"]["image_augmentation"].items()
            if given.get("enable", True)
        }
        crop = {key: value for key, value in steps.get(_CROP, {}).items() if key in ("size", "interpolation")}
    except (KeyError, TypeError, AttributeError):
        raise malformed(folder / CONFIG, "does not state the augmentation") from None
    others = sorted(steps.keys() - _WITHOUT_PARAMETERS - set(_WITH_PARAMETERS))
    if "size" not in crop or others:
        raise UsageError(
            f"{folder / CONFIG} has the transforms {', '.join(steps)}: only random_resized_crop as the first step can "
            "be replayed",
            f"reinforce the data set with random_resized_crop{', and without ' if others else ''}{', '.join(others)}",
        )
    names = [name_of(number) for number in range(len(samples))]
    if (folder / name_of(len(samples))).exists() or not (folder / names[-1]).exists():
        raise MismatchError(
            f"{samples.name}/{samples.split} has {len(samples)} images, but {folder} has another number of files: "
            "ml-dr numbers all training images",
            "use the data set that was reinforced; if it is this one, hold nothing out: --set "
            "dataset.validation_fraction=0 and dataset.test_fraction=0",
        )
    random_steps = tuple(name for name in _WITH_PARAMETERS if name in steps)
    number, reinforcements = _read(folder / names[0])
    try:
        top_k = len(reinforcements[0]["prob"][0])
    except (KeyError, TypeError, IndexError):
        raise malformed(folder / names[0], f"holds no probabilities of sample {number}") from None
    source = MLDRFiles(folder.absolute(), samples.num_classes, random_steps, len(reinforcements), top_k)
    source.read(names[:1], range(len(reinforcements)))
    return OpenedSource(source, names, _transform(crop, steps))


def _transform(crop: dict[str, Any], steps: dict[str, Any]) -> Transform:
    """Return the transform of ml-dr's reader, in terms of torchvision v2."""
    transform: Transform = [
        {CROP: {**crop, "unit": "pixels"}},
        {"ToImage": {}},
        {"ToDtype": {"dtype": "float32", "scale": True}},
    ]
    return [*transform, {"Normalize": dict(steps["normalize"])}] if "normalize" in steps else transform


def _read(path: Path) -> tuple[int, list[Any]]:
    """Read (number, reinforcements) from a file; the reinforcements are not checked yet."""
    if not path.is_file():
        raise malformed(path, "is missing")
    try:
        with zipfile.ZipFile(path) as packed:
            (member,) = (info for info in packed.infolist() if info.filename.endswith("/data.pkl"))
            if member.file_size > min(_MAX_BYTES, path.stat().st_size):  # torch.save does not compress
                raise ValueError("too large")
            content = _PlainUnpickler(io.BytesIO(packed.read(member))).load()
    except Exception as error:  # zipfile and pickle raise many kinds of errors for damaged files
        raise malformed(
            path, f"cannot be read ({type(error).__name__}): it is damaged, was written by joblib, or is not plain data"
        ) from error
    is_pair = isinstance(content, tuple) and len(content) == 2 and type(content[0]) is int
    is_pair = is_pair and isinstance(content[1], list)
    if not (is_pair and 0 <= content[0] < 2**63):
        raise malformed(path, "does not hold a number and a list of reinforcements")
    if not content[1]:
        raise malformed(path, "holds no reinforcement")
    return content[0], content[1]


def _box(path: Path, view: int, reinforcement: Any, steps: tuple[str, ...]) -> list[float]:
    """Return [top, left, height, width, flip] of a reinforcement, and check that other steps have changed nothing."""
    try:
        values = _own_parameters(reinforcement["params"], steps)
        crop, flip = values[_CROP], values.get(_FLIP, False)
        box = [float(side) for side in crop]
        valid = all(side == int(side) for side in crop) and len(box) == 4 and flip in (True, False)
    except (KeyError, TypeError, ValueError, IndexError, OverflowError):
        valid = False
    if not valid:
        raise malformed(path, f"holds parameters for reinforcement {view} that do not fit {', '.join(steps)}")
    for name in steps[1:]:
        value = values.get(name)
        skipped = name == "random_erase" and isinstance(value, list | tuple) and [*value[:1]] == [-1]
        if name != _FLIP and value is not None and not skipped:
            raise UsageError(
                f"reinforcement {view} in {path} was changed by {name}, which only ml-dr's own code can replay",
                "reinforce the data set with random_resized_crop and random_horizontal_flip alone",
            )
    return [*box, float(flip)]


def _own_parameters(params: Any, steps: tuple[str, ...]) -> dict[str, Any]:
    """Return the parameters of the image itself by step, without those of its partner; None for a skipped step."""
    mixes = any(name in _MIXING for name in steps)
    if isinstance(params, dict):
        given = ((name, params.get(name)) for name in steps)
        return {name: value if name in _MIXING or value is None else value[0] for name, value in given}
    partner = params[0] if mixes else None
    listed = zip(steps, params[1:] if mixes else params, strict=True)
    return {
        name: value[0] if partner is not None and name not in _MIXING and value is not None else value
        for name, value in listed
    }


def write(path: Path, number: int, soft_labels: SparseSoftLabels) -> None:
    """Write the file of one sample, from arrays [V, ...]."""
    reinforcements = [
        {
            "params": [tuple(int(side) for side in box[:4]), bool(box[4])],
            "prob": (_below_one(values).tolist(), classes.tolist()),
        }
        for values, classes, box in zip(*soft_labels, strict=True)
    ]
    # Not protocol 4, which ml-dr uses: torch reads it only with arbitrary code allowed.
    torch.save((number, reinforcements), path)


def _below_one(probabilities: Any) -> Any:
    """Scale probabilities until their float32 sum is at most 1: the reader applies a softmax to larger ones."""
    values = torch.from_numpy(probabilities)
    while values.sum() > 1:
        values = values * (1 - 2.0**-20)
    return values


def write_config(
    folder: Path, samples: Samples, views: int, top_k: int, size: list[int], normal: dict[str, Any]
) -> None:
    """Write the config that the readers need: transforms, number of reinforcements, top_k."""
    augmentation = {
        "uint8": {"enable": True},
        _CROP: {"enable": True, "size": size},
        _FLIP: {"enable": True, "p": 0.5},
        "to_tensor": {"enable": True},
        **({"normalize": normal} if normal else {}),
    }
    reinforce = {
        "num_samples": views,
        "num_candidates": None,
        "topk": top_k,
        "compress": True,
        "joblib": False,
        "gzip": False,
        "image_augmentation": augmentation,
    }
    config = {"dataset": samples.name, "num_classes": samples.num_classes, "reinforce": reinforce}
    torch.save(config, folder / CONFIG)

"""ml-dr's reinforcements: a file an image, with the crop, the flip and a few probabilities of each of its samples.

FOLDER/NUMBER.pth.tar, numbered as the training images are, is what torch.save made of

    (NUMBER, [{"params": [(top, left, height, width), flip], "prob": ([k probabilities], [k classes])}, ...])

with boxes in pixels; `params` may also be a dict of (this image's, its partner's) by the names of the transforms.
FOLDER/config.pth.tar says which transforms these are, at what size, how normalized. Reinforcement v is view v.

What RandAugment, RandomErasing, MixUp or CutMix has changed as well could only be drawn by ml-dr's own code, and is
refused; where they left a sample alone it is taken.

Its files are pickles of protocol 4, which torch's `weights_only` does not read: they are read here with no name that a
pickle could call, by Python's own reader, whose memory is bounded by the file. Those written here are of protocol 2.

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
from kdcache.config.schema import Transform
from kdcache.curate.foreign.fkd import loaded
from kdcache.curate.foreign.sparse_labels import Opened, SparseSoftLabels, check_first, checked, refused
from kdcache.data.samples import Samples
from kdcache.errors import MismatchError, UsageError

CONFIG = "config.pth.tar"
_CROP, _FLIP = "random_resized_crop", "random_horizontal_flip"
_MIXING = ("mixup", "cutmix")
_WITH_PARAMETERS = (_CROP, _FLIP, "rand_augment", "random_erase", *_MIXING)
"""In the order in which compressed parameters have them."""

_WITHOUT = {"uint8", "to_tensor", "normalize"}
_LARGEST = 2**26
_NESTED = (list, tuple, dict, set, frozenset)


class _Plain(pickle._Unpickler):
    """Lists, tuples, dicts, strings and numbers: no name of any module can be found.

    Python's own, for which a number in the file is a key, where C's makes a table as long as a number says; without the
    one kind of bytes that it makes room for before it has looked how many there are.
    """

    dispatch: ClassVar[dict[int, Any]] = {
        code: load for code, load in pickle._Unpickler.dispatch.items() if code != pickle.BYTEARRAY8[0]
    }

    def find_class(self, module: str, name: str) -> Any:
        raise pickle.UnpicklingError(f"{module}.{name} is not plain data")

    def persistent_load(self, pid: Any) -> Any:
        raise pickle.UnpicklingError("a reference out of the file is not plain data")


@dataclass(frozen=True)
class MLDRFiles:
    """The files of ml-dr in a folder; `steps` are the transforms that draw something, in their order."""

    folder: Path
    num_classes: int
    steps: tuple[str, ...]
    views: int
    top_k: int
    by_sample: bool = True

    def read(self, names: Sequence[str], views: Sequence[int]) -> SparseSoftLabels:
        """See `SoftLabelSource`."""
        found = [self._of_one(name) for name in names]
        return SparseSoftLabels(*(np.stack(values, axis=1)[list(views)] for values in zip(*found, strict=True)))

    def _of_one(self, name: str) -> SparseSoftLabels:
        path = self.folder / name
        number, each = _read(path)
        if name != name_of(number):
            raise refused(path, f"is of sample {number}")
        if len(each) != self.views:
            raise refused(path, f"holds {len(each)} reinforcements, the first file has {self.views}")
        # A pickle may name one list any number of times, and a file of a few bytes hold any number of numbers.
        if self.views * self.top_k > path.stat().st_size:
            raise refused(path, f"is too small for {self.views} reinforcements of {self.top_k} classes")
        boxes = np.array([_box(path, view, one, self.steps) for view, one in enumerate(each)], np.float32)
        if (wrong := wrong_boxes(boxes, "pixels")).any():
            raise refused(path, f"holds the box {boxes[wrong.argmax()].tolist()}, which is none in pixels")
        try:
            pairs = [one["prob"] for one in each]
            parts = [part for values, kept in pairs for part in (values, kept)]
            if any(len(part) != self.top_k or any(isinstance(number, _NESTED) for number in part) for part in parts):
                raise ValueError("no list of so many numbers")
            probabilities = np.array([values for values, _ in pairs], np.float32)
            classes = np.array([kept for _, kept in pairs])
        except (ValueError, TypeError, OverflowError, KeyError):
            probabilities, classes = np.empty(0, np.float32), np.empty(0)
        if not probabilities.shape == classes.shape == (self.views, self.top_k) or classes.dtype.kind != "i":
            raise refused(path, f"does not hold {self.top_k} probabilities and classes a reinforcement, as the first")
        checked(path, probabilities, classes.astype(np.int64), self.num_classes)
        return SparseSoftLabels(probabilities, classes.astype(np.int64), boxes)


def name_of(number: int) -> str:
    """The file of a sample."""
    return f"{number}.pth.tar"


def open_ml_dr(folder: Path, samples: Samples) -> Opened:
    """The files of a data set's images, and what the config says of the transform.

    Raises:
        KdcacheError: if there is no config, its transform begins otherwise than with a random resized crop, or the
            number of files is not that of the images.
    """
    check_first(folder, CONFIG, "ml-dr")
    config = loaded(folder / CONFIG)
    try:
        steps = {
            name: {key: value for key, value in given.items() if key != "enable"}
            for name, given in config["reinforce"]["image_augmentation"].items()
            if given.get("enable", True)
        }
        crop = {key: value for key, value in steps.get(_CROP, {}).items() if key in ("size", "interpolation")}
    except (KeyError, TypeError, AttributeError):
        raise refused(folder / CONFIG, "does not say what is done to an image") from None
    others = sorted(steps.keys() - _WITHOUT - set(_WITH_PARAMETERS))
    if "size" not in crop or others:
        raise UsageError(
            f"{folder / CONFIG} has the transforms {', '.join(steps)}: only crops of random_resized_crop, which are "
            "the first thing that happens to an image, can be cut again",
            f"reinforce the data set with random_resized_crop{', and without ' if others else ''}{', '.join(others)}",
        )
    names = [name_of(number) for number in range(len(samples))]
    if (folder / name_of(len(samples))).exists() or not (folder / names[-1]).exists():
        raise MismatchError(
            f"{samples.name}/{samples.split} has {len(samples)} images, and {folder} has not as many files: ml-dr "
            "numbers all training images",
            "give the data set that was reinforced; if it is this one, with nothing held out: --set "
            "dataset.validation_fraction=0 and dataset.test_fraction=0",
        )
    drawing = tuple(name for name in _WITH_PARAMETERS if name in steps)
    number, each = _read(folder / names[0])
    try:
        top_k = len(each[0]["prob"][0])
    except (KeyError, TypeError, IndexError):
        raise refused(folder / names[0], f"says nothing of sample {number}") from None
    source = MLDRFiles(folder.absolute(), samples.num_classes, drawing, len(each), top_k)
    source.read(names[:1], range(len(each)))
    return Opened(source, names, _transform(crop, steps))


def _transform(crop: dict[str, Any], steps: dict[str, Any]) -> Transform:
    """What its reader does to an image, in words of torchvision's v2."""
    shown: Transform = [
        {CROP: {**crop, "unit": "pixels"}},
        {"ToImage": {}},
        {"ToDtype": {"dtype": "float32", "scale": True}},
    ]
    return [*shown, {"Normalize": dict(steps["normalize"])}] if "normalize" in steps else shown


def _read(path: Path) -> tuple[int, list[Any]]:
    """(number, its reinforcements), of which nothing is known yet."""
    if not path.is_file():
        raise refused(path, "is missing")
    try:
        with zipfile.ZipFile(path) as packed:
            (member,) = (info for info in packed.infolist() if info.filename.endswith("/data.pkl"))
            if member.file_size > min(_LARGEST, path.stat().st_size):  # it is not compressed
                raise ValueError("too large")
            held = _Plain(io.BytesIO(packed.read(member))).load()
    except Exception as error:  # whatever the bytes of a broken file make zipfile and pickle stumble over
        raise refused(
            path, f"cannot be read ({type(error).__name__}): it is damaged, was written by joblib, or is no plain data"
        ) from error
    is_pair = isinstance(held, tuple) and len(held) == 2 and type(held[0]) is int and isinstance(held[1], list)
    if not (is_pair and 0 <= held[0] < 2**63):
        raise refused(path, "does not hold a number and a list of reinforcements")
    if not held[1]:
        raise refused(path, "holds no reinforcement")
    return held[0], held[1]


def _box(path: Path, view: int, one: Any, steps: tuple[str, ...]) -> list[float]:
    """[top, left, height, width, flip] of a reinforcement, of which the other steps have changed nothing."""
    try:
        values = _of_this_image(one["params"], steps)
        crop, flip = values[_CROP], values.get(_FLIP, False)
        box = [float(side) for side in crop]
        whole = all(side == int(side) for side in crop) and len(box) == 4 and flip in (True, False)
    except (KeyError, TypeError, ValueError, IndexError, OverflowError):
        whole = False
    if not whole:
        raise refused(path, f"holds other parameters for reinforcement {view} than {', '.join(steps)} have")
    for name in steps[1:]:
        value = values.get(name)
        spared = name == "random_erase" and isinstance(value, list | tuple) and [*value[:1]] == [-1]
        if name != _FLIP and value is not None and not spared:
            raise UsageError(
                f"reinforcement {view} in {path} was changed by {name}, which is drawn by ml-dr's own code: no student "
                "could be shown here what the teacher saw",
                "reinforce the data set with random_resized_crop and random_horizontal_flip alone",
            )
    return [*box, float(flip)]


def _of_this_image(params: Any, steps: tuple[str, ...]) -> dict[str, Any]:
    """The parameters of the image itself, without those of a partner; None of a step that was left out."""
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


def write(path: Path, number: int, said: SparseSoftLabels) -> None:
    """One file; `said` is of one sample, its arrays [V, ...]."""
    each = [
        {
            "params": [tuple(int(side) for side in box[:4]), bool(box[4])],
            "prob": (_below_one(values).tolist(), classes.tolist()),
        }
        for values, classes, box in zip(*said, strict=True)
    ]
    # Not protocol 4, which ml-dr takes and torch reads no more unless it is allowed to run what it finds.
    torch.save((number, each), path)


def _below_one(probabilities: Any) -> Any:
    """Probabilities whose sum in float32 is 1 at most: its reader takes the softmax of any that have more."""
    values = torch.from_numpy(probabilities)
    while values.sum() > 1:
        values = values * (1 - 2.0**-20)
    return values


def write_config(
    folder: Path, samples: Samples, views: int, top_k: int, size: list[int], normal: dict[str, Any]
) -> None:
    """What its readers ask of a folder: which transforms, and how many reinforcements."""
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

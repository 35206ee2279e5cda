"""FKD's soft labels: a file an image, with the box, the flip and a few probabilities of each of its crops.

FOLDER/train/CLASS/NAME.tar, as its readers' `--softlabel_path` takes the folder, is what torch.save made of

    [coords [V, 4], flips [V], output]

coords are top, left, height, width as fractions of the image's height and width, float32 or float16. output is [V, 2,
k]: classes, then their probabilities (`marginal_smoothing_k5`, `_k10`, `marginal_renorm_k5`); [V, 2]: one of each
(`smoothing`); or all probabilities [V, C]. The `hard` labels are none. Crop v of an image is view v.

The files do not say at what size, with what interpolation and normalization the crops were seen, and FKD's own students
see them otherwise than their teachers did: the transform is the user's to give. Nor do they say at what temperature
(`--temp`) the probabilities were taken; that is 1 unless its maker set it. Of a label outside the k classes the files
know no more than of any other.

Source: github.com/szq0214/FKD at afd5294, FKD/FKD_SLG/generate_soft_label.py, utils.py (writers), FKD/utils_FKD.py (the
reader, whose rounding of boxes `crops.pixels_of` has).
"""

from __future__ import annotations

import zipfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from kdcache.cache.format.recorded_views import wrong_boxes
from kdcache.curate.foreign.sparse_labels import Floats, Opened, SparseSoftLabels, check_first, checked, refused
from kdcache.data.images import FileImages
from kdcache.data.samples import Samples
from kdcache.errors import UsageError

_LARGEST = 2**30
_PARTS = 3  # of a path: the split, the class, the file


def _reconstructed(module: str) -> Callable[..., Any]:
    """NumPy's beginning of an array, under the name that one of its versions pickles it with: always an empty one."""

    def begun(kind: type, shape: tuple[int, ...], code: bytes) -> Any:
        if kind is not np.ndarray or shape != (0,):
            raise ValueError(f"an array cannot begin as {kind} {shape}")
        return np.empty(shape, np.int8)

    begun.__module__, begun.__name__, begun.__qualname__ = module, "_reconstruct", "_reconstruct"
    return begun


# What an array of numbers is pickled with; nothing of it runs anybody's code. For the process, since torch's list of
# what is safe is the process's, and files are read in several threads.
_TYPES = [type(np.dtype(code)) for code in ("f2", "f4", "f8", "i1", "i4", "i8", "u1", "?")]
torch.serialization.add_safe_globals(
    [*map(_reconstructed, ("numpy.core.multiarray", "numpy._core.multiarray")), np.ndarray, np.dtype, *_TYPES]
)


@dataclass(frozen=True)
class FKDFiles:
    """The files of FKD under a folder."""

    folder: Path
    num_classes: int
    views: int
    top_k: int
    by_sample: bool = True

    def read(self, names: Sequence[str], views: Sequence[int]) -> SparseSoftLabels:
        """See `SoftLabelSource`."""
        found = [_read(self.folder / name, self.num_classes) for name in names]
        for name, each in zip(names, found, strict=True):
            if each.probabilities.shape != (self.views, self.top_k):
                raise refused(
                    self.folder / name,
                    f"holds {len(each.recorded)} crops with {each.probabilities.shape[1]} classes each, the first file "
                    f"has {self.views} with {self.top_k}",
                )
        parts = (np.stack(values, axis=1)[list(views)] for values in zip(*found, strict=True))
        return SparseSoftLabels(*parts)


def open_fkd(folder: Path, samples: Samples) -> Opened:
    """The files of a data set's images.

    Raises:
        UsageError: if the data set has no paths.
        KdcacheError: if the file of the first image is not there or not well.
    """
    names = names_of(samples)
    check_first(folder, names[0], "FKD")
    first = _read(folder / names[0], samples.num_classes).probabilities
    return Opened(FKDFiles(folder.absolute(), samples.num_classes, *first.shape), names, None)


def names_of(samples: Samples) -> list[str]:
    """The file of each image, relative to FKD's folder: SPLIT/CLASS/NAME.tar, NAME up to its first point.

    Raises:
        UsageError: if the data set has no paths, or images that would share a file.
    """
    if not isinstance(samples.images, FileImages):
        raise UsageError(
            f"FKD's files have the names of image files, and the images of {samples.name} are in none",
            "give an image-folder or imagenet data set with --pipeline",
        )
    of_name: dict[str, str] = {}
    for path in samples.images.paths:
        *folders, file = Path(path).parts[-_PARTS:]
        name = "/".join([*folders, file.split(".")[0]]) + ".tar"
        if name in of_name:
            raise UsageError(f"{of_name[name]} and {path} have the same file in FKD's folder, {name}", "rename one")
        of_name[name] = path
    return [*of_name]


def write(path: Path, said: SparseSoftLabels) -> None:
    """One file; `said` is of one sample, its arrays [V, ...]."""
    path.parent.mkdir(parents=True, exist_ok=True)
    output = np.stack([said.classes.astype(np.float32), said.probabilities], axis=1)
    torch.save([said.recorded[:, :4].astype(np.float32), said.recorded[:, 4] > 0, output], path)


def loaded(path: Path) -> Any:
    """What torch.save made of tensors, arrays of numbers and plain values; nothing else is unpickled.

    Raises:
        CorruptError: for anything else, or a file that is not there.
    """
    if not path.is_file():
        raise refused(path, "is missing")
    if path.stat().st_size > _LARGEST:
        raise refused(path, f"is too large, {path.stat().st_size:,} bytes")
    try:
        if zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as packed:
                if sum(member.file_size for member in packed.infolist()) > path.stat().st_size:
                    raise ValueError("compressed, as torch.save never does, to any size")
        return torch.load(path, "cpu", weights_only=True)
    except Exception as error:  # whatever the bytes of a broken file make torch stumble over
        raise refused(
            path, f"cannot be read ({type(error).__name__}): it is damaged, or holds more than numbers"
        ) from error


def _read(path: Path, num_classes: int) -> SparseSoftLabels:
    """What a file says of one sample: arrays [V, ...]."""
    held = loaded(path)
    if not (isinstance(held, list | tuple) and len(held) == _PARTS):
        raise refused(path, "does not hold coords, flips and output")
    coords, flips, output = (_numbers(part) for part in held)
    # A tensor may repeat what it has, and a file of a few bytes be of any size.
    if coords.nbytes + flips.nbytes + output.nbytes > path.stat().st_size:
        raise refused(path, f"is too small for coords {coords.shape}, flips {flips.shape} and output {output.shape}")
    count = len(coords) if coords.ndim else 0
    if coords.shape != (count, 4) or flips.shape != (count,) or output.shape[:1] != (count,) or not count:
        raise refused(path, f"holds coords {coords.shape}, flips {flips.shape} and output {output.shape}")
    boxes = np.concatenate([coords, flips[:, None]], axis=1).astype(np.float32)
    if (wrong := wrong_boxes(boxes, "fraction")).any():
        raise refused(path, f"holds the box {boxes[wrong.argmax()].tolist()}, which is none in fractions of an image")
    probabilities, classes = _probabilities(path, output, num_classes)
    checked(path, probabilities, classes, num_classes)
    return SparseSoftLabels(probabilities, classes, boxes)


def _numbers(part: Any) -> npt.NDArray[Any]:
    array = part.numpy() if isinstance(part, torch.Tensor) and part.device.type == "cpu" else part
    return array if isinstance(array, np.ndarray) and array.dtype.kind in "fiub" else np.empty(0)


def _probabilities(path: Path, output: npt.NDArray[Any], num_classes: int) -> tuple[Floats, npt.NDArray[np.int64]]:
    if output.ndim == 1:
        raise UsageError(f"{path} holds hard labels, which are no probabilities", "generate soft labels with FKD")
    if output.shape[1:] == (num_classes,):
        every = np.broadcast_to(np.arange(num_classes), output.shape)
        return output.astype(np.float32), every.copy()
    if output.shape[1:2] != (2,) or output.ndim > _PARTS or not 0 < output[0, 0].size <= num_classes:
        raise refused(
            path,
            f"holds an output {output.shape}, neither [V, 2, k] with k of {num_classes} classes at most nor [V, "
            f"{num_classes}]; if all files do, the data set has another number of classes than the teacher",
        )
    pairs = output.reshape(len(output), 2, -1).astype(np.float64)
    with np.errstate(invalid="ignore"):
        classes = np.nan_to_num(pairs[:, 0], nan=-1, posinf=-1, neginf=-1)
    if (classes != np.floor(classes)).any() or (np.abs(classes) > 2**31).any():
        raise refused(path, "names classes that are no whole numbers")
    return pairs[:, 1].astype(np.float32), classes.astype(np.int64)

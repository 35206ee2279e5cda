"""FKD's soft labels: one file per image, with the box, the flip and a few probabilities of each of its crops.

The files FOLDER/train/CLASS/NAME.tar, where FOLDER is the `--softlabel_path` of its readers, are written by torch.save:

    [coords [V, 4], flips [V], output]

coords are top, left, height, width as fractions of the image's height and width, float32 or float16. output is [V, 2,
k]: classes, then their probabilities (`marginal_smoothing_k5`, `_k10`, `marginal_renorm_k5`); [V, 2]: one of each
(`smoothing`); or all probabilities [V, C]. `hard` labels are not supported. Crop v of an image is view v.

The files do not state size, interpolation and normalization of the crops, and FKD's students use others than their
teachers: the user has to configure the transform. Nor do they state the temperature of the probabilities (`--temp`);
the default is 1. The probability of a label that is not among the k classes is not stored.

Source: github.com/szq0214/FKD at afd5294, FKD/FKD_SLG/generate_soft_label.py, utils.py (writers), FKD/utils_FKD.py (the
reader; `recorded_crop.pixels_of` rounds boxes as it does).
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
from kdcache.curate.foreign.sparse_labels import (
    Floats,
    OpenedSource,
    SparseSoftLabels,
    check_first,
    check_rows,
    malformed,
)
from kdcache.data.images import FileImages
from kdcache.data.samples import Samples
from kdcache.errors import UsageError

_MAX_BYTES = 2**30
_PATH_PARTS = 3  # split, class, file
_FILE_PARTS = 3  # coords, flips, output


def _reconstructed(module: str) -> Callable[..., Any]:
    """Return a stand-in for numpy's `_reconstruct` in one of its modules; it only makes empty arrays."""

    def empty_array(kind: type, shape: tuple[int, ...], code: bytes) -> Any:
        if kind is not np.ndarray or shape != (0,):
            raise ValueError(f"an array cannot start as {kind} {shape}")
        return np.empty(shape, np.int8)

    empty_array.__module__, empty_array.__name__, empty_array.__qualname__ = module, "_reconstruct", "_reconstruct"
    return empty_array


# The globals in the pickle of a numeric array; none of them runs code from the file. They are registered for the whole
# process, because torch's list of safe globals is global, and files are read in several threads.
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
        of_samples = [_read(self.folder / name, self.num_classes) for name in names]
        for name, of_sample in zip(names, of_samples, strict=True):
            if of_sample.probabilities.shape != (self.views, self.top_k):
                raise malformed(
                    self.folder / name,
                    f"holds {len(of_sample.recorded)} crops with {of_sample.probabilities.shape[1]} classes, the first "
                    f"file has {self.views} with {self.top_k}",
                )
        parts = (np.stack(values, axis=1)[list(views)] for values in zip(*of_samples, strict=True))
        return SparseSoftLabels(*parts)


def open_fkd(folder: Path, samples: Samples) -> OpenedSource:
    """Open the files of the images of a data set.

    Raises:
        UsageError: if the data set has no paths.
        KdcacheError: if the file of the first image is missing or malformed.
    """
    names = names_of(samples)
    check_first(folder, names[0], "FKD")
    first = _read(folder / names[0], samples.num_classes).probabilities
    return OpenedSource(FKDFiles(folder.absolute(), samples.num_classes, *first.shape), names, None)


def names_of(samples: Samples) -> list[str]:
    """Return the file of each image, relative to FKD's folder: SPLIT/CLASS/NAME.tar, with NAME up to its first dot.

    Raises:
        UsageError: if the data set has no paths, or images that would share a file.
    """
    if not isinstance(samples.images, FileImages):
        raise UsageError(
            f"FKD's files are named after image files, but the images of {samples.name} are not in files",
            "pass an image-folder or imagenet data set with --pipeline",
        )
    path_by_name: dict[str, str] = {}
    for path in samples.images.paths:
        *folders, file = Path(path).parts[-_PATH_PARTS:]
        name = "/".join([*folders, file.split(".")[0]]) + ".tar"
        if name in path_by_name:
            raise UsageError(
                f"{path_by_name[name]} and {path} have the same file in FKD's folder, {name}", "rename one"
            )
        path_by_name[name] = path
    return [*path_by_name]


def write(path: Path, soft_labels: SparseSoftLabels) -> None:
    """Write the file of one sample, from arrays [V, ...]."""
    path.parent.mkdir(parents=True, exist_ok=True)
    output = np.stack([soft_labels.classes.astype(np.float32), soft_labels.probabilities], axis=1)
    torch.save([soft_labels.recorded[:, :4].astype(np.float32), soft_labels.recorded[:, 4] > 0, output], path)


def load_plain(path: Path) -> Any:
    """Load tensors, numeric arrays and plain values from a file of torch.save; nothing else is unpickled.

    Raises:
        CorruptError: if the file is missing, too large or damaged, or holds anything else.
    """
    if not path.is_file():
        raise malformed(path, "is missing")
    if path.stat().st_size > _MAX_BYTES:
        raise malformed(path, f"is too large, {path.stat().st_size:,} bytes")
    try:
        if zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as packed:
                if sum(member.file_size for member in packed.infolist()) > path.stat().st_size:
                    raise ValueError("compressed, which torch.save never does")
        return torch.load(path, "cpu", weights_only=True)
    except Exception as error:  # torch raises many kinds of errors for damaged files
        raise malformed(
            path, f"cannot be read ({type(error).__name__}): it is damaged, or holds more than numbers"
        ) from error


def _read(path: Path, num_classes: int) -> SparseSoftLabels:
    """Read the file of one sample, as arrays [V, ...]."""
    loaded = load_plain(path)
    if not (isinstance(loaded, list | tuple) and len(loaded) == _FILE_PARTS):
        raise malformed(path, "does not hold coords, flips and output")
    coords, flips, output = (_numbers(part) for part in loaded)
    # A tensor with stride 0 can have any size in a file of a few bytes.
    if coords.nbytes + flips.nbytes + output.nbytes > path.stat().st_size:
        raise malformed(path, f"is too small for coords {coords.shape}, flips {flips.shape} and output {output.shape}")
    count = len(coords) if coords.ndim else 0
    if coords.shape != (count, 4) or flips.shape != (count,) or output.shape[:1] != (count,) or not count:
        raise malformed(path, f"holds coords {coords.shape}, flips {flips.shape} and output {output.shape}")
    boxes = np.concatenate([coords, flips[:, None]], axis=1).astype(np.float32)
    if (wrong := wrong_boxes(boxes, "fraction")).any():
        raise malformed(path, f"holds {boxes[wrong.argmax()].tolist()}, which is not a box in fractions of an image")
    probabilities, classes = _probabilities(path, output, num_classes)
    check_rows(path, probabilities, classes, num_classes)
    return SparseSoftLabels(probabilities, classes, boxes)


def _numbers(part: Any) -> npt.NDArray[Any]:
    array = part.numpy() if isinstance(part, torch.Tensor) and part.device.type == "cpu" else part
    return array if isinstance(array, np.ndarray) and array.dtype.kind in "fiub" else np.empty(0)


def _probabilities(path: Path, output: npt.NDArray[Any], num_classes: int) -> tuple[Floats, npt.NDArray[np.int64]]:
    """Return (probabilities, classes), both [V, k], of an output in any of its forms."""
    if output.ndim == 1:
        raise UsageError(f"{path} holds hard labels, not probabilities", "generate soft labels with FKD")
    if output.shape[1:] == (num_classes,):
        classes = np.broadcast_to(np.arange(num_classes), output.shape)
        return output.astype(np.float32), classes.copy()
    if output.shape[1:2] != (2,) or output.ndim > 3 or not 0 < output[0, 0].size <= num_classes:
        raise malformed(
            path,
            f"holds an output {output.shape}, neither [V, 2, k] with k up to {num_classes} nor [V, {num_classes}]; if "
            "all files do, the data set has another number of classes than the teacher",
        )
    pairs = output.reshape(len(output), 2, -1).astype(np.float64)
    with np.errstate(invalid="ignore"):
        classes = np.nan_to_num(pairs[:, 0], nan=-1, posinf=-1, neginf=-1)
    if (classes != np.floor(classes)).any() or (np.abs(classes) > 2**31).any():
        raise malformed(path, "holds classes that are not integers")
    return pairs[:, 1].astype(np.float32), classes.astype(np.int64)

"""Data sets in npz files: `images` and `labels`, or `x` of any shape and `y`.

`class_names`, `groups`, `sample_names` and `privacy` are optional beside both.
"""

from __future__ import annotations

import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from kdcache.config.transform import Transform
from kdcache.data.sample_attributes import SampleAttributes, attributes_of_arrays
from kdcache.data.samples import check_labels
from kdcache.errors import CorruptError, MismatchError, UsageError

MOST_CHANNELS = 4

_WRITE_TENSORS = "write it with numpy.savez(path, x=[N, ...], y=[N]); y can be left out"


class NpzContent(NamedTuple):
    """What an npz file holds.

    Attributes:
        samples: images [N, channels, H, W], or tensors [N, ...].
        labels: [N] int32, -1 without labels.
        class_names: name of each class; () without labels.
        transform: the default one of the samples; none for tensors.
        attributes: groups, names and privacy of the samples.
    """

    samples: Tensor
    labels: npt.NDArray[np.int32]
    class_names: tuple[str, ...]
    transform: Transform
    attributes: SampleAttributes


def array_transform(mean: Sequence[float], std: Sequence[float]) -> Transform:
    """Return the steps from 8-bit pixels to normalized ones."""
    return [
        {"ToDtype": {"dtype": "float32", "scale": True}},
        {"Normalize": {"mean": list(mean), "std": list(std)}},
    ]


def read_arrays(path: Path, content: str) -> dict[str, npt.NDArray[Any]]:
    """Return the arrays of an npz file; nothing in it is unpickled.

    Args:
        path: the file.
        content: arguments of numpy.savez that write such a file, for the fix.

    Raises:
        UsageError: if there is no such file.
        CorruptError: if it cannot be read.
    """
    if not path.is_file():
        raise UsageError(f"file not found: {path}", "give the npz file: --set dataset.root=FILE")
    try:
        if not zipfile.is_zipfile(path):
            raise ValueError("it is not a zip archive, or its end is missing")
        with path.open("rb") as file, np.load(file, allow_pickle=False) as stored:
            return {name: stored[name] for name in stored.files}
    except Exception as error:  # numpy raises errors of many types for a damaged file
        raise CorruptError(
            f"cannot read {path} as an npz file: {error}", f"write it with numpy.savez(path, {content})"
        ) from error


def read_npz(path: Path) -> NpzContent:
    """Return the content of an npz file with `images` and `labels`, or `x` and optionally `y`.

    Raises:
        UsageError: if it holds other arrays, or arrays of other types or shapes.
        MismatchError: if the numbers of samples and labels differ, or a label is out of range.
        CorruptError: if it cannot be read.
    """
    arrays = read_arrays(path, "images=..., labels=...")
    if "x" in arrays:
        return _tensors(path, arrays)
    if "images" not in arrays or "labels" not in arrays:
        raise UsageError(
            f"{path} holds {', '.join(sorted(arrays)) or 'nothing'}, not images and labels",
            "write it with numpy.savez(path, images=[N, H, W] or [N, H, W, channels], labels=[N]); for samples that "
            "are not images x=[N, ...], and if you have labels y=[N]",
        )
    images, labels = arrays["images"], arrays["labels"]
    if images.ndim not in (3, 4) or images.dtype != np.uint8 or labels.ndim != 1 or labels.dtype.kind not in "iu":
        raise UsageError(
            f"{path} has images {list(images.shape)} {images.dtype} and labels {list(labels.shape)} {labels.dtype}",
            "images must be uint8 [N, H, W] or [N, H, W, channels], labels integers [N]",
        )
    if len(images) != len(labels):
        raise MismatchError(f"{path} has {len(images)} images and {len(labels)} labels", "give one label per image")
    names = _class_names(path, arrays.get("class_names"), labels)
    if images.ndim == 3:
        images = images[..., None]
    if images.shape[3] > MOST_CHANNELS:
        raise UsageError(
            f"{path} has images {list(images.shape)}, that is {images.shape[3]} channels",
            "put the channels last, [N, H, W, channels]: numpy.moveaxis(images, 1, -1)",
        )
    channels = images.shape[3]
    pixels = torch.from_numpy(images).permute(0, 3, 1, 2)
    steps = array_transform([0.5] * channels, [0.5] * channels)
    attributes = attributes_of_arrays(arrays, len(labels), str(path))
    return NpzContent(pixels, labels.astype(np.int32), names, steps, attributes)


def _tensors(path: Path, arrays: Mapping[str, npt.NDArray[Any]]) -> NpzContent:
    """Return samples `x` [N, ...] of any shape, with their labels `y` [N] if there are any."""
    samples = arrays["x"]
    labels = arrays.get("y", np.full(len(samples) if samples.ndim else 0, -1))
    if samples.ndim < 2 or 0 in samples.shape[1:] or samples.dtype.kind not in "biuf" or samples.dtype.itemsize > 8:
        raise UsageError(
            f"{path} has x {list(samples.shape)} {samples.dtype}",
            f"x must be numbers [N, ...], integers or floats of up to 64 bits; {_WRITE_TENSORS}",
        )
    if samples.ndim == 4 and samples.dtype.kind != "f":
        raise UsageError(
            f"{path} has x {list(samples.shape)} {samples.dtype}: are they images?",
            "write images as images=[N, H, W, channels] uint8, labels=[N]; or x as float32, or in another shape",
        )
    if labels.ndim != 1 or labels.dtype.kind not in "iu":
        raise UsageError(f"{path} has y {list(labels.shape)} {labels.dtype}", "y must be integers [N]")
    if len(samples) != len(labels):
        raise MismatchError(f"{path} has {len(samples)} samples x and {len(labels)} labels y", _WRITE_TENSORS)
    names = _class_names(path, arrays.get("class_names"), labels)
    native = np.require(samples, samples.dtype.newbyteorder("="), ["C", "W"])
    attributes = attributes_of_arrays(arrays, len(labels), str(path))
    return NpzContent(torch.from_numpy(native), labels.astype(np.int32), names, [], attributes)


def _class_names(path: Path, names: npt.NDArray[Any] | None, labels: npt.NDArray[np.integer[Any]]) -> tuple[str, ...]:
    """Return the name of each class, and check that the labels are among them."""
    if names is not None and names.ndim != 1:
        raise UsageError(f"{path} has class_names {list(names.shape)}", "store one name per class: [classes]")
    largest = int(labels.max()) if len(labels) else -1
    if names is None and largest >= max(len(labels), 2):
        raise MismatchError(
            f"{path} has the label {largest} and only {len(labels)} images: are there {largest + 1} classes?",
            "correct the labels, or store class_names=[one name per class] beside them",
        )
    known = tuple(map(str, range(largest + 1) if names is None else names))
    check_labels(labels, len(known), str(path))
    return known

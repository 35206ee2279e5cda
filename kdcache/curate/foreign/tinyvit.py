"""TinyViT's saved logits: one folder per epoch, with the seed and a few probabilities of each image.

FOLDER/logits_topK_epochE/rankR-keys.txt has one key per line, and rankR-values.bin one record per key, little-endian:

    seed int32, classes int16 [k], probabilities float16 [k]

Epoch e is view e. A key is the number of an image or, for ImageNet-22k, the name of its file without suffix.

The seed is that of TinyViT's own augmentation (timm's, with another generator), which also mixes an image with the next
one of the batch: it cannot be replayed here. The seeds are stored, so that the files can be exported again; rows can be
read, compared and selected, but no images are available for training.

Source: github.com/microsoft/Cream at 4a13c40, TinyViT/save_logits.py, TinyViT/data/augmentation/dataset_wrapper.py and
manager.py.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from kdcache.cache.format.recorded_views import ELSEWHERE
from kdcache.config.transform import Transform
from kdcache.curate.foreign.sparse_labels import OpenedSource, SparseSoftLabels, check_rows, malformed
from kdcache.data.images import FileImages
from kdcache.data.samples import Samples
from kdcache.errors import MismatchError, UsageError

NUMBERS, NAMES = "numbers", "names"
MAX_CLASSES = 2**15


def record(top_k: int) -> np.dtype[np.void]:
    """Return the type of the record of an image in an epoch."""
    return np.dtype([("seed", "<i4"), ("classes", "<i2", (top_k,)), ("probabilities", "<f2", (top_k,))])


def folder_of(top_k: int, epoch: int) -> str:
    """Return the name of the folder of an epoch."""
    return f"logits_top{top_k}_epoch{epoch}"


def transform_of(keys: str) -> Transform:
    """Return the transform that stands for TinyViT's augmentation."""
    return [{ELSEWHERE: {"by": "TinyViT, from the seeds", "keys": keys}}]


@dataclass(frozen=True)
class TinyViTFiles:
    """The folders of the epochs."""

    folder: Path
    num_classes: int
    views: int
    top_k: int
    by_sample: bool = False

    def read(self, names: Sequence[str], views: Sequence[int]) -> SparseSoftLabels:
        """See `SoftLabelSource`."""
        records = np.stack([self._read_epoch(names, view) for view in views])
        return SparseSoftLabels(
            records["probabilities"].astype(np.float32),
            records["classes"].astype(np.int64),
            records["seed"].astype(np.int32),
        )

    def _read_epoch(self, names: Sequence[str], epoch: int) -> npt.NDArray[Any]:
        """Read the records of some images in an epoch, in the order of their names."""
        folder = self.folder / folder_of(self.top_k, epoch)
        missing = {name: index for index, name in enumerate(names)}
        records = np.zeros(len(names), record(self.top_k))
        for values, keys in _packages(folder):
            rows = [(missing.pop(key), row) for row, key in enumerate(keys) if key in missing]
            if values.stat().st_size != len(keys) * records.itemsize:
                raise malformed(
                    values,
                    f"has {values.stat().st_size} bytes, {len(keys)} records of {records.itemsize} were expected",
                )
            if rows:
                target, source = np.array(rows).T
                records[target] = np.memmap(values, records.dtype, "r")[source]
                check_rows(
                    values,
                    records["probabilities"][target].astype(np.float32),
                    records["classes"][target].astype(np.int64),
                    self.num_classes,
                )
        if missing:
            raise malformed(folder, f"has no record with the key {next(iter(missing))} ({len(missing)} are missing)")
        return records


def _packages(folder: Path) -> Iterator[tuple[Path, list[str]]]:
    """Yield the values and the keys of each rank, in the order of ranks; the first of several records counts."""
    files = {
        int(name[1]): path for path in folder.glob("*") if (name := re.fullmatch(r"rank(\d+)-values.bin", path.name))
    }
    if not files:
        raise malformed(folder, "has no rank0-values.bin")
    for _, values in sorted(files.items()):
        keys = values.with_name(values.name.replace("-values.bin", "-keys.txt"))
        try:
            yield values, [line.strip() for line in keys.read_text("utf-8").splitlines()]
        except (OSError, UnicodeDecodeError) as error:
            raise malformed(keys, f"cannot be read: {type(error).__name__}") from None


def open_tinyvit(folder: Path, samples: Samples) -> OpenedSource:
    """Open the saved logits of the images of a data set, all epochs from 0 on.

    Raises:
        KdcacheError: if there are none, or they are of other images.
    """
    epochs = {
        int(name[2]): int(name[1])
        for path in (folder.iterdir() if folder.is_dir() else ())
        if (name := re.fullmatch(r"logits_top(\d+)_epoch(\d+)", path.name))
    }
    if not epochs:
        raise UsageError(
            f"{folder} has no folder logits_topK_epochE",
            "pass the folder that TinyViT's DISTILL.TEACHER_LOGITS_PATH names",
        )
    top_ks = set(epochs.values())
    if sorted(epochs) != list(range(len(epochs))) or len(top_ks) != 1 or not 0 < min(top_ks) <= samples.num_classes:
        raise UsageError(
            f"{folder} holds logits of the epochs {sorted(epochs)}, the top {sorted(top_ks)} of {samples.num_classes} "
            "classes: the epochs must be 0, 1, ... without gaps, all with the same number of classes",
            "pass the folder that TinyViT's DISTILL.TEACHER_LOGITS_PATH names",
        )
    top_k = top_ks.pop()
    found_keys = [key for _, keys in _packages(folder / folder_of(top_k, 0)) for key in keys]
    form = NUMBERS if all(re.fullmatch("0|[1-9][0-9]*", key) for key in found_keys) else NAMES
    names = names_of(samples, form)
    if len(others := set(found_keys).difference(names)):
        raise MismatchError(
            f"{folder} has {len(others)} images that are not in {samples.name}/{samples.split}, such as {min(others)}",
            "use the data set that TinyViT was run on, with nothing held out: --set dataset.validation_fraction=0 and "
            "dataset.test_fraction=0",
        )
    source = TinyViTFiles(folder.absolute(), samples.num_classes, len(epochs), top_k)
    source.read(names[:1], [0])
    return OpenedSource(source, names, transform_of(form))


def names_of(samples: Samples | None, form: str, count: int | None = None) -> list[str]:
    """Return the key of each image.

    Raises:
        UsageError: if keys are names, and the images of the data set have none, or two have the same.
    """
    if form == NUMBERS:
        return [str(number) for number in range(len(samples) if samples is not None else count or 0)]
    if samples is None or not isinstance(samples.images, FileImages):
        raise UsageError(
            "the keys are names of image files, but no data set with image files is given",
            "pass an image-folder or imagenet data set with --pipeline",
        )
    names = [Path(path).stem for path in samples.images.paths]
    if len(set(names)) < len(names):
        raise UsageError(f"two images of {samples.name} have the same name, which is their key", "rename one")
    return names


def write(folder: Path, epoch: int, names: list[str], parts: Iterator[SparseSoftLabels], top_k: int) -> None:
    """Write the folder of an epoch, from consecutive parts with arrays [1, B, ...]."""
    epoch_folder = folder / folder_of(top_k, epoch)
    epoch_folder.mkdir(parents=True)
    (epoch_folder / "rank0-keys.txt").write_text("".join(f"{name}\n" for name in names), "utf-8")
    with (epoch_folder / "rank0-values.bin").open("wb") as opened:
        for part in parts:
            records = np.zeros(part.classes.shape[1], record(top_k))
            records["seed"], records["classes"] = part.recorded[0], part.classes[0]
            records["probabilities"] = part.probabilities[0]
            opened.write(records.tobytes())

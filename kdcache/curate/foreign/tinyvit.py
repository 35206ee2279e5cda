"""TinyViT's saved logits: of each epoch a folder, with the seed and a few probabilities of each image.

FOLDER/logits_topK_epochE/rankR-keys.txt has a key a line, rankR-values.bin beside it a record a line, little-endian

    seed int32, classes int16 [k], probabilities float16 [k]

Epoch e is view e. A key is the number of an image, or, of ImageNet-22k, the name of its file without the ending.

The seed drives TinyViT's own augmentation (timm's, over a generator of its own), and mixes images with the next one of
a batch: what the teacher saw cannot be drawn here. The seeds are kept, so that the files can be written again; the rows
can be read, compared and selected, and no image is shown.

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
from kdcache.config.schema import Transform
from kdcache.curate.foreign.sparse_labels import Opened, SparseSoftLabels, checked, refused
from kdcache.data.images import FileImages
from kdcache.data.samples import Samples
from kdcache.errors import MismatchError, UsageError

NUMBERS, NAMES = "numbers", "names"
MOST_CLASSES = 2**15


def record(top_k: int) -> np.dtype[np.void]:
    """What is kept of an image in an epoch."""
    return np.dtype([("seed", "<i4"), ("classes", "<i2", (top_k,)), ("probabilities", "<f2", (top_k,))])


def folder_of(top_k: int, epoch: int) -> str:
    """The folder of an epoch."""
    return f"logits_top{top_k}_epoch{epoch}"


def transform_of(keys: str) -> Transform:
    """What a cache says of images that TinyViT drew."""
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
        kept = np.stack([self._of_epoch(names, view) for view in views])
        return SparseSoftLabels(
            kept["probabilities"].astype(np.float32), kept["classes"].astype(np.int64), kept["seed"].astype(np.int32)
        )

    def _of_epoch(self, names: Sequence[str], epoch: int) -> npt.NDArray[Any]:
        folder = self.folder / folder_of(self.top_k, epoch)
        places = {name: place for place, name in enumerate(names)}
        kept = np.zeros(len(names), record(self.top_k))
        for values, keys in _packages(folder):
            rows = [(places.pop(key), row) for row, key in enumerate(keys) if key in places]
            if values.stat().st_size != len(keys) * kept.itemsize:
                raise refused(
                    values, f"has {values.stat().st_size} bytes, {len(keys)} records of {kept.itemsize} were expected"
                )
            if rows:
                to, at = np.array(rows).T
                kept[to] = np.memmap(values, kept.dtype, "r")[at]
                checked(
                    values,
                    kept["probabilities"][to].astype(np.float32),
                    kept["classes"][to].astype(np.int64),
                    self.num_classes,
                )
        if places:
            raise refused(folder, f"has no record with the key {next(iter(places))} ({len(places)} are missing)")
        return kept


def _packages(folder: Path) -> Iterator[tuple[Path, list[str]]]:
    """The values and the keys of each rank, in the order of the ranks, in which the first of several records counts."""
    found = {
        int(name[1]): path for path in folder.glob("*") if (name := re.fullmatch(r"rank(\d+)-values.bin", path.name))
    }
    if not found:
        raise refused(folder, "holds no rank0-values.bin")
    for _, values in sorted(found.items()):
        keys = values.with_name(values.name.replace("-values.bin", "-keys.txt"))
        try:
            yield values, [line.strip() for line in keys.read_text("utf-8").splitlines()]
        except (OSError, UnicodeDecodeError) as error:
            raise refused(keys, f"cannot be read: {type(error).__name__}") from None


def open_tinyvit(folder: Path, samples: Samples) -> Opened:
    """The saved logits of a data set's images, all epochs from 0 on.

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
            "give the one that TinyViT's DISTILL.TEACHER_LOGITS_PATH names",
        )
    kept = set(epochs.values())
    if sorted(epochs) != list(range(len(epochs))) or len(kept) != 1 or not 0 < min(kept) <= samples.num_classes:
        raise UsageError(
            f"{folder} holds logits of the epochs {sorted(epochs)}, of the top {sorted(kept)} of {samples.num_classes} "
            "classes: the views of a cache are those of all epochs from 0 on, with one number of classes",
            "give the folder that TinyViT's DISTILL.TEACHER_LOGITS_PATH names",
        )
    top_k = kept.pop()
    found = [key for _, keys in _packages(folder / folder_of(top_k, 0)) for key in keys]
    form = NUMBERS if all(re.fullmatch("0|[1-9][0-9]*", key) for key in found) else NAMES
    names = names_of(samples, form)
    if len(others := set(found).difference(names)):
        raise MismatchError(
            f"{folder} has {len(others)} images that {samples.name}/{samples.split} has not, such as {min(others)}",
            "give the data set that TinyViT was run on, with nothing held out: --set dataset.validation_fraction=0 and "
            "dataset.test_fraction=0",
        )
    source = TinyViTFiles(folder.absolute(), samples.num_classes, len(epochs), top_k)
    source.read(names[:1], [0])
    return Opened(source, names, transform_of(form))


def names_of(samples: Samples | None, form: str, count: int | None = None) -> list[str]:
    """The key of each image.

    Raises:
        UsageError: if they are names, and the data set has none or some twice.
    """
    if form == NUMBERS:
        return [str(number) for number in range(len(samples) if samples is not None else count or 0)]
    if samples is None or not isinstance(samples.images, FileImages):
        raise UsageError(
            "these keys are names of image files, and no data set with such files is given",
            "give an image-folder or imagenet data set with --pipeline",
        )
    names = [Path(path).stem for path in samples.images.paths]
    if len(set(names)) < len(names):
        raise UsageError(f"two images of {samples.name} have the same name, and so the same key", "rename one")
    return names


def write(folder: Path, epoch: int, names: list[str], parts: Iterator[SparseSoftLabels], top_k: int) -> None:
    """The folder of an epoch; the parts, one after the other, have arrays [1, B, ...]."""
    made = folder / folder_of(top_k, epoch)
    made.mkdir(parents=True)
    (made / "rank0-keys.txt").write_text("".join(f"{name}\n" for name in names), "utf-8")
    with (made / "rank0-values.bin").open("wb") as opened:
        for said in parts:
            kept = np.zeros(said.classes.shape[1], record(top_k))
            kept["seed"], kept["classes"] = said.recorded[0], said.classes[0]
            kept["probabilities"] = said.probabilities[0]
            opened.write(kept.tobytes())

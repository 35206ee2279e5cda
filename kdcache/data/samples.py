"""The samples of a data set split: images, labels and content keys.

`Samples` are in a fixed order: a sample's ordinal is its id in every cache. Each has a 64-bit content key, so that
a changed copy, order or version of the data set is detected before a cache is used with it.
"""

from __future__ import annotations

import hashlib
import operator
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import numpy as np
import numpy.typing as npt
from torch import Tensor
from torch.utils.data import Dataset, Subset

from kdcache.config.transform import Transform, step_names
from kdcache.data.content_keys import load_keys, save_keys
from kdcache.data.images import FileImages, Images, ItemImages, Picture, split_item
from kdcache.data.label_maps import DEFAULT_IGNORED, ItemMaps, LabelMaps, MaskValues, hash_of_content, mask_of
from kdcache.data.sample_attributes import Privacy, attributes_of_dataset, checked_privacy
from kdcache.data.sample_groups import Groups, check_names, checked_groups
from kdcache.errors import MismatchError, UsageError
from kdcache.runtime.progress import Progress, delayed_task
from kdcache.runtime.terminal import reporter
from kdcache.runtime.user_code import trust

if TYPE_CHECKING:
    from kdcache.data.nodes import Graph

Split = Literal["train", "validation", "test"]


class HeldOut(NamedTuple):
    """From how many images a split was drawn, of which other splits hold some.

    Attributes:
        total: number of training images of the data set, with those held out.
        fractions: name and value of the options by which images are held out.
    """

    total: int
    fractions: dict[str, float]


@dataclass(frozen=True)
class Samples:
    """One split of a data set, in a fixed order.

    Attributes:
        name: name of the data set.
        split: name of the split.
        images: source of the pixels.
        labels: [N] int32, -1 for unknown labels.
        class_names: name of each class, in the order of the labels.
        transform: default transform, for pipelines without one; see `views.py` for the format.
        ids: [N] int64, ascending, ids of the samples in a cache, from which their views are seeded. None if they are
            the ordinals of the samples.
        notes: what the data set leaves out, one line each.
        held_out: from how many images the split was drawn; None if it is a split of its own.
        groups: [M, K] int64, ordinals of samples that are trained on together; None without. An epoch is then of M
            groups.
        sample_names: [N] str, by which files of other projects refer to the samples; None if they have no names.
        graph: whose nodes the samples are (`nodes.py`); None for other samples.
        privacy: [N] float64 from 0 to 1, weights of the noise that a dump may add; None if all are 1.
        maps: the class of each pixel of each image, for segmentation; None without. Content keys cover them.
    """

    name: str
    split: str
    images: Images
    labels: npt.NDArray[np.int32]
    class_names: tuple[str, ...]
    transform: Transform
    ids: npt.NDArray[np.int64] | None = None
    notes: tuple[str, ...] = ()
    held_out: HeldOut | None = None
    groups: Groups | None = None
    sample_names: npt.NDArray[np.str_] | None = None
    graph: Graph | None = None
    privacy: Privacy | None = None
    maps: LabelMaps | None = None

    def __post_init__(self) -> None:
        if len(self.labels) != len(self.images):
            raise MismatchError(
                f"{self.name}/{self.split} has {len(self.images)} images and {len(self.labels)} labels",
                "give one label per image; -1 marks an unknown label",
            )
        if self.maps is not None and len(self.maps) != len(self.images):
            raise MismatchError(
                f"{self.name}/{self.split} has {len(self.images)} images and {len(self.maps)} label maps",
                "give one label map per image",
            )
        if len(self.labels) == 0:
            raise UsageError(f"{self.name}/{self.split} holds no image", "check dataset.root and the split fractions")
        where = f"{self.name}/{self.split}"
        check_labels(self.labels, self.num_classes, where)
        if self.groups is not None:
            checked_groups(self.groups, len(self), where)
        if self.sample_names is not None:
            check_names(self.sample_names, len(self), where)
        if self.privacy is not None:
            checked_privacy(self.privacy, len(self), where)

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def num_classes(self) -> int:
        """Number of classes."""
        return len(self.class_names)

    @property
    def group_size(self) -> int:
        """Number of samples that are trained on together, K; 1 without groups."""
        return 1 if self.groups is None else self.groups.shape[1]

    @property
    def per_epoch(self) -> int:
        """Number of samples of an epoch, in which one of several groups comes several times."""
        return len(self) if self.groups is None else self.groups.size

    def keys(self, progress: Progress | bool | None = None) -> npt.NDArray[np.uint64]:
        """Return the content key of each sample, [N] uint64: BLAKE2b-64 of the image's content.

        Image files are read once per machine: their keys are stored in kdcache's own folder until a file changes.
        """
        stamp = self._stamp()
        if stamp is not None and (stored := load_keys(stamp, len(self))) is not None:
            return stored
        keys = self._compute_keys(reporter(progress))
        if stamp is not None:
            save_keys(stamp, keys)
        return keys

    def with_map(self, index: int) -> tuple[Picture, Tensor]:
        """Return an image and its label map, [H, W] int64; an item of a Dataset that holds both is read once."""
        images, maps = self.images, self.maps
        if isinstance(maps, ItemMaps) and isinstance(images, ItemImages) and images.dataset is maps.dataset:
            item = maps.dataset[index]
            return images.of_item(item, index), maps.of_item(item, index)
        if maps is None:
            raise ValueError(f"{self.name}/{self.split} has no label maps")
        return images.picture(index), maps.label_map(index)

    def _stamp(self) -> str | None:
        """Return a digest that changes if an image file or a mask file changes; None if some are not in files."""
        if self.maps is None:
            return self.images.stamp()
        files = self.maps.files()
        if not files or not isinstance(self.images, FileImages):
            return None
        return FileImages([*self.images.paths, *files]).stamp()

    def _compute_keys(self, progress: Progress) -> npt.NDArray[np.uint64]:
        with (
            delayed_task(progress, f"content keys of {self.name}/{self.split}", len(self), "images") as task,
            ThreadPoolExecutor(
                max_workers=None if self.images.parallel and (self.maps is None or self.maps.parallel) else 1
            ) as pool,
        ):
            blocks = [range(start, min(start + 256, len(self))) for start in range(0, len(self), 256)]
            keys = np.empty(len(self), np.uint64)
            for block, block_keys in zip(blocks, pool.map(self._keys_of, blocks), strict=True):
                keys[block.start : block.stop] = block_keys
                task.advance(len(block))
        return keys

    def _content(self, index: int) -> bytes:
        """Return the bytes that the content key of a sample is computed from."""
        image = self.images.content(index)
        return image if self.maps is None else hash_of_content(image, self.maps.content(index))

    def _keys_of(self, ids: range) -> npt.NDArray[np.uint64]:
        digests = (hashlib.blake2b(self._content(index), digest_size=8).digest() for index in ids)
        return np.frombuffer(b"".join(digests), "<u8")


def check_labels(labels: npt.NDArray[np.integer[Any]], num_classes: int, where: str) -> None:
    """Check that each label is between 0 and `num_classes - 1`, or -1 if it is unknown.

    Raises:
        MismatchError: for a label out of range; the message names the first such sample.
    """
    invalid = np.flatnonzero((labels < -1) | (labels >= num_classes))
    if len(invalid):
        raise MismatchError(
            f"label out of range in {where}: sample {invalid[0]} has label {labels[invalid[0]]}, "
            f"classes run from 0 to {num_classes - 1} ({len(invalid)} such samples)",
            "correct the labels or the number of classes; -1 marks an unknown label",
        )


def wrap(
    dataset: Dataset[Any],
    num_classes: int,
    name: str = "dataset",
    split: str = "train",
    transform: Transform | None = None,
    class_names: Sequence[str] | None = None,
) -> Samples:
    """Return a map-style `torch.utils.data.Dataset` of (image, label) pairs, or of tensors of any shape, as `Samples`.

    For segmentation, items are (image, mask) pairs.

    Args:
        dataset: with `__len__` and `__getitem__`; images are tensors [channels, H, W], numpy arrays [H, W] or
            [H, W, channels], or PIL images; labels are integers. Other samples are tensors of one shape, such as
            features [F] or token ids [L]; integers reach the network as int64. An item without a label is a sample
            alone, or (sample, None). An attribute `groups` [M, K] lists the samples that are trained on together,
            `sample_names` [N] what files of other projects call them, and `privacy` [N], from 0 to 1, is the weight of
            the noise that a dump may add. A mask is [H, W] integers, or a PIL image of one channel; pixels of the value
            `ignore_index`, an attribute of the data set, 255 without one, have no class.
        num_classes: labels run from 0 to `num_classes - 1`; -1 marks an unknown label.
        name: name of the data set in the manifest.
        split: name of the split.
        transform: steps as in a pipeline file; None leaves the images as the data set returns them.
        class_names: name of each class, for the manifest; "0", "1", ... if None.

    Raises:
        UsageError: if it is not such a data set.
        MismatchError: if a label or a group is out of range, or the number of class names is not `num_classes`.
    """
    names = tuple(str(c) for c in (range(num_classes) if class_names is None else class_names))
    if len(names) != num_classes:
        raise MismatchError(f"{len(names)} class names for {num_classes} classes", "give one name per class")
    maps = maps_of(dataset, num_classes)
    labels = labels_of(dataset) if maps is None else np.full(len(maps), -1)
    where = f"{name}/{split}"
    check_labels(labels, num_classes, where)
    trust(step_names(transform))
    return Samples(
        name,
        split,
        ItemImages(dataset, len(labels)),
        labels.astype(np.int32),
        names,
        transform or [],
        **attributes_of_dataset(dataset, len(labels), where)._asdict(),
        maps=maps,
    )


def maps_of(dataset: Dataset[Any], num_classes: int) -> ItemMaps | None:
    """Return the label maps of a map-style data set of (image, mask) pairs; None of another one."""
    count = length_of(dataset)
    if not count or mask_of(dataset[0]) is None:
        return None
    base: Any = dataset
    while isinstance(base, Subset):
        base = base.dataset
    ignored = getattr(base, "ignore_index", DEFAULT_IGNORED)
    return ItemMaps(dataset, count, MaskValues(num_classes, ignored=() if ignored is None else (int(ignored),)))


def as_samples(data: Samples | Dataset[Any]) -> Samples:
    """Return `Samples` unchanged, and any other data set of (image, label) pairs wrapped.

    Raises:
        KdcacheError: if it is not such a data set, or its classes are ambiguous; see `wrap` and `class_names`.
    """
    if isinstance(data, Samples):
        return data
    names = class_names(data, type(data).__name__)
    return wrap(data, len(names), class_names=names)


def class_names(dataset: Dataset[Any], where: str) -> Sequence[str]:
    """Return the attribute `classes` of a data set; without one, "0", "1", ... up to the largest label; () if none.

    Args:
        dataset: data set of (image, label) pairs.
        where: name of the data set, for error messages.

    Raises:
        UsageError: if `classes` is not a sequence of names.
        MismatchError: if there is no such attribute, and the largest label is not below the number of images.
    """
    names = getattr(dataset, "classes", None)
    if names is not None:
        if isinstance(names, str) or not isinstance(names, Sequence):
            raise UsageError(
                f"the attribute `classes` of {where} is a {type(names).__name__}", "make it a list of names"
            )
        return [str(name) for name in names]
    if length_of(dataset) and mask_of(dataset[0]) is not None:
        raise UsageError(
            f"{where} has masks, and does not say which classes they have",
            "give the data set an attribute `classes` with the name of each class",
        )
    labels = labels_of(dataset)
    largest = int(labels.max()) if len(labels) else -1
    if largest >= max(len(labels), 2):
        raise MismatchError(
            f"{where} has the label {largest} and only {len(labels)} images: are there {largest + 1} classes?",
            "correct the labels, or give the data set an attribute `classes` with the name of each class",
        )
    return [str(label) for label in range(largest + 1)]


def labels_of(dataset: Dataset[Any]) -> npt.NDArray[np.integer[Any]]:
    """Return the labels of a map-style data set of (image, label) pairs, [N]; -1 where an item has none.

    Raises:
        UsageError: if it has no length, or an item is not such a pair.
    """
    return np.array([_label(dataset[index], index) for index in range(length_of(dataset))])


def length_of(dataset: Dataset[Any]) -> int:
    """Return the number of items of a data set.

    Raises:
        UsageError: if it has no length.
    """
    try:
        return len(dataset)  # type: ignore[arg-type]  # torch leaves __len__ to the subclass
    except TypeError:
        raise UsageError(f"{type(dataset).__name__} has no length", "give a map-style data set") from None


def _label(item: Any, index: int) -> int:
    try:
        return operator.index(split_item(item)[1])
    except (TypeError, ValueError, LookupError):
        raise UsageError(
            f"item {index} of the data set is not a pair of an image and an integer label",
            "return (image, label), or without labels the image or tensor alone",
        ) from None

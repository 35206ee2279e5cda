"""Label maps: the class of each pixel of an image, from mask files or from the items of a Dataset."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Protocol

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from kdcache.data.image_files import reason_of, register_plugins
from kdcache.errors import CorruptError, MismatchError, UsageError
from kdcache.runtime.paths import READ_PERMISSION

UNKNOWN = -1
"""Class of a pixel that is ignored."""

DEFAULT_IGNORED = 255
"""Value of the pixels of a mask that have no class, unless the data set says another."""

_INTEGER_MODES = {"1", "L", "P", "I", "I;16", "I;16L", "I;16B"}


class LabelMaps(Protocol):
    """A source of label maps."""

    @property
    def parallel(self) -> bool:
        """Whether several threads may read at the same time."""

    def __len__(self) -> int: ...

    def label_map(self, index: int) -> Tensor:
        """Return the class of each pixel of image `index`, [H, W] int64, -1 where it is ignored."""

    def header(self, index: int) -> tuple[int, int] | None:
        """Return (height, width) of the label map of image `index` from the header of its file; None without a file.

        Raises:
            KdcacheError: if the header says that it is not a label map.
        """

    def content(self, index: int) -> bytes:
        """Return the bytes of the label map of image `index` that its content key covers."""

    def files(self) -> Sequence[str]:
        """Return the mask files; empty if they are not in files."""


@dataclass(frozen=True)
class MaskValues:
    """What the values of masks stand for.

    Attributes:
        num_classes: C.
        first: value of class 0; those of the others follow.
        ignored: values of pixels that have no class.
        table: value -> class, instead of `first`, -1 for ignored values; None without.
    """

    num_classes: int
    first: int = 0
    ignored: tuple[int, ...] = (DEFAULT_IGNORED,)
    table: tuple[int, ...] | None = None

    def classes(self, values: npt.NDArray[np.integer[Any]], where: str) -> Tensor:
        """Return the class of each pixel of a mask [H, W], int64.

        Raises:
            MismatchError: for a value that is neither a class nor ignored; names the first such pixel.
        """
        found = np.full(values.shape, UNKNOWN, np.int64)
        if self.table is not None:
            known = (values >= 0) & (values < len(self.table))
            found[known] = np.asarray(self.table)[values[known].astype(np.int64)]
        else:
            known = (values >= self.first) & (values < self.first + self.num_classes)
            found[known] = values[known].astype(np.int64) - self.first
        ignored = np.isin(values, self.ignored)
        found[ignored] = UNKNOWN
        wrong = np.argwhere(~(known | ignored))
        if len(wrong):
            row, column = wrong[0]
            last = len(self.table) - 1 if self.table is not None else self.first + self.num_classes - 1
            named = ", ".join(map(str, self.ignored)) or "none"
            raise MismatchError(
                f"{where} has the value {values[row, column]} at row {row}, column {column} ({len(wrong):,} such "
                f"pixels); classes are {0 if self.table is not None else self.first} to {last}, ignored is {named}",
                "correct the mask, or say what its values are: dataset.classes, dataset.first_class, dataset.ignore",
            )
        return torch.from_numpy(found)


@dataclass(frozen=True)
class ArrayMaps:
    """Label maps in memory.

    Attributes:
        classes: [N, H, W] int64, -1 where they are ignored.
    """

    parallel: ClassVar[bool] = True
    classes: Tensor

    def __len__(self) -> int:
        return len(self.classes)

    def label_map(self, index: int) -> Tensor:
        """Return the class of each pixel, [H, W] int64."""
        return self.classes[index]

    def header(self, index: int) -> None:
        """Return nothing: there is no file."""

    def content(self, index: int) -> bytes:
        """Return type, shape and values of a map."""
        return bytes_of_mask(self.classes[index].numpy())

    def files(self) -> Sequence[str]:
        """Return nothing: they are not in files."""
        return ()


@dataclass(frozen=True)
class FileMaps:
    """Label maps in image files of one channel, whose values are classes.

    Attributes:
        paths: of the files.
        values: what their values stand for.
        palettes: whether the indices of palette images are classes, as in Pascal VOC.
    """

    parallel: ClassVar[bool] = True
    paths: Sequence[str]
    values: MaskValues
    palettes: bool = False

    def __len__(self) -> int:
        return len(self.paths)

    def label_map(self, index: int) -> Tensor:
        """Return the class of each pixel, [H, W] int64.

        Raises:
            UsageError: for a picture in color, or a palette image where the indices are not known to be classes.
            MismatchError: for a value that is not a class.
            CorruptError: if the file cannot be read.
        """
        return self.values.classes(self._stored(index), f"the mask {self.paths[index]}")

    def header(self, index: int) -> tuple[int, int]:
        """Return (height, width), without decoding the file; see `label_map` for the errors."""
        path = self.paths[index]
        register_plugins()
        try:
            with Image.open(path) as image:
                mode, size = image.mode, (image.height, image.width)
        except Exception as error:  # Pillow raises many types for a damaged file
            raise _unreadable(path, error) from error
        self._check_mode(path, mode)
        return size

    def content(self, index: int) -> bytes:
        """Return the bytes of the file."""
        try:
            return Path(self.paths[index]).read_bytes()
        except OSError as error:
            raise _unreadable(self.paths[index], error) from error

    def files(self) -> Sequence[str]:
        """Return the mask files."""
        return self.paths

    def _stored(self, index: int) -> npt.NDArray[np.integer[Any]]:
        """Return the values of a mask file."""
        path = self.paths[index]
        register_plugins()
        try:
            with Image.open(path) as image:
                mode = image.mode
                values = np.array(image) if mode in _INTEGER_MODES else None
        except Exception as error:  # Pillow raises many types for a damaged file
            raise _unreadable(path, error) from error
        self._check_mode(path, mode)
        assert values is not None, "its mode was checked"  # noqa: S101  # for the types
        return values.astype(np.uint8) if values.dtype == bool else values

    def _check_mode(self, path: str, mode: str) -> None:
        """Check that an image of a mode can be a mask.

        Raises:
            UsageError: for a picture in color, or a palette image where the indices are not known to be classes.
        """
        if mode not in _INTEGER_MODES:
            raise UsageError(
                f"the mask {path} is a picture of mode {mode}, not one channel of class indices",
                "convert colors to the index of their class, and save it as 8-bit gray PNG",
            )
        if mode == "P" and not self.palettes:
            raise UsageError(
                f"the mask {path} is a palette image: its values are positions in its palette, which a program may "
                "have chosen by itself",
                "if the positions are the classes, as in Pascal VOC: --set dataset.palettes=true; if the colors are, "
                "save the index of each as 8-bit gray PNG",
            )


@dataclass(frozen=True)
class ItemMaps:
    """The masks of the items of a `torch.utils.data.Dataset` of (image, mask).

    Attributes:
        dataset: map-style.
        length: number of items.
        values: what the values of the masks stand for.
    """

    parallel: ClassVar[bool] = False
    dataset: Dataset[Any]
    length: int
    values: MaskValues

    def __len__(self) -> int:
        return self.length

    def label_map(self, index: int) -> Tensor:
        """Return the class of each pixel, [H, W] int64.

        Raises:
            UsageError: if the item has no mask.
            MismatchError: for a value that is not a class.
        """
        return self.of_item(self.dataset[index], index)

    def header(self, index: int) -> None:
        """Return nothing: an item is made as a whole."""

    def of_item(self, item: Any, index: int) -> Tensor:
        """Return the label map of an item that was read already; see `label_map`."""
        return self.values.classes(self._stored(item, index), f"the mask of item {index}")

    def content(self, index: int) -> bytes:
        """Return type, shape and values of the mask."""
        return bytes_of_mask(self._stored(self.dataset[index], index))

    def files(self) -> Sequence[str]:
        """Return nothing: the source of the items is unknown."""
        return ()

    @staticmethod
    def _stored(item: Any, index: int) -> npt.NDArray[np.integer[Any]]:
        """Return the values of the mask of an item."""
        found = mask_of(item)
        if found is None:
            raise UsageError(
                f"item {index} of the data set is not a pair of an image and a mask, and others are",
                "return (image, mask) for every item: a mask is [H, W] integers, or a PIL image of one channel",
            )
        return found


@dataclass(frozen=True)
class ChosenMaps:
    """Some of the label maps of a source.

    Attributes:
        maps: the source.
        ids: [n], indices in it.
    """

    maps: LabelMaps
    ids: npt.NDArray[np.int64]

    @property
    def parallel(self) -> bool:
        """Whether several threads may read at the same time."""
        return self.maps.parallel

    def __len__(self) -> int:
        return len(self.ids)

    def label_map(self, index: int) -> Tensor:
        """Return the class of each pixel, [H, W] int64."""
        return self.maps.label_map(int(self.ids[index]))

    def header(self, index: int) -> tuple[int, int] | None:
        """Return (height, width) from the header of a file; None without one."""
        return self.maps.header(int(self.ids[index]))

    def content(self, index: int) -> bytes:
        """Return the bytes of a label map."""
        return self.maps.content(int(self.ids[index]))

    def files(self) -> Sequence[str]:
        """Return the mask files of these."""
        files = self.maps.files()
        return [files[int(index)] for index in self.ids] if files else ()


def mask_of(item: Any) -> npt.NDArray[np.integer[Any]] | None:
    """Return the mask [H, W] of an item (image, mask) of a data set; None if it has none."""
    if not isinstance(item, tuple | list) or len(item) < 2:
        return None
    mask = item[1]
    if isinstance(mask, Image.Image):
        if mask.mode not in _INTEGER_MODES:
            return None
        values = np.array(mask)
        return values.astype(np.uint8) if values.dtype == bool else values
    if isinstance(mask, Tensor):
        mask = mask.detach().cpu().numpy()
    if not isinstance(mask, np.ndarray) or mask.dtype.kind not in "iu":
        return None
    mask = mask[0] if mask.ndim == 3 and len(mask) == 1 else mask
    return mask if mask.ndim == 2 and mask.size else None


def bytes_of_mask(values: npt.NDArray[np.integer[Any]]) -> bytes:
    """Return type, shape and values of a mask [H, W]."""
    return f"{values.dtype.str}{values.shape}".encode() + np.ascontiguousarray(values).tobytes()


def hash_of_content(image: bytes, label_map: bytes) -> bytes:
    """Return the content that the key of a sample with a label map is computed from."""
    return image + b"label map" + hashlib.blake2b(label_map, digest_size=16).digest()


def _unreadable(path: str, error: Exception) -> CorruptError | UsageError:
    what = f"cannot read the mask {path}: {reason_of(error)}"
    if isinstance(error, PermissionError):
        return UsageError(what, READ_PERMISSION)
    return CorruptError(what, "replace or remove it, and its image")

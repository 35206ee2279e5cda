"""Sources of samples: arrays in memory, mapped files, image files, or the items of a Dataset.

A sample is an image, [channels, H, W] or a PIL image, or a tensor of any other shape, such as features [F], token ids
[L] or frames [T, F]. What is written of images here holds for those tensors too, except that no step of torchvision is
applied to them.
"""

from __future__ import annotations

import hashlib
import math
import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Protocol

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from kdcache.data.image_files import SCALE_FILES, UnknownRangeError, decode_rgb
from kdcache.data.label_maps import bytes_of_mask, hash_of_content, mask_of
from kdcache.errors import CorruptError, KdcacheError, UsageError
from kdcache.runtime.paths import READ_PERMISSION

Picture = Tensor | Image.Image


class Images(Protocol):
    """A source of pixels."""

    parallel: ClassVar[bool]
    """Whether several threads may read at the same time."""

    def __len__(self) -> int: ...

    def picture(self, index: int) -> Picture:
        """Return image `index`: a tensor [channels, H, W], or of another shape, or a PIL image."""

    def content(self, index: int) -> bytes:
        """Return the bytes that the content key of image `index` is computed from."""

    def shape(self) -> tuple[int, ...]:
        """Return (channels, height, width) of the images, or the shape of a tensor; of the first one if they differ."""

    def stamp(self) -> str | None:
        """Return a digest that changes if an image file changes; None if the images are not in files."""


@dataclass(frozen=True)
class ArrayImages:
    """Images in memory, a tensor [N, channels, H, W], or tensors of one other shape, [N, ...]."""

    parallel: ClassVar[bool] = True
    pixels: Tensor

    def __len__(self) -> int:
        return len(self.pixels)

    def picture(self, index: int) -> Tensor:
        """Return image `index` as a tensor [channels, H, W], or of another shape."""
        return self.pixels[index]

    def content(self, index: int) -> bytes:
        """Return type, shape and pixels of image `index`."""
        pixels = self.pixels[index].contiguous().numpy()
        return f"{pixels.dtype.str}{pixels.shape}".encode() + pixels.tobytes()

    def shape(self) -> tuple[int, ...]:
        """Return (channels, height, width), or the shape of a tensor."""
        return tuple(self.pixels.shape[1:])

    def stamp(self) -> None:
        """Return None: the images are in memory."""


@dataclass(frozen=True)
class FileImages:
    """Images in files, decoded one at a time to RGB (`image_files.py`)."""

    parallel: ClassVar[bool] = True
    paths: Sequence[str]

    def __len__(self) -> int:
        return len(self.paths)

    def picture(self, index: int) -> Image.Image:
        """Return image `index` as a PIL image."""
        try:
            return decode_rgb(self.paths[index])
        except UnknownRangeError as error:
            raise UsageError(f"cannot read the image {self.paths[index]}: {error}", SCALE_FILES) from None
        except Exception as error:  # Pillow raises many types for a damaged file
            raise self._unreadable(index, error) from error

    def content(self, index: int) -> bytes:
        """Return the bytes of the file: another encoding of the same image is another sample."""
        try:
            return Path(self.paths[index]).read_bytes()
        except OSError as error:
            raise self._unreadable(index, error) from error

    def shape(self) -> tuple[int, int, int]:
        """Return (channels, height, width) of the first image."""
        width, height = self.picture(0).size
        return 3, height, width

    def stamp(self) -> str:
        """Return a digest of the files' paths, sizes, modification times and inodes."""
        sha = hashlib.sha256()
        for index, path in enumerate(self.paths):
            try:
                status = Path(path).stat()
            except OSError as error:
                raise self._unreadable(index, error) from error
            parts = (path, status.st_size, status.st_mtime_ns, status.st_ctime_ns, status.st_ino)
            sha.update(repr(parts).encode())
        return sha.hexdigest()

    def _unreadable(self, index: int, error: Exception) -> KdcacheError:
        what = f"cannot read the image {self.paths[index]}: {error}"
        if isinstance(error, PermissionError):
            return UsageError(what, READ_PERMISSION)
        return CorruptError(what, "replace or remove it")


@dataclass(frozen=True)
class ItemImages:
    """The images, or tensors of other shapes, of any `torch.utils.data.Dataset`, as `wrap` takes it."""

    parallel: ClassVar[bool] = False
    dataset: Dataset[Any]
    length: int
    reload: Callable[[], Dataset[Any]] | None = None
    """Loads the data set again; None if it was given as an object."""

    def __len__(self) -> int:
        return self.length

    def picture(self, index: int) -> Picture:
        """Return item `index`, without its label."""
        return self._picture(split_item(self.dataset[index])[0], index)

    def of_item(self, item: Any, index: int) -> Picture:
        """Return the image of an item that was read already, without its label."""
        return self._picture(split_item(item)[0], index)

    def read(self, index: int) -> tuple[bytes, int]:
        """Return the content of an image and its label, of one reading of the item; -1 for one with a mask."""
        item = self.dataset[index]
        image, label = split_item(item)
        content = self._content(self._picture(image, index))
        if (mask := mask_of(item)) is not None:
            return hash_of_content(content, bytes_of_mask(mask)), -1
        return content, operator.index(label)

    @staticmethod
    def _picture(image: Any, index: int) -> Picture:
        """Return an image or tensor of an item as torch or Pillow has it."""
        if isinstance(image, np.ndarray) and image.ndim in (2, 3):
            # Equal to torchvision's to_image, whose import would take every command a second.
            image = _tensor_of(np.atleast_3d(image), index).permute(2, 0, 1).contiguous()
        elif isinstance(image, np.ndarray) and image.ndim:
            image = _tensor_of(image, index)
        if isinstance(image, Tensor):
            # NumPy, in whose types content keys are defined, has neither gradients nor bfloat16.
            image = image.detach().float() if image.dtype == torch.bfloat16 else image.detach()
        if isinstance(image, Image.Image) or (isinstance(image, Tensor) and image.numel() and image.ndim):
            return image
        shape = f" {list(image.shape)}" if isinstance(image, Tensor | np.ndarray) else ""
        raise UsageError(
            f"item {index} of the data set has an image of type {type(image).__name__}{shape}",
            "return an image as a tensor [channels, H, W], a numpy array [H, W] or [H, W, channels], or a PIL image; "
            "and anything else as a tensor of one or more dimensions, such as features [F] or token ids [L]",
        )

    def content(self, index: int) -> bytes:
        """Return type, shape and values of the image."""
        return self._content(self.picture(index))

    @staticmethod
    def _content(image: Picture) -> bytes:
        if isinstance(image, Image.Image) and image.mode == "P":
            image = image.convert("RGBA")  # palette indices have no meaning without the palette
        array = np.ascontiguousarray(image.cpu().numpy() if isinstance(image, Tensor) else np.asarray(image))
        return f"{array.dtype.str}{array.shape}".encode() + array.tobytes()

    def shape(self) -> tuple[int, ...]:
        """Return (channels, height, width) of the first image, or the shape of the first tensor."""
        image = self.picture(0)
        if isinstance(image, Image.Image):
            return len(image.getbands()), image.height, image.width
        return tuple(image.shape)

    def stamp(self) -> None:
        """Return None: the source of the items is unknown."""


def split_item(item: Any) -> tuple[Any, Any]:
    """Return the sample and the label of an item of a data set; -1 if it has no label, or None.

    An item is a pair of both, a tuple of a sample alone (of `TensorDataset`), or a sample that is not in a tuple.
    """
    if isinstance(item, Tensor | np.ndarray | Image.Image):
        return item, -1
    label = item[1] if len(item) > 1 else None
    return item[0], -1 if label is None else label


def name_of(images: Images, index: int) -> str:
    """Return what to call an image in a message: its ordinal, and its file if it is in one."""
    return f"sample {index} ({images.paths[index]})" if isinstance(images, FileImages) else f"sample {index}"


def _tensor_of(image: npt.NDArray[Any], index: int) -> Tensor:
    """Return the values of an array of any shape, byte order and strides, in that shape.

    Raises:
        UsageError: if torch has no such type.
    """
    try:
        return torch.from_numpy(np.require(image, image.dtype.newbyteorder("="), ["C", "W"]))
    except TypeError:
        raise UsageError(
            f"item {index} of the data set has an image of {image.dtype.name} numbers",
            "return integers up to 64 bits, or float16, float32 or float64",
        ) from None


@dataclass(frozen=True)
class MappedImages(ArrayImages):
    """Images in a memory-mapped file of pixels without a header; processes that map it share the memory."""

    path: Path

    def __reduce__(self) -> Any:
        return _map, (self.path, self.pixels.shape, self.pixels.dtype)


def map_images(images: ArrayImages, path: Path) -> MappedImages:
    """Write images that are in memory to a file, and return them as a memory map of it."""
    images.pixels.contiguous().numpy().tofile(path)
    return _map(path, images.pixels.shape, images.pixels.dtype)


def _map(path: Path, shape: Sequence[int], dtype: torch.dtype) -> MappedImages:
    pixels = torch.from_file(str(path), shared=False, size=math.prod(shape), dtype=dtype)
    return MappedImages(pixels.view(*shape), path)

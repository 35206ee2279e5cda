"""Seeded views: view v of sample i is the same pixels on every machine, in any order, in any worker.

A transform is data: a list of names and arguments of `torchvision.transforms.v2`, such as

    - RandomCrop: {size: 32, padding: 4}
    - ToDtype: {dtype: float32, scale: true}

It goes into the manifest as it stands, so that the student can replay what the teacher saw. The last step may mix two
images (`mixing.py`): what view v makes of sample i with what it makes of a partner, drawn from (seed, i, v) among all
samples. The first step may be a crop that was drawn elsewhere, and recorded (`crops.py`): its box is given.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.utils.data import Dataset

from kdcache.cache.format.recorded_views import CROP, Crops
from kdcache.config.schema import Transform
from kdcache.data.images import ArrayImages, Picture
from kdcache.data.mixing import Mixing, split_mixing
from kdcache.data.recorded_crop import split_recorded
from kdcache.data.samples import Samples
from kdcache.data.transform_limits import check_batch
from kdcache.data.transforms import build_transform, is_batched, is_random
from kdcache.errors import CorruptError, UsageError
from kdcache.losses.batch import MixedLabels


class Batch(NamedTuple):
    """What a view shows of B samples.

    Attributes:
        images: [B, channels, H, W] float32.
        labels: [B] int64, the samples' own, -1 where not known.
        ids: [B] int64.
        mixed: with what the images are mixed; None if they are not.
    """

    images: Tensor
    labels: Tensor
    ids: Tensor
    mixed: MixedLabels | None


@contextmanager
def seeded(*parts: int) -> Iterator[None]:
    """Python's, NumPy's and torch's generators seeded from `parts`, and put back as they were.

    Of torch's, only the one of the CPU, where transforms run: `torch.manual_seed` would seed a GPU's too.
    """
    digest = hashlib.blake2b(b"".join(part.to_bytes(8, "little") for part in parts), digest_size=8).digest()
    seed = int.from_bytes(digest, "little")
    python, numpy, cpu = random.getstate(), np.random.get_state(), torch.get_rng_state()
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.default_generator.manual_seed(seed)
    try:
        yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)
        torch.set_rng_state(cpu)


@contextmanager
def _one_thread() -> Iterator[None]:
    """Torch on one thread, as in a DataLoader's workers: how a sum, such as ColorJitter's, is shared out rounds it."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


class View(Dataset[Batch]):
    """One view of a data set, fetched a whole batch at a time (`__getitems__`, which DataLoader calls).

    Args:
        samples: the data set.
        transform: what is done to an image.
        seed: of the views.
        view: which one; may be set anew between epochs.
        labels: [N] int64 that take the place of the data set's, such as those of a student that may not know all.
        crops: the boxes of a transform that begins with a recorded crop, by the samples' ids.

    Raises:
        UsageError: for a transform that cannot be, or whose boxes are not given.
    """

    def __init__(
        self,
        samples: Samples,
        transform: Transform,
        seed: int = 0,
        view: int = 0,
        labels: Tensor | None = None,
        crops: Crops | None = None,
    ) -> None:
        self.samples, self.seed, self.view = samples, seed, view
        self.labels = torch.from_numpy(samples.labels.astype(np.int64)) if labels is None else labels
        self.transform = transform
        self._crop, rest = split_recorded(transform)
        steps, mixing = split_mixing(rest)
        if self._crop is not None and crops is None:
            raise UsageError(
                f"the transform begins with {CROP}, whose boxes are in a cache, and none is given",
                "only `kdcache convert --from` makes caches of such crops: begin the transform with another one",
            )
        self._crops, self._boxes = crops, (-1, np.empty((0, 0), np.float32))
        self._transform = build_transform(steps)
        self._mixing = build_transform([mixing]) if mixing else None
        if mixing and samples.ids is not None:
            raise UsageError(
                f"{mixing} mixes images with any others of the cache, and some of these are not here",
                "train on the whole data set, or from a cache of views that are not mixed",
            )
        self._random = is_random(steps)
        self._arrays = samples.images if isinstance(samples.images, ArrayImages) and is_batched(transform) else None

    def __len__(self) -> int:
        return len(self.samples)

    @property
    def mixes(self) -> bool:
        """Whether each image is mixed with another."""
        return self._mixing is not None

    def boxes(self) -> npt.NDArray[np.float32] | None:
        """The boxes of the view, [N, 5], read once; None where none are recorded."""
        if self._crops is None or self._crop is None:
            return None
        if self._boxes[0] != self.view:
            self._boxes = self.view, self._crops(self.view)
        return self._boxes[1]

    def shape(self) -> tuple[int, int, int]:
        """(channels, height, width) of the images after the transform."""
        channels, height, width = self[0].images.shape[1:]
        return channels, height, width

    def __getitem__(self, index: int) -> Batch:
        return self.__getitems__([index])

    def __getitems__(self, ids: Sequence[int]) -> Batch:
        """The samples `ids`, in that order."""
        which = torch.as_tensor(ids, dtype=torch.int64)
        if self._arrays is not None:
            # One call for the whole batch gives the same pixels as one an image, many times faster.
            pixels = self._seen(self._arrays.pixels[which], int(which[0])).float()
            return Batch(pixels, self.labels[which], which, None)
        count = len(ids)
        with _one_thread():
            if self._mixing is None:
                images = _stacked([self._one(int(index), count) for index in ids])
                return Batch(images, self.labels[which], which, None)
            each, shares, partners = zip(*(self._mixed(int(index), self._mixing, count) for index in ids), strict=True)
            mixed = MixedLabels(self.labels[list(partners)], torch.tensor(shares))
            return Batch(_stacked(each), self.labels[which], which, mixed)

    def _mixed(self, index: int, mixing: Mixing, count: int) -> tuple[Tensor, float, int]:
        """An image mixed with another, the share of its own, and which the other is."""
        with self._seeded(index):
            own = self._transformed(index, count)
            partner = int(torch.randint(len(self), ()))
            other = self._one(partner, count)
            _check_sizes([own, other])
            image, _, share = mixing(own, other, 1.0)
        return image, share, partner

    def _one(self, index: int, count: int = 1) -> Tensor:
        if not self._random:
            return self._transformed(index, count)
        with self._seeded(index):
            return self._transformed(index, count)

    def _id(self, index: int) -> int:
        return index if self.samples.ids is None else int(self.samples.ids[index])

    def _seeded(self, index: int) -> AbstractContextManager[None]:
        return seeded(self.seed, self._id(index), self.view)

    def _transformed(self, index: int, count: int) -> Tensor:
        """An image, one of `count` that are to be held at once."""
        picture = self.samples.images.picture(index)
        if isinstance(picture, Tensor):
            picture = picture.clone()  # a transform may work in place, and must not change the data set
        if self._crop is not None and (boxes := self.boxes()) is not None:
            try:
                picture = self._crop(picture, boxes[self._id(index)])
            except ValueError as error:
                raise CorruptError(
                    f"sample {self._id(index)} of {self.samples.name}/{self.samples.split}, view {self.view}: {error}",
                    "use the images that the boxes were drawn for",
                ) from None
        pixels = self._seen(picture, index)
        check_batch(pixels.numel(), count)
        return pixels

    def _seen(self, picture: Picture, first: int) -> Tensor:
        """What the transform makes of an image, or of a batch of them that begins with sample `first`."""
        try:
            pixels = self._transform(picture)
        except (RuntimeError, TypeError, ValueError, LookupError) as error:
            raise UsageError(
                f"the transform cannot take sample {first} of {self.samples.name}/{self.samples.split}: {error}",
                "correct `transform` or `eval_transform` of the pipeline",
            ) from None
        if not (isinstance(pixels, Tensor) and pixels.is_floating_point()):
            raise UsageError(
                f"the transform ends in {pixels.dtype if isinstance(pixels, Tensor) else type(pixels).__name__} images",
                "end it with - ToImage: {} and - ToDtype: {dtype: float32, scale: true}",
            )
        return pixels.as_subclass(Tensor)


def _check_sizes(images: Sequence[Tensor]) -> None:
    if any(pixels.shape != images[0].shape for pixels in images):
        raise UsageError(
            "the transform leaves images of different sizes: "
            + " and ".join(sorted({str(list(pixels.shape)) for pixels in images})[:2]),
            "bring them to one size, for instance with - Resize: {size: [224, 224]}",
        )


def _stacked(images: Sequence[Tensor]) -> Tensor:
    """Images of one size, [B, channels, H, W] float32."""
    _check_sizes(images)
    return torch.stack(list(images)).float()

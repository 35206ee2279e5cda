"""Seeded views: the pixels of view v of sample i are a function of (seed, i, v) alone, on every machine.

A transform is data: a list of names and arguments of `torchvision.transforms.v2`, such as

    - RandomCrop: {size: 32, padding: 4}
    - ToDtype: {dtype: float32, scale: true}

The manifest stores it unchanged, so that the student can replay what the teacher saw. The last step may mix two images
(`mixing.py`): view v of sample i with view v of a partner, which (seed, i, v) draws among all samples. The first step
may be a crop whose boxes are stored in the cache (`recorded_crop.py`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.utils.data import Dataset

from kdcache.cache.format.recorded_views import CROP, Crops
from kdcache.config.transform import Transform, step_names
from kdcache.data.batched_steps import batched_transform
from kdcache.data.images import ArrayImages, FileImages, name_of
from kdcache.data.mixing import Mixing, split_mixing
from kdcache.data.moved_maps import MapTransform
from kdcache.data.recorded_crop import split_recorded
from kdcache.data.samples import Samples
from kdcache.data.seeding import kept_generators, kept_torch_generator, seed_generators, seed_of
from kdcache.data.stacking import as_input, check_sizes, fix_of_channels, stack
from kdcache.data.transform_limits import check_batch
from kdcache.data.transforms import build_transform, is_random, runs_user_code
from kdcache.errors import CorruptError, UsageError
from kdcache.losses.batch import MixedLabels
from kdcache.runtime.user_code import is_user_code


class Batch(NamedTuple):
    """B samples of a view.

    Attributes:
        images: [B, channels, H, W] float32; of other tensors [B, ...] float32, or int64 if they are integers.
        labels: [B] int64, of the samples themselves, -1 where unknown.
        ids: [B] int64.
        mixed: labels and shares of the partners; None if the images are not mixed.
        maps: [B, H, W] int64, the class of each pixel, -1 where it is ignored; None without label maps.
    """

    images: Tensor
    labels: Tensor
    ids: Tensor
    mixed: MixedLabels | None
    maps: Tensor | None = None


@contextmanager
def _one_thread() -> Iterator[None]:
    """Run torch on one thread, as DataLoader workers do: the rounding of a sum depends on the number of threads."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


class View(Dataset[Batch]):
    """A data set with a transform, in seeded views, read a batch at a time.

    Indexing (`__getitem__`, and `__getitems__`, which DataLoader calls) returns samples of the constructor's `view`;
    `batch` returns samples of any view.

    Args:
        samples: data set.
        transform: steps that are applied to an image.
        seed: seed of the views.
        view: index of the view that indexing returns.
        labels: [N] int64, which replace the labels of the data set, for instance to hide some; None for its own labels.
        crops: boxes by sample id, for a transform that begins with a recorded crop.

    Raises:
        UsageError: if the transform is invalid, or its boxes are missing.
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
        self.samples, self.transform, self.seed = samples, transform, seed
        self._view = view
        if samples.graph is not None and transform:
            raise UsageError(
                f"{samples.name} is a graph, whose nodes are not transformed, and the transform begins with "
                f"{next(iter(step_names(transform)))}",
                "remove the transform; scale features in the file",
            )
        self.labels = torch.from_numpy(samples.labels.astype(np.int64)) if labels is None else labels
        self._crop, rest = split_recorded(transform)
        steps, mixing = split_mixing(rest)
        if self._crop is not None and crops is None:
            raise UsageError(
                f"the transform begins with {CROP}, whose boxes are stored in a cache, and no boxes were given",
                "begin the transform with another step: only `kdcache convert --from` writes caches with such crops",
            )
        self._crops, self._boxes = crops, (-1, np.empty((0, 0), np.float32))
        self._transform = build_transform(steps)
        self._mixing = build_transform([mixing]) if mixing else None
        if mixing and samples.ids is not None:
            raise UsageError(
                f"{mixing} mixes each image with any other one of the cache, and some of these are missing",
                "train on the whole data set, or from a cache of views that are not mixed",
            )
        self._random = is_random(steps)
        # Only torchvision's steps are known to draw from torch's generator alone, and to seed it is far cheaper.
        self._torch_alone = isinstance(samples.images, ArrayImages | FileImages) and not runs_user_code(transform)
        whole = self._crop is None and mixing is None
        self._moves = None if samples.maps is None else MapTransform(transform)
        whole = whole and self._moves is None
        self._batched = batched_transform(steps, getattr(self._transform, "transforms", [])) if whole else None

    def __len__(self) -> int:
        return len(self.samples)

    @property
    def view(self) -> int:
        """Index of the view that indexing returns."""
        return self._view

    @property
    def mixes(self) -> bool:
        """Whether each image is mixed with another."""
        return self._mixing is not None

    @property
    def is_batched(self) -> bool:
        """Whether the images of a batch are transformed together, as far as is known."""
        return self._batched is not None

    @property
    def has_boxes(self) -> bool:
        """Whether the crops of the images are recorded in a cache."""
        return self._crop is not None

    def boxes(self, view: int) -> npt.NDArray[np.float32] | None:
        """Return the recorded boxes of a view, [N, 5], which are read once; None without recorded crops."""
        if self._crops is None or self._crop is None:
            return None
        if self._boxes[0] != view:
            self._boxes = view, self._crops(view)
        return self._boxes[1]

    def shape(self) -> tuple[int, ...]:
        """Return (channels, height, width) of the first image after the transform, or the shape of a tensor."""
        return tuple(self[0].images.shape[1:])

    def __getitem__(self, index: int) -> Batch:
        return self.batch([index], self._view)

    def __getitems__(self, ids: Sequence[int]) -> Batch:
        """Return the samples `ids`, in that order."""
        return self.batch(ids, self._view)

    def batch(self, ids: Sequence[int], view: int) -> Batch:
        """Return the samples `ids` in a view, in that order.

        Raises:
            UsageError: if the transform cannot be applied to an image.
            CorruptError: if an image cannot be read.
        """
        indices = torch.as_tensor(ids, dtype=torch.int64)
        labels = self.labels[indices]
        if (images := self._at_once(ids, view)) is not None:
            return Batch(images, labels, indices, None)
        count = len(ids)
        with _one_thread(), self._generators_kept():
            if self._moves is not None:
                pairs = (self._with_map(int(index), view, count, self._moves) for index in ids)
                pixels, maps = zip(*pairs, strict=True)
                return Batch(stack(pixels), labels, indices, None, torch.stack(maps))
            if self._mixing is None:
                each = [self._image(int(index), view, count) for index in ids]
                return Batch(stack(each), labels, indices, None)
            mixtures = (self._mixed(int(index), view, self._mixing, count) for index in ids)
            mixed_images, shares, partners = zip(*mixtures, strict=True)
            mixed = MixedLabels(self.labels[list(partners)], torch.tensor(shares))
            return Batch(stack(mixed_images), labels, indices, mixed)

    def _at_once(self, ids: Sequence[int], view: int) -> Tensor | None:
        """Return images of one size, [B, channels, H, W] float32, transformed together; None if they cannot be."""
        if self._batched is None or (pixels := self._batched.stack(self.samples.images, ids)) is None:
            self._batched = None
            return None
        self._check_steps(pixels[0])
        if not self._random:
            return as_input(self._apply(partial(self._batched, pixels, None), int(ids[0]), pixels.ndim == 4))
        seeds = [self._seed_of(int(index), view) for index in ids]
        with kept_torch_generator():
            return as_input(self._apply(partial(self._batched, pixels, seeds), int(ids[0])))

    def _mixed(self, index: int, view: int, mixing: Mixing, count: int) -> tuple[Tensor, float, int]:
        """Return an image mixed with its partner, the share of its own label, and the index of the partner."""
        self._seed(index, view)
        own = self._transformed(index, view, count)
        partner = int(torch.randint(len(self), ()))
        with self._generators_kept():
            partner_image = self._image(partner, view, count)
        check_sizes([own, partner_image])
        image, _, share = mixing(own, partner_image, 1.0)
        return image, share, partner

    def _image(self, index: int, view: int, count: int) -> Tensor:
        """Return an image after the transform; the generators are left in another state."""
        if self._random:
            self._seed(index, view)
        return self._transformed(index, view, count)

    def _with_map(self, index: int, view: int, count: int, moves: MapTransform) -> tuple[Tensor, Tensor]:
        """Return an image and its label map after the transform, by the draws of the image alone."""
        if self._random:
            self._seed(index, view)
        picture, label_map = self.samples.with_map(index)
        moved = label_map
        where = name_of(self.samples.images, index)

        def transform() -> Any:
            nonlocal moved
            image, moved = moves(picture.clone() if isinstance(picture, Tensor) else picture, label_map, where)
            return image

        pixels = self._apply(transform, index)
        check_batch(pixels.numel(), count)
        return pixels, moved

    def _id(self, index: int) -> int:
        return index if self.samples.ids is None else int(self.samples.ids[index])

    def _seed_of(self, index: int, view: int) -> int:
        return seed_of(self.seed, self._id(index), view)

    def _seed(self, index: int, view: int) -> None:
        """Seed the generators that the transform of an image may draw from."""
        seed = self._seed_of(index, view)
        if self._torch_alone:
            torch.default_generator.manual_seed(seed)
        else:
            seed_generators(seed)

    def _generators_kept(self) -> AbstractContextManager[None]:
        """Restore the generators that `_seed` seeds at the end of the context."""
        if not (self._random or self.mixes):
            return nullcontext()
        return kept_torch_generator() if self._torch_alone else kept_generators()

    def _transformed(self, index: int, view: int, count: int) -> Tensor:
        """Return an image after the transform; `count` images are in memory at the same time."""
        picture = self.samples.images.picture(index)
        if isinstance(picture, Tensor):
            self._check_steps(picture)
            picture = picture.clone()  # a transform may modify its input, and must not modify the data set
        if self._crop is not None and (boxes := self.boxes(view)) is not None:
            try:
                picture = self._crop(picture, boxes[self._id(index)])
            except ValueError as error:
                raise CorruptError(
                    f"sample {self._id(index)} of {self.samples.name}/{self.samples.split}, view {view}: {error}",
                    "use the images from which the boxes were drawn",
                ) from None
        is_image = not (isinstance(picture, Tensor) and picture.ndim != 3)
        pixels = self._apply(partial(self._transform, picture), index, is_image)
        check_batch(pixels.numel(), count)
        return pixels

    def _check_steps(self, sample: Tensor) -> None:
        """Check that a sample is an image if a step is one of kdcache's or torchvision's, which are for images."""
        names = [name for name in step_names(self.transform) if not is_user_code(name)]
        if names and sample.ndim != 3:
            raise UsageError(
                f"the samples of {self.samples.name}/{self.samples.split} are tensors {list(sample.shape)}, and the "
                f"step {names[0]} of the transform is for images [channels, H, W]",
                "leave the transform empty (transform: []), or write steps of your own: path/file.py:function",
            )

    def _apply(self, transform: Callable[[], Any], first: int, is_image: bool = True) -> Tensor:
        """Return the result of a transform of an image, or of a batch of images that begins with sample `first`."""
        try:
            pixels = transform()
        except (RuntimeError, TypeError, ValueError, LookupError) as error:
            raise UsageError(
                f"the transform cannot be applied to sample {first} of {self.samples.name}/{self.samples.split}: "
                f"{error}",
                f"correct `transform` or `eval_transform` of the pipeline{fix_of_channels(self.samples, first)}",
            ) from None
        if isinstance(pixels, Tensor) and not is_image and not pixels.is_complex():
            return pixels.as_subclass(Tensor)
        if not (isinstance(pixels, Tensor) and pixels.is_floating_point()):
            raise UsageError(
                f"the transform returns {pixels.dtype if isinstance(pixels, Tensor) else type(pixels).__name__} images",
                "end it with - ToImage: {} and - ToDtype: {dtype: float32, scale: true}; ToDtype alone leaves PIL "
                "images, such as those of image folders, as they are",
            )
        return pixels.as_subclass(Tensor)

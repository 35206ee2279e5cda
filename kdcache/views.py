"""Seeded views: view v of sample i is the same pixels on every machine, in any order, in any worker.

A transform is data: a list of names and arguments of `torchvision.transforms.v2`, such as

    - RandomCrop: {size: 32, padding: 4}
    - ToDtype: {dtype: float32, scale: true}

It goes into the manifest as it stands, so that the student can replay what the teacher saw.
"""

from __future__ import annotations

import hashlib
import inspect
import random
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as tvf

from kdcache.errors import UsageError
from kdcache.pipeline import Transform
from kdcache.samples import ArrayImages, Picture, Samples

Batch = tuple[Tensor, Tensor, Tensor]
"""(images [B, channels, H, W] float32, labels [B] int64, ids [B] int64)."""

_ALSO_RANDOM = {"AutoAugment", "RandAugment", "TrivialAugmentWide", "AugMix", "ColorJitter", "ElasticTransform",
                "ScaleJitter", "GaussianNoise", "JPEG", "GaussianBlur"}  # fmt: skip


def is_random(transform: Transform) -> bool:
    """Whether a transform draws random numbers."""
    names = [name for step in transform for name in step]
    return any(name.startswith("Random") or name in _ALSO_RANDOM for name in names)


def build_transform(transform: Transform) -> Callable[[Any], Any]:
    """The transform that a list of names and arguments describes.

    Raises:
        UsageError: for a name that `torchvision.transforms.v2` has not, or arguments that it does not take.
    """
    steps: list[Callable[[Any], Any]] = [_step(step) for step in transform]
    return v2.Compose(steps) if steps else v2.Identity()  # type: ignore[no-any-return]  # torchvision is untyped


def _step(step: dict[str, dict[str, Any]]) -> v2.Transform:
    if len(step) != 1:
        raise UsageError(f"a step of a transform has {len(step)} names: {', '.join(step)}", "begin each step with '- '")
    ((name, arguments),) = step.items()
    kind = getattr(v2, name, None)
    if not (inspect.isclass(kind) and issubclass(kind, v2.Transform)):
        raise UsageError(
            f"torchvision.transforms.v2 has no transform {name!r}",
            "take a name from torchvision's list of v2 transforms",
        )
    try:
        built = kind(**{key: _argument(key, value) for key, value in arguments.items()})
    except (TypeError, ValueError, AttributeError) as error:
        raise UsageError(
            f"transform {name}: {error}", f"see the arguments of torchvision.transforms.v2.{name}"
        ) from None
    return built


def _argument(key: str, value: Any) -> Any:
    if key == "dtype" and isinstance(value, str):
        dtype = getattr(torch, value, None)
        if not isinstance(dtype, torch.dtype):
            raise ValueError(f"dtype {value!r} is not a torch type")
        return dtype
    if key == "interpolation" and isinstance(value, str):
        return v2.InterpolationMode(value)
    return value


@contextmanager
def seeded(*parts: int) -> Iterator[None]:
    """Python's, NumPy's and torch's generators seeded from `parts`, and put back as they were."""
    digest = hashlib.blake2b(b"".join(part.to_bytes(8, "little") for part in parts), digest_size=8).digest()
    seed = int.from_bytes(digest, "little")
    python, numpy = random.getstate(), np.random.get_state()
    with torch.random.fork_rng(devices=[]):
        random.seed(seed)
        np.random.seed(seed % 2**32)
        torch.manual_seed(seed)
        try:
            yield
        finally:
            random.setstate(python)
            np.random.set_state(numpy)


class View(Dataset[Batch]):
    """One view of a data set, fetched a whole batch at a time (`__getitems__`, which DataLoader calls).

    Args:
        samples: the data set.
        transform: what is done to an image.
        seed: of the views.
        view: which one; may be set anew between epochs.
        labels: [N] int64 that take the place of the data set's, such as those of a student that may not know all.
    """

    def __init__(
        self, samples: Samples, transform: Transform, seed: int = 0, view: int = 0, labels: Tensor | None = None
    ) -> None:
        self.samples, self.seed, self.view = samples, seed, view
        self.labels = torch.from_numpy(samples.labels.astype(np.int64)) if labels is None else labels
        self.transform = transform
        self._random = is_random(transform)
        self._transform = build_transform(transform)

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> Batch:
        return self.__getitems__([index])

    def __getitems__(self, ids: Sequence[int]) -> Batch:
        """The samples `ids`, in that order."""
        which = torch.as_tensor(ids, dtype=torch.int64)
        images = self.samples.images
        if isinstance(images, ArrayImages) and not self._random:
            # One call for the whole batch gives the same pixels as one an image, many times faster.
            pixels = self._transform(images.pixels[which])
        else:
            pixels = torch.stack([self._one(int(i)) for i in ids])
        if not (isinstance(pixels, Tensor) and pixels.is_floating_point()):
            raise UsageError(
                f"the transform ends in {pixels.dtype if isinstance(pixels, Tensor) else type(pixels).__name__} images",
                "end it with - ToImage: {} and - ToDtype: {dtype: float32, scale: true}",
            )
        return pixels.float(), self.labels[which], which

    def _one(self, index: int) -> Tensor:
        picture: Picture = self.samples.images.picture(index)
        if self._random:
            with seeded(self.seed, index, self.view):
                picture = self._transform(picture)
        else:
            picture = self._transform(picture)
        return picture.as_subclass(Tensor) if isinstance(picture, Tensor) else tvf.pil_to_tensor(picture)


def cut_range(ids: range, batch_size: int) -> list[range]:
    """A run of ids in batches, the last one shorter where it does not come out even."""
    return [range(start, min(start + batch_size, ids.stop)) for start in range(ids.start, ids.stop, batch_size)]


def batches(
    view: View, cuts: Sequence[list[int]], workers: int = 0, device: torch.device | str = "cpu"
) -> Iterable[Batch]:
    """The batches of a view, in the order of `cuts`, loaded by `workers` processes ahead of the one that asks."""
    loader: DataLoader[Any] = DataLoader(
        view,
        batch_sampler=cuts,
        num_workers=workers,
        collate_fn=_as_is,
        pin_memory=torch.device(device).type == "cuda",
    )
    return loader


def _as_is(batch: Any) -> Any:
    return batch

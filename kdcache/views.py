"""Seeded views: view v of sample i is the same pixels on every machine, in any order, in any worker.

A transform is data: a list of names and arguments of `torchvision.transforms.v2`, such as

    - RandomCrop: {size: 32, padding: 4}
    - ToDtype: {dtype: float32, scale: true}

It goes into the manifest as it stands, so that the student can replay what the teacher saw. The last step may mix two
images (`mixing.py`): what view v makes of sample i with what it makes of a partner, drawn from (seed, i, v) among all
samples.
"""

from __future__ import annotations

import hashlib
import inspect
import json
import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms import v2

from kdcache.errors import KdcacheError, UsageError
from kdcache.limits import Bounded, check_batch, check_steps
from kdcache.lost_process import told_of_lost_processes
from kdcache.mixing import MIXINGS, Mixed, Mixing, split_mixing, step_names
from kdcache.pipeline import Transform
from kdcache.samples import ArrayImages, Picture, Samples


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
    mixed: Mixed | None


# What torchvision has that draws no random number. A name that is not here is taken to draw some: its images are then
# made one by one from their own seeds, which is right for every transform and only slower for one that is fixed.
_FIXED = {"CenterCrop", "ClampBoundingBoxes", "ClampKeyPoints", "ConvertBoundingBoxFormat", "ConvertImageDtype",
          "FiveCrop", "Grayscale", "Identity", "LinearTransformation", "Normalize", "PILToTensor", "Pad", "RGB",
          "Resize", "SanitizeBoundingBoxes", "SanitizeKeyPoints", "SetClampingMode", "TenCrop", "ToDtype", "ToImage",
          "ToPILImage", "ToPureTensor", "ToTensor", "UniformTemporalSubsample"}  # fmt: skip

# Of those, what takes a batch for one image too large, or for a film.
_NOT_BATCHED = {"ToPILImage", "UniformTemporalSubsample"}


def is_random(transform: Transform) -> bool:
    """Whether a transform may draw random numbers."""
    return not _FIXED.issuperset(name for step in transform for name in step)


def transform_for_evaluation(said: Transform | None, seen: Transform) -> Transform:
    """What images that are not for training go through: never something random, never something unsaid.

    Args:
        said: `eval_transform` of the pipeline.
        seen: what training images go through, which is taken where nothing is said.

    Raises:
        UsageError: if it mixes images, or draws at random and nothing is said.
    """
    if said is not None:
        if split_mixing(said)[1]:
            raise UsageError(
                "eval_transform mixes images, and accuracy is of images with one label", "remove its last step"
            )
        return said
    if is_random(seen):
        fixed = [step for step in seen if not is_random([step])]
        raise UsageError(
            "the transform draws at random, and validation and test images need one that does not",
            f"say which: its fixed steps would be eval_transform: {json.dumps(fixed)}",
        )
    return seen


def build_transform(transform: Transform) -> Callable[..., Any]:
    """The transform that a list of names and arguments describes.

    Raises:
        UsageError: for a name that `torchvision.transforms.v2` has not, arguments that it does not take, or more than
            `limits.py` allows.
    """
    check_steps(step_names(transform))
    steps = [_step(step) for step in transform]
    return v2.Compose(steps) if steps else v2.Identity()  # type: ignore[no-any-return]  # torchvision is untyped


def _step(step: dict[str, dict[str, Any]]) -> Callable[..., Any]:
    if not (isinstance(step, dict) and len(step) == 1 and all(isinstance(given, dict) for given in step.values())):
        raise UsageError(
            f"the step {step!r} of a transform is not one name with its arguments", "write it as - NAME: {KEY: VALUE}"
        )
    ((name, arguments),) = step.items()
    kind = MIXINGS.get(name, vars(v2).get(name))
    if not (name in MIXINGS or (inspect.isclass(kind) and issubclass(kind, v2.Transform))):
        raise UsageError(
            f"torchvision.transforms.v2 has no transform {name!r}",
            "take a name from torchvision's list of v2 transforms",
        )
    try:
        built: Callable[..., Any] = kind(**{key: _argument(key, value) for key, value in arguments.items()})
    except (TypeError, ValueError, AttributeError) as error:
        fix = f"see the arguments of torchvision.transforms.v2.{name}"
        if name in MIXINGS:
            fix = "give alpha alone: the loss is told of both labels and their shares"
        raise UsageError(f"transform {name}: {error}", fix) from None
    return built if name in MIXINGS else Bounded(built, name, arguments)


def _argument(key: str, value: Any) -> Any:
    """What YAML cannot say: a torch type, a member of an enumeration, a transform inside another one."""
    if key == "dtype" and isinstance(value, str):
        dtype = vars(torch).get(value)
        if not isinstance(dtype, torch.dtype):
            raise ValueError(f"dtype {value!r} is not a torch type")
        return dtype
    if key == "interpolation" and isinstance(value, str):
        return v2.InterpolationMode(value)
    if key == "policy" and isinstance(value, str):
        return v2.AutoAugmentPolicy(value)
    if key == "transforms" and isinstance(value, list):
        return [_step(step) for step in value]
    return value


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

    Raises:
        UsageError: for a transform that cannot be.
    """

    def __init__(
        self, samples: Samples, transform: Transform, seed: int = 0, view: int = 0, labels: Tensor | None = None
    ) -> None:
        self.samples, self.seed, self.view = samples, seed, view
        self.labels = torch.from_numpy(samples.labels.astype(np.int64)) if labels is None else labels
        self.transform = transform
        steps, mixing = split_mixing(transform)
        self._transform = build_transform(steps)
        self._mixing = build_transform([mixing]) if mixing else None
        if mixing and samples.ids is not None:
            raise UsageError(
                f"{mixing} mixes images with any others of the cache, and some of these are not here",
                "train on the whole data set, or from a cache of views that are not mixed",
            )
        self._random = is_random(steps)
        alone = is_random(transform) or any(name in _NOT_BATCHED for step in transform for name in step)
        self._arrays = samples.images if isinstance(samples.images, ArrayImages) and not alone else None

    def __len__(self) -> int:
        return len(self.samples)

    @property
    def mixes(self) -> bool:
        """Whether each image is mixed with another."""
        return self._mixing is not None

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
            mixed = Mixed(self.labels[list(partners)], torch.tensor(shares))
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

    def _seeded(self, index: int) -> AbstractContextManager[None]:
        ids = self.samples.ids
        return seeded(self.seed, index if ids is None else int(ids[index]), self.view)

    def _transformed(self, index: int, count: int) -> Tensor:
        """An image, one of `count` that are to be held at once."""
        picture = self.samples.images.picture(index)
        if isinstance(picture, Tensor):
            picture = picture.clone()  # a transform may work in place, and must not change the data set
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


def cut_range(ids: range, batch_size: int) -> list[range]:
    """A run of ids in batches, the last one shorter where it does not come out even."""
    return [range(start, min(start + batch_size, ids.stop)) for start in range(ids.start, ids.stop, batch_size)]


def batches(
    view: View, cuts: Sequence[Sequence[int]], workers: int = 0, device: torch.device | str = "cpu"
) -> Iterator[Batch]:
    """The batches of a view, in the order of `cuts`, loaded by `workers` processes ahead of the one that asks.

    Raises:
        IncompleteError: if one of these processes dies.
    """
    loader: DataLoader[Any] = DataLoader(
        _Fetched(view),
        batch_sampler=cuts,  # type: ignore[arg-type]  # torch says lists, and takes ranges as well
        num_workers=workers,
        collate_fn=_as_is,
        pin_memory=torch.device(device).type == "cuda",
        generator=torch.Generator(),  # of the workers' seeds, which no view uses; the caller's is left alone
    )
    with told_of_lost_processes(*((ConnectionError, EOFError) if workers else ())):
        for batch in loader:
            if isinstance(batch, KdcacheError):
                raise batch
            yield batch


class _Fetched(Dataset[Any]):
    """A view whose mistakes come back as values: of one raised in a worker process, DataLoader keeps the text only."""

    def __init__(self, view: View) -> None:
        self.view = view

    def __getitems__(self, ids: Sequence[int]) -> Batch | KdcacheError:
        try:
            return self.view.__getitems__(ids)
        except KdcacheError as error:
            return error


def _as_is(batch: Any) -> Any:
    return batch

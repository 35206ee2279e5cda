"""Apply a transform to a whole batch: first the draws of each image, then the pixels of all images at once.

Only for steps of which the pixels of a batch are those of its images, and whose draws depend on nothing but the size of
an image. Other transforms are applied to one image at a time (`views.py`), which gives the same pixels.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torchvision.transforms import v2

from kdcache.config.transform import Transform
from kdcache.data.images import ArrayImages, Images, Picture
from kdcache.data.seeding import kept_torch_generator
from kdcache.data.transform_limits import SizeLimitedStep, check_batch
from kdcache.data.transforms import is_batched

_APPLIED_OR_NOT = {"RandomGrayscale", "RandomHorizontalFlip", "RandomInvert", "RandomPosterize", "RandomSolarize",
                   "RandomVerticalFlip"}  # fmt: skip
"""Steps that draw whether an image is changed, and nothing else."""

_MOVES = {"CenterCrop", "Identity", "Pad", "RandomCrop", "RandomHorizontalFlip", "RandomVerticalFlip"}
"""Steps that give a PIL image and the tensor of its pixels the same pixels, where they can be applied to the latter."""

_MODES = {"L", "RGB"}
"""Modes of PIL images whose values ToImage returns as they are."""

_MAX_STACKED = 2**26
"""Values of the images of a batch; larger ones are read and transformed one at a time."""

_CHUNK = 2**20
"""Values of the images that are transformed at once: they stay in the processor's cache between two steps."""

Draw = Callable[[], Any]


class _Plan(NamedTuple):
    """What images of one size and type need.

    Attributes:
        draws: of each step, a function that draws what it draws for one image; None if it draws nothing.
        values: the most values that an image has on the way.
    """

    draws: list[Draw | None]
    values: int


class BatchedTransform:
    """A transform that is applied to images of one size and type at once.

    Args:
        steps: as `build_transform` makes them.
    """

    def __init__(self, steps: Sequence[SizeLimitedStep]) -> None:
        self._steps = steps
        names = [step.name for step in steps]
        self._takes_pil = "ToImage" in names and set(names[: names.index("ToImage")]) <= _MOVES
        self._plans: dict[tuple[torch.Size, torch.dtype], _Plan] = {}

    def __getstate__(self) -> dict[str, Any]:
        return vars(self) | {"_plans": {}}  # functions, which another process makes for itself

    def stack(self, images: Images, ids: Sequence[int]) -> Tensor | None:
        """Return the images `ids`, [B, channels, H, W], or other tensors [B, ...].

        None if they have to be transformed one at a time.
        """
        if isinstance(images, ArrayImages):
            return images.pixels[torch.as_tensor(ids, dtype=torch.int64)]
        arrays: list[Tensor] = []
        are_tensors = True
        for index in ids:
            picture = images.picture(int(index))
            are_tensors &= isinstance(picture, Tensor)
            pixels = self._pixels(picture)
            if pixels is None or (arrays and (pixels.shape, pixels.dtype) != (arrays[0].shape, arrays[0].dtype)):
                return None
            if pixels.numel() * len(ids) > _MAX_STACKED:
                return None
            arrays.append(pixels)
        stacked = torch.stack(arrays)
        return stacked if are_tensors or self._can_move(stacked) else None

    def _pixels(self, picture: Picture) -> Tensor | None:
        """Return a picture as a tensor [channels, H, W]; None if the steps treat it otherwise than that tensor."""
        if isinstance(picture, Tensor):
            return picture.as_subclass(Tensor)
        if not (self._takes_pil and picture.mode in _MODES):
            return None
        return torch.from_numpy(np.array(picture)).view(picture.height, picture.width, -1).permute(2, 0, 1)

    def __call__(self, pixels: Tensor, seeds: Sequence[int] | None) -> Tensor:
        """Return the transformed images; torch's generator is left in another state.

        Args:
            pixels: [B, channels, H, W]; may be modified.
            seeds: one per image, from which it draws; None if no step draws.
        """
        plan = self._plan_of(pixels)
        size = max(1, _CHUNK // plan.values)
        done = []
        for start in range(0, len(pixels), size):
            chosen = slice(start, start + size)
            drawn = _draw(plan, seeds[chosen]) if seeds is not None else [()] * len(self._steps)
            made = pixels[chosen]
            for step, values in zip(self._steps, drawn, strict=True):
                made = _apply(step, made, values)
            check_batch(made[0].numel(), len(pixels))
            done.append(made)
        return done[0] if len(done) == 1 else torch.cat(done)

    def _can_move(self, pixels: Tensor) -> bool:
        """Return whether the steps apply to tensors too: Pillow's images can be reflected by more than their size."""
        try:
            with kept_torch_generator():
                self._plan_of(pixels)
        except (IndexError, RuntimeError):
            return False
        return True

    def _plan_of(self, pixels: Tensor) -> _Plan:
        """Return the plan for images like `pixels` [B, channels, H, W], made once per size and type."""
        key = (pixels.shape[1:], pixels.dtype)
        if key not in self._plans:
            self._plans[key] = self._plan(pixels[:1].clone())
        return self._plans[key]

    def _plan(self, image: Tensor) -> _Plan:
        """Return the plan for images of the size and type of `image` [1, channels, H, W]."""
        draws: list[Draw | None] = []
        values = max(image.numel(), 1)
        for step in self._steps:
            draws.append(_draw_of(step, image))
            values = max(values, step.check(image))
            image = step(image)
        return _Plan(draws, values)


def _draw(plan: _Plan, seeds: Sequence[int]) -> list[Sequence[Any]]:
    """Return what each step draws for each image, in the order of the steps; nothing for a fixed step."""
    drawing = [draw for draw in plan.draws if draw is not None]
    generator, rows = torch.default_generator, []
    for seed in seeds:
        generator.manual_seed(seed)
        rows.append([draw() for draw in drawing])
    columns = iter(zip(*rows, strict=True))
    return [() if draw is None else next(columns) for draw in plan.draws]


def batched_transform(transform: Transform, steps: Sequence[Any]) -> BatchedTransform | None:
    """Return a transform for batches; None if a step has to be applied to one image at a time."""
    batched = all(
        isinstance(step, SizeLimitedStep)
        and (step.name == "RandomCrop" or step.name in _APPLIED_OR_NOT or is_batched([given]))
        for given, step in zip(transform, steps, strict=True)
    )
    return BatchedTransform(steps) if batched else None


def _draw_of(step: SizeLimitedStep, image: Tensor) -> Draw | None:
    """Return a function that draws what the step draws for one image; None if it draws nothing."""
    torchvision_step: Any = step.step
    if step.name == "RandomCrop":
        return lambda: torchvision_step.make_params([image])
    if step.name in _APPLIED_OR_NOT:
        return lambda: bool(torch.rand(1) < torchvision_step.p)
    return None


def _apply(step: SizeLimitedStep, pixels: Tensor, drawn: Sequence[Any]) -> Tensor:
    """Apply a step to images [B, channels, H, W], given what it draws for each."""
    if not drawn:
        result: Tensor = step(pixels)
        return result
    torchvision_step: Any = step.step
    pixels = pixels.as_subclass(Tensor)
    if step.name == "RandomCrop":
        return _crop(torchvision_step, pixels, drawn)
    changed = torch.tensor(drawn)
    if changed.any():
        selected = pixels[changed]
        pixels[changed] = torchvision_step.transform(selected, torchvision_step.make_params([selected]))
    return pixels


def _crop(step: v2.RandomCrop, pixels: Tensor, boxes: Sequence[dict[str, Any]]) -> Tensor:
    """Return one window per image, [B, channels, height, width], after the padding of RandomCrop."""
    first = boxes[0]
    padded: Tensor = step.transform(pixels, {**first, "needs_crop": False})
    if not first["needs_crop"]:
        return padded.clone() if padded is pixels else padded
    tops, lefts = (torch.tensor([box[side] for box in boxes]) for side in ("top", "left"))
    windows = padded.unfold(2, first["height"], 1).unfold(3, first["width"], 1)
    return windows[torch.arange(len(boxes)), :, tops, lefts]

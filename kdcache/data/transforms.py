"""Transforms as data: lists of steps, each a name of `torchvision.transforms.v2` with its arguments.

A step may also be `path/file.py:function`: a function `(image, **arguments) -> image`, or a class that is built with
the arguments and called on an image. It counts as random unless it has an attribute `deterministic = True`.
"""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from PIL import Image, ImageOps
from torch import Tensor
from torchvision.transforms import v2
from torchvision.tv_tensors import Mask

from kdcache.cache.format.recorded_views import CROP, ELSEWHERE, recorded
from kdcache.config.transform import EXIF_TRANSPOSE, Transform, step_names
from kdcache.data.mixing import MIXINGS, split_mixing
from kdcache.data.transform_limits import SizeLimitedStep, check_steps
from kdcache.errors import UsageError, did_you_mean
from kdcache.runtime import user_code

# The transforms of torchvision that draw no random numbers. Any other is assumed to draw some: its images are then made
# one by one from their own seeds, which is correct for every transform and only slower for one that is fixed.
_FIXED = {"CenterCrop", "ClampBoundingBoxes", "ClampKeyPoints", "ConvertBoundingBoxFormat", "ConvertImageDtype",
          "FiveCrop", "Grayscale", "Identity", "LinearTransformation", "Normalize", "PILToTensor", "Pad", "RGB",
          "Resize", "SanitizeBoundingBoxes", "SanitizeKeyPoints", "SetClampingMode", "TenCrop", "ToDtype", "ToImage",
          "ToPILImage", "ToPureTensor", "ToTensor", "UniformTemporalSubsample", EXIF_TRANSPOSE}  # fmt: skip

NOT_BATCHED = {"ToPILImage", "UniformTemporalSubsample"}
"""Fixed transforms that cannot be given a batch, which they would take for one image or a video."""


def is_random(transform: Transform) -> bool:
    """Whether a transform may draw random numbers.

    Raises:
        UsageError: for a step of the user that cannot be loaded.
    """
    return any(_may_draw(name) for step in transform for name in step)


def _may_draw(name: str) -> bool:
    # Code that only a cache names is not run to find out.
    if user_code.is_user_code(name) and user_code.is_trusted(name):
        return getattr(load_step(name).target, "deterministic", False) is not True
    return name not in _FIXED


def runs_user_code(transform: Transform) -> bool:
    """Whether a step is code of the user."""
    return any(map(user_code.is_user_code, step_names(transform)))


def is_batched(transform: Transform) -> bool:
    """Whether the steps give the same images for a whole batch as for one image at a time."""
    names = [name for step in transform for name in step]
    return not is_random(transform) and not any(name in NOT_BATCHED or user_code.is_user_code(name) for name in names)


def is_drawn(transform: Transform) -> bool:
    """Whether a view of a sample depends on its id; a recorded crop does not."""
    return is_random(transform if recorded(transform) is None else transform[1:])


def transform_for_evaluation(given: Transform | None, training: Transform) -> Transform:
    """Return the transform of validation and test images.

    Args:
        given: `eval_transform` of the pipeline.
        training: the transform of the training images, which is the default.

    Raises:
        UsageError: if it mixes images, or if it is random and `given` is None.
    """
    if given is not None:
        if recorded(given):
            raise UsageError(
                f"eval_transform begins with {next(iter(given[0]))}, whose boxes are recorded for training images only",
                "begin it with Resize and CenterCrop",
            )
        if split_mixing(given)[1]:
            raise UsageError(
                "eval_transform mixes images, and accuracy needs images with one label", "remove its last step"
            )
        return given
    if is_random(training):
        fixed = [step for step in training if not is_random([step])]
        raise UsageError(
            "the transform is random, and validation and test images need one that is not",
            f"set eval_transform; the fixed steps of the transform are eval_transform: {json.dumps(fixed)}",
        )
    return training


class ExifTranspose(v2.Transform):  # type: ignore[misc]  # torchvision is untyped
    """Turn or mirror an image as its EXIF orientation says; tensors, which have none, are left as they are."""

    def transform(self, image: Any, _params: dict[str, Any]) -> Any:
        """Return the upright image."""
        return ImageOps.exif_transpose(image) if isinstance(image, Image.Image) else image


def build_transform(transform: Transform, fill_of_maps: int | None = None) -> Callable[..., Any]:
    """Return the transform that a list of steps describes, a callable.

    Args:
        transform: the steps.
        fill_of_maps: what steps put into label maps where the image has no pixels, if it is also called as
            transform(image, label map); None if it is called with images alone.

    Raises:
        UsageError: for a name that is not in `torchvision.transforms.v2`, for wrong arguments, or for more than
            `data/transform_limits.py` allows.
    """
    check_steps(step_names(transform))
    if EXIF_TRANSPOSE in [*step_names(transform)][1:]:
        raise UsageError(f"{EXIF_TRANSPOSE} can only be the first step of a transform", "put it at the beginning, once")
    steps = [_step(step, fill_of_maps) for step in transform]
    return v2.Compose(steps) if steps else v2.Identity()  # type: ignore[no-any-return]  # torchvision is untyped


def _step(step: dict[str, dict[str, Any]], fill_of_maps: int | None = None) -> Callable[..., Any]:
    """Return one step of a transform, a callable; see `build_transform`."""
    if not (isinstance(step, dict) and len(step) == 1 and all(isinstance(given, dict) for given in step.values())):
        raise UsageError(
            f"the step {step!r} of a transform is not one name with its arguments", "write it as - NAME: {KEY: VALUE}"
        )
    ((name, arguments),) = step.items()
    if user_code.is_user_code(name):
        return UserStep(name, arguments)
    kind = ExifTranspose if name == EXIF_TRANSPOSE else MIXINGS.get(name, vars(v2).get(name))
    if name in (CROP, ELSEWHERE):
        raise UsageError(f"{name} can only be the first step of a transform", "put it at the beginning, once")
    if not (name in MIXINGS or (inspect.isclass(kind) and issubclass(kind, v2.Transform))):
        raise UsageError(
            f"torchvision.transforms.v2 has no transform {name!r}{did_you_mean(name, [*vars(v2), *MIXINGS])}",
            "use a name from torchvision's list of v2 transforms, or path/file.py:function",
        )
    try:
        given = {key: _argument(key, value, fill_of_maps) for key, value in arguments.items()}
        if fill_of_maps is not None and "fill" in inspect.signature(kind).parameters:
            given["fill"] = {Mask: fill_of_maps, "others": given.get("fill", 0)}
        built: Callable[..., Any] = kind(**given)
    except (TypeError, ValueError, AttributeError) as error:
        fix = f"see the arguments of torchvision.transforms.v2.{name}"
        if name in MIXINGS:
            fix = "give alpha only: the loss gets both labels and their shares"
        raise UsageError(f"transform {name}: {error}", fix) from None
    return built if name in MIXINGS else SizeLimitedStep(built, name, arguments)


def _argument(key: str, value: Any, fill_of_maps: int | None = None) -> Any:
    """Return an argument that YAML cannot express: a torch type, a member of an enumeration, or inner transforms."""
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
        return [_step(step, fill_of_maps) for step in value]
    return value


_SIGNATURE = "function(image, **arguments) -> image, or a class built with the arguments whose instances take an image"


def load_step(reference: str) -> user_code.UserCode:
    """Return the function or class of a step `path/file.py:function`.

    Raises:
        UsageError: if only a cache names it, or it cannot be loaded.
    """
    if not user_code.is_trusted(reference):
        raise UsageError(
            f"the transform of this cache runs {reference}, code that is not part of the cache",
            "if you have that file and trust it, give the transform of the cache yourself: `transform` in the "
            "pipeline, or CachedDataset(..., transform=...)",
        )
    return user_code.load(reference, "transform step", _SIGNATURE)


class UserStep:
    """A step from a file of the user. It can be sent to worker processes, which load the file again.

    Raises:
        UsageError: if it cannot be loaded or built, raises, or returns anything but an image.
    """

    def __init__(self, reference: str, arguments: dict[str, Any]) -> None:
        self.reference, self.arguments = reference, arguments
        self.code = load_step(reference)
        self._built: Callable[..., Any] | None = None
        if inspect.isclass(self.code.target):
            self._built = self.code(**arguments)
            if not callable(self._built):
                raise self.code.mistake("makes objects that cannot be called on an image")
        else:
            self.code.check_arguments(None, **arguments)

    def __call__(self, image: Any, *label_map: Any) -> Any:
        """Return the image that the step makes of an image: a tensor [channels, H, W] or a PIL image.

        Of a tensor of another number of dimensions it makes one of as many; of an image and its label map, both.
        """
        if self._built is None:
            result = self.code(image, *label_map, **self.arguments)
        else:
            result = replace(self.code, target=self._built)(image, *label_map)
        if label_map:
            return self._pair(result)
        ndim = image.ndim if isinstance(image, Tensor) else 3
        if isinstance(result, Image.Image) or (isinstance(result, Tensor) and result.ndim == ndim):
            return result
        shape = f" {list(result.shape)}" if isinstance(result, Tensor) else ""
        if ndim != 3:
            raise self.code.mistake(f"returned a {type(result).__name__}{shape}, not a tensor of {ndim} dimensions")
        raise self.code.mistake(
            f"returned a {type(result).__name__}{shape}, not a tensor [channels, H, W] or PIL image"
        )

    def _pair(self, result: Any) -> Any:
        """Return an image and its label map, if these are what the step returned."""
        if isinstance(result, tuple) and len(result) == 2:
            image, moved = result
            if isinstance(image, Image.Image | Tensor) and isinstance(moved, Tensor) and moved.ndim == 2:
                return image, Mask(moved)
        raise self.code.mistake(f"returned a {type(result).__name__}, not an image and its label map [H, W]")

    def __reduce__(self) -> Any:
        return _in_worker, (self.reference, self.arguments)


def _in_worker(reference: str, arguments: dict[str, Any]) -> UserStep:
    """Build a step in a process that was started by one that was allowed to."""
    user_code.trust([reference])
    return UserStep(reference, arguments)

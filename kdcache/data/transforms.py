"""Transforms as data: lists of names and arguments of `torchvision.transforms.v2`, and what can be said of them."""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable
from typing import Any

import torch
from torchvision.transforms import v2

from kdcache.cache.format.recorded_views import CROP, ELSEWHERE, recorded
from kdcache.config.schema import Transform
from kdcache.data.mixing import MIXINGS, split_mixing, step_names
from kdcache.data.transform_limits import Bounded, check_steps
from kdcache.errors import UsageError

# What torchvision has that draws no random number. A name that is not here is taken to draw some: its images are then
# made one by one from their own seeds, which is right for every transform and only slower for one that is fixed.
_FIXED = {"CenterCrop", "ClampBoundingBoxes", "ClampKeyPoints", "ConvertBoundingBoxFormat", "ConvertImageDtype",
          "FiveCrop", "Grayscale", "Identity", "LinearTransformation", "Normalize", "PILToTensor", "Pad", "RGB",
          "Resize", "SanitizeBoundingBoxes", "SanitizeKeyPoints", "SetClampingMode", "TenCrop", "ToDtype", "ToImage",
          "ToPILImage", "ToPureTensor", "ToTensor", "UniformTemporalSubsample"}  # fmt: skip

NOT_BATCHED = {"ToPILImage", "UniformTemporalSubsample"}
"""Of those, what takes a batch for one image too large, or for a film."""


def is_random(transform: Transform) -> bool:
    """Whether a transform may draw random numbers."""
    return not _FIXED.issuperset(name for step in transform for name in step)


def is_drawn(transform: Transform) -> bool:
    """Whether a view of a sample depends on its number: what is recorded goes wherever the sample goes."""
    return is_random(transform if recorded(transform) is None else transform[1:])


def transform_for_evaluation(said: Transform | None, seen: Transform) -> Transform:
    """What images that are not for training go through: never something random, never something unsaid.

    Args:
        said: `eval_transform` of the pipeline.
        seen: what training images go through, which is taken where nothing is said.

    Raises:
        UsageError: if it mixes images, or draws at random and nothing is said.
    """
    if said is not None:
        if recorded(said):
            raise UsageError(
                f"eval_transform begins with {next(iter(said[0]))}, and there are no boxes of these images",
                "begin it with Resize and CenterCrop",
            )
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
    if name in (CROP, ELSEWHERE):
        raise UsageError(f"{name} can only be the first step of a transform", "put it at the beginning, once")
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

"""A student that augments its images itself: its training images, and the transform that it is evaluated with.

A network must be evaluated on such images as it was trained on. If a student has a `transform` of its own and the
pipeline has no `eval_transform`, its evaluation transform is derived: `student.transform` without the augmentations.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

from kdcache.config.schema import Pipeline, StudentSpec, TeacherSpec, TrainSpec
from kdcache.config.transform import Transform
from kdcache.data.mixing import split_mixing
from kdcache.data.transforms import is_random, transform_for_evaluation
from kdcache.data.views import View
from kdcache.errors import UsageError
from kdcache.train.inputs import TrainingInputs, labels_shown
from kdcache.train.shared_views import SharedViews

# Steps that leave an image as it is in expectation or in some of their draws, so that evaluation does without them.
_AUGMENTATIONS = {"AugMix", "AutoAugment", "ColorJitter", "ElasticTransform", "GaussianBlur", "GaussianNoise", "JPEG",
                  "RandAugment", "RandomAdjustSharpness", "RandomAffine", "RandomAutocontrast",
                  "RandomChannelPermutation", "RandomCrop", "RandomEqualize", "RandomErasing", "RandomGrayscale",
                  "RandomHorizontalFlip", "RandomInvert", "RandomPerspective", "RandomPhotometricDistort",
                  "RandomPosterize", "RandomRotation", "RandomSolarize", "RandomVerticalFlip",
                  "TrivialAugmentWide"}  # fmt: skip
_CONTAINERS = {"RandomApply", "RandomChoice"}

_NO_CHANGE = {"degrees": 0, "shear": 0, "scale": 1, "brightness": 1, "contrast": 1, "saturation": 1, "hue": 0}
"""Values of the arguments of RandomAffine, RandomRotation and ColorJitter that leave an image as it is."""

_RESIZE_PER_CROP = 256 / 224
"""Of torchvision's evaluation of ImageNet networks: images are resized to 256 pixels, and 224 are cropped."""


def own_training_view(inputs: TrainingInputs, own: Transform, spec: TrainSpec, views: SharedViews) -> View:
    """Return the training images under a student's own transform.

    Raises:
        UsageError: if the teacher's views are random, or the transform mixes images.
    """
    if inputs.teacher is not None:
        if inputs.views != 1 or is_random(inputs.transform):
            raise UsageError(
                f"student.transform is for a teacher of fixed images, and the cache has {inputs.views} views of "
                f"{json.dumps(inputs.transform)}",
                "remove student.transform: the student then sees what the teacher saw",
            )
        if split_mixing(own)[1]:
            raise UsageError(
                f"student.transform mixes images in its step {own[-1]}, and the teacher saw no mixed images",
                "dump the teacher on mixed views: put the step at the end of `transform`",
            )
    return views.view(inputs.samples, own, spec.seed_of_data, labels=labels_shown(inputs.samples, spec))


def evaluation_transform(pipeline: Pipeline, spec: TeacherSpec | StudentSpec, seen: Transform) -> Transform:
    """Return the transform that a network is validated and tested with.

    Args:
        pipeline: its `eval_transform` is used if there is one.
        spec: section of the network; of a student, its `transform` is considered.
        seen: transform of the training images for a network without one of its own.

    Raises:
        UsageError: if it is random or mixes images, or cannot be derived; the fix proposes one.
    """
    own = spec.transform if isinstance(spec, StudentSpec) else None
    if own is None or pipeline.eval_transform is not None:
        return transform_for_evaluation(pipeline.eval_transform, seen)
    steps, _ = split_mixing(own)
    for step in steps:
        if is_random([step]) and not _can_be_left_out(step):
            raise _underivable(own, f"its step {json.dumps(step)} is not known to be an augmentation alone")
    return [step for step in steps if not is_random([step])]


def check_evaluation_shape(own: Transform, train: View, held_out: View) -> None:
    """Check that under a derived transform, images have the shape that the student is trained on.

    Raises:
        UsageError: if the shapes differ, such as without a RandomCrop to a smaller size; the fix proposes a transform.
    """
    trained, evaluated = train.shape(), held_out.shape()
    if trained != evaluated:
        raise _underivable(
            own, f"without its augmentations, images are {list(evaluated)} and not {list(trained)}, as in training"
        )


def _can_be_left_out(step: dict[str, dict[str, Any]]) -> bool:
    """Return whether a random step is a known augmentation that leaves some images as they are."""
    ((name, arguments),) = step.items()
    if arguments.get("p", 0.5) == 1 and name != "RandomErasing":
        return False
    if name in ("ColorJitter", "RandomAffine", "RandomRotation") and any(_changes_all(*of) for of in arguments.items()):
        return False
    if name in _CONTAINERS:
        return all(is_random([inner]) and _can_be_left_out(inner) for inner in arguments.get("transforms", [{}]))
    return name in _AUGMENTATIONS


def _changes_all(argument: str, value: Any) -> bool:
    """Return whether an argument is a range, or several, without the value that changes nothing, such as [90, 90]."""
    if argument not in _NO_CHANGE or not isinstance(value, list):
        return False
    ends = zip(value[::2], value[1::2], strict=False)
    return any(not low <= _NO_CHANGE[argument] <= high for low, high in ends)


def _underivable(own: Transform, why: str) -> UsageError:
    return UsageError(
        f"the transform for validation and test images cannot be derived from student.transform: {why}",
        f"set it in the pipeline, for instance eval_transform: {json.dumps(list(_proposed(own)))}",
    )


def _proposed(own: Transform) -> Iterator[dict[str, dict[str, Any]]]:
    """Yield the fixed steps of a transform, with center crops in place of random ones."""
    for step in split_mixing(own)[0]:
        ((name, arguments),) = step.items()
        size = arguments.get("size")
        if name == "RandomResizedCrop":
            side = size if isinstance(size, int) else max(size or [224])
            yield {"Resize": {"size": [round(side * _RESIZE_PER_CROP)]}}
        if name in ("RandomCrop", "RandomResizedCrop"):
            yield {"CenterCrop": {"size": size}}
        elif not is_random([step]):
            yield step

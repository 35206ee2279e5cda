"""Move label maps by the same draws as their images.

torchvision's v2 steps take an image and its mask together, and draw for both what they draw for the image alone, so
that the pixels of a view are those of the data set without masks. What a step adds at the edges is ignored in the map.
"""

from __future__ import annotations

import warnings
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from torchvision import tv_tensors

from kdcache.cache.format.recorded_views import CROP, ELSEWHERE
from kdcache.config.transform import EXIF_TRANSPOSE, Transform, step_names
from kdcache.data.label_maps import UNKNOWN
from kdcache.data.mixing import split_mixing
from kdcache.data.transforms import build_transform, load_step
from kdcache.errors import MismatchError, UsageError
from kdcache.runtime.user_code import is_user_code

IMAGES_ALONE = {"AugMix", "AutoAugment", "FiveCrop", "RandAugment", "RandomIoUCrop", "TenCrop", "TrivialAugmentWide"}
"""Steps of torchvision that do not take masks alone, or return several images."""

_ORIENTATION, _UPRIGHT = 274, 1


class MapTransform:
    """A transform of an image and its label map.

    Args:
        transform: steps, as in a pipeline file.

    Raises:
        UsageError: for a step that does not move label maps; names it.
    """

    def __init__(self, transform: Transform) -> None:
        self._turns = turns_images(transform)
        check_moves_maps(transform)
        self._transform = build_transform(transform, UNKNOWN)

    def __call__(self, picture: Image.Image | Tensor, label_map: Tensor, where: str) -> tuple[Any, Tensor]:
        """Return the transformed image and its label map, [h, w] int64.

        Args:
            picture: the image.
            label_map: [H, W] int64.
            where: name of the sample, for messages.

        Raises:
            MismatchError: if image and label map differ in size, before or after.
            UsageError: for an image that the transform would turn by its EXIF orientation.
        """
        check_same_size(_size_of(picture), (label_map.shape[0], label_map.shape[1]), where)
        if self._turns and isinstance(picture, Image.Image) and _is_turned(picture):
            raise turned_alone(where)
        mask = tv_tensors.Mask(label_map.to(torch.int16))
        with warnings.catch_warnings():
            # RandomErasing says that it leaves masks as they are, which is right: the object is still there.
            warnings.filterwarnings("ignore", "RandomErasing", UserWarning)
            image, moved = self._transform(picture, mask)
        moved = moved.as_subclass(Tensor).long()
        if (after := _size_of(image)) != tuple(moved.shape):
            raise MismatchError(
                f"after the transform, the image of {where} has {after[0]} x {after[1]} pixels, and its mask "
                f"{moved.shape[0]} x {moved.shape[1]}",
                "use steps that change both",
            )
        return image, moved


def check_moves_maps(transform: Transform) -> None:
    """Check that every step of a transform can be applied to label maps.

    Raises:
        UsageError: for one that cannot; names it.
    """
    if split_mixing(transform)[1] is not None:
        name = [*step_names(transform)][-1]
        raise UsageError(
            f"{name} mixes two images, and their label maps cannot be mixed", "remove this step from the transform"
        )
    for name in step_names(transform):
        if name in (CROP, ELSEWHERE):
            raise UsageError(
                f"the transform begins with {name}, whose views other code drew, and label maps are not moved with it",
                "use the data set without its masks, or a cache of views that kdcache drew",
            )
        if name in IMAGES_ALONE:
            raise UsageError(
                f"the step {name} of the transform does not take label maps",
                "use steps such as RandomResizedCrop, RandomCrop, RandomHorizontalFlip, RandomAffine or ColorJitter",
            )
        if is_user_code(name) and getattr(load_step(name).target, "takes_maps", False) is not True:
            raise UsageError(
                f"the step {name} of the transform takes images alone, and the data set has label maps",
                "make it function(image, label_map=None, **arguments) -> (image, label_map), or of an image alone the "
                "image, and set its attribute takes_maps = True",
            )


def turns_images(transform: Transform) -> bool:
    """Return whether a transform turns images by their EXIF orientation."""
    return EXIF_TRANSPOSE in [*step_names(transform)][:1]


def check_same_size(image: tuple[int, int], mask: tuple[int, int], where: str) -> None:
    """Check that an image and its mask have one size, (height, width).

    Raises:
        MismatchError: if they differ.
    """
    if image != mask:
        raise MismatchError(
            f"the image of {where} has {image[0]} x {image[1]} pixels (height x width), and its mask "
            f"{mask[0]} x {mask[1]}",
            "save the mask in the size of its image",
        )


def turned_alone(where: str) -> UsageError:
    """Return the error for an image that would be turned without its mask."""
    return UsageError(
        f"the image of {where} has an EXIF orientation, which {EXIF_TRANSPOSE} applies, and its mask has none",
        "save the image upright, or remove the step if the mask belongs to the pixels as they are stored",
    )


def _is_turned(picture: Image.Image) -> bool:
    return bool(picture.getexif().get(_ORIENTATION, _UPRIGHT) != _UPRIGHT)


def _size_of(picture: Any) -> tuple[int, int]:
    """Return (height, width) of an image."""
    if isinstance(picture, Image.Image):
        return picture.height, picture.width
    return int(picture.shape[-2]), int(picture.shape[-1])

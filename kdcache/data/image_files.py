"""Decode image files to 8-bit RGB by one rule, and examine their headers.

- 8-bit images of any color space are converted by Pillow: gray is repeated, a palette resolved, transparency dropped.
- 16-bit gray keeps its high byte, as Pillow does with 16-bit color: its largest value is white.
- Images of a range of values that the file does not state (32-bit integers and floats) are refused.
- Of an animation, the first frame is taken. An EXIF orientation is applied by the transform, if it begins with
  `ExifTranspose`.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from importlib import import_module
from typing import Any

import numpy as np
from PIL import Image, UnidentifiedImageError

from kdcache.config.transform import EXIF_TRANSPOSE, Transform

# fmt: off
EXTENSIONS = frozenset({
    ".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".apng", ".ppm", ".pgm", ".pbm", ".pnm", ".bmp", ".dib", ".tif", ".tiff",
    ".webp", ".gif", ".avif", ".avifs", ".heic", ".heif", ".hif", ".jp2", ".j2k", ".jpx", ".jxl", ".tga", ".qoi",
})
"""Image files of a data set, in lower case, if Pillow or one of its plug-ins reads them."""

UNREADABLE_EXTENSIONS = frozenset({
    ".svg", ".psd", ".raw", ".dng", ".cr2", ".cr3", ".nef", ".arw", ".orf", ".rw2", ".raf", ".exr", ".hdr", ".dcm",
    ".nii", ".ico", ".icns", ".eps", ".pdf",
})
"""Files that hold images and are left out of a data set with a note of their own."""
# fmt: on

PLUGINS = {
    ".heic": "pillow-heif",
    ".heif": "pillow-heif",
    ".hif": "pillow-heif",
    ".avif": "pillow-avif-plugin",
    ".avifs": "pillow-avif-plugin",
    ".jxl": "pillow-jxl-plugin",
}
"""Extension -> the package that reads it, where Pillow alone does not."""

GRAY_16_BIT = "are 16-bit gray and are scaled to 8 bits"
TRANSPARENT = "have transparency, which is dropped"
ROTATED = "have an EXIF orientation"
"""What `header_facts` finds."""

_EIGHT_BIT_MODES = {
    "1", "L", "LA", "P", "PA", "RGB", "RGBA", "RGBX", "RGBa", "CMYK", "YCbCr", "HSV", "LAB",
}  # fmt: skip
_MODE_NAMES = {"I": "32-bit integers", "F": "32-bit floats"}

# TIFF tags, and the value of PHOTOMETRIC by which 0 is white.
_BITS, _PHOTOMETRIC, _MIN_IS_WHITE = 258, 262, 0
_ORIENTATION, _UPRIGHT = 274, 1

SCALE_FILES = (
    "scale them by the range that all files share and save them as 8-bit or 16-bit gray PNG (floats from 0 to 1: "
    "multiply by 65535), or return float tensors from a data set of your own: dataset.name=path/file.py:function"
)
"""The fix for images of an unknown range."""


class UnknownRangeError(ValueError):
    """The values of an image have no range that is known."""


@cache
def register_plugins() -> None:
    """Register the plug-ins of Pillow that are installed, once per process."""
    for module, function in (("pillow_heif", "register_heif_opener"), ("pillow_avif", ""), ("pillow_jxl", "")):
        try:
            plugin = import_module(module)
        except ImportError:
            continue
        if function:
            getattr(plugin, function)()


def readable_extensions() -> frozenset[str]:
    """Return the extensions of `EXTENSIONS` that can be read on this machine."""
    register_plugins()
    formats = Image.registered_extensions()
    return frozenset(extension for extension in EXTENSIONS if formats.get(extension) in Image.OPEN)


def decode_rgb(path: str) -> Image.Image:
    """Return the image in a file as an 8-bit RGB image, with its EXIF data in `info`.

    Raises:
        UnknownRangeError: if the range of its values is not known.
        Exception: of many types, if the file is damaged.
    """
    register_plugins()
    with Image.open(path) as image:
        if image.mode in _EIGHT_BIT_MODES:
            return image.convert("RGB")
        bits = _gray_bits(image)
        if bits is None:
            raise _unknown_range(image)
        tags: Mapping[int, Any] = getattr(image, "tag_v2", {})
        inverted = tags.get(_PHOTOMETRIC) == _MIN_IS_WHITE
        high = (np.asarray(image).astype(np.int64) >> (bits - 8)).astype(np.uint8)
        gray = Image.fromarray(255 - high if inverted else high)
        gray.info = dict(image.info)
        return gray.convert("RGB")


def _gray_bits(image: Image.Image) -> int | None:
    """Return how many bits a gray image of more than 8 has; None if that is not known."""
    tags: Mapping[int, Any] = getattr(image, "tag_v2", {})
    if image.mode.startswith("I;16"):
        return int(tags.get(_BITS, (16,))[0])
    # Pillow scales these files to 16 bits, whatever their own largest value is.
    return 16 if image.mode == "I" and image.format in ("PPM", "PNG") else None


def _unknown_range(image: Image.Image) -> UnknownRangeError:
    name = f"mode {image.mode} ({_MODE_NAMES[image.mode]})" if image.mode in _MODE_NAMES else f"mode {image.mode}"
    try:
        low, high = (f"{value:g}" for value in image.getextrema())
    except (TypeError, ValueError):
        return UnknownRangeError(f"{name}, which has no conversion to RGB")
    return UnknownRangeError(f"{name}, values {low} to {high}: the range that is black to white is not known")


def header_facts(path: str, decode: bool = False) -> list[str]:
    """Return what a file's header says that a user should know: `GRAY_16_BIT`, `TRANSPARENT`, `ROTATED`.

    Args:
        path: of the image file.
        decode: decode the image completely too.

    Raises:
        UnknownRangeError: if the range of its values is not known.
        Exception: of many types, if the file is damaged.
    """
    register_plugins()
    with Image.open(path) as image:
        facts = []
        if image.mode not in _EIGHT_BIT_MODES:
            if _gray_bits(image) is None:
                raise _unknown_range(image)
            facts.append(GRAY_16_BIT)
        if image.mode in ("LA", "PA", "RGBA", "RGBa") or "transparency" in image.info:
            facts.append(TRANSPARENT)
        # Pillow turns TIFF files itself. Of a PNG without EXIF data in front, getexif would decode the pixels.
        has_exif = "exif" in image.info or "xmp" in image.info
        if has_exif and image.format != "TIFF" and image.getexif().get(_ORIENTATION, _UPRIGHT) != _UPRIGHT:
            facts.append(ROTATED)
    if decode:
        decode_rgb(path)
    return facts


def size_of_file(path: str) -> tuple[int, int]:
    """Return (height, width) of an image from the header of its file.

    Raises:
        Exception: of many types, if the file is damaged.
    """
    register_plugins()
    with Image.open(path) as image:
        return image.height, image.width


def reason_of(error: Exception) -> str:
    """Return in a few words why a file could not be read."""
    if isinstance(error, UnidentifiedImageError):
        return "not an image file"
    return error.strerror if isinstance(error, OSError) and error.strerror else str(error)


def describe_facts(counts: Mapping[str, int], transform: Transform) -> list[str]:
    """Return a line for each fact of `header_facts`.

    Args:
        counts: number of files, by fact.
        transform: of the images.
    """
    applied = bool(transform) and EXIF_TRANSPOSE in transform[0]
    advice = f"does not apply: to turn them, begin it with - {EXIF_TRANSPOSE}: {{}}"
    rotated = f", which the transform {'applies' if applied else advice}"
    return [
        f"{count:,} image files {fact}{rotated if fact == ROTATED else ''}" for fact, count in sorted(counts.items())
    ]

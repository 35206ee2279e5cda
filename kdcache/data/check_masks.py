"""Check the masks of a data set before they are used, and report what is wrong with all of them at once."""

from __future__ import annotations

from collections.abc import Sequence

from kdcache.data.image_files import ROTATED, size_of_file
from kdcache.data.images import FileImages
from kdcache.data.moved_maps import check_same_size, turned_alone
from kdcache.data.samples import Samples
from kdcache.errors import CorruptError, KdcacheError, MismatchError, UsageError

_NAMED = 10
"""Masks that a message names for each cause."""


def mask_problem(samples: Samples, index: int, decode: bool, facts: Sequence[str], turns: bool) -> KdcacheError | None:
    """Return what is wrong with the mask of an image in a file; None if nothing is, or there is no mask.

    Args:
        samples: the data set.
        index: of the image.
        decode: read the mask and check its values too, not only its header.
        facts: of the image file; see `header_facts`.
        turns: whether the transform turns images by their EXIF orientation.
    """
    images, maps = samples.images, samples.maps
    if maps is None or not isinstance(images, FileImages):
        return None
    path = images.paths[index]
    try:
        size = maps.header(index)
        if decode:
            found = maps.label_map(index)
            size = found.shape[0], found.shape[1]
        if size is not None:
            check_same_size(size_of_file(path), size, path)
    except KdcacheError as error:
        return error
    return turned_alone(path) if turns and ROTATED in facts else None


def unusable_masks(problems: Sequence[KdcacheError], total: int) -> KdcacheError:
    """Return the error that names masks that cannot be used, with one fix per cause.

    Args:
        problems: of each of them.
        total: number of masks.
    """
    by_fix: dict[str, list[str]] = {}
    for problem in problems:
        by_fix.setdefault(problem.fix, []).append(problem.what)
    lines = [f"{len(problems):,} of {total:,} masks cannot be used:"]
    for named in by_fix.values():
        lines += named[:_NAMED]
        if len(named) > _NAMED:
            lines.append(f"and {len(named) - _NAMED:,} more of this kind")
    return _worst(problems)("\n  ".join(lines), "; ".join(by_fix))


def joined(errors: Sequence[KdcacheError]) -> KdcacheError:
    """Return one error of several."""
    what, fix = "\n  ".join(each.what for each in errors), "; ".join(dict.fromkeys(each.fix for each in errors))
    return _worst(errors)(what, fix)


def _worst(errors: Sequence[KdcacheError]) -> type[KdcacheError]:
    """Return the kind with the highest exit code."""
    kinds: tuple[type[KdcacheError], ...] = (CorruptError, MismatchError, UsageError)
    return next(kind for kind in kinds if any(isinstance(error, kind) for error in errors))

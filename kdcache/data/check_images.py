"""Check that all files of a data set can be read, before they are used, and report what is done with them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

from kdcache.config.transform import Transform
from kdcache.data.check_masks import joined, mask_problem, unusable_masks
from kdcache.data.image_files import SCALE_FILES, UnknownRangeError, describe_facts, header_facts, reason_of
from kdcache.data.images import FileImages
from kdcache.data.moved_maps import turns_images
from kdcache.data.samples import Samples
from kdcache.errors import CorruptError, KdcacheError, UsageError
from kdcache.runtime.paths import READ_PERMISSION
from kdcache.runtime.progress import Progress, delayed_task

_FILES_PER_TASK = 256


def check_images(
    samples: Samples, progress: Progress, decode: bool = False, transform: Transform | None = None
) -> list[str]:
    """Check the header of every image file, and of its mask, several at the same time.

    Images in memory are not checked.

    Args:
        samples: the data set.
        progress: progress reporter.
        decode: decode every image and mask completely, which finds truncated files and values that are not classes
            too, and takes as long as reading them all.
        transform: of the images; None for the data set's own.

    Returns:
        What a user should know, one line each, such as what is left out, or how many files have an EXIF orientation.

    Raises:
        CorruptError: if some files cannot be read; names all of them.
        UsageError: if this user may not read some of them, the range of their values is not known, or masks are not
            of class indices.
        MismatchError: if masks are not of the size of their images, or have values that are not classes.
    """
    if not isinstance(samples.images, FileImages):
        return [*samples.notes]
    paths = samples.images.paths
    cuts = [range(start, min(start + _FILES_PER_TASK, len(paths))) for start in range(0, len(paths), _FILES_PER_TASK)]
    turns = turns_images(samples.transform if transform is None else transform)
    problems: dict[str, Exception] = {}
    of_masks: list[KdcacheError] = []
    facts: Counter[str] = Counter()
    what = f"{'decoding' if decode else 'checking'} the images of {samples.name}/{samples.split}"
    workers = None if samples.maps is None or samples.maps.parallel else 1
    with (
        delayed_task(progress, what, len(paths), "images") as task,
        ThreadPoolExecutor(max_workers=workers) as pool,
    ):
        for cut, examined in zip(cuts, pool.map(lambda cut: _examine(samples, cut, decode, turns), cuts), strict=True):
            for index, (found, of_mask) in zip(cut, examined, strict=True):
                if isinstance(found, Exception):
                    problems[paths[index]] = found
                else:
                    facts.update(found)
                of_masks += [of_mask] if of_mask is not None else []
            task.advance(len(cut))
    errors = [_unreadable(problems, len(paths))] if problems else []
    errors += [unusable_masks(of_masks, len(paths))] if of_masks else []
    if errors:
        raise joined(errors)
    return [*samples.notes, *describe_facts(facts, samples.transform if transform is None else transform)]


def _examine(
    samples: Samples, indices: Sequence[int], decode: bool, turns: bool
) -> list[tuple[list[str] | Exception, KdcacheError | None]]:
    """Return for each image what its header says, or why it cannot be read, and what is wrong with its mask."""
    assert isinstance(samples.images, FileImages), "checked before"  # noqa: S101  # for the types
    examined: list[tuple[list[str] | Exception, KdcacheError | None]] = []
    for index in indices:
        try:
            facts = header_facts(samples.images.paths[index], decode)
            examined.append((facts, mask_problem(samples, index, decode, facts, turns)))
        except Exception as error:  # noqa: BLE001  # Pillow raises errors of many kinds for damaged files
            examined.append((error, None))
    return examined


def _unreadable(problems: dict[str, Exception], total: int) -> KdcacheError:
    """Return the error that names all files that cannot be read, with one fix per cause."""
    lines = [f"{path}: {reason_of(error)}" for path, error in problems.items()]
    what = "\n  ".join([f"{len(problems)} of {total} image files cannot be read:", *lines])
    fixes = []
    errors = problems.values()
    damaged = any(not isinstance(error, PermissionError | UnknownRangeError) for error in errors)
    if damaged:
        fixes.append(
            "replace these files and run the same command again: an unsealed cache is resumed, and only the shards of "
            "changed images are made again; if files are removed, the ids change and the cache must be made anew"
        )
    if any(isinstance(error, PermissionError) for error in errors):
        fixes.append(READ_PERMISSION)
    if any(isinstance(error, UnknownRangeError) for error in errors):
        fixes.append(SCALE_FILES)
    return (CorruptError if damaged else UsageError)(what, "; ".join(fixes))

"""Check that all image files of a data set can be read, before they are used, and report what is done with them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

from kdcache.config.transform import Transform
from kdcache.data.image_files import SCALE_FILES, UnknownRangeError, describe_facts, header_facts, reason_of
from kdcache.data.images import FileImages
from kdcache.data.samples import Samples
from kdcache.errors import CorruptError, KdcacheError, UsageError
from kdcache.runtime.paths import READ_PERMISSION
from kdcache.runtime.progress import Progress, delayed_task

_FILES_PER_TASK = 256


def check_images(
    samples: Samples, progress: Progress, decode: bool = False, transform: Transform | None = None
) -> list[str]:
    """Check the header of every image file, several files at the same time; images in memory are not checked.

    Args:
        samples: the data set.
        progress: progress reporter.
        decode: decode every image completely, which finds truncated files too and takes as long as reading them all.
        transform: of the images; None for the data set's own.

    Returns:
        What a user should know, one line each, such as what is left out, or how many files have an EXIF orientation.

    Raises:
        CorruptError: if some files cannot be read; names all of them.
        UsageError: if this user may not read some of them, or the range of their values is not known; names all.
    """
    if not isinstance(samples.images, FileImages):
        return [*samples.notes]
    paths = samples.images.paths
    groups = [paths[start : start + _FILES_PER_TASK] for start in range(0, len(paths), _FILES_PER_TASK)]
    problems: dict[str, Exception] = {}
    facts: Counter[str] = Counter()
    what = f"{'decoding' if decode else 'checking'} the images of {samples.name}/{samples.split}"
    with delayed_task(progress, what, len(paths), "images") as task, ThreadPoolExecutor() as pool:
        for group, examined in zip(groups, pool.map(lambda group: _examine(group, decode), groups), strict=True):
            for path, found in zip(group, examined, strict=True):
                if isinstance(found, Exception):
                    problems[path] = found
                else:
                    facts.update(found)
            task.advance(len(group))
    if problems:
        raise _unreadable(problems, len(paths))
    return [*samples.notes, *describe_facts(facts, samples.transform if transform is None else transform)]


def _examine(paths: Sequence[str], decode: bool) -> list[list[str] | Exception]:
    """Return for each file what its header says, or why it cannot be read."""
    examined: list[list[str] | Exception] = []
    for path in paths:
        try:
            examined.append(header_facts(path, decode))
        except Exception as error:  # noqa: BLE001  # Pillow raises errors of many kinds for damaged files
            examined.append(error)
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

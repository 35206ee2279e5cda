"""Check that all image files of a data set can be read, before the teacher runs over them."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

from PIL import Image, UnidentifiedImageError

from kdcache.data.images import FileImages
from kdcache.data.samples import Samples
from kdcache.errors import CorruptError
from kdcache.runtime.progress import Progress

_FILES_PER_TASK = 256


def check_images(samples: Samples, progress: Progress, decode: bool = False) -> None:
    """Check the header of every image file, several files at the same time; images in memory are not checked.

    Args:
        samples: the data set.
        progress: progress reporter.
        decode: decode every image completely, which finds truncated files too and takes as long as reading them all.

    Raises:
        CorruptError: if some files cannot be read; names all of them.
    """
    if not isinstance(samples.images, FileImages):
        return
    paths = samples.images.paths
    groups = [paths[start : start + _FILES_PER_TASK] for start in range(0, len(paths), _FILES_PER_TASK)]
    unreadable: list[str] = []
    what = f"{'decoding' if decode else 'checking'} the images of {samples.name}/{samples.split}"
    with progress.task(what, len(paths), "images") as task, ThreadPoolExecutor() as pool:
        for group, problems in zip(groups, pool.map(lambda group: _problems(group, decode), groups), strict=True):
            unreadable += problems
            task.advance(len(group))
    if unreadable:
        raise CorruptError(
            "\n  ".join([f"{len(unreadable)} of {len(paths)} image files cannot be read:", *unreadable]),
            "replace these files and run the same command again: an unsealed cache is resumed, and only the shards of "
            "changed images are made again; if files are removed, the ids change and the cache must be made anew",
        )


def _problems(paths: Sequence[str], decode: bool) -> list[str]:
    """Return a line for each file that cannot be read."""
    problems = []
    for path in paths:
        try:
            with Image.open(path) as image:
                if decode:
                    image.convert("RGB")
        except Exception as error:  # noqa: BLE001  # Pillow raises errors of many kinds for damaged files
            problems.append(f"{path}: {_reason(error)}")
    return problems


def _reason(error: Exception) -> str:
    if isinstance(error, UnidentifiedImageError):
        return "not an image file"
    return error.strerror if isinstance(error, OSError) and error.strerror else str(error)

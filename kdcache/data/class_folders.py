"""List the images of a split that has one folder per class, and what is left out of it."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from kdcache.data.image_files import PLUGINS, UNREADABLE_EXTENSIONS, readable_extensions
from kdcache.errors import MismatchError, UsageError
from kdcache.runtime.paths import READ_PERMISSION
from kdcache.runtime.system_files import is_system_file

_NAMES_SHOWN = 5


class FolderImages(NamedTuple):
    """The images of a split.

    Attributes:
        paths: of the image files, by class, then in the order of their names.
        labels: of each, its index in `classes`.
        classes: names of the class folders of the training split.
        notes: what is left out, one line each.
    """

    paths: list[str]
    labels: list[int]
    classes: tuple[str, ...]
    notes: tuple[str, ...]


@dataclass
class _LeftOut:
    """What a listing leaves out.

    Attributes:
        system: number of hidden files and folders, and of those that an operating system adds.
        loops: symbolic links to a folder that they are in.
        unreadable: number of images, by extension, that no installed library reads.
        others: number of other files, by extension.
    """

    system: int = 0
    loops: list[str] = field(default_factory=list)
    unreadable: Counter[str] = field(default_factory=Counter)
    others: Counter[str] = field(default_factory=Counter)

    def notes(self, split: Path) -> Iterator[str]:
        """Yield a line per kind."""
        if self.system:
            yield f"{self.system:,} hidden or system files and folders in {split} are left out"
        if self.loops:
            yield f"links to a folder that they are in are left out: {_first_few(self.loops)}"
        if self.unreadable:
            names = sorted({PLUGINS[extension] for extension in self.unreadable if extension in PLUGINS})
            install = f" (to read them: pip install {' '.join(names)})" if names else ""
            yield f"images in {split} that Pillow cannot read are left out: {_counts(self.unreadable)}{install}"
        if self.others:
            yield f"files in {split} that are not images are left out: {_counts(self.others)}"


def list_images(split: Path, train: Path) -> FolderImages:
    """List the images of a split, in the order of torchvision's `ImageFolder`.

    Args:
        split: folder of the split.
        train: folder of the training split, whose class folders are the classes. Another split may lack some of them.

    Raises:
        UsageError: if there is no class folder, a class of the training split has no image, or a folder cannot be read.
        MismatchError: if another split has class folders that the training split does not have.
    """
    left_out = _LeftOut()
    above = _with_parents(split)
    folders = _class_folders(train, _with_parents(train), _LeftOut() if split != train else left_out)
    own = set(folders if split == train else _class_folders(split, above, left_out))
    if extra := sorted(own.difference(folders)):
        raise MismatchError(
            f"{split} has other class folders than {train}: {_first_few(map(printable, extra))}",
            f"move them away, or add them to {train}: its folders are the classes",
        )
    paths: list[str] = []
    labels: list[int] = []
    notes: list[str] = []
    empty = []
    extensions = readable_extensions()
    for label, name in enumerate(folders):
        unreadable, others = left_out.unreadable.copy(), left_out.others.copy()
        found = _images_of(split / name, above, extensions, left_out) if name in own else []
        if not found:
            instead = (left_out.unreadable - unreadable) + (left_out.others - others)
            empty.append(printable(name) + (f" ({_counts(instead)})" if instead else ""))
        paths += found
        labels += [label] * len(found)
    if empty and split == train:
        raise UsageError(
            f"no image was found for the classes {_first_few(empty)} in {train}",
            "make one folder per class, with at least one image in each; read are "
            + " ".join(sorted(extensions))
            + "".join(f"; {PLUGINS[key]} reads {key}" for key in sorted(left_out.unreadable) if key in PLUGINS),
        )
    if empty and paths:
        notes.append(f"{split} has no images of {len(empty)} of {len(folders)} classes: {_first_few(empty)}")
    return FolderImages(paths, labels, tuple(map(printable, folders)), (*notes, *left_out.notes(split)))


def printable(name: str) -> str:
    r"""Return the name of a file; bytes that are not UTF-8 are written as \xff."""
    return os.fsencode(name).decode("utf-8", "backslashreplace")


def _class_folders(split: Path, above: set[_Identity], left_out: _LeftOut) -> list[str]:
    """Return the names of the class folders of a split, sorted."""
    names = []
    for entry in _entries(split):
        if entry.name.startswith(".") or is_system_file(entry.name):
            left_out.system += 1
        elif _is_folder(entry):
            if _identity(entry.path) in above:
                left_out.loops.append(entry.path)
            else:
                names.append(entry.name)
    if not names:
        raise UsageError(
            f"cannot find any class folder in {split}",
            f"make one folder of images per class in it; without a split of its own, rename {split.name}/: images are "
            "then held out of the training images",
        )
    return sorted(names)


def _images_of(folder: Path, above: set[_Identity], extensions: frozenset[str], left_out: _LeftOut) -> list[str]:
    """Return the images in a class folder and all folders in it."""
    by_folder: list[tuple[str, list[str]]] = []
    pending = [(str(folder), {*above, _identity(folder)})]
    while pending:
        path, ancestors = pending.pop()
        files = []
        for entry in _entries(path):
            if entry.name.startswith(".") or is_system_file(entry.name):
                left_out.system += 1
            elif _is_folder(entry):
                identity = _identity(entry.path)
                if identity in ancestors:
                    left_out.loops.append(entry.path)
                else:
                    pending.append((entry.path, {*ancestors, identity}))
            elif (extension := Path(entry.name).suffix.lower()) in extensions:
                files.append(entry.name)
            else:
                is_image = extension in PLUGINS or extension in UNREADABLE_EXTENSIONS
                (left_out.unreadable if is_image else left_out.others)[extension or "without extension"] += 1
        by_folder.append((path, sorted(files)))
    return [f"{path}/{name}" for path, files in sorted(by_folder) for name in files]


def _entries(folder: str | Path) -> list[os.DirEntry[str]]:
    """Return what is in a folder.

    Raises:
        UsageError: if it cannot be read.
    """
    try:
        with os.scandir(folder) as entries:
            return list(entries)
    except PermissionError:
        raise UsageError(f"no permission to read the folder {folder}", READ_PERMISSION) from None
    except OSError as error:
        raise UsageError(f"cannot read the folder {folder}: {error.strerror}", "make it a folder of images") from None


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link to itself
        return False


_Identity = tuple[int, int]
"""Device and inode of a folder, by whatever path."""


def _identity(folder: str | Path) -> _Identity:
    status = Path(folder).stat()
    return status.st_dev, status.st_ino


def _with_parents(folder: Path) -> set[_Identity]:
    """Return the identities of a folder and its parents."""
    real = Path(os.path.realpath(folder))
    return {_identity(each) for each in (real, *real.parents)}


def _counts(counter: Counter[str]) -> str:
    return _first_few(f"{count:,} {name}" for name, count in sorted(counter.items()))


def _first_few(names: Iterable[str]) -> str:
    names = list(names)
    more = f" and {len(names) - _NAMES_SHOWN} more" if len(names) > _NAMES_SHOWN else ""
    return ", ".join(names[:_NAMES_SHOWN]) + more

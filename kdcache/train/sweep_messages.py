"""What is sent between the process of a sweep, the workers of a cluster, and the processes that train there."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from kdcache.errors import KdcacheError
from kdcache.train.inputs import CacheOptions
from kdcache.train.sweep_groups import Job
from kdcache.train.sweep_results import StudentResult


class CacheToOpen(NamedTuple):
    """A cache of the sweep.

    Attributes:
        path: absolute path of its folder.
        views: indices of the views that are opened.
        digest: that it must have.
    """

    path: str
    views: tuple[int, ...]
    digest: str


class Place(NamedTuple):
    """What a worker must see and have to train the students of a sweep.

    Attributes:
        current: the current folder of the process of the sweep, to which paths may be relative.
        lock: the file that names that process, in the folder of the runs.
        holder: its content.
        caches: caches of the teacher.
        versions: of Python and the libraries; None for any.
    """

    current: str
    lock: str
    holder: str
    caches: tuple[CacheToOpen, ...]
    versions: dict[str, str] | None


class Request(NamedTuple):
    """A group of students to train.

    Attributes:
        sweep: a name that no other sweep has, for the processes that have loaded its inputs.
        place: where.
        device: where to train; `auto` is a GPU if there is one.
        options: of the caches.
        group: the students.
    """

    sweep: str
    place: Place
    device: str
    options: CacheOptions
    group: Sequence[Job]


class Trained(NamedTuple):
    """The students of a group, when all of them have ended.

    Attributes:
        students: (index in the group, result).
        crash: traceback of an error that is not one of kdcache's; None if there was none.
    """

    students: list[tuple[int, StudentResult]]
    crash: str | None


class Unfit(NamedTuple):
    """Why a worker cannot train the students of a sweep."""

    error: KdcacheError

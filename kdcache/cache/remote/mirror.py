"""Caches of other places, brought to a folder here: every byte checked as it comes, and nothing fetched twice.

The manifest is read first, and checked; it comes to lie in the folder last. A folder without it is no cache yet, and
the same call goes on with it: a file has its name only when it is whole.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import tempfile
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

from kdcache.cache.format import array_specs
from kdcache.cache.format.integrity import damaged_files
from kdcache.cache.format.read_records import read_manifest
from kdcache.cache.format.schema import MANIFEST, FileRecord, Manifest, Plan, commit_file
from kdcache.cache.remote.address import CacheAddress
from kdcache.cache.remote.object_store import Store, in_parallel
from kdcache.cache.remote.signatures import LARGEST_SIGNATURE, SIGNATURE
from kdcache.errors import CorruptError, IncompleteError, InterruptedRun, KdcacheError, MismatchError, UsageError
from kdcache.runtime.progress import Progress, Silent
from kdcache.runtime.resources import free_disk, home

PULLING, PUSHING = "pulling", "pushing"
"""Names of the object that says whose manifest is to follow: in a folder, and in a store."""

LARGEST_MANIFEST = 2**28
BESIDE = {SIGNATURE: LARGEST_SIGNATURE, "README.md": 2**24, "card.png": 2**24}
"""What is shared with a cache, and not covered by its digest, and how large it may be: the signature and the card."""

Views = int | Collection[int] | None
"""Which views are wanted: these, the first so many, or all."""


class Mirrored(NamedTuple):
    """A cache that was brought here.

    Attributes:
        folder: where it lies.
        manifest: of it.
        views: that are there, and checked.
        fetched: how many of its files were brought now.
        bytes: of these.
    """

    folder: Path
    manifest: Manifest
    views: tuple[int, ...]
    fetched: int
    bytes: int


def wanted_views(plan: Plan, views: Views) -> tuple[int, ...]:
    """The numbers of the views that are wanted, ascending.

    Raises:
        UsageError: for one that the cache has not got, or none at all.
    """
    count = plan.views.count
    if views is None or isinstance(views, int):
        return tuple(range(count if views is None else min(views, count)))
    if not views or not set(views) <= set(range(count)):
        raise UsageError(f"there are no views {sorted(views)} of {count}", f"ask for some of 0 to {count - 1}")
    return tuple(sorted(set(views)))


def files_of(manifest: Manifest, views: Collection[int]) -> dict[str, FileRecord]:
    """The files that a cache needs for some of its views."""
    plan = manifest.plan
    names = [*array_specs.common_files(plan)]
    for view in views:
        for shard in range(plan.shards):
            names += [commit_file(view, shard), *array_specs.shard_files(plan, view, shard)]
    return {name: manifest.files[name] for name in names}


def check_pinned(where: str | Path, found: str, pinned: str | None) -> None:
    """That a cache is the one that is meant.

    Raises:
        MismatchError: with both digests.
    """
    if pinned is not None and found != pinned:
        raise MismatchError(
            f"{where} is another cache than the one that is pinned\n  there:  {found}\n  pinned: {pinned}",
            "ask who gave the digest which is right; without a digest whatever is there is taken",
        )


def remote_manifest(found: CacheAddress, store: Store | None = None) -> tuple[Manifest, bytes]:
    """The manifest of a cache in a store, checked, and its bytes; in at most two requests.

    Raises:
        UsageError: if there is no cache.
        IncompleteError: if its push has not ended.
        CorruptError: if it is not as it was written.
        MismatchError: if it is not the one that is pinned.
    """
    store = store or Store(found.where)
    data = store.read(MANIFEST, LARGEST_MANIFEST)
    if data is None:
        if store.read(PUSHING, LARGEST_SIGNATURE) is not None:
            raise IncompleteError(f"{found.where} is still being pushed", "wait, or push it again to complete it")
        raise UsageError(f"there is no cache at {found.where}", "check the URL: it is the one that it was pushed to")
    manifest = read_manifest(f"{found.where}/{MANIFEST}", data)
    check_pinned(found.where, manifest.digest, found.digest)
    array_specs.check_listed(found.where, manifest.plan, {name: record.size for name, record in manifest.files.items()})
    return manifest, data


def mirror(found: CacheAddress, folder: Path | None, views: Views, progress: Progress | None = None) -> Mirrored:
    """Bring a cache here, or what is not here yet of the views that are wanted.

    Args:
        found: its URL, and the digest that it must have.
        folder: where to; None for a place of kdcache's own, where the next call finds it.
        views: which are wanted.
        progress: who is told how it goes.

    Raises:
        KdcacheError: if it cannot be had, or is not what its manifest says. What has arrived whole is kept.
    """
    if folder is None and found.digest is not None and (here := _at_home(found.digest, views)) is not None:
        return here
    store = Store(found.where)
    manifest, data = remote_manifest(found, store)
    views = wanted_views(manifest.plan, views)
    wanted = files_of(manifest, views)
    into = folder or _home_of(manifest.digest)
    _begin(into, manifest.digest, folder is not None)
    with _alone(into) as stage:
        missing = {finding.where: wanted[finding.where] for finding in damaged_files(into, wanted)}
        size = sum(record.size for record in missing.values())
        if size > (free := free_disk(into)):
            raise IncompleteError(
                f"{found.where} needs {size / 1e6:,.1f} MB, and {free / 1e6:,.1f} MB are free in {into}",
                "make room there, ask for fewer views, or set KDCACHE_HOME to another disk",
            )
        try:
            _fetch(store, missing, stage, into, progress or Silent())
            _fetch_others(store, stage, into, with_card=folder is not None)
        except KeyboardInterrupt:
            raise InterruptedRun(
                f"interrupted; what has arrived whole is kept in {into}", "run the same command again: it goes on there"
            ) from None
        (stage / MANIFEST).write_bytes(data)
        (stage / MANIFEST).replace(into / MANIFEST)
        (into / PULLING).unlink(missing_ok=True)
    return Mirrored(into, manifest, views, len(missing), size)


def unfinished_pull(path: Path) -> KdcacheError | None:
    """Why a folder that a pull has begun is no cache yet; None for any other."""
    if not (path / PULLING).is_file():
        return None
    return IncompleteError(f"{path} was not pulled to its end", "run the same `kdcache pull` again: it goes on there")


def views_here(folder: Path, plan: Plan) -> tuple[int, ...]:
    """The views of which there is any file, in a folder that may hold only some of them; all, if it holds none."""
    parts = ["commits", *(f"{array_specs.STORE}/{name}/c" for name in array_specs.shard_arrays(plan))]
    names = {entry.name for part in parts if (folder / part).is_dir() for entry in (folder / part).iterdir()}
    return tuple(view for view in range(plan.views.count) if str(view) in names) or tuple(range(plan.views.count))


def _home_of(digest: str) -> Path:
    return home() / "mirrors" / digest.removeprefix("sha256:")


def _at_home(digest: str, views: Views) -> Mirrored | None:
    """What an earlier call has brought of a cache, if it is whole."""
    folder = _home_of(digest)
    try:
        manifest = read_manifest(folder / MANIFEST)
    except (OSError, CorruptError):
        return None
    wanted = wanted_views(manifest.plan, views)
    if manifest.digest != digest or damaged_files(folder, files_of(manifest, wanted)):
        return None
    return Mirrored(folder, manifest, wanted, 0, 0)


def _begin(into: Path, digest: str, of_the_user: bool) -> None:
    """Make the folder of a pull, or see that it is one of the same cache.

    Raises:
        MismatchError: if it holds another cache, or a part of another.
        UsageError: if it is something else.
    """
    if of_the_user and into.exists():
        if (into / MANIFEST).is_file():
            check_pinned(into, read_manifest(into / MANIFEST).digest, digest)
        elif (into / PULLING).is_file():
            check_pinned(into, (into / PULLING).read_text().strip(), digest)
        elif not into.is_dir() or any(into.iterdir()):
            raise UsageError(f"{into} exists and is no cache", "give another folder, or delete it first")
    into.mkdir(parents=True, exist_ok=True)
    if not (into / MANIFEST).is_file():
        (into / PULLING).write_text(f"{digest}\n")


@contextmanager
def _alone(folder: Path) -> Iterator[Path]:
    """A folder for files on their way; other processes that pull here meanwhile wait, and find what has come."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX)
        except OSError:  # a file system without locks: each process then fetches for itself
            pass
        else:
            for leftover in folder.glob("incoming-*"):
                shutil.rmtree(leftover, ignore_errors=True)
        with tempfile.TemporaryDirectory(prefix="incoming-", dir=folder) as stage:
            yield Path(stage)
    finally:
        os.close(handle)


def _fetch(store: Store, missing: dict[str, FileRecord], stage: Path, into: Path, progress: Progress) -> None:
    numbers = {name: stage / str(number) for number, name in enumerate(missing)}

    def bring(name: str) -> None:
        store.fetch(name, numbers[name], missing[name])
        place = into / name
        place.parent.mkdir(parents=True, exist_ok=True)
        numbers[name].replace(place)

    total = sum(record.size for record in missing.values()) / 1e6
    done = 0.0
    with progress.task(f"pull {store.url}", len(missing), "files") as task:

        def told(name: str) -> None:
            nonlocal done
            done += missing[name].size / 1e6
            task.advance(1, f"{done:,.1f} of {total:,.1f} MB")

        in_parallel(bring, missing, store.stop, told)


def _fetch_others(store: Store, stage: Path, into: Path, with_card: bool) -> None:
    """Bring what the digest does not cover: the signature, and the card, where there are people who look at it."""

    def bring(name: str) -> None:
        data = store.read(name, BESIDE[name])
        if data is not None:
            (stage / name).write_bytes(data)
            (stage / name).replace(into / name)

    in_parallel(bring, BESIDE if with_card else (SIGNATURE,), store.stop, lambda _: None)

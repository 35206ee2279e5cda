"""Download remote caches to a local folder: every byte is checked on arrival, and nothing is downloaded twice.

The manifest is read and checked first and stored in the folder last, so that a folder without it is not yet a cache.
The same call resumes such a download: a file has its final name only when it is complete.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Collection, Iterator
from contextlib import contextmanager, suppress
from numbers import Integral
from operator import index
from pathlib import Path
from typing import NamedTuple

from filelock import FileLock

from kdcache.cache.format import array_specs, store_files
from kdcache.cache.format.read_records import read_manifest
from kdcache.cache.format.schema import MANIFEST, FileRecord, Manifest, Plan, commit_file
from kdcache.cache.format.verified_files import VerifiedFiles, damaged_files
from kdcache.cache.remote.address import CacheAddress
from kdcache.cache.remote.object_store import Store, in_parallel
from kdcache.cache.remote.signatures import LARGEST_SIGNATURE, SIGNATURE
from kdcache.errors import CorruptError, IncompleteError, InterruptedRun, KdcacheError, MismatchError, UsageError
from kdcache.runtime.atomic_write import move_into_place, write_file
from kdcache.runtime.progress import Progress, Silent
from kdcache.runtime.resources import free_disk, home

PULLING, PUSHING = "pulling", "pushing"
"""Names of the marker that holds the digest of an unfinished pull (a file in the folder) or push (an object)."""

_LOCK = f"{PULLING}.lock"

LARGEST_MANIFEST = 2**28
"""Bytes of a manifest at most."""

BESIDE = {SIGNATURE: LARGEST_SIGNATURE, "README.md": 2**24, "card.png": 2**24}
"""Files shared with a cache but not covered by its digest (signature and card), and their sizes in bytes at most."""

Views = int | Collection[int] | None
"""Requested views: their indices, the first so many, or all."""


class Mirrored(NamedTuple):
    """A cache that was downloaded.

    Attributes:
        folder: local folder.
        manifest: its manifest.
        views: indices of the views that are present and checked.
        fetched: number of its files that this call downloaded.
        bytes: total size of those files.
    """

    folder: Path
    manifest: Manifest
    views: tuple[int, ...]
    fetched: int
    bytes: int


def wanted_views(plan: Plan, views: Views) -> tuple[int, ...]:
    """Return the indices of the requested views, ascending.

    Raises:
        UsageError: if the cache does not have one of them, or none is requested.
    """
    count = plan.views.count
    if views is None:
        return tuple(range(count))
    fix = f"use indices from 0 to {count - 1}, the number of the first views, or None for all"
    if isinstance(views, Integral) and not isinstance(views, bool):
        if views < 1:
            raise UsageError(f"{views} views were requested", fix)
        return tuple(range(min(int(views), count)))
    try:
        if isinstance(views, str | bytes | bool):
            raise TypeError
        indices = sorted({index(view) for view in views})  # type: ignore[union-attr]  # an integer was returned above
    except TypeError:
        raise UsageError(f"the views {views!r} are not integers", fix) from None
    if not indices or indices[0] < 0 or indices[-1] >= count:
        raise UsageError(f"views {indices} are not in this cache of {count} views", f"use 0 to {count - 1}")
    return tuple(indices)


def missing_views(path: Path, count: int, here: Collection[int], wanted: Collection[int] | None = None) -> str | None:
    """Describe which views a folder lacks, for an error; None if it lacks none.

    Args:
        path: of the folder.
        count: number of views of the cache.
        here: indices of the views that the folder holds.
        wanted: those that are needed; None for all.
    """
    missing = [view for view in (range(count) if wanted is None else wanted) if view not in here]
    if not missing:
        return None
    return f"{path} holds {_numbered(here)} of {count}, not {_numbered(missing)}"


def check_here(path: Path, count: int, here: Collection[int], wanted: Collection[int] | None = None) -> None:
    """Check that a folder holds some views, or all; as `missing_views`.

    Raises:
        IncompleteError: with the missing views, and how to get them.
    """
    if what := missing_views(path, count, here, wanted):
        raise IncompleteError(what, f"download the missing views into the folder: kdcache pull URL {path}")


def _numbered(views: Collection[int]) -> str:
    return f"view{'' if len(views) == 1 else 's'} {', '.join(map(str, views))}"


def files_of(manifest: Manifest, views: Collection[int]) -> dict[str, FileRecord]:
    """Return the records of the files that a cache needs for some of its views."""
    plan = manifest.plan
    names = [*store_files.common_files(plan)]
    for view in views:
        names += _files_of_view(plan, view)
    return {name: manifest.files[name] for name in names}


def check_pinned(where: str | Path, digest: str, pinned: str | None) -> None:
    """Check that a cache has the expected digest; any digest passes if `pinned` is None.

    Raises:
        MismatchError: with both digests.
    """
    if pinned is not None and digest != pinned:
        raise MismatchError(
            f"{where} holds another cache than the pinned one\n  there:  {digest}\n  pinned: {pinned}",
            "ask the publisher for the right digest; without a digest any cache at that URL is accepted",
        )


def remote_manifest(address: CacheAddress, store: Store | None = None) -> tuple[Manifest, bytes]:
    """Return the checked manifest of a remote cache, and its bytes, in at most two requests.

    Raises:
        UsageError: if there is no cache.
        IncompleteError: if its push is unfinished.
        CorruptError: if the manifest differs from what was written.
        MismatchError: if it does not have the pinned digest.
    """
    store = store or Store(address.where)
    data = store.read(MANIFEST, LARGEST_MANIFEST)
    if data is None:
        if store.read(PUSHING, LARGEST_SIGNATURE) is not None:
            raise IncompleteError(f"{address.where} is still being pushed", "wait, or push it again to complete it")
        raise UsageError(f"no cache found at {address.where}", "use the URL that the cache was pushed to")
    manifest = read_manifest(f"{address.where}/{MANIFEST}", data)
    check_pinned(address.where, manifest.digest, address.digest)
    sizes = {name: record.size for name, record in manifest.files.items()}
    store_files.check_listed(address.where, manifest.plan, sizes)
    return manifest, data


def mirror(address: CacheAddress, folder: Path | None, views: Views, progress: Progress | None = None) -> Mirrored:
    """Download a cache, or what a local folder lacks of the requested views.

    Args:
        address: its URL, and the digest that it must have.
        folder: target folder; None for a folder in kdcache's own home, where the next call finds it.
        views: requested views.
        progress: progress reporter; silent if None.

    Raises:
        KdcacheError: if it cannot be downloaded, or differs from its manifest. Complete files are kept.
    """
    if folder is None and address.digest is not None:
        mirrored = _already_in_home(address.digest, views)
        if mirrored is not None:
            return mirrored
    store = Store(address.where)
    manifest, data = remote_manifest(address, store)
    views = wanted_views(manifest.plan, views)
    wanted = files_of(manifest, views)
    into = folder or _folder_in_home(manifest.digest)
    if folder is not None:
        _check_folder(into, manifest.digest)
    into.mkdir(parents=True, exist_ok=True)
    with _lock(into) as stage:
        if folder is not None:
            _check_folder(into, manifest.digest)
        missing = {problem.where: wanted[problem.where] for problem in damaged_files(into, wanted)}
        if missing or not (into / MANIFEST).is_file():
            write_file(into / PULLING, f"{manifest.digest}\n")
        size = sum(record.size for record in missing.values())
        if size > (free := free_disk(into)):
            raise IncompleteError(
                f"{address.where} needs {size / 1e6:,.1f} MB, and {free / 1e6:,.1f} MB are free in {into}",
                "free some space, request fewer views, or set KDCACHE_HOME to another disk",
            )
        try:
            _fetch_files(store, missing, stage, into, progress or Silent())
            _fetch_others(store, into, with_card=folder is not None)
        except KeyboardInterrupt:
            raise InterruptedRun(
                f"interrupted; complete files are kept in {into}", "run the same command again to resume"
            ) from None
        write_file(into / MANIFEST, data)
        (into / PULLING).unlink(missing_ok=True)
    return Mirrored(into, manifest, views, len(missing), size)


def unfinished_pull(path: Path) -> KdcacheError | None:
    """Return the error of a folder whose pull is unfinished; None for any other."""
    if not (path / PULLING).is_file():
        return None
    return IncompleteError(f"the pull to {path} is unfinished", "run the same `kdcache pull` again to resume it")


def views_here(folder: Path, plan: Plan) -> tuple[int, ...]:
    """Return the views that a folder holds, since it may hold only some of them; all views if none.

    A view of which a file is missing is damaged, unless a pull of more views has been interrupted.
    """
    parts = ["commits", *(f"{array_specs.STORE}/{name}/c" for name in array_specs.shard_arrays(plan))]
    names = {entry.name for part in parts if (folder / part).is_dir() for entry in (folder / part).iterdir()}
    views = [view for view in range(plan.views.count) if str(view) in names]
    if (folder / PULLING).is_file():
        complete = [view for view in views if all((folder / name).is_file() for name in _files_of_view(plan, view))]
        views = complete or views
    return tuple(views) or tuple(range(plan.views.count))


def _files_of_view(plan: Plan, view: int) -> Iterator[str]:
    for shard in range(plan.shards):
        yield commit_file(view, shard)
        yield from store_files.shard_files(plan, view, shard)


def _folder_in_home(digest: str) -> Path:
    return home() / "mirrors" / digest.removeprefix("sha256:")


def _already_in_home(digest: str, views: Views) -> Mirrored | None:
    """Return what an earlier call downloaded of a cache, if it is complete."""
    folder = _folder_in_home(digest)
    try:
        manifest = read_manifest(folder / MANIFEST)
    except (OSError, CorruptError):
        return None
    wanted = wanted_views(manifest.plan, views)
    files = VerifiedFiles(folder, digest, files_of(manifest, wanted))
    if manifest.digest != digest or files.find_unchecked():
        return None
    try:
        files.check()
    except CorruptError:
        return None
    return Mirrored(folder, manifest, wanted, 0, 0)


def _check_folder(into: Path, digest: str) -> None:
    """Check that a folder is new, or belongs to a pull of the same cache.

    Raises:
        MismatchError: if it holds another cache, or a part of another.
        UsageError: if it is something else.
    """
    if not into.exists():
        return
    if (into / MANIFEST).is_file():
        check_pinned(into, read_manifest(into / MANIFEST).digest, digest)
    elif (into / PULLING).is_file():
        check_pinned(into, (into / PULLING).read_text().strip(), digest)
    elif not into.is_dir() or any(not entry.name.startswith((PULLING, "incoming-")) for entry in into.iterdir()):
        raise UsageError(f"{into} exists and is not a cache", "use another folder, or delete it first")


@contextmanager
def _lock(folder: Path) -> Iterator[Path]:
    """Lock a folder against other pulls, which then find the files, and yield a folder for unfinished files."""
    lock = FileLock(folder / _LOCK)
    with suppress(OSError):  # a file system without locks: each process then downloads for itself
        lock.acquire()
    try:
        if lock.is_locked:
            for leftover in folder.glob("incoming-*"):
                shutil.rmtree(leftover, ignore_errors=True)
        with tempfile.TemporaryDirectory(prefix="incoming-", dir=folder) as stage:
            yield Path(stage)
    finally:
        if lock.is_locked:
            (folder / _LOCK).unlink(missing_ok=True)
            lock.release()


def _fetch_files(store: Store, missing: dict[str, FileRecord], stage: Path, into: Path, progress: Progress) -> None:
    """Download files of a cache to `stage`, check each, and move it to its place in `into`."""
    staged = {name: stage / str(index) for index, name in enumerate(missing)}

    def fetch(name: str) -> None:
        store.fetch(name, staged[name], missing[name])
        path = into / name
        path.parent.mkdir(parents=True, exist_ok=True)
        move_into_place(staged[name], path)

    total = sum(record.size for record in missing.values()) / 1e6
    done = 0.0
    with progress.task(f"pull {store.url}", len(missing), "files") as task:

        def advance(name: str) -> None:
            nonlocal done
            done += missing[name].size / 1e6
            task.advance(1, f"{done:,.1f} of {total:,.1f} MB")

        in_parallel(fetch, missing, store.stop, advance)


def _fetch_others(store: Store, into: Path, with_card: bool) -> None:
    """Download what the digest does not cover: the signature, and in a folder of the user the card."""

    def fetch(name: str) -> None:
        data = store.read(name, BESIDE[name])
        if data is not None:
            write_file(into / name, data)

    in_parallel(fetch, BESIDE if with_card else (SIGNATURE,), store.stop, lambda _: None)

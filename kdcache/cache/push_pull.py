"""Caches that are shared: pushed to a store and pulled from one.

A push puts the manifest there last, so that what has a manifest is whole. Before anything else it puts an object there
that names its digest: a push that goes on knows by it that objects of the right size are its own, since a store takes
an object whole or not at all. So nothing need be read back, and no store's checksums be understood.
"""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

from kdcache.cache.format.read_records import read_manifest
from kdcache.cache.format.schema import MANIFEST
from kdcache.cache.preconditions import check_outside
from kdcache.cache.reader import Cache, open_cache, opened
from kdcache.cache.remote.address import source
from kdcache.cache.remote.mirror import BESIDE, LARGEST_MANIFEST, PUSHING, Views, mirror
from kdcache.cache.remote.object_store import Store
from kdcache.errors import IncompleteError, InterruptedRun, MismatchError, UsageError
from kdcache.runtime.progress import Progress, Silent


class Pushed(NamedTuple):
    """What came of a push.

    Attributes:
        digest: of the cache that is there now.
        files: how many were put there by this push.
        bytes: of these.
        kept: how many were there already.
    """

    digest: str
    files: int
    bytes: int
    kept: int


def pull(
    url: str, folder: str | Path, views: Views = None, digest: str | None = None, progress: Progress | None = None
) -> Cache:
    """Bring a cache to a folder, or what is not there yet of it.

    Args:
        url: where it was pushed to; `URL#sha256:...` pins it.
        folder: a new one, or that of an earlier pull of the same cache.
        views: which are wanted; None for all.
        digest: that it must have.
        progress: who is told how it goes.

    Raises:
        KdcacheError: if it cannot be had, or is not what its manifest says. What has arrived whole is kept, and the
            same call goes on with it.
    """
    found = source(url, digest)
    if not found.is_remote:
        raise UsageError(f"{url} is no URL", "a folder on this machine needs no pull: give it as it is, or as file://")
    check_outside(Path(folder))
    here = mirror(found, Path(folder), views, progress)
    return opened(here.folder, here.manifest, here.views)


def push(path: str | Path, url: str, progress: Progress | None = None) -> Pushed:
    """Publish a cache: every file of it, and the manifest last.

    A push that was interrupted puts there only what is missing; one of what is there already does nothing.

    Args:
        path: of a sealed cache with all its views; every byte of it is checked first.
        url: of a place for it alone.
        progress: who is told how it goes.

    Raises:
        UsageError: if nothing can be put there.
        MismatchError: if another cache is there, or a part of one.
        KdcacheError: if the cache is not whole, or the store cannot be reached.
    """
    cache = open_cache(path)
    manifest, store = cache.manifest, Store(url)
    if store.is_read_only:
        raise UsageError(f"{url} can only be read", "push to s3://, gs://, az://, hf:// or file://")
    if len(cache.views) < manifest.plan.views.count:
        raise IncompleteError(
            f"{path} holds only {len(cache.views)} of {manifest.plan.views.count} views", "pull the others first"
        )
    there = store.read(MANIFEST, LARGEST_MANIFEST)
    if there is not None:
        _check_same(url, "another cache", read_manifest(f"{url}/{MANIFEST}", there).digest, manifest.digest)
    begun = store.read(PUSHING, LARGEST_MANIFEST)
    if begun is not None and there is None:
        _check_same(url, "a part of another cache", begun.decode(errors="replace").strip(), manifest.digest)
    try:
        if there is not None:
            put = _put_others(cache, store)
        else:
            put = _put_files(cache, store, begun is not None, progress or Silent())
            put += _put_others(cache, store)
            store.put({MANIFEST: cache.path / MANIFEST})
            put.append(MANIFEST)
        if there is None or begun is not None:
            store.remove(PUSHING)
    except KeyboardInterrupt:
        raise InterruptedRun(
            f"interrupted; {url} is no cache yet", "run the same command again: it puts there what is missing"
        ) from None
    kept = len(manifest.files) + 1 - len({MANIFEST, *manifest.files} & {*put})
    return Pushed(manifest.digest, len(put), sum((cache.path / name).stat().st_size for name in put), kept)


def _put_files(cache: Cache, store: Store, goes_on: bool, progress: Progress) -> list[str]:
    """Put all files of a cache there but those that its interrupted push has, and see that they have arrived."""
    files = cache.manifest.files
    own = f"{cache.manifest.digest}\n".encode()
    if not goes_on:
        store.put({PUSHING: own})
    have = store.sizes() if goes_on else {}
    missing = {name: cache.path / name for name, record in files.items() if have.get(name) != record.size}
    total = sum(files[name].size for name in missing) / 1e6
    with progress.task(f"push {store.url}", len(missing), "files") as task:
        store.put(missing, lambda count: task.advance(count, f"of {total:,.1f} MB"))
    have, begun = store.sizes(), store.read(PUSHING, LARGEST_MANIFEST)
    if begun != own:
        _check_same(store.url, "a push of another cache", (begun or b"").decode(errors="replace"), own.decode())
    wrong = [name for name, record in files.items() if have.get(name) != record.size]
    if wrong:
        raise IncompleteError(f"{wrong[0]} has not arrived whole at {store.url}", "run the same command again")
    return list(missing)


def _put_others(cache: Cache, store: Store) -> list[str]:
    """Put there what the digest does not cover, where it is not there as it is here: the signature and the card."""
    here = {name: (cache.path / name).read_bytes() for name in BESIDE if (cache.path / name).is_file()}
    changed = {name: data for name, data in here.items() if store.read(name, LARGEST_MANIFEST) != data}
    store.put(changed)
    return list(changed)


def _check_same(url: str, what: str, there: str, ours: str) -> None:
    if there.strip() != ours.strip():
        raise MismatchError(
            f"{what} is at {url}\n  there: {there.strip()}\n  here:  {ours.strip()}",
            "push to another place, or delete what is there first",
        )

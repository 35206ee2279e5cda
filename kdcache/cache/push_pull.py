"""Share caches: push one to an object store, and pull one from there.

A push uploads the manifest last, so that whatever has a manifest is complete. It begins with a marker object that holds
the digest of the cache. A resumed push knows by the marker that objects of the right size are its own, since stores
upload atomically. So nothing has to be read back, and no checksums of the store are needed.
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
    """The result of a push.

    Attributes:
        digest: root digest of the cache that was pushed.
        files: number of files that this push uploaded.
        bytes: total size of those files.
        kept: number of files that were already in the store.
    """

    digest: str
    files: int
    bytes: int
    kept: int


def pull(
    url: str, folder: str | Path, views: Views = None, digest: str | None = None, progress: Progress | None = None
) -> Cache:
    """Download a cache to a folder, or what the folder lacks of it.

    Args:
        url: where it was pushed to; `URL#sha256:...` pins it to a root digest.
        folder: a new folder, or that of an earlier pull of the same cache.
        views: requested views; None for all.
        digest: root digest that it must have.
        progress: progress reporter; silent if None.

    Raises:
        KdcacheError: if it cannot be downloaded, or differs from its manifest. Complete files are kept, and the same
            call resumes.
    """
    address = source(url, digest)
    if not address.is_remote:
        raise UsageError(f"{url} is not a URL", "use a local folder directly, without pull, or write it as file://")
    check_outside(Path(folder))
    mirrored = mirror(address, Path(folder), views, progress)
    return opened(mirrored.folder, mirrored.manifest, mirrored.views)


def push(path: str | Path, url: str, progress: Progress | None = None) -> Pushed:
    """Upload every file of a cache, the manifest last.

    A push that was interrupted uploads only what is missing; a second push of the same cache uploads nothing.

    Args:
        path: folder of a sealed cache with all its views; every byte of it is checked first.
        url: URL for this cache alone.
        progress: progress reporter; silent if None.

    Raises:
        UsageError: if the store does not accept uploads.
        MismatchError: if the URL holds another cache, or a part of one.
        KdcacheError: if the cache is incomplete or damaged, or the store cannot be reached.
    """
    cache = open_cache(path)
    cache.check_files(progress)
    manifest, store = cache.manifest, Store(url)
    if store.is_read_only:
        raise UsageError(f"{url} is read-only", "push to s3://, gs://, az://, hf:// or file://")
    cache.check_views()
    existing = store.read(MANIFEST, LARGEST_MANIFEST)
    if existing is not None:
        _check_same(url, "another cache", read_manifest(f"{url}/{MANIFEST}", existing).digest, manifest.digest)
    marker = store.read(PUSHING, LARGEST_MANIFEST)
    if marker is not None and existing is None:
        _check_same(url, "a part of another cache", marker.decode(errors="replace").strip(), manifest.digest)
    try:
        if existing is not None:
            uploaded = _put_others(cache, store)
        else:
            uploaded = _put_files(cache, store, marker is not None, progress or Silent())
            uploaded += _put_others(cache, store)
            store.put({MANIFEST: cache.path / MANIFEST})
            uploaded.append(MANIFEST)
        if existing is None or marker is not None:
            store.remove(PUSHING)
    except KeyboardInterrupt:
        raise InterruptedRun(
            f"interrupted; the push to {url} is unfinished", "run the same command again to resume"
        ) from None
    kept = len(manifest.files) + 1 - len({MANIFEST, *manifest.files} & {*uploaded})
    size = sum((cache.path / name).stat().st_size for name in uploaded)
    return Pushed(manifest.digest, len(uploaded), size, kept)


def _put_files(cache: Cache, store: Store, resumed: bool, progress: Progress) -> list[str]:
    """Upload the files of a cache that the store lacks, and check that all have arrived; return their names."""
    files = cache.manifest.files
    own_marker = f"{cache.manifest.digest}\n".encode()
    if not resumed:
        store.put({PUSHING: own_marker})
    sizes = store.sizes() if resumed else {}
    missing = {name: cache.path / name for name, record in files.items() if sizes.get(name) != record.size}
    total = sum(files[name].size for name in missing) / 1e6
    with progress.task(f"push {store.url}", len(missing), "files") as task:
        store.put(missing, lambda count: task.advance(count, f"of {total:,.1f} MB"))
    sizes, marker = store.sizes(), store.read(PUSHING, LARGEST_MANIFEST)
    if marker != own_marker:
        there = (marker or b"").decode(errors="replace")
        _check_same(store.url, "a push of another cache", there, own_marker.decode())
    wrong = [name for name, record in files.items() if sizes.get(name) != record.size]
    if wrong:
        raise IncompleteError(f"{wrong[0]} is incomplete at {store.url}", "run the same command again to resume")
    return list(missing)


def _put_others(cache: Cache, store: Store) -> list[str]:
    """Upload the files that the digest does not cover (signature and card) where they differ; return their names."""
    local = {name: (cache.path / name).read_bytes() for name in BESIDE if (cache.path / name).is_file()}
    changed = {name: data for name, data in local.items() if store.read(name, LARGEST_MANIFEST) != data}
    store.put(changed)
    return list(changed)


def _check_same(url: str, what: str, there: str, ours: str) -> None:
    """Check that a digest found in a store is that of the cache to push.

    Raises:
        MismatchError: with both digests.
    """
    if there.strip() != ours.strip():
        raise MismatchError(
            f"{url} holds {what}\n  there: {there.strip()}\n  here:  {ours.strip()}",
            "push to another URL, or delete what is there first",
        )

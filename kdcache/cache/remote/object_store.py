"""Object stores that hold remote caches. The only module that imports fsspec.

A store is a flat set of named objects under a URL. Objects are read up to their declared size and no further, and
uploaded atomically. Every failure becomes a KdcacheError that says whether a retry may help.
"""

from __future__ import annotations

import errno
import hashlib
import io
import logging
import threading
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor, as_completed
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

import fsspec

from kdcache.cache.format.schema import FileRecord
from kdcache.cache.remote.hf_hub import Hub
from kdcache.errors import CorruptError, IncompleteError, KdcacheError, UsageError
from kdcache.runtime.atomic_write import move_into_place, temporary

EXTRAS = {"s3": "s3", "gs": "gs", "az": "az", "http": "http", "https": "http", "hf": "hf", "file": ""}
"""Supported URL schemes, and the optional extra of kdcache that each needs."""

THREADS = 16
"""Concurrent requests: a cache has many small files, and each request waits for the network."""

ATTEMPTS = 6
"""Attempts per request that fails with an error that may be temporary."""

FIRST_WAIT = 0.25
"""Seconds before the second attempt; doubled before each further one."""

_RANGE = 2**23
"""Bytes per range request."""

_STALLED = 30
"""Seconds without a byte after which a connection counts as lost."""

_WRONG_CONTENT_ATTEMPTS = 2
"""Attempts after which an object with wrong content counts as damaged in the store."""

_DAMAGED_THERE = "ask the publisher to push the cache again"

_CREDENTIALS = (
    "set the credentials of that store, such as AWS_PROFILE, GOOGLE_APPLICATION_CREDENTIALS, "
    "AZURE_STORAGE_CONNECTION_STRING or HF_TOKEN"
)

_LOCAL_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS)
"""Errors of writing to the local disk, which no retry resolves."""

T = TypeVar("T")

# Errors are reported once, by kdcache; gcsfs would also log them with tracebacks.
logging.getLogger("gcsfs").addHandler(logging.NullHandler())


class _WrongContent(Exception):
    """An object has other bytes than its record declares."""


class _Sink(io.RawIOBase):
    """A file that accepts no more bytes than were declared, and computes their digest."""

    def __init__(self, file: BinaryIO, max_bytes: int, stop: threading.Event) -> None:
        self._file, self._max_bytes, self._stop = file, max_bytes, stop
        self._sha, self.size = hashlib.sha256(), 0

    def write(self, data: Any) -> int:
        if self._stop.is_set():
            raise InterruptedError("the download was canceled")
        self.size += len(data)
        if self.size > self._max_bytes:
            raise _WrongContent(f"has more than {self._max_bytes} bytes")
        self._sha.update(data)
        return self._file.write(data)

    def tell(self) -> int:
        return self.size

    def record(self) -> FileRecord:
        return FileRecord(size=self.size, sha256=self._sha.hexdigest())


class Store:
    """The objects under a URL.

    Attributes:
        url: URL without a trailing slash.
        stop: event that cancels all transfers.

    Args:
        url: URL with one of the schemes in `EXTRAS`.

    Raises:
        UsageError: if the URL is not supported, or the library that it needs is not installed.
    """

    def __init__(self, url: str) -> None:
        self.url, self.stop = url.rstrip("/"), threading.Event()
        scheme = url.partition("://")[0]
        if scheme not in EXTRAS or not self.url.partition("://")[2]:
            raise UsageError(
                f"{url} is not a URL of a supported store", f"use one of {', '.join(f'{name}://' for name in EXTRAS)}"
            )
        self._hub: Hub | None = None
        self._library_retries = scheme in ("gs", "az")  # for a minute
        self._whole_files = EXTRAS[scheme] in ("http", "hf")  # a server may return more than the requested range
        try:
            if scheme == "hf":
                self._hub = Hub(self.url)
            self._fs = fsspec.filesystem("http" if self._hub else scheme, **self._options(scheme))
        except ImportError as error:
            raise UsageError(f"{url} cannot be reached: {error}", f"pip install 'kdcache[{EXTRAS[scheme]}]'") from None
        except ValueError as error:  # of adlfs without an account
            raise UsageError(f"{url} cannot be reached: {_message(error)}", _CREDENTIALS) from None
        self._root = "" if self._hub else self._fs._strip_protocol(self.url).rstrip("/")
        self._renames = scheme == "file"

    def _options(self, scheme: str) -> dict[str, Any]:
        options: dict[str, Any] = {"skip_instance_cache": True, "use_listings_cache": False}
        if self._whole_files:
            import aiohttp  # noqa: PLC0415  # of the extra http

            # fsspec's own time limit is for a whole file, whose download may take any time.
            timeout = aiohttp.ClientTimeout(total=None, sock_connect=_STALLED, sock_read=_STALLED)
            headers = {"Accept-Encoding": "identity", **(self._hub.headers if self._hub else {})}
            options |= {"client_kwargs": {"timeout": timeout, "headers": headers}}
        elif scheme == "file":
            options = {"auto_mkdir": True}
        return options

    @property
    def is_read_only(self) -> bool:
        """Whether the store does not accept uploads."""
        return self._whole_files and self._hub is None

    def _path(self, name: str) -> str:
        return self._hub.url_of(name) if self._hub else f"{self._root}/{name}"

    def read(self, name: str, max_bytes: int) -> bytes | None:
        """Read a small object; None if it does not exist.

        Raises:
            CorruptError: if it is larger than `max_bytes`.
            KdcacheError: if it cannot be read.
        """
        try:
            return self._retry(name, lambda: self._read(name, max_bytes))
        except FileNotFoundError:
            return None

    def _read(self, name: str, max_bytes: int) -> bytes:
        content = io.BytesIO()
        sink = _Sink(content, max_bytes, self.stop)
        if self._whole_files:
            self._fs.get_file(self._path(name), sink)
        else:
            sink.write(self._fs.cat_file(self._path(name), start=0, end=max_bytes + 1))
        return content.getvalue()

    def fetch(self, name: str, to: Path, expected: FileRecord) -> None:
        """Download an object to a file, and check its size and digest.

        Raises:
            CorruptError: if it does not exist, or repeatedly has other bytes than expected.
            KdcacheError: if it cannot be read.
        """

        def attempt() -> None:
            with to.open("wb") as file:
                sink = _Sink(file, expected.size, self.stop)
                if self._whole_files:
                    self._fs.get_file(self._path(name), sink)
                else:
                    for start in range(0, expected.size, _RANGE):
                        end = min(start + _RANGE, expected.size)
                        # One byte more in the last range, so that an object that is too long is noticed.
                        requested_end = end + (end == expected.size)
                        read = partial(self._fs.cat_file, self._path(name), start=start, end=requested_end)
                        sink.write(self._retry(name, read))
                        if sink.size < end:
                            break
            if sink.record() != expected:
                if sink.size != expected.size:
                    raise _WrongContent(f"has {sink.size} bytes, its manifest declares {expected.size}")
                raise _WrongContent("has other bytes than its manifest declares")

        try:
            self._retry(name, attempt)
        except FileNotFoundError:
            raise CorruptError(
                f"{name} is listed in the manifest and not found at {self.url}", _DAMAGED_THERE
            ) from None

    def sizes(self) -> dict[str, int]:
        """Return the size of every object in bytes, by name."""
        if self._hub:
            return self._hub.sizes()
        try:
            details = self._retry("", lambda: self._fs.find(self._root, detail=True))
        except FileNotFoundError:
            return {}
        return {str(path)[len(self._root) + 1 :]: int(detail["size"]) for path, detail in details.items()}

    def put(self, objects: Mapping[str, Path | bytes], on_each: Callable[[int], None] = lambda _: None) -> None:
        """Upload objects, each atomically.

        Args:
            objects: name -> file, or content.
            on_each: called with the number of objects uploaded since the last call.
        """
        if self._hub:
            self._hub.put(objects, on_each)
            return
        in_parallel(
            lambda name: self._retry(name, lambda: self._put(name, objects[name])),
            objects,
            self.stop,
            lambda _: on_each(1),
        )

    def _put(self, name: str, content: Path | bytes) -> None:
        path = self._path(name)
        to = str(temporary(Path(path))) if self._renames else path
        if isinstance(content, bytes):
            self._fs.pipe_file(to, content)
        else:
            self._fs.put_file(str(content), to)
        if self._renames:
            # On the disk before it has its name: the next push takes a file of the right size for complete.
            move_into_place(Path(to), Path(path))

    def remove(self, name: str) -> None:
        """Delete an existing object."""
        if self._hub:
            self._hub.remove(name)
        else:
            self._retry(name, lambda: self._fs.rm_file(self._path(name)))

    def _retry(self, name: str, work: Callable[[], T]) -> T:
        """Return what `work` returns, retrying with exponential backoff after errors that may be temporary.

        Raises:
            FileNotFoundError: if there is no such object.
            UsageError: if access is denied.
            CorruptError: if the object has other bytes than declared.
            IncompleteError: if the store could not be reached.
        """
        where = f"{self.url}/{name}".rstrip("/")
        for attempt in range(1, ATTEMPTS + 1):
            try:
                return work()
            except (FileNotFoundError, KdcacheError):
                raise
            except Exception as error:  # each store's library raises its own types
                if isinstance(error, OSError) and error.errno in _LOCAL_ERRORS:
                    raise
                permanent = _permanent_error(where, attempt, error)
                last_attempt = attempt == ATTEMPTS or (self._library_retries and not isinstance(error, _WrongContent))
                if permanent or last_attempt or self.stop.is_set():
                    times = "for a minute" if self._library_retries else f"{attempt} times"
                    raise permanent or IncompleteError(
                        f"{where} could not be reached, tried {times}: {_message(error)}",
                        "run the same command again to resume",
                    ) from None
            self.stop.wait(FIRST_WAIT * 2 ** (attempt - 1))
        raise AssertionError("the last attempt returns or raises")


def _permanent_error(where: str, attempt: int, error: Exception) -> KdcacheError | None:
    """Return the error to raise for a failure that another attempt would not resolve; None for any other."""
    status = next((getattr(error, name) for name in ("status", "status_code", "code") if hasattr(error, name)), None)
    forbidden = isinstance(error, PermissionError) or str(error).startswith("Forbidden: ")  # the latter of gcsfs
    if forbidden or status in (401, 403):
        return UsageError(f"access to {where} is denied: {_message(error)}", _CREDENTIALS)
    if isinstance(error, _WrongContent) and attempt >= _WRONG_CONTENT_ATTEMPTS:
        return CorruptError(f"{where} {error}", _DAMAGED_THERE)
    return None


def _message(error: Exception) -> str:
    return next(iter(str(error).splitlines()), "") or type(error).__name__


def in_parallel(
    work: Callable[[str], object], names: Iterable[str], stop: threading.Event, on_each: Callable[[str], None]
) -> None:
    """Call `work` for each name in threads; after a failure or Ctrl-C, cancel the others and set `stop`."""
    with ThreadPoolExecutor(THREADS, thread_name_prefix="kdcache-store") as pool:
        futures = {pool.submit(work, name): name for name in names}
        try:
            for future in as_completed(futures):
                future.result()
                on_each(futures[future])
        except BaseException:
            stop.set()
            pool.shutdown(wait=False, cancel_futures=True)
            raise

"""Where caches lie that are not on this machine. The only module that knows fsspec.

A store is a flat set of named objects under a URL. They are read as far as their declared size and no further, put
there whole, and every failure is told as an error of kdcache that says whether trying again may help.
"""

from __future__ import annotations

import errno
import hashlib
import io
import logging
import os
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

EXTRAS = {"s3": "s3", "gs": "gs", "az": "az", "http": "http", "https": "http", "hf": "hf", "file": ""}
"""The schemes of URLs that are known, and the extra of kdcache that brings what each needs."""

THREADS = 16
"""Requests that are on their way at once: a cache has many small files, and each waits for the network."""

ATTEMPTS = 6
FIRST_WAIT = 0.25
"""Seconds before the second attempt; each further one waits twice as long."""

_PIECE = 2**23
_STALLED = 30
"""Seconds without a byte after which a connection counts as lost."""

_WRONG_TWICE = 2
_DAMAGED_THERE = "tell whoever published it: it is to be pushed again"

_CREDENTIALS = (
    "give credentials as the tools of that store take them, such as AWS_PROFILE, GOOGLE_APPLICATION_CREDENTIALS, "
    "AZURE_STORAGE_CONNECTION_STRING or HF_TOKEN"
)

_OF_THIS_MACHINE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS)

T = TypeVar("T")


# What went wrong is told once, by us; gcsfs logs it too, with tracebacks, where nobody has asked for its log.
logging.getLogger("gcsfs").addHandler(logging.NullHandler())


class _Wrong(Exception):
    """Other bytes came than there may be."""


class _Sink(io.RawIOBase):
    """A file that takes no more bytes than were declared, and knows the digest of those that came."""

    def __init__(self, to: BinaryIO, most: int, stop: threading.Event) -> None:
        self._to, self._most, self._stop = to, most, stop
        self._sha, self.size = hashlib.sha256(), 0

    def write(self, data: Any) -> int:
        if self._stop.is_set():
            raise InterruptedError("it was given up")
        self.size += len(data)
        if self.size > self._most:
            raise _Wrong(f"came with more than {self._most} bytes")
        self._sha.update(data)
        return self._to.write(data)

    def tell(self) -> int:
        return self.size

    def record(self) -> FileRecord:
        return FileRecord(size=self.size, sha256=self._sha.hexdigest())


class Store:
    """The objects under a URL.

    Args:
        url: of one of the schemes in `EXTRAS`.

    Raises:
        UsageError: for a URL that cannot be one, and for a library that is not installed.
    """

    def __init__(self, url: str) -> None:
        self.url, self.stop = url.rstrip("/"), threading.Event()
        scheme = url.partition("://")[0]
        if scheme not in EXTRAS or not self.url.partition("://")[2]:
            raise UsageError(
                f"{url} is no URL that a cache can have", f"begin it with {', '.join(f'{name}://' for name in EXTRAS)}"
            )
        self._hub: Hub | None = None
        self._tries_itself = scheme in ("gs", "az")  # its library does, for a minute
        self._whole_files = EXTRAS[scheme] in ("http", "hf")  # a server may give more than the range that is asked for
        try:
            if scheme == "hf":
                self._hub = Hub(self.url)
            self._fs = fsspec.filesystem("http" if self._hub else scheme, **self._options(scheme))
        except ImportError as error:
            raise UsageError(f"{url} cannot be reached: {error}", f"pip install 'kdcache[{EXTRAS[scheme]}]'") from None
        except ValueError as error:  # adlfs, where it is told of no account
            raise UsageError(f"{url} cannot be reached: {_said(error)}", _CREDENTIALS) from None
        self._root = "" if self._hub else self._fs._strip_protocol(self.url).rstrip("/")
        self._renames = scheme == "file"

    def _options(self, scheme: str) -> dict[str, Any]:
        options: dict[str, Any] = {"skip_instance_cache": True, "use_listings_cache": False}
        if self._whole_files:
            import aiohttp  # noqa: PLC0415  # of the extra http

            # fsspec's own limit is of a whole file, which may take as long as it takes.
            timeout = aiohttp.ClientTimeout(total=None, sock_connect=_STALLED, sock_read=_STALLED)
            headers = {"Accept-Encoding": "identity", **(self._hub.headers if self._hub else {})}
            options |= {"client_kwargs": {"timeout": timeout, "headers": headers}}
        elif scheme == "file":
            options = {"auto_mkdir": True}
        return options

    @property
    def is_read_only(self) -> bool:
        """Whether nothing can be put there."""
        return self._whole_files and self._hub is None

    def _path(self, name: str) -> str:
        return self._hub.url_of(name) if self._hub else f"{self._root}/{name}"

    def read(self, name: str, most: int) -> bytes | None:
        """A small object; None where there is none of that name.

        Raises:
            CorruptError: if it is larger than `most` bytes.
            KdcacheError: if it cannot be read.
        """
        try:
            return self._again(name, lambda: self._read(name, most))
        except FileNotFoundError:
            return None

    def _read(self, name: str, most: int) -> bytes:
        content = io.BytesIO()
        sink = _Sink(content, most, self.stop)
        if self._whole_files:
            self._fs.get_file(self._path(name), sink)
        else:
            sink.write(self._fs.cat_file(self._path(name), start=0, end=most + 1))
        return content.getvalue()

    def fetch(self, name: str, to: Path, expected: FileRecord) -> None:
        """Bring an object to a file, and check its size and digest on the way.

        Raises:
            CorruptError: if it is not there, or other bytes are, however often it is read.
            KdcacheError: if it cannot be read.
        """

        def once() -> None:
            with to.open("wb") as opened:
                sink = _Sink(opened, expected.size, self.stop)
                if self._whole_files:
                    self._fs.get_file(self._path(name), sink)
                else:
                    for start in range(0, expected.size, _PIECE):
                        end = min(start + _PIECE, expected.size)
                        # One byte more of the last piece: an object that is too long must not pass for whole.
                        asked = end + (end == expected.size)
                        sink.write(
                            self._again(name, partial(self._fs.cat_file, self._path(name), start=start, end=asked))
                        )
                        if sink.size < end:
                            break
            if sink.record() != expected:
                raise _Wrong(f"came with {sink.size} bytes, {expected.size} are declared" if sink.size != expected.size
                             else "came with other bytes than its manifest declares")  # fmt: skip

        try:
            self._again(name, once)
        except FileNotFoundError:
            raise CorruptError(f"{name} is not at {self.url}, and its manifest lists it", _DAMAGED_THERE) from None

    def sizes(self) -> dict[str, int]:
        """The size of every object."""
        if self._hub:
            return self._hub.sizes()
        try:
            found = self._again("", lambda: self._fs.find(self._root, detail=True))
        except FileNotFoundError:
            return {}
        return {str(path)[len(self._root) + 1 :]: int(about["size"]) for path, about in found.items()}

    def put(self, objects: Mapping[str, Path | bytes], on_each: Callable[[int], None] = lambda _: None) -> None:
        """Put objects there, each whole or not at all.

        Args:
            objects: by name: a file, or the bytes themselves.
            on_each: told how many more are there.
        """
        if self._hub:
            self._hub.put(objects, on_each)
            return
        in_parallel(
            lambda name: self._again(name, lambda: self._put(name, objects[name])),
            objects,
            self.stop,
            lambda _: on_each(1),
        )

    def _put(self, name: str, content: Path | bytes) -> None:
        path = self._path(name)
        to = f"{path}.partial" if self._renames else path
        if isinstance(content, bytes):
            self._fs.pipe_file(to, content)
        else:
            self._fs.put_file(str(content), to)
        if self._renames:
            with Path(to).open("rb") as opened:
                os.fsync(opened.fileno())  # a file of the right size is taken for whole by the next push
            Path(to).replace(path)

    def remove(self, name: str) -> None:
        """Delete an object that is there."""
        if self._hub:
            self._hub.remove(name)
        else:
            self._again(name, lambda: self._fs.rm_file(self._path(name)))

    def _again(self, name: str, work: Callable[[], T]) -> T:
        """What `work` returns, tried several times where it may be the network's fault.

        Raises:
            FileNotFoundError: if there is no such object.
            UsageError: if it may not be read or written.
            CorruptError: if it is not what it was declared to be.
            IncompleteError: if the store could not be reached.
        """
        where = f"{self.url}/{name}".rstrip("/")
        for attempt in range(1, ATTEMPTS + 1):
            try:
                return work()
            except (FileNotFoundError, KdcacheError):
                raise
            except Exception as error:  # each library has errors of its own
                if isinstance(error, OSError) and error.errno in _OF_THIS_MACHINE:
                    raise
                failed = _hopeless(where, attempt, error)
                tried_enough = attempt == ATTEMPTS or (self._tries_itself and not isinstance(error, _Wrong))
                if failed or tried_enough or self.stop.is_set():
                    times = "for a minute" if self._tries_itself else f"{attempt} times"
                    raise failed or IncompleteError(
                        f"{where} could not be reached, tried {times}: {_said(error)}",
                        "run the same command again: it goes on where it stopped",
                    ) from None
            self.stop.wait(FIRST_WAIT * 2 ** (attempt - 1))
        raise AssertionError("the last attempt returns or raises")


def _hopeless(where: str, attempt: int, error: Exception) -> KdcacheError | None:
    """What to say of a failure that another attempt would not mend."""
    status = next((getattr(error, name) for name in ("status", "status_code", "code") if hasattr(error, name)), None)
    forbidden = isinstance(error, PermissionError) or str(error).startswith("Forbidden: ")  # the latter of gcsfs
    if forbidden or status in (401, 403):
        return UsageError(f"{where} may not be used: {_said(error)}", _CREDENTIALS)
    if isinstance(error, _Wrong) and attempt >= _WRONG_TWICE:
        return CorruptError(f"{where} {error}", _DAMAGED_THERE)
    return None


def _said(error: Exception) -> str:
    return next(iter(str(error).splitlines()), "") or type(error).__name__


def in_parallel(
    work: Callable[[str], object], names: Iterable[str], stop: threading.Event, on_each: Callable[[str], None]
) -> None:
    """Do something for each name, several at once; after a failure, or Ctrl-C, what is on its way is given up."""
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

"""Addresses of caches: a folder or a URL, optionally pinned to a root digest."""

from __future__ import annotations

import re
from pathlib import Path
from typing import NamedTuple

from kdcache.errors import UsageError
from kdcache.runtime.paths import expand

_PINNED = re.compile(r"(?P<where>.*)#(?P<digest>sha256:[^#]*)")


class CacheAddress(NamedTuple):
    """The address of a cache.

    Attributes:
        where: URL, or path of a folder.
        digest: root digest that it is pinned to; None if any is accepted.
    """

    where: str
    digest: str | None

    @property
    def is_remote(self) -> bool:
        """Whether it is a URL."""
        return "://" in self.where


def source(given: str | Path, digest: str | None = None) -> CacheAddress:
    """Parse an address; its digest follows a `#`, or is passed as an argument.

    Raises:
        UsageError: if the digest is malformed, or two are given that differ.
    """
    match = _PINNED.fullmatch(str(given))
    where, pinned = match.group("where", "digest") if match else (str(given), None)
    for value in (pinned, digest):
        if value is not None and not re.fullmatch("sha256:[0-9a-f]{64}", value):
            raise UsageError(f"{value!r} is not a digest", "use sha256: and 64 hex digits, as `kdcache info` prints")
    if pinned and digest and pinned != digest:
        raise UsageError(f"{given} is pinned to another digest than the given {digest}", "pass one digest only")
    return CacheAddress(where if "://" in where else str(expand(where)), pinned or digest)

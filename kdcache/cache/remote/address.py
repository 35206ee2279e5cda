"""What users name as a cache: a folder or a URL, pinned to a digest or not."""

from __future__ import annotations

import re
from pathlib import Path
from typing import NamedTuple

from kdcache.errors import UsageError

_PINNED = re.compile(r"(?P<where>.*)#(?P<digest>sha256:[^#]*)")


class CacheAddress(NamedTuple):
    """What a user names as a cache.

    Attributes:
        where: a URL, or the path of a folder.
        digest: that it is pinned to, if any.
    """

    where: str
    digest: str | None

    @property
    def is_remote(self) -> bool:
        """Whether it is a URL."""
        return "://" in self.where


def source(given: str | Path, digest: str | None = None) -> CacheAddress:
    """What a user named, with the digest that follows a `#`, or that was given beside it.

    Raises:
        UsageError: for a digest that cannot be one, or two that differ.
    """
    found = _PINNED.fullmatch(str(given))
    where, pinned = found.group("where", "digest") if found else (str(given), None)
    for one in (pinned, digest):
        if one is not None and not re.fullmatch("sha256:[0-9a-f]{64}", one):
            raise UsageError(f"{one!r} is no digest", "give sha256: and 64 digits, as `kdcache info` prints it")
    if pinned and digest and pinned != digest:
        raise UsageError(f"{given} is pinned to one digest, and {digest} is asked for", "give one digest")
    return CacheAddress(where, pinned or digest)

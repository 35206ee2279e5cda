"""Secret keys in files: random bytes that only their owner may read, and the digest by which one is recognized."""

from __future__ import annotations

import hashlib
import os
import stat
from pathlib import Path

from kdcache.errors import UsageError
from kdcache.runtime.atomic_write import flush
from kdcache.runtime.paths import READ_PERMISSION, check_writable, fix_for

KEY_BYTES = 32
"""Bytes of a new key, and fewest of any key: 256 random bits cannot be guessed from a digest of them."""

_MOST_BYTES = 4096
"""Bytes above which a file is taken for something else than a key."""

_FEWEST_DISTINCT = 8
"""Distinct bytes below which a key is not random: 32 random bytes have 30 on average, and 64 hexadecimal digits 16."""

_PURPOSE = b"kdcache secret key\0"


def create_key(path: Path) -> bytes:
    """Write a new key that only its owner may read, and return it.

    Raises:
        UsageError: if it cannot be written, or the file exists.
    """
    check_writable(path)
    key = os.urandom(KEY_BYTES)
    try:
        handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        try:
            with os.fdopen(handle, "wb") as file:
                file.write(key)
                file.flush()
                os.fsync(file.fileno())
        except OSError:
            path.unlink()
            raise
        flush(path.parent)
    except FileExistsError:
        raise UsageError(
            f"another process created the key {path} at the same time", "run the same command again"
        ) from None
    except OSError as error:
        raise UsageError(f"cannot write the key {path}: {error.strerror}", fix_for(error)) from None
    return key


def read_key(path: Path) -> bytes:
    """Return the key in a file.

    Raises:
        UsageError: if it cannot be read, or cannot be a random key of 32 bytes or more.
    """
    try:
        with path.open("rb") as file:
            key = file.read(_MOST_BYTES + 1)
    except FileNotFoundError:
        raise UsageError(f"key not found: {path}", "copy the key there, or name the file that has it") from None
    except OSError as error:
        fix = READ_PERMISSION if isinstance(error, PermissionError) else "name the file that has the key"
        raise UsageError(f"cannot read the key {path}: {error.strerror}", fix) from None
    another = f"name another file: one that does not exist yet is made with {KEY_BYTES} random bytes"
    if len(key) > _MOST_BYTES:
        raise UsageError(f"{path} has more than {_MOST_BYTES:,} bytes, and is not a key", another)
    if len(key) < KEY_BYTES:
        raise UsageError(f"the key {path} has {len(key)} bytes, and {KEY_BYTES} are needed", another)
    if (distinct := len(set(key))) < _FEWEST_DISTINCT:
        raise UsageError(f"the key {path} is not random: it has {distinct} different bytes in {len(key)}", another)
    return key


def readable_by_others(path: Path) -> bool:
    """Return whether other users than its owner may read a file."""
    return bool(stat.S_IMODE(path.stat().st_mode) & 0o077)


def key_digest(key: bytes) -> str:
    """Return the digest by which a key is recognized, `sha256:...`; it does not reveal a random key."""
    return f"sha256:{hashlib.sha256(_PURPOSE + key).hexdigest()}"

"""Secret keys in files: made for their owner alone, recognized by a digest, and other files are refused."""

from __future__ import annotations

import hashlib
import os
import stat
from pathlib import Path

import pytest

from kdcache.errors import UsageError
from kdcache.runtime.secret_key import create_key, key_digest, read_key, readable_by_others


@pytest.mark.parametrize("umask", [0o000, 0o022, 0o077])
def test_a_new_key_is_random_and_only_its_owner_may_read_it(umask: int, tmp_path: Path) -> None:
    before = os.umask(umask)
    try:
        keys = [create_key(tmp_path / name) for name in ("a", "b")]
    finally:
        os.umask(before)
    assert [len(key) for key in keys] == [32, 32] and keys[0] != keys[1]
    assert read_key(tmp_path / "a") == keys[0]
    assert stat.S_IMODE((tmp_path / "a").stat().st_mode) == 0o600
    assert not readable_by_others(tmp_path / "a")


@pytest.mark.parametrize(("mode", "others"), [(0o600, False), (0o400, False), (0o640, True), (0o604, True)])
def test_who_may_read_a_key(mode: int, others: bool, tmp_path: Path) -> None:
    create_key(tmp_path / "key")
    (tmp_path / "key").chmod(mode)
    assert readable_by_others(tmp_path / "key") == others


def test_a_file_that_exists_is_not_replaced(tmp_path: Path) -> None:
    (tmp_path / "key").write_bytes(b"mine")
    with pytest.raises(UsageError, match="at the same time"):
        create_key(tmp_path / "key")
    assert (tmp_path / "key").read_bytes() == b"mine"


def test_a_dangling_link_is_not_followed_and_stays(tmp_path: Path) -> None:
    (tmp_path / "key").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(UsageError):
        create_key(tmp_path / "key")
    assert (tmp_path / "key").is_symlink() and not (tmp_path / "elsewhere").exists()


def test_the_digest_is_that_of_the_format() -> None:
    key = bytes(range(32))
    assert key_digest(key) == "sha256:" + hashlib.sha256(b"kdcache secret key\0" + key).hexdigest()


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "0 bytes, and 32"),
        (bytes(range(31)), "31 bytes"),
        (b"password", "8 bytes"),
        (bytes(64), "1 different bytes"),
        (b"abcabc!" * 10, "4 different bytes"),
        (bytes(range(256)) * 17, "more than 4,096 bytes"),
    ],
)
def test_what_is_not_a_key_is_refused(content: bytes, words: str, tmp_path: Path) -> None:
    (tmp_path / "key").write_bytes(content)
    with pytest.raises(UsageError, match=words):
        read_key(tmp_path / "key")


@pytest.mark.parametrize("content", [bytes(range(32)), b"0123456789abcdef" * 4, bytes(range(256)) * 16])
def test_other_keys_are_taken(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "key").write_bytes(content)
    assert read_key(tmp_path / "key") == content


def test_keys_that_are_not_there(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="not found"):
        read_key(tmp_path / "key")
    with pytest.raises(UsageError, match="cannot read"):
        read_key(tmp_path)
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(UsageError):
        create_key(tmp_path / "file" / "key")

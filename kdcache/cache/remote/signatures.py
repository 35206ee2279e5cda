"""Signatures on a manifest, made and checked with SSH keys by `ssh-keygen`, which every machine with OpenSSH has.

A signature lies beside the manifest, whose bytes it covers, and through them every byte of the cache. It is not part of
the root digest: a cache stays the same, whoever signs it.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

from kdcache.cache.format.schema import MANIFEST
from kdcache.errors import CorruptError, MismatchError, UsageError

SIGNATURE = f"{MANIFEST}.sig"
LARGEST_SIGNATURE = 2**16
_NAMESPACE = "kdcache"
_SECONDS = 60


def sign(cache: Path, key: Path) -> Path:
    """Sign the manifest of a cache, in place of an earlier signature.

    Args:
        cache: its folder.
        key: an SSH private key, or the public one of a key that the ssh-agent holds.

    Returns:
        The file of the signature.

    Raises:
        UsageError: if there is no such key, it cannot be used, or there is no ssh-keygen.
    """
    if not key.is_file():
        raise UsageError(f"there is no key {key}", "make one with `ssh-keygen -t ed25519`, or give another with --key")
    done = _ssh_keygen("sign", "-f", str(key), stdin=(cache / MANIFEST).read_bytes(), ask=True)
    if done.returncode:
        raise UsageError(
            f"ssh-keygen cannot sign with {key}: {_said(done)}", "give a key that is yours, and its passphrase if asked"
        )
    unfinished = cache / f"{SIGNATURE}.partial"
    unfinished.write_bytes(done.stdout)
    return unfinished.replace(cache / SIGNATURE)


def check_signature(cache: Path, allowed: Path) -> str:
    """That the manifest of a cache is signed by one of several people.

    Args:
        cache: its folder.
        allowed: a file of allowed signers as ssh-keygen reads it: a line `NAME ssh-ed25519 AAAA...` for each.

    Returns:
        The name of who signed.

    Raises:
        UsageError: if `allowed` is not there, or there is no ssh-keygen.
        MismatchError: if it is not signed, or by nobody of those.
        CorruptError: if the signature is one of other bytes.
    """
    signature = cache / SIGNATURE
    if not allowed.is_file():
        raise UsageError(
            f"there is no file {allowed}", "give one with a line `NAME ssh-ed25519 AAAA...` for each signer"
        )
    if not signature.is_file():
        raise MismatchError(
            f"{cache} is not signed", "ask who made it to run `kdcache sign`, or pin its digest instead"
        )
    signed_by = ("-f", str(allowed.absolute()), "-s", str(signature.absolute()))
    found = _ssh_keygen("find-principals", *signed_by)
    if found.returncode or not found.stdout.strip():
        raise MismatchError(
            f"{cache} is not signed by anyone in {allowed}: {_said(found)}",
            "ask who published it for their public key, and check that it is theirs",
        )
    who = found.stdout.decode().splitlines()[0]
    checked = _ssh_keygen("verify", *signed_by, "-I", who, stdin=(cache / MANIFEST).read_bytes())
    if checked.returncode:
        raise CorruptError(
            f"the signature of {cache} is by {who}, and not of this manifest: {_said(checked)}",
            "get the cache again from where it was made",
        )
    return who


def _ssh_keygen(
    action: str, *arguments: str, stdin: bytes = b"", ask: bool = False
) -> subprocess.CompletedProcess[bytes]:
    program = shutil.which("ssh-keygen")
    if program is None:
        raise UsageError(
            "there is no ssh-keygen on this machine", "install OpenSSH 8.2 or later (openssh-client), or pin the digest"
        )
    environment = os.environ if ask else {**os.environ, "SSH_ASKPASS_REQUIRE": "never"}
    return subprocess.run(
        [program, "-Y", action, "-n", _NAMESPACE, *arguments],
        input=stdin,
        capture_output=True,
        check=False,
        env=environment,
        timeout=None if ask else _SECONDS,  # a passphrase is typed when its owner is ready
    )


def _said(done: subprocess.CompletedProcess[bytes]) -> str:
    return (done.stderr or done.stdout).decode(errors="replace").strip() or f"it ended with {done.returncode}"

"""Sign a cache's manifest and verify the signature, with SSH keys and OpenSSH's `ssh-keygen`.

The signature is a file beside the manifest. It covers the manifest's bytes, and through the digests in them every byte
of the cache. It is not part of the root digest, which does not depend on who signs.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

from kdcache.cache.format.schema import MANIFEST
from kdcache.errors import CorruptError, MismatchError, UsageError
from kdcache.runtime.atomic_write import write_file

SIGNATURE = f"{MANIFEST}.sig"
LARGEST_SIGNATURE = 2**16
"""Bytes of a signature at most."""

_NAMESPACE = "kdcache"

_TIMEOUT = 60
"""Seconds that ssh-keygen may take where it does not ask for a passphrase."""


def sign(cache: Path, key: Path) -> Path:
    """Sign the manifest of a cache, replacing an earlier signature.

    Args:
        cache: folder of the cache.
        key: file of an SSH private key, or of the public key of one that the ssh-agent holds.

    Returns:
        The signature file.

    Raises:
        UsageError: if the key is missing or cannot be used, or ssh-keygen is not installed.
    """
    if not key.is_file():
        raise UsageError(f"key {key} not found", "create one with `ssh-keygen -t ed25519`, or set another with --key")
    done = _ssh_keygen("sign", "-f", str(key), stdin=(cache / MANIFEST).read_bytes(), ask=True)
    if done.returncode:
        raise UsageError(
            f"ssh-keygen cannot sign with {key}: {_message(done)}",
            "use your own private key, and enter its passphrase if asked",
        )
    return write_file(cache / SIGNATURE, done.stdout)


def check_signature(cache: Path, allowed: Path) -> str:
    """Check that the manifest of a cache is signed by one of the allowed signers.

    Args:
        cache: folder of the cache.
        allowed: ssh-keygen's allowed signers file: a line `NAME ssh-ed25519 AAAA...` per signer.

    Returns:
        The name of the signer.

    Raises:
        UsageError: if `allowed` or ssh-keygen is missing.
        MismatchError: if the cache is not signed, or by someone who is not in `allowed`.
        CorruptError: if the signature does not belong to this manifest.
    """
    signature = cache / SIGNATURE
    if not allowed.is_file():
        raise UsageError(
            f"allowed signers file {allowed} not found",
            "create it, with a line `NAME ssh-ed25519 AAAA...` per signer",
        )
    if not signature.is_file():
        raise MismatchError(
            f"{cache} is not signed", "ask its publisher to run `kdcache sign`, or pin its digest instead"
        )
    signed_by = ("-f", str(allowed.absolute()), "-s", str(signature.absolute()))
    principals = _ssh_keygen("find-principals", *signed_by)
    if principals.returncode or not principals.stdout.strip():
        raise MismatchError(
            f"{cache} is not signed by anyone in {allowed}: {_message(principals)}",
            "ask its publisher for their public key, verify that it is theirs, and add it to that file",
        )
    signer = principals.stdout.decode().splitlines()[0]
    checked = _ssh_keygen("verify", *signed_by, "-I", signer, stdin=(cache / MANIFEST).read_bytes())
    if checked.returncode:
        raise CorruptError(
            f"the signature of {cache} by {signer} is not of this manifest: {_message(checked)}",
            "download the cache again",
        )
    return signer


def _ssh_keygen(
    action: str, *arguments: str, stdin: bytes = b"", ask: bool = False
) -> subprocess.CompletedProcess[bytes]:
    """Run an action of `ssh-keygen -Y`; with `ask`, it may ask the user for a passphrase.

    Raises:
        UsageError: if ssh-keygen is not installed.
    """
    program = shutil.which("ssh-keygen")
    if program is None:
        raise UsageError(
            "ssh-keygen not found on this machine", "install OpenSSH 8.2 or later (openssh-client), or pin the digest"
        )
    environment = os.environ if ask else {**os.environ, "SSH_ASKPASS_REQUIRE": "never"}
    return subprocess.run(
        [program, "-Y", action, "-n", _NAMESPACE, *arguments],
        input=stdin,
        capture_output=True,
        check=False,
        env=environment,
        timeout=None if ask else _TIMEOUT,  # a user may take any time to type a passphrase
    )


def _message(done: subprocess.CompletedProcess[bytes]) -> str:
    return (done.stderr or done.stdout).decode(errors="replace").strip() or f"exit code {done.returncode}"

"""Signatures of SSH keys on a manifest: whose they are is told, and nobody else's pass."""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path

import pytest
from helpers.cli import ok, refused
from helpers.corruption import contents, forge, setting
from helpers.paths import GOLDEN
from helpers.remote_servers import serving

from kdcache import open_cache
from kdcache.cache.inspect.audit import audit
from kdcache.cache.push_pull import pull, push
from kdcache.cache.remote.signatures import SIGNATURE, check_signature, sign
from kdcache.errors import CorruptError, MismatchError, UsageError

DENSE = GOLDEN / "dense-v1.kdcache"
pytestmark = pytest.mark.skipif(shutil.which("ssh-keygen") is None, reason="there is no ssh-keygen")


@pytest.fixture(scope="module")
def keys(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Keys of Alice and of Eve, and who is allowed to sign."""
    folder = tmp_path_factory.mktemp("keys")
    for name in ("alice", "eve"):
        subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(folder / name)], check=True)
        (folder / f"allowed-{name}").write_text(f"{name}@example.org {(folder / f'{name}.pub').read_text()}")
    return folder


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache, and a home of its own."""
    monkeypatch.setenv("KDCACHE_HOME", str(tmp_path / "home"))
    return Path(shutil.copytree(DENSE, tmp_path / "www" / "c"))


def test_a_signature_is_of_whom_it_says(cache: Path, keys: Path) -> None:
    before, digest = contents(cache), open_cache(cache).manifest.digest
    assert sign(cache, keys / "alice") == cache / SIGNATURE
    assert check_signature(cache, keys / "allowed-alice") == "alice@example.org"
    with pytest.raises(MismatchError, match="is not signed by anyone in"):
        check_signature(cache, keys / "allowed-eve")
    # It is beside the cache, not of it.
    assert {name: data for name, data in contents(cache).items() if name != SIGNATURE} == before
    assert open_cache(cache).manifest.digest == digest
    assert audit(cache).problems == []


def test_any_ssh_verifies_it(cache: Path, keys: Path) -> None:
    sign(cache, keys / "alice")
    verify = ["ssh-keygen", "-Y", "verify", "-n", "kdcache", "-f", "allowed-alice", "-I", "alice@example.org"]
    done = subprocess.run(
        [*verify, "-s", str(cache / SIGNATURE)],
        input=(cache / "manifest.json").read_bytes(),
        cwd=keys,
        capture_output=True,
        check=True,
    )
    assert b'Good "kdcache" signature for alice@example.org' in done.stdout


def test_a_signature_of_another_manifest_or_purpose_is_refused(cache: Path, keys: Path) -> None:
    sign(cache, keys / "alice")
    forge(cache, setting("by Eve", "plan", "notes"))
    assert open_cache(cache).manifest.plan.notes == "by Eve", "the digest alone does not tell"
    with pytest.raises(CorruptError, match=r"by alice@example\.org is not of this manifest"):
        check_signature(cache, keys / "allowed-alice")
    sign(cache, keys / "eve")
    with pytest.raises(MismatchError):
        check_signature(cache, keys / "allowed-alice")
    signed = subprocess.run(
        ["ssh-keygen", "-q", "-Y", "sign", "-n", "git", "-f", str(keys / "alice")],
        input=(cache / "manifest.json").read_bytes(),
        capture_output=True,
        check=True,
    )
    (cache / SIGNATURE).write_bytes(signed.stdout)
    with pytest.raises(CorruptError):
        check_signature(cache, keys / "allowed-alice")
    for nonsense in (b"", b"-----BEGIN SSH SIGNATURE-----\n"):
        (cache / SIGNATURE).write_bytes(nonsense)
        with pytest.raises(MismatchError):
            check_signature(cache, keys / "allowed-alice")


def test_it_is_pushed_and_pulled_with_the_cache(cache: Path, keys: Path, tmp_path: Path) -> None:
    url = f"file://{tmp_path / 'www' / 'shared'}"
    push(cache, url)
    pull(url, tmp_path / "pulled")
    with pytest.raises(MismatchError, match="is not signed"):
        check_signature(tmp_path / "pulled", keys / "allowed-alice")
    sign(cache, keys / "alice")
    assert push(cache, url).files == 1
    pull(url, tmp_path / "pulled")
    assert check_signature(tmp_path / "pulled", keys / "allowed-alice") == "alice@example.org"
    with serving(tmp_path / "www") as server:
        mirrored = open_cache(f"{server.url}/shared").path
        assert check_signature(mirrored, keys / "allowed-alice") == "alice@example.org"


def test_a_signature_that_is_no_small_file_is_not_taken(cache: Path) -> None:
    (cache / SIGNATURE).write_bytes(bytes(2**17))
    with serving(cache.parent) as server, pytest.raises(CorruptError, match=r"manifest\.json\.sig has more than"):
        open_cache(f"{server.url}/c")


def test_the_commands(cache: Path, keys: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    digest = open_cache(cache).manifest.digest
    assert "is not signed" in refused(4, "verify", cache, "--signed-by", keys / "allowed-alice")
    told = json.loads(ok("sign", cache, "--key", keys / "alice", "--json"))
    assert told == {"signature": str(cache / SIGNATURE), "digest": digest}
    assert digest in ok("sign", cache, "--key", keys / "alice")
    verified = json.loads(ok("verify", cache, "--signed-by", keys / "allowed-alice", "--json"))
    assert (verified["signed_by"], verified["ok"]) == ("alice@example.org", True)
    with serving(cache.parent) as server:
        assert "alice@example.org" in ok("verify", f"{server.url}/c", "--signed-by", keys / "allowed-alice")
    assert "signed by anyone" in refused(4, "verify", cache, "--signed-by", keys / "allowed-eve")
    assert "allowed signers file" in refused(2, "verify", cache, "--signed-by", tmp_path / "none")
    assert "/none not found" in refused(2, "sign", cache, "--key", tmp_path / "none")
    assert "cannot sign with" in refused(2, "sign", cache, "--key", keys / "allowed-eve")
    monkeypatch.setenv("PATH", str(tmp_path))
    said = refused(2, "sign", cache, "--key", keys / "alice")
    assert "ssh-keygen not found" in said
    assert "install OpenSSH" in said
    with pytest.raises(UsageError, match="ssh-keygen not found"):
        check_signature(cache, keys / "allowed-alice")
